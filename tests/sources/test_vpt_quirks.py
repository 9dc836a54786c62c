"""Claims: quirks of VPT recordings that cross rooms, each by a recording of its own, made and (where present) real.

What the recorder does (scales per version, overlays, lag, loading screens, other codecs, files beside the pair) never moves a
tick, drops one, or stops the other recordings.
"""

import json
import tarfile

import av
import numpy as np
import pytest

from jepa_cache.actions import VPT_BUTTONS, get_action_space
from jepa_cache.encoding.decoding import luma_statistics
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from jepa_cache.sources.parsers.vpt_controls import read_contractor
from tests.makers import REAL_VPT, make_rows, make_video, to_jsonl, write_tar, write_vpt_tar

NUM_FRAMES = 12
VIDEO = make_video(NUM_FRAMES)
PAIR = "trimmed_shabby-viridian-beaver-b064d8e1dc68-20220417-011815"
needs_real = pytest.mark.skipif(not REAL_VPT.exists(), reason="no real recordings in ../shared/data/vpt")
real_logs = pytest.mark.parametrize("log", sorted(REAL_VPT.rglob("trimmed_*.jsonl")), ids=lambda path: path.stem[:30])


def _read_tar(path, **options):
    source = build_source("vpt", options)
    return [result for unit in source.list_units([str(path)], path.parent) for result in source.iter_episodes(unit)]


def _read(tmp_path, rows, video=VIDEO, key="seg", **options):
    (result,) = _read_tar(write_vpt_tar(tmp_path / "a.tar", {key: (video, to_jsonl(rows))}), **options)
    return result


def _gui_rows(gui):
    rows = make_rows(NUM_FRAMES, seed=2)
    yaw = 0.0
    for row in rows:
        row["mouse"]["dx"], row["mouse"]["dy"], row["yaw"] = 8.0, -6.0, yaw
        row["isGuiOpen"] = row["tick"] in gui
        yaw += 0.0 if row["isGuiOpen"] else 0.15 * 8
    return rows


@pytest.mark.parametrize(
    ("version", "factor"), [("5.7", 0.5), ("5.8", 0.5), ("6.7", 2), ("6.8", 2), ("6.9", 2), ("6.10", 1), ("10.0", 1)]
)
def test_the_cursor_is_scaled_by_recorder_version_inside_guis_only(tmp_path, version, factor):
    episode = _read(tmp_path, _gui_rows(range(3, 7)), key=f"data/{version}/seg", mouse_scale="by_version")
    inside = np.isin(np.arange(NUM_FRAMES), range(3, 7))
    np.testing.assert_array_equal(episode.controls["mouse_dx"], np.where(inside, 8.0 * factor, 8.0))
    np.testing.assert_array_equal(episode.controls["mouse_dy"], np.where(inside, -6.0 * factor, -6.0))
    assert any("mouse movement inside GUIs" in note for note in episode.notes) == (factor != 1)


def test_the_mouse_is_as_recorded_unless_asked_otherwise(tmp_path):
    episode = _read(tmp_path, _gui_rows(range(3, 7)), key="6.9/seg")
    assert (episode.controls["mouse_dx"] == 8.0).all() and episode.notes == ()


@pytest.mark.parametrize("key", ["seg", "10.0.0/seg", "6.9/10.0/seg"])
def test_scaling_by_version_needs_one_version_in_the_path(tmp_path, key):
    result = _read(tmp_path, _gui_rows([3]), key=key, mouse_scale="by_version")
    assert isinstance(result, Skipped) and "recorder version" in result.reason


def test_the_mouse_scale_is_checked_and_enters_the_recipe_only_when_chosen():
    with pytest.raises(ValueError, match="did you mean 'by_version'"):
        build_source("vpt", {"mouse_scale": "by_versions"})
    with pytest.raises(ValueError, match="belongs to schema 'contractor'"):
        build_source("vpt", {"schema": "simple", "camera_unit": "delta_deg", "mouse_scale": "by_version"})
    assert "mouse_scale" not in build_source("vpt", {}).recipe, "older stores must be found again"
    assert build_source("vpt", {"mouse_scale": "by_version"}).recipe["mouse_scale"] == "by_version"


