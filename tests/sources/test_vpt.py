"""Claims of sources/vpt.py and vpt_controls.py, by recordings with one quirk each (real ones: tests/test_mixtures.py).

Controls mean the same whatever the recorder did (stuck attack, wheel, unwrapped yaw, scales per version, lag, counts that differ);
no tick is moved or dropped; a recording that cannot be used is skipped with its name, line and field while the others go on;
in the simple schema rows are placed on frames by time and nothing is guessed; equal inputs give equal numbers for a version.
"""

import hashlib

import numpy as np
import pytest

from jepa_cache.actions import VPT_BUTTONS, get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source, list_sources
from jepa_cache.sources import vpt as vpt_module
from tests.makers import make_rows, make_video, to_jsonl, write_vpt_tar

NUM_FRAMES = 12
VIDEO = make_video(NUM_FRAMES)


def _read_tar(path, **options):
    source = build_source("vpt", options)
    return [result for unit in source.list_units([str(path)], path.parent) for result in source.iter_episodes(unit)]


def _read(tmp_path, rows, video=VIDEO, key="seg", **options):
    lines = rows if isinstance(rows, bytes) else to_jsonl(rows)
    (result,) = _read_tar(write_vpt_tar(tmp_path / "a.tar", {key: (video, lines)}), **options)
    return result


def _controls(tmp_path, rows):
    result = _read(tmp_path, rows)
    assert isinstance(result, Episode), result
    return result.controls


def _held(controls):
    return {name: np.flatnonzero(controls[name]).tolist() for name in VPT_BUTTONS if controls[name].any()}


def _still(num_lines=NUM_FRAMES):
    """Rows in which nothing is pressed or moved."""
    rows = make_rows(num_lines)
    for row in rows:
        row["keyboard"]["keys"], row["mouse"]["dx"], row["mouse"]["dy"], row["yaw"] = [], 0.0, 0.0, 0.0
    return rows


def test_a_plain_recording_is_read_as_it_is(tmp_path):
    rows = make_rows(NUM_FRAMES, seed=3)
    episode = _read(tmp_path, rows)
    assert (episode.key, episode.fps, episode.num_video_frames, episode.notes) == ("seg", 20.0, NUM_FRAMES, ())
    assert episode.video == VIDEO
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    for column, field in (("yaw_deg", "yaw"), ("pitch_deg", "pitch"), ("milli", "milli"), ("zpos_blocks", "zpos")):
        np.testing.assert_array_equal(episode.controls[column], [row[field] for row in rows])
    np.testing.assert_array_equal(episode.controls["mouse_dx"], [row["mouse"]["dx"] for row in rows])
    assert _held(episode.controls) == {"forward": [t for t, row in enumerate(rows) if row["keyboard"]["keys"]]}
    types = {name: column.dtype.name for name, column in episode.controls.items()}
    assert {types.pop(name) for name in (*VPT_BUTTONS, "gui", "gui_inventory")} == {"bool"}
    assert (types.pop("tick"), types.pop("milli"), types.pop("hotbar")) == ("int64", "int64", "int8")
    assert types.pop("idle") == "float32" and set(types.values()) == {"float64"}


def _with_attack(rows, held, pressed):
    for tick, row in enumerate(rows):
        row["mouse"]["buttons"], row["mouse"]["newButtons"] = [0] * (tick in held), [0] * (tick in pressed)
    return rows


@pytest.mark.parametrize(
    ("held", "pressed", "attack"),
    [(range(10), [0, 7], [7, 8, 9]), (range(12), [0], []), (range(5), [], [0, 1, 2, 3, 4])],
)
def test_attack_that_is_stuck_from_the_first_line_is_released_until_it_is_pressed_again(
    tmp_path, held, pressed, attack
):
    controls = _controls(tmp_path, _with_attack(make_rows(NUM_FRAMES), held, pressed))
    assert _held(controls).get("attack", []) == attack
    space = get_action_space("vpt36")
    column = [column.name for column in space.actions].index("attack")
    pressed_in_step = space.aggregate(controls, np.array([6, 10])).actions[0, column]
    assert pressed_in_step == bool({6, 7, 8, 9} & set(attack)), "a step that starts late knows that attack is stuck"


