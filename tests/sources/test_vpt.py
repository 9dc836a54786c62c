"""Claims of sources/vpt.py for contractor recordings, on made ones: every quirk of the format by a sample of its own.

Controls mean the same whatever the recorder did (stuck attack, wheel, unwrapped yaw, counts that differ); a recording that
cannot be used is skipped with its name, line and field while the others go on; equal inputs give equal numbers for a version.
"""

import hashlib

import numpy as np
import pytest

from jepa_cache.actions import VPT_BUTTONS, get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.tar import pack_folder
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit, build_source, list_sources
from jepa_cache.sources import vpt as vpt_module
from tests.makers import make_rows, make_video, make_vpt_pair, to_jsonl, write_tar, write_vpt_tar

NUM_FRAMES = 12
VIDEO = make_video(NUM_FRAMES)


def _read_tar(path, **options):
    return list(build_source("vpt", options).iter_episodes(Unit(path.name, (path,))))


def _read(tmp_path, rows, video=VIDEO):
    lines = rows if isinstance(rows, bytes) else to_jsonl(rows)
    (result,) = _read_tar(write_vpt_tar(tmp_path / "a.tar", {"seg": (video, lines)}))
    return result


def _controls(tmp_path, rows):
    result = _read(tmp_path, rows)
    assert isinstance(result, Episode), result
    return result.controls


def _held(controls, name):
    return np.flatnonzero(controls[name]).tolist()


def test_a_plain_recording_is_read_as_it_is(tmp_path):
    rows = make_rows(NUM_FRAMES, seed=3)
    episode = _read(tmp_path, rows)
    assert (episode.key, episode.fps, episode.num_video_frames, episode.notes) == ("seg", 20.0, NUM_FRAMES, ())
    assert episode.video == VIDEO
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    for column, field in (("yaw_deg", "yaw"), ("pitch_deg", "pitch"), ("milli", "milli"), ("zpos_blocks", "zpos")):
        np.testing.assert_array_equal(episode.controls[column], [row[field] for row in rows])
    np.testing.assert_array_equal(episode.controls["mouse_dx"], [row["mouse"]["dx"] for row in rows])
    assert _held(episode.controls, "forward") == [t for t, row in enumerate(rows) if row["keyboard"]["keys"]]


def test_the_columns_have_their_types(tmp_path):
    controls = _controls(tmp_path, make_rows(NUM_FRAMES))
    types = {name: column.dtype.name for name, column in controls.items()}
    assert {types.pop(name) for name in (*VPT_BUTTONS, "gui", "gui_inventory")} == {"bool"}
    assert (types.pop("tick"), types.pop("milli"), types.pop("hotbar")) == ("int64", "int64", "int8")
    assert types.pop("idle") == "float32"
    assert set(types.values()) == {"float64"}


def _with_attack(rows, held, pressed):
    for row, mouse in ((t, rows[t]["mouse"]) for t in range(len(rows))):
        mouse["buttons"], mouse["newButtons"] = [0] * (row in held), [0] * (row in pressed)
    return rows


def test_attack_that_is_stuck_from_the_first_line_is_released_until_it_is_pressed_again(tmp_path):
    controls = _controls(tmp_path, _with_attack(make_rows(NUM_FRAMES), held=range(10), pressed=[0, 7]))
    assert _held(controls, "attack") == [7, 8, 9]


def test_attack_that_is_never_pressed_again_stays_released(tmp_path):
    assert _held(_controls(tmp_path, _with_attack(make_rows(NUM_FRAMES), range(NUM_FRAMES), [0])), "attack") == []


def test_attack_that_is_held_but_not_new_on_the_first_line_is_kept(tmp_path):
    assert _held(_controls(tmp_path, _with_attack(make_rows(NUM_FRAMES), range(5), [])), "attack") == [0, 1, 2, 3, 4]


def test_other_buttons_are_kept_while_attack_is_stuck(tmp_path):
    rows = _with_attack(make_rows(NUM_FRAMES), range(NUM_FRAMES), [0])
    rows[4]["mouse"]["buttons"] = [0, 1, 2]
    controls = _controls(tmp_path, rows)
    assert (_held(controls, "use"), _held(controls, "pickItem"), _held(controls, "attack")) == ([4], [4], [])


def test_a_step_that_starts_late_knows_that_attack_is_stuck(tmp_path):
    controls = _controls(tmp_path, _with_attack(make_rows(NUM_FRAMES), range(NUM_FRAMES), [0]))
    space = get_action_space("vpt36")
    attack = [column.name for column in space.actions].index("attack")
    assert not space.aggregate(controls, np.array([6, 10])).actions[:, attack].any()