def test_null_actions_are_kept_so_that_time_goes_on(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows[3:9]:
        row["keyboard"]["keys"], row["mouse"]["dx"], row["mouse"]["dy"] = [], 0.0, 0.0
        row["yaw"] = rows[3]["yaw"]
    episode = _read(tmp_path, rows)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    assert episode.controls["idle"][3:9].all() and len(episode.controls["tick"]) == NUM_FRAMES


def test_a_key_held_over_steps_is_pressed_in_each_of_them(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["keyboard"]["keys"] = ["key.keyboard.left.shift"] if 2 <= row["tick"] < 9 else []
        row["keyboard"]["newKeys"] = ["key.keyboard.left.shift"] if row["tick"] == 2 else []
    space = get_action_space("vpt36")
    actions = space.aggregate(_read(tmp_path, rows).controls, np.array([0, 4, 8, 9, 11])).actions
    assert actions[:, [column.name for column in space.actions].index("sneak")].tolist() == [1, 1, 1, 0]


def test_f3_is_no_action(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["keyboard"]["keys"] = ["key.keyboard.f3"]
        row["keyboard"]["newKeys"], row["keyboard"]["chars"] = ["key.keyboard.f3"], "?"
        row["mouse"]["dx"], row["mouse"]["dy"], row["yaw"] = 0.0, 0.0, 0.0
    controls = _read(tmp_path, rows).controls
    assert not any(controls[name].any() for name in VPT_BUTTONS) and controls["idle"].all()


def test_frames_are_placed_by_tick_whatever_milli_says(tmp_path):
    rows = make_rows(NUM_FRAMES)
    for row in rows:
        row["milli"] = 1650147496543 + 125 * row["tick"] - (400 if row["tick"] > 6 else 0)
    episode = _read(tmp_path, rows)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(NUM_FRAMES))
    assert (episode.fps, episode.controls["milli"][7]) == (20.0, rows[7]["milli"])


def test_options_and_world_checkpoints_beside_a_pair_are_neither_read_nor_reported(tmp_path):
    members = [
        *(("10.0/seg-options.json", b"{"), ("10.0/seg.zip", b"\0" * 512), ("10.0/seg.mp4", VIDEO)),
        *(("10.0/seg.jsonl", to_jsonl(make_rows(NUM_FRAMES))), ("README.txt", b"")),
    ]
    (episode,) = _read_tar(write_tar(tmp_path / "a.tar", members))
    assert isinstance(episode, Episode) and episode.key == "10.0/seg"


def test_members_of_pairs_may_be_mixed_and_doubled_ones_skip_their_recording_alone(tmp_path):
    lines = to_jsonl(make_rows(NUM_FRAMES))
    members = [("a.mp4", VIDEO), ("b..mp4", VIDEO), ("c.mp4", VIDEO), ("a.jsonl", lines), ("c.mp4", VIDEO)]
    results = _read_tar(write_tar(tmp_path / "a.tar", [*members, ("b..jsonl", lines), ("c.jsonl", lines)]))
    assert [result.key for result in results if isinstance(result, Episode)] == ["a", "b"]
    (skipped,) = [result for result in results if isinstance(result, Skipped)]
    assert skipped.key == "c" and "more than one member 'mp4'" in skipped.reason


@pytest.mark.parametrize(
    ("encoder", "codec"),
    [("libx264", "h264"), ("mpeg4", "mpeg4"), ("libx265", "hevc"), ("libsvtav1", "av1")],
)
def test_recordings_of_every_codec_are_read_and_decoded_whole(tmp_path, encoder, codec):
    if encoder not in av.codec.codecs_available:
        pytest.skip(f"this build of FFmpeg has no encoder {encoder}")
    options = {"x265-params": "log-level=none"} if encoder == "libx265" else {}
    video = make_video(NUM_FRAMES, codec=encoder, options=options)
    episode = _read(tmp_path, make_rows(NUM_FRAMES), video)
    with open_video(episode.video) as opened:
        assert opened.info.codec in (codec, "libdav1d")
        frames = opened.read(np.arange(NUM_FRAMES))
    bars = (frames[:, 2, :, :].min(axis=-1) > 225).sum(axis=1)
    assert frames.shape == (NUM_FRAMES, 48, 64, 3) and (np.abs(bars - np.arange(1, NUM_FRAMES + 1)) <= 3).all()
    assert len(episode.frame_ticks) == NUM_FRAMES


def test_a_loading_screen_has_less_luma_deviation_than_play(tmp_path):
    flat = np.full((1, 48, 64, 3), (30, 20, 10), np.uint8)
    with open_video(VIDEO) as opened:
        (_, play), (_, loading) = luma_statistics(opened.read(np.array([5])))[0], luma_statistics(flat)[0]
    assert loading < 0.01 and play > 10


@needs_real
def test_the_real_loading_screen_is_flatter_than_the_three_seconds_after_it():
    """It lasts one frame here ("Joining world"). Night scenes get as flat (11.5), so deviation alone cannot tell them apart."""
    with open_video(REAL_VPT / f"{PAIR}.mp4") as opened:
        deviation = luma_statistics(opened.read(np.arange(60)))[:, 1]
    assert deviation[0] < 16 < 20 < deviation[2:].min()


@needs_real
@real_logs
def test_real_null_actions_are_kept_and_are_exactly_the_ticks_without_mapped_key_button_or_movement(log):
    controls = read_contractor(log.read_bytes()).controls
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert len(controls["tick"]) == len(lines) and (controls["idle"] == 1).any()
    moved = np.array([bool(row["mouse"]["dx"] or row["mouse"]["dy"]) for row in lines])
    held = np.any([controls[name] for name in VPT_BUTTONS], axis=0)
    np.testing.assert_array_equal(controls["idle"] == 1, ~moved & ~held)


@needs_real
@real_logs
def test_in_real_logs_every_change_of_slot_is_a_press_and_a_step_starts_with_its_own_slot(log):
    controls = read_contractor(log.read_bytes()).controls
    changes = np.flatnonzero(np.diff(controls["hotbar"])) + 1
    for tick in changes:
        assert controls[f"hotbar.{controls['hotbar'][tick] + 1}"][tick]
    assert not any(controls[f"hotbar.{slot}"][0] for slot in range(1, 10))


@needs_real
@real_logs
def test_in_real_logs_the_view_stands_still_while_a_gui_is_open_though_the_mouse_moves(log):
    controls = read_contractor(log.read_bytes()).controls
    inside = controls["gui"][:-1] & controls["gui"][1:]
    assert np.abs(np.diff(controls["yaw_deg"])[inside]).sum() == 0
    vpt25 = get_action_space("vpt25").aggregate(controls, np.arange(len(controls["tick"])))
    names = [column.name for column in get_action_space("vpt25").actions]
    np.testing.assert_allclose(vpt25.actions[:, names.index("cameraX")], 0.15 * controls["mouse_dx"][:-1], rtol=1e-6)


def test_a_hard_link_in_a_tar_cannot_give_one_recording_the_video_of_another(tmp_path):
    path = write_vpt_tar(tmp_path / "a.tar", {"a": (VIDEO, to_jsonl(make_rows(NUM_FRAMES)))})
    with tarfile.open(path, "a") as tar:
        for suffix in ("mp4", "jsonl"):
            link = tarfile.TarInfo(f"b.{suffix}")
            link.type, link.linkname = tarfile.LNKTYPE, f"a.{suffix}"
            tar.addfile(link)
    results = _read_tar(path)
    assert [type(result).__name__ for result in results] == ["Episode", "Skipped"]
    assert "link" in results[1].reason


def test_a_tar_that_was_cut_off_costs_the_recording_that_was_cut_and_counts_once(tmp_path):
    pair = (VIDEO, to_jsonl(make_rows(NUM_FRAMES)))
    path = write_vpt_tar(tmp_path / "a.tar", {"a": pair, "b": pair})
    content, (video, lines) = path.read_bytes(), (512 + 512 * -(-len(part) // 512) for part in pair)
    second = video + lines
    for cut in (
        second + 1,
        second + 600,
        second + video - 1,
        second + video,
        second + video + 300,
        second + video + 600,
    ):
        path.write_bytes(content[:cut])
        first, *lost = _read_tar(path)
        assert isinstance(first, Episode) and len(lost) == 1, cut
        assert "cut off" in lost[0].reason and lost[0].key == ("a.tar" if cut < second + 512 else "b")