def test_buttons_and_keys_are_kept_unknown_ones_ignored_and_a_change_of_slot_is_a_press_of_its_key(tmp_path):
    rows = _with_attack(_still(), range(NUM_FRAMES), [0])
    rows[2]["keyboard"]["keys"] = ["key.keyboard.f3", "scancode.0", "key.keyboard.x"]
    rows[3]["keyboard"]["keys"] = ["key.keyboard.right.shift"]
    rows[4]["mouse"]["buttons"] = [0, 1, 2, 7]
    for row, slot in zip(rows, [4, 4, 4, 4, 4, 5, 5, 0, 0, 8, 8, 8], strict=True):
        row["hotbar"] = slot
    controls = _controls(tmp_path, rows)
    wheel = {"hotbar.6": [5], "hotbar.1": [7], "hotbar.9": [9]}  # the first line's slot is no press
    assert _held(controls) == {"sneak": [3], "use": [4], "pickItem": [4], **wheel}
    assert np.flatnonzero(controls["idle"] == 0).tolist() == [3, 4, 5, 7, 9]
    assert controls["hotbar"].tolist() == [row["hotbar"] for row in rows]


def test_ticks_and_frames_are_counted_by_line_whatever_the_clocks_say(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["yaw"] += 1500
        row["milli"] += 125 * row["tick"] - (400 if row["tick"] > 6 else 0)
    rows[3]["isGuiOpen"] = rows[4]["isGuiOpen"] = rows[4]["isGuiInventory"] = True
    for row in rows[5:]:
        row["tick"] += 2
    episode = _read(tmp_path, rows)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    np.testing.assert_array_equal(episode.controls["tick"], np.arange(NUM_FRAMES))
    assert len(episode.notes) == 1 and "line 6: 4 to 7" in episode.notes[0]
    assert np.flatnonzero(episode.controls["gui"]).tolist() == [3, 4]
    assert np.flatnonzero(episode.controls["gui_inventory"]).tolist() == [4]
    assert episode.controls["yaw_deg"].min() > 1000, "unwrapped as recorded; the state is wrapped"


@pytest.mark.parametrize(
    ("num_lines", "num_frames", "fps", "ticks", "rate", "words"),
    [
        (40, 12, 20, range(12), 20, "12 frames, 40 lines: the last 28 lines are not used"),
        (1056, 1090, 20, range(1056), 20, "1090 frames, 1056 lines: the last 34 frames are not used"),
        (13, 12, 30, range(12), 20, "header says 30 Hz"),  # but there is a frame per line
        (20, 30, 30, [0, 1, 1, 2, 3, 3, 4], 30, "by time"),
        (40, 12, 30, None, None, "neither frame by line nor by time"),
    ],
)
def test_counts_and_clocks_that_differ_are_aligned_at_the_start_and_noted(
    tmp_path, num_lines, num_frames, fps, ticks, rate, words
):
    result = _read(tmp_path, make_rows(num_lines), make_video(num_frames, codec="mpeg4", size=(16, 16), fps=fps))
    if ticks is None:
        assert words in result.reason
        return
    assert (result.fps, result.num_video_frames, result.num_ticks) == (rate, num_frames, num_lines)
    assert result.frame_ticks[: len(ticks)].tolist() == list(ticks) and words in result.notes[0]
    assert rate == 30 or len(result.frame_ticks) == len(ticks)


def test_stripped_recordings_need_only_mouse_keys_and_gui_and_line_ends_are_no_quirk(tmp_path):
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
    odd = _read(tmp_path, b"\xef\xbb\xbf" + to_jsonl(bare).replace(b"\n", b"\r\n") + b"\r\n\n").controls
    for name, column in controls.items():
        np.testing.assert_array_equal(odd[name], column)


MISSING = object()
WRONG_FIELDS = {
    "mouse.dx": ["3", float("nan"), 10**400, MISSING],
    "mouse.buttons": [0, ["0"]],
    "keyboard.keys": ["key.keyboard.w", MISSING],
    "isGuiOpen": [1],
    "hotbar": [9, -1, 1.5],
    "yaw": [True],
    "pitch": ["0"],
    "tick": [[1]],
    "milli": [1e30],
    "mouse": [None],
}


@pytest.mark.parametrize(
    ("field", "value"), [(name, value) for name, values in WRONG_FIELDS.items() for value in values]
)
def test_a_field_that_is_missing_or_of_a_wrong_type_skips_the_recording_with_line_and_field(tmp_path, field, value):
    rows = make_rows(NUM_FRAMES)
    *parents, name = field.split(".")
    inner = rows[4][parents[0]] if parents else rows[4]
    inner[name] = value
    if value is MISSING:
        del inner[name]
    skipped = _read(tmp_path, rows)
    assert isinstance(skipped, Skipped) and skipped.key == "seg"
    assert "line 5" in skipped.reason and field in skipped.reason


@pytest.mark.parametrize("bad", [b"{", b"", b"[1]", b'{"mouse": \xff}', b"[" * 100_000, b"1" * 5000, b"{" * (2 << 20)])
def test_a_bad_line_ends_a_run_and_the_longest_one_is_kept(tmp_path, bad):
    lines = to_jsonl(make_rows(NUM_FRAMES)).split(b"\n")
    whole = _read(tmp_path, b"\n".join(lines))
    lines[4] = bad
    episode = _read(tmp_path, b"\n".join(lines))
    assert (episode.first_frame, episode.num_video_frames, episode.num_ticks) == (5, 7, 7)
    assert episode.frame_ticks.tolist() == list(range(7))
    for name, column in whole.controls.items():
        np.testing.assert_array_equal(episode.controls[name], column[5:])
    assert "1 of 12 lines cannot be used (first: line 5 of 12" in episode.notes[0]
    assert "lines 6 to 12" in episode.notes[0]
    with open_video(episode.video, first_frame=episode.first_frame) as part, open_video(whole.video) as video:
        np.testing.assert_array_equal(part.read(np.arange(7)), video.read(np.arange(5, 12)))


def test_runs_at_the_edges(tmp_path):
    lines = to_jsonl(make_rows(11)).rstrip().split(b"\n")
    cut = _read(tmp_path, b"\n".join(lines)[:-40])
    assert (cut.first_frame, cut.num_ticks) == (0, 10) and "line 11 of 11" in cut.notes[0]
    lines[3] = lines[7] = b"{"
    assert _read(tmp_path, b"\n".join(lines)).first_frame == 0, "of equal runs the first is kept"
    late = to_jsonl(make_rows(3 * NUM_FRAMES)).split(b"\n")
    late[NUM_FRAMES] = b"{"
    bad = {b"{\n[": "line 1 of 2 is no JSON", b"\n\n": "no line", b"\n".join(late): "no frame of the video shows"}
    assert all(words in _read(tmp_path, lines).reason for lines, words in bad.items())


def test_attack_is_followed_from_line_0_and_slots_from_the_runs_own_first_line(tmp_path):
    rows = _with_attack(make_rows(NUM_FRAMES), range(12), [0, 9])
    for row in rows[4:]:
        row["hotbar"] = 3
    lines = to_jsonl(rows).split(b"\n")
    for number in (3, 0):
        lines[number] = b"{"
        controls = _read(tmp_path, b"\n".join(lines)).controls
        assert controls["attack"].tolist() == [False] * 5 + [True] * 3, "stuck until line 9 presses it anew"
        assert not controls["hotbar.4"].any() and (controls["hotbar"] == 3).all()
    free = to_jsonl(_with_attack(make_rows(NUM_FRAMES), range(12), [])).split(b"\n")
    free[3] = b"{"
    assert _read(tmp_path, b"\n".join(free)).controls["attack"].all(), "line 0 does not say that it is stuck"
    two = _with_attack(make_rows(NUM_FRAMES), range(12), [])
    two[0]["mouse"]["newButtons"] = [0, 1]
    assert _controls(tmp_path, two)["attack"].all(), "nor do two buttons at once"


def test_a_tar_that_was_cut_off_costs_the_recording_that_was_cut_and_counts_once(tmp_path):
    pair = (VIDEO, to_jsonl(make_rows(NUM_FRAMES)))
    path = write_vpt_tar(tmp_path / "a.tar", {"a": pair, "b": pair})
    content, (video, lines) = path.read_bytes(), (512 + 512 * -(-len(part) // 512) for part in pair)
    second = video + lines
    for cut in (1, 600, video - 1, video, video + 300, video + 600):
        path.write_bytes(content[: second + cut])
        first, *lost = _read_tar(path)
        assert isinstance(first, Episode) and len(lost) == 1, cut
        assert "cut off" in lost[0].reason and lost[0].key == ("a.tar" if cut < 512 else "b")


YAW_CHANGES = {
    "respawn": lambda index, row: {"yaw": row["yaw"] + 77.7 * (index >= 20)},
    "wrap": lambda index, row: {"dx": (10.0, -10.0)[index % 2], "yaw": (179.25, -179.25)[index % 2]},
    "rest": lambda index, row: {"dx": 0.0, "yaw": 5.0 * (index > 30)},
    "gui": lambda index, row: {"isGuiOpen": True, "yaw": 12.0, "dx": 2.5 * row["mouse"]["dx"]},
    "other scale": lambda index, row: {"dx": 0.5 * row["mouse"]["dx"]},
    "change per step": lambda index, row: {"yaw": 0.15 * row["mouse"]["dx"]},
    "lone changes per step": lambda index, row: {"dx": 8.0 * (index % 7 == 0), "yaw": 1.2 * (index % 7 == 1)},
}


@pytest.mark.parametrize("kind", YAW_CHANGES)
def test_respawns_wrapped_yaw_rest_and_guis_are_vpt_and_yaw_on_another_scale_or_per_step_is_none(tmp_path, kind):
    rows = make_rows(80)
    for index, row in enumerate(rows):
        changes = YAW_CHANGES[kind](index, row)
        row["mouse"]["dx"] = changes.pop("dx", row["mouse"]["dx"])
        row.update(changes)
    result = _read(tmp_path, rows)
    if kind in ("respawn", "wrap", "rest", "gui"):
        assert isinstance(result, Episode)
    else:
        assert "yaw does not follow the mouse" in result.reason


def test_options_are_checked_with_the_nearest_name_and_enter_the_recipe_when_chosen():
    simple = {"schema": "simple", "camera_unit": "delta_deg"}
    for options, words in (
        ({"camera_unit": "delta_deg"}, "camera_unit belongs to schema 'simple'"),
        ({"schema": "simple"}, r"needs source_options\.camera_unit, one of delta_deg"),
    ):
        with pytest.raises(ValueError, match=words):
            build_source("vpt", options)
    with pytest.raises(ValueError, match="there is no source called 'vtp'; did you mean 'vpt'"):
        build_source("vtp", {})
    assert "vpt" in list_sources() and "parsers" not in list_sources()
    version = {"source": "vpt", "recipe_version": vpt_module.RECIPE_VERSION}
    assert build_source("vpt", simple).recipe == {**version, **simple}, "older stores must be found again"


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
    for lines, options in cases:
        episode = _read(tmp_path, lines, **options)
        for name, column in sorted(episode.controls.items()):
            digest.update(f"{name} {column.dtype} {np.round(column.astype(np.float64), 6).tolist()}".encode())
        digest.update(f"{episode.frame_ticks.tolist()} {episode.first_frame} {episode.fps} {episode.key}".encode())
    assert digest.hexdigest()[:16] == PINNED[vpt_module.RECIPE_VERSION]


# The simple schema


def _make_simple(times_s):
    return [
        {
            "timestamp": time_s,
            "mouse": {"dx": 2.0, "dy": 1.0, "buttons": [0]},
            "keyboard": ["w"],
            "camera": {"yaw": 1.0 * t, "pitch": -0.5 * t},
            "hotbar": 1,
        }
        for t, time_s in enumerate(times_s)
    ]


SIMPLE_VIDEO = make_video(20)


def _read_simple(tmp_path, rows, unit="absolute_deg", fps=20):
    video = SIMPLE_VIDEO if fps == 20 else make_video(20, fps=fps)
    return _read(tmp_path, rows, video, schema="simple", camera_unit=unit)


@pytest.mark.parametrize(
    ("unit", "yaw", "pitch"),
    [
        ("absolute_deg", [0, 1, 2, 3], [0, -0.5, -1, -1.5]),
        ("absolute_rad", np.degrees([0, 1, 2, 3]), np.degrees([0, -0.5, -1, -1.5])),
        ("delta_deg", [0, 0, 1, 3], [0, 0, -0.5, -1.5]),
        ("delta_rad", np.degrees([0, 0, 1, 3]), np.degrees([0, 0, -0.5, -1.5])),
    ],
)
def test_the_camera_becomes_absolute_degrees_before_each_row_in_both_spellings(tmp_path, unit, yaw, pitch):
    rows = _make_simple(np.arange(4) / 20)
    controls = _read_simple(tmp_path, rows, unit).controls
    np.testing.assert_allclose(controls["yaw_deg"], yaw)
    np.testing.assert_allclose(controls["pitch_deg"], pitch)
    assert controls["forward"].all() and controls["attack"].all() and not controls["gui"].any()
    for row in rows:
        row["camera"], row["keyboard"] = list(row["camera"].values()), {"keys": ["key.keyboard.w"]}
    for name, column in _read_simple(tmp_path, rows, unit).controls.items():
        np.testing.assert_array_equal(column, controls[name])


def test_changes_that_add_up_to_more_than_a_view_holds_are_skipped_by_their_line(tmp_path):
    rows = _make_simple(np.arange(8) / 20)
    rows[4]["camera"]["yaw"] = -1e18
    skipped = _read_simple(tmp_path, rows, "delta_deg")
    assert skipped.reason.startswith("line 5: the changes of camera.yaw add up to -1e+18 degrees")
    rows[4]["camera"]["yaw"] = -1e5
    np.testing.assert_allclose(np.diff(_read_simple(tmp_path, rows, "delta_deg").controls["yaw_deg"])[5:], [5, 6])


@pytest.mark.parametrize(("fps", "rate"), [(20, 60), (20, 7), (5, 15)])
def test_each_frame_shows_the_row_nearest_in_time_the_earlier_of_two(tmp_path, fps, rate):
    rng = np.random.default_rng(0)
    times = np.sort(np.arange(0, 25 * rate // fps) / rate + rng.uniform(0, 0.3 / rate, 25 * rate // fps))
    times[0] = 0.0
    episode = _read_simple(tmp_path, _make_simple(times), fps=fps)
    frame_times = np.arange(len(episode.frame_ticks)) / fps
    error = np.abs(times[episode.frame_ticks] - frame_times)
    np.testing.assert_allclose(error, np.abs(times[:, None] - frame_times).min(axis=0), atol=1e-9)
    halves = _read_simple(tmp_path, _make_simple(np.arange(10) / 20), fps=40)
    np.testing.assert_array_equal(halves.frame_ticks, np.arange(20) // 2)
    rounded = _read_simple(tmp_path, _make_simple(np.round(np.arange(20) / 30, 2)), fps=30)
    assert rounded.frame_ticks.tolist() == list(range(20)) and (rounded.fps, rounded.notes) == (30, ())


@pytest.mark.parametrize(
    ("times", "num_used", "words"),
    [
        (np.arange(12) / 20, 12, "the last 8 frames come after the last row"),
        (np.arange(30) / 20, 20, "the last 10 rows"),
        (np.concatenate((np.arange(8) / 20, 0.8 + np.arange(4) / 20)), 20, "gap of 0.45 s"),
        (1650147496.5 + np.arange(20) / 20, None, "seconds since its first frame"),
        ([-0.05], None, "no frame shows a row"),
        ([0.0, 0.05, 0.1, 0.07], None, "line 4: the timestamp goes back"),
    ],
)
def test_frames_or_rows_without_the_other_and_gaps_are_noted_and_times_from_elsewhere_skipped(
    tmp_path, times, num_used, words
):
    found = _read_simple(tmp_path, _make_simple(times))
    if num_used is None:
        assert words in found.reason
    else:
        assert len(found.frame_ticks) == num_used and any(words in text for text in found.notes)


def test_a_missing_camera_is_unknown_and_not_zero_and_a_wrong_field_is_skipped_with_its_line(tmp_path):
    rows = _make_simple(np.arange(20) / 20)
    for row in rows:
        del row["camera"], row["hotbar"], row["mouse"]["buttons"]
    for unit in ("absolute_deg", "delta_deg"):
        controls = _read_simple(tmp_path, rows, unit).controls
        assert np.isnan(controls["yaw_deg"][1:]).all() and (controls["hotbar"] == -1).all()
    wrong = {"timestamp": ["0", None], "camera": [3, ["a", 1]], "keyboard": [{"w": 1}]}
    for field, value in ((field, value) for field, values in wrong.items() for value in values):
        rows[2] = {**rows[1], field: value}
        place = f"line 3: {'the field ' if field == 'keyboard' else ''}{field}"
        assert place in _read_simple(tmp_path, rows).reason