def test_a_change_of_slot_is_a_press_of_its_key_on_that_tick(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row, slot in zip(rows, [4, 4, 4, 5, 5, 0, 0, 0, 8, 8, 8, 8], strict=True):
        row["hotbar"] = slot
    controls = _controls(tmp_path, rows)
    pressed = {
        name: _held(controls, name) for name in VPT_BUTTONS if name.startswith("hotbar") and controls[name].any()
    }
    assert pressed == {"hotbar.6": [3], "hotbar.1": [5], "hotbar.9": [8]}, "the first line's slot 4 is no press"
    assert controls["hotbar"].tolist() == [row["hotbar"] for row in rows]


def test_yaw_stays_unwrapped_and_its_state_is_wrapped(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["yaw"] += 1500
    controls = _controls(tmp_path, rows)
    assert controls["yaw_deg"].min() > 1000
    states = get_action_space("vpt13").aggregate(controls, np.array([0, 5])).states
    assert np.abs(states[:, 0]).max() <= 180


def test_ticks_are_counted_by_line_and_a_jump_of_the_field_is_noted(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows[5:]:
        row["tick"] += 2
    episode = _read(tmp_path, rows)
    np.testing.assert_array_equal(episode.controls["tick"], np.arange(NUM_FRAMES))
    assert "line 6: 4 to 7" in episode.notes[0]


def test_lag_in_milli_changes_nothing(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows[4:]:
        row["milli"] += 9000
    episode = _read(tmp_path, rows)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    assert episode.notes == ()


@pytest.mark.parametrize(("num_lines", "used"), [(11, 11), (13, 12), (4, 4), (40, 12)])
def test_counts_that_differ_are_aligned_at_the_start_and_noted(tmp_path, num_lines, used):
    episode = _read(tmp_path, make_rows(num_lines))
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(used))
    assert episode.num_video_frames == NUM_FRAMES and len(episode.controls["tick"]) == num_lines
    assert f"{NUM_FRAMES} frames, {num_lines} lines" in episode.notes[0]


def test_1090_frames_and_1056_lines_use_1056_of_each(tmp_path):
    episode = _read(tmp_path, make_rows(1056), make_video(1090, codec="mpeg4", size=(16, 16)))
    assert isinstance(episode, Episode), episode
    assert (episode.num_video_frames, len(episode.frame_ticks)) == (1090, 1056)
    assert episode.notes == ("1090 frames, 1056 lines: the last 34 frames are not used",)


def test_a_header_of_another_rate_does_not_move_a_frame_per_line(tmp_path):
    episode = _read(tmp_path, make_rows(13), make_video(NUM_FRAMES, fps=30))
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    assert episode.fps == 20 and "header says 30 Hz" in episode.notes[0]


def test_a_video_of_another_clock_is_placed_by_time(tmp_path):
    episode = _read(tmp_path, make_rows(20), make_video(30, fps=30))
    assert episode.fps == 30 and "by time" in episode.notes[0]
    assert episode.frame_ticks[:7].tolist() == [0, 1, 1, 2, 3, 3, 4]


def test_frames_that_fit_neither_by_line_nor_by_time_are_skipped(tmp_path):
    assert "neither" in _read(tmp_path, make_rows(40), make_video(NUM_FRAMES, fps=30)).reason


def test_unknown_keys_are_ignored_and_right_shift_sneaks(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["keyboard"]["keys"], row["mouse"]["dx"], row["yaw"] = [], 0.0, 0.0
    rows[2]["keyboard"]["keys"] = ["key.keyboard.f3", "scancode.0", "key.keyboard.x"]
    rows[3]["keyboard"]["keys"] = ["key.keyboard.right.shift"]
    rows[4]["mouse"]["buttons"] = [7]
    controls = _controls(tmp_path, rows)
    held = {name: _held(controls, name) for name in VPT_BUTTONS if controls[name].any()}
    assert held == {"sneak": [3]}


@pytest.mark.parametrize("change", ["key", "button", "dx", "dy", "slot"])
def test_idle_is_told_per_tick(tmp_path, change):
    rows = make_rows(3)
    for row in rows:
        row["keyboard"]["keys"], row["mouse"]["dx"], row["mouse"]["dy"], row["yaw"] = [], 0.0, 0.0, 0.0
    _with_attack(rows, range(3), [0])
    assert _controls(tmp_path, rows)["idle"].tolist() == [1, 1, 1], "a stuck button is no action"
    if change == "key":
        rows[1]["keyboard"]["keys"] = ["key.keyboard.space"]
    elif change == "button":
        rows[1]["mouse"]["buttons"] = [0, 1]
    elif change == "slot":
        rows[1]["hotbar"] = rows[2]["hotbar"] = 3
    else:
        rows[1]["mouse"][change] = 0.5
    assert _controls(tmp_path, rows)["idle"].tolist() == [1, 0, 1]


def test_gui_is_kept_per_tick(tmp_path):
    rows = make_rows(NUM_FRAMES)
    rows[3]["isGuiOpen"] = rows[4]["isGuiOpen"] = rows[4]["isGuiInventory"] = True
    controls = _controls(tmp_path, rows)
    assert (_held(controls, "gui"), _held(controls, "gui_inventory")) == ([3, 4], [4])


def test_stripped_recordings_need_only_mouse_keys_and_gui(tmp_path):
    rows = make_rows(NUM_FRAMES)
    bare = [
        {
            "mouse": {name: row["mouse"][name] for name in ("dx", "dy", "buttons")},
            "keyboard": {"keys": row["keyboard"]["keys"]},
            "isGuiOpen": False,
        }
        for row in rows
    ]
    controls = _controls(tmp_path, bare)
    assert np.isnan(controls["yaw_deg"]).all() and np.isnan(controls["xpos_blocks"]).all()
    assert (controls["hotbar"] == -1).all() and (controls["milli"] == -1).all() and not controls["gui_inventory"].any()
    with pytest.raises(ValueError, match="no usable yaw"):
        get_action_space("vpt13").aggregate(controls, np.array([0, 4]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mouse.dx", "3"),
        ("mouse.dy", None),
        ("mouse.dx", float("nan")),
        ("mouse.dx", 10**400),
        ("mouse.buttons", 0),
        ("mouse.buttons", ["0"]),
        ("keyboard.keys", "key.keyboard.w"),
        ("keyboard.keys", [3]),
        ("isGuiOpen", 1),
        ("hotbar", 9),
        ("hotbar", -1),
        ("hotbar", 1.5),
        ("yaw", True),
        ("pitch", "0"),
        ("tick", [1]),
        ("milli", 1e30),
        ("mouse", None),
    ],
)
def test_a_field_of_a_wrong_type_is_skipped_with_line_and_field(tmp_path, field, value):
    rows = make_rows(NUM_FRAMES)
    *parents, name = field.split(".")
    inner = rows[4]
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    skipped = _read(tmp_path, rows)
    assert isinstance(skipped, Skipped) and skipped.key == "seg"
    assert "line 5" in skipped.reason and field in skipped.reason


@pytest.mark.parametrize("field", ["mouse.dx", "mouse.dy", "mouse.buttons", "keyboard.keys", "isGuiOpen"])
def test_a_missing_field_is_skipped_with_line_and_field(tmp_path, field):
    rows = make_rows(NUM_FRAMES)
    *parents, name = field.split(".")
    (rows[4][parents[0]] if parents else rows[4]).pop(name)
    assert f"line 5: the field {field} is missing" in _read(tmp_path, rows).reason


@pytest.mark.parametrize(
    "bad", [b"{", b"", b"[1]", b"null", b'{"mouse": \xff}', b"[" * 100_000, b'{"mouse":' * 100_000, b"1" * 5000]
)
def test_a_bad_line_ends_a_run_and_the_longest_one_is_kept(tmp_path, bad):
    lines = to_jsonl(make_rows(NUM_FRAMES)).split(b"\n")
    whole = _read(tmp_path, b"\n".join(lines))
    lines[4] = bad
    episode = _read(tmp_path, b"\n".join(lines))
    assert (episode.first_frame, episode.num_video_frames, episode.num_ticks) == (5, 7, 7)
    assert episode.frame_ticks.tolist() == list(range(7))
    for name, column in whole.controls.items():
        np.testing.assert_array_equal(episode.controls[name], column[5:])
    assert (
        "1 of 12 lines cannot be used (first: line 5 of 12" in episode.notes[0] and "lines 6 to 12" in episode.notes[0]
    )
    with open_video(episode.video, first_frame=episode.first_frame) as part, open_video(whole.video) as video:
        np.testing.assert_array_equal(part.read(np.arange(7)), video.read(np.arange(5, 12)))


def test_a_last_line_that_was_cut_off_costs_that_line(tmp_path):
    episode = _read(tmp_path, to_jsonl(make_rows(NUM_FRAMES))[:-40])
    assert (episode.first_frame, episode.num_ticks, len(episode.frame_ticks)) == (0, 11, 11)
    assert "line 12 of 12" in episode.notes[0]


def test_of_equal_runs_the_first_is_kept_and_without_a_good_line_there_is_none(tmp_path):
    lines = to_jsonl(make_rows(11)).rstrip().split(b"\n")
    lines[5] = b"{"
    assert _read(tmp_path, b"\n".join(lines)).first_frame == 0
    assert "line 1 of 2 is no JSON" in _read(tmp_path, b"{\n[").reason


def test_attack_is_followed_from_line_0_and_slots_from_the_runs_own_first_line(tmp_path):
    rows = _with_attack(make_rows(NUM_FRAMES), range(12), [0, 9])
    for row in rows[4:]:
        row["hotbar"] = 3
    lines = to_jsonl(rows).split(b"\n")
    lines[3] = b"{"
    episode = _read(tmp_path, b"\n".join(lines))
    assert episode.controls["attack"].tolist() == [False] * 5 + [True] * 3, "stuck until line 9 presses it anew"
    assert not episode.controls["hotbar.4"].any() and (episode.controls["hotbar"] == 3).all()
    lines[0] = b"{"
    assert _read(tmp_path, b"\n".join(lines)).controls["attack"].tolist() == [False] * 5 + [True] * 3
    free = to_jsonl(_with_attack(make_rows(NUM_FRAMES), range(12), [])).split(b"\n")
    free[3] = b"{"
    assert _read(tmp_path, b"\n".join(free)).controls["attack"].all(), "line 0 does not say that it is stuck"


def test_frames_that_show_no_line_of_the_run_skip_the_recording(tmp_path):
    lines = to_jsonl(make_rows(3 * NUM_FRAMES)).split(b"\n")
    lines[NUM_FRAMES] = b"{"
    assert "no frame of the video shows" in _read(tmp_path, b"\n".join(lines)).reason


@pytest.mark.parametrize("lines", [b"", b"\n\n"])
def test_a_file_without_lines_is_skipped(tmp_path, lines):
    assert "no line" in _read(tmp_path, lines).reason


def test_byte_order_mark_carriage_returns_and_empty_last_lines_are_no_quirk(tmp_path):
    plain = to_jsonl(make_rows(NUM_FRAMES))
    odd = _read(tmp_path, b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n\n").controls
    for name, column in _read(tmp_path, plain).controls.items():
        np.testing.assert_array_equal(odd[name], column)


def test_what_cannot_be_used_is_skipped_by_name_and_the_others_go_on(tmp_path):
    good, good_lines = make_vpt_pair(4)
    members = [
        *(("lonely.mp4", good), ("half.jsonl", good_lines), ("first.mp4", good), ("first-options.json", b"{}")),
        *(("broken.mp4", good[:300]), ("broken.jsonl", good_lines), ("first.jsonl", good_lines), ("first.zip", b"zip")),
        *(("badline.mp4", good), ("badline.jsonl", b"{"), ("10.0/last..mp4", good), ("10.0/last..jsonl", good_lines)),
    ]
    results = _read_tar(write_tar(tmp_path / "x.tar", members))
    assert [result.key for result in results if isinstance(result, Episode)] == ["first", "10.0/last"]
    reasons = {result.key: result.reason for result in results if isinstance(result, Skipped)}
    assert "no lonely.jsonl" in reasons.pop("lonely") and "no half.mp4" in reasons.pop("half")
    assert "cannot be opened" in reasons.pop("broken") and "line 1 of 1" in reasons.pop("badline")
    assert not reasons


def _yaw_law(rows, step):
    yaw = 0.0
    for row in rows:
        row["yaw"] = yaw
        yaw = step(yaw, row["mouse"]["dx"])
    return rows


@pytest.mark.parametrize("step", [lambda yaw, dx: yaw + 0.3 * dx, lambda yaw, dx: 0.15 * dx], ids=["scale", "per step"])
@pytest.mark.parametrize("movement", ["all", "lone"])
def test_yaw_on_another_scale_or_per_step_is_no_vpt(tmp_path, step, movement):
    rows = make_rows(80)
    for index, row in enumerate(rows):
        row["mouse"]["dx"] *= movement == "all" or index % 7 == 0
    assert "yaw does not follow the mouse" in _read(tmp_path, _yaw_law(rows, step)).reason


def test_yaw_that_is_late_by_a_tick_is_no_vpt(tmp_path):
    rows = make_rows(60)
    yaws = [row["yaw"] for row in rows]
    for row, yaw in zip(rows[1:], yaws, strict=False):
        row["yaw"] = yaw
    assert "yaw does not follow the mouse" in _read(tmp_path, rows).reason


def test_a_few_respawns_are_vpt(tmp_path):
    rows = make_rows(60)
    for row in rows[20:]:
        row["yaw"] += 77.7
    assert isinstance(_read(tmp_path, rows), Episode)


def test_yaw_that_is_recorded_wrapped_is_vpt(tmp_path):
    rows = make_rows(60)
    for index, row in enumerate(rows):
        row["mouse"]["dx"], row["yaw"] = (10.0, 179.25) if index % 2 == 0 else (-10.0, -179.25)
    assert isinstance(_read(tmp_path, rows), Episode)


def test_a_recording_that_hardly_moves_is_vpt(tmp_path):
    rows = make_rows(60)
    for index, row in enumerate(rows):
        row["mouse"]["dx"], row["yaw"] = 0.0, 5.0 if index > 30 else 0.0
    assert isinstance(_read(tmp_path, rows), Episode)


def test_mouse_movement_inside_a_gui_says_nothing_about_yaw(tmp_path):
    rows = make_rows(60)
    for row in rows:
        row["isGuiOpen"], row["yaw"], row["mouse"]["dx"] = True, 12.0, 2.5 * row["mouse"]["dx"]
    assert isinstance(_read(tmp_path, rows), Episode)


def test_a_packed_folder_is_read_back(tmp_path):
    pairs = {f"10.0/seg-{index}": make_vpt_pair(5, index) for index in range(3)}
    for key, (video, lines) in pairs.items():
        (tmp_path / "in" / "10.0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{key}.mp4").write_bytes(video)
        (tmp_path / "in" / f"{key}.jsonl").write_bytes(lines)
    two_bytes = sum(len(part) for key in list(pairs)[:2] for part in pairs[key])
    pack_folder(tmp_path / "in", tmp_path / "out", max_bytes=two_bytes)
    source = build_source("vpt", {})
    units = source.list_units(["out"], tmp_path)
    assert [unit.name for unit in units] == ["shard-000000.tar", "shard-000001.tar"]
    episodes = [episode for unit in units for episode in source.iter_episodes(unit)]
    assert {episode.key: episode.video for episode in episodes} == {key: pair[0] for key, pair in pairs.items()}


def test_options_are_checked_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'schema'"):
        build_source("vpt", {"shema": "simple"})
    with pytest.raises(ValueError, match="did you mean 'contractor'"):
        build_source("vpt", {"schema": "contracter"})
    with pytest.raises(ValueError, match="camera_unit belongs to schema 'simple'"):
        build_source("vpt", {"camera_unit": "delta_deg"})
    with pytest.raises(ValueError, match="there is no source called 'vtp'; did you mean 'vpt'"):
        build_source("vtp", {})


def test_helper_modules_are_no_sources():
    assert "vpt" in list_sources() and not any(name.startswith("_") for name in list_sources())
    with pytest.raises(ValueError, match="no source called"):
        build_source("parsers", {})


# A change of these numbers needs a higher RECIPE_VERSION: stored controls would no longer be what the reader gives.
PINNED = {1: "03b8ba2b3aed2f67", 2: "a0726fca4ec25944"}


def test_the_recipe_version_pins_the_numbers(tmp_path):
    rows = _with_attack(make_rows(NUM_FRAMES, seed=5), range(9), [0, 6])
    for row in rows[7:]:
        row["hotbar"], row["isGuiOpen"] = 2, True
    digest = hashlib.sha256()
    simple = [
        {"timestamp": t / 20, "mouse": row["mouse"], "keyboard": row["keyboard"], "camera": [1, 2]}
        for t, row in enumerate(rows)
    ]
    bad = to_jsonl(rows).replace(b"{", b"", 1)
    cases = [(to_jsonl(rows), {}), (bad, {}), (to_jsonl(simple), {"schema": "simple", "camera_unit": "delta_rad"})]
    for number, (lines, options) in enumerate(cases):
        tar = write_vpt_tar(tmp_path / f"{number}.tar", {"seg": (VIDEO, lines)})
        (episode,) = _read_tar(tar, **options)
        for name, column in sorted(episode.controls.items()):
            digest.update(f"{name} {column.dtype} {np.round(column.astype(np.float64), 6).tolist()}".encode())
        digest.update(f"{episode.frame_ticks.tolist()} {episode.first_frame} {episode.fps} {episode.key}".encode())
    assert digest.hexdigest()[:16] == PINNED[vpt_module.RECIPE_VERSION]


def test_the_recipe_holds_name_version_and_options():
    assert build_source("vpt", {"schema": "simple", "camera_unit": "delta_deg"}).recipe == {
        "source": "vpt",
        "recipe_version": vpt_module.RECIPE_VERSION,
        "schema": "simple",
        "camera_unit": "delta_deg",
    }
