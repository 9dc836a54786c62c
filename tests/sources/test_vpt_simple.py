"""Claims of sources/vpt.py for the simple schema (timestamp, mouse, keyboard, camera, hotbar).

Rows are placed on frames by time, camera values mean what `camera_unit` says, and nothing is guessed: without a unit, or with
times that cannot belong to the video, there is an error.
"""

import numpy as np
import pytest

from jepa_cache.episode import Episode, Skipped
from jepa_cache.sources import Unit, build_source
from tests.makers import make_video, to_jsonl, write_vpt_tar

VIDEO = make_video(20)


def _make_rows(times_s, camera=None):
    cameras = [{"yaw": 1.0 * t, "pitch": -0.5 * t} for t in range(len(times_s))] if camera is None else camera
    return [
        {
            "timestamp": time_s,
            "mouse": {"dx": 2.0, "dy": 1.0, "buttons": [0]},
            "keyboard": ["w"],
            "camera": cam,
            "hotbar": 1,
        }
        for time_s, cam in zip(times_s, cameras, strict=True)
    ]


def _read(tmp_path, rows, *, unit="absolute_deg", video=VIDEO):
    tar = write_vpt_tar(tmp_path / "a.tar", {"seg": (video, to_jsonl(rows))})
    (result,) = build_source("vpt", {"schema": "simple", "camera_unit": unit}).iter_episodes(Unit("a.tar", (tar,)))
    return result


@pytest.mark.parametrize("unit", [None, "deg", "absolute"])
def test_the_camera_unit_must_be_named(unit):
    with pytest.raises(ValueError, match=r"needs source_options\.camera_unit, one of delta_deg"):
        build_source("vpt", {"schema": "simple", "camera_unit": unit})


@pytest.mark.parametrize(
    ("unit", "yaw", "pitch"),
    [
        ("absolute_deg", [0, 1, 2, 3], [0, -0.5, -1, -1.5]),
        ("absolute_rad", np.degrees([0, 1, 2, 3]), np.degrees([0, -0.5, -1, -1.5])),
        ("delta_deg", [0, 0, 1, 3], [0, 0, -0.5, -1.5]),
        ("delta_rad", np.degrees([0, 0, 1, 3]), np.degrees([0, 0, -0.5, -1.5])),
    ],
)
def test_the_camera_becomes_absolute_degrees_before_each_row(tmp_path, unit, yaw, pitch):
    controls = _read(tmp_path, _make_rows(np.arange(4) / 20), unit=unit).controls
    np.testing.assert_allclose(controls["yaw_deg"], yaw)
    np.testing.assert_allclose(controls["pitch_deg"], pitch)


def test_changes_that_add_up_to_more_than_a_view_holds_are_skipped_by_their_line(tmp_path):
    rows = _make_rows(np.arange(8) / 20)
    rows[4]["camera"]["yaw"] = -1e18
    skipped = _read(tmp_path, rows, unit="delta_deg")
    assert skipped.reason.startswith("line 5: the changes of camera.yaw add up to -1e+18 degrees")
    rows[4]["camera"]["yaw"] = -1e5
    np.testing.assert_allclose(np.diff(_read(tmp_path, rows, unit="delta_deg").controls["yaw_deg"])[5:], [5, 6])


def test_both_spellings_of_camera_and_keys_are_read(tmp_path):
    rows = _make_rows(np.arange(20) / 20)
    other = [
        {
            **row,
            "camera": [row["camera"]["yaw"], row["camera"]["pitch"]],
            "keyboard": {"keys": ["key.keyboard.w"]},
        }
        for row in rows
    ]
    first, second = _read(tmp_path, rows), _read(tmp_path, other)
    assert first.controls["forward"].all() and first.controls["attack"].all() and not first.controls["gui"].any()
    for name, column in first.controls.items():
        np.testing.assert_array_equal(second.controls[name], column)


@pytest.mark.parametrize("digits", [2, 3, 9])
def test_rows_at_the_frames_times_are_lock_step_however_they_are_rounded(tmp_path, digits):
    video = make_video(20, fps=30)
    episode = _read(tmp_path, _make_rows(np.round(np.arange(20) / 30, digits)), video=video)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(20))
    assert episode.fps == 30 and episode.notes == ()


@pytest.mark.parametrize(("fps", "rate"), [(20, 60), (20, 20), (30, 20), (20, 7), (5, 15)])
def test_each_frame_shows_the_row_nearest_in_time(tmp_path, fps, rate):
    rng = np.random.default_rng(0)
    times = np.sort(np.arange(0, 25 * rate // fps) / rate + rng.uniform(0, 0.3 / rate, 25 * rate // fps))
    times[0] = 0.0
    episode = _read(tmp_path, _make_rows(times), video=make_video(20, fps=fps))
    frame_times = np.arange(len(episode.frame_ticks)) / fps
    error = np.abs(times[episode.frame_ticks] - frame_times)
    np.testing.assert_allclose(error, np.abs(times[:, None] - frame_times).min(axis=0), atol=1e-9)


def test_a_frame_half_way_between_two_rows_shows_the_earlier(tmp_path):
    episode = _read(tmp_path, _make_rows(np.arange(10) / 20), video=make_video(20, fps=40))
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(20) // 2)


def test_frames_after_the_last_row_are_not_used(tmp_path):
    episode = _read(tmp_path, _make_rows(np.arange(12) / 20))
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(12))
    assert episode.num_video_frames == 20 and "the last 8 frames are not used" in episode.notes[0]


def test_rows_after_the_last_frame_are_noted(tmp_path):
    episode = _read(tmp_path, _make_rows(np.arange(30) / 20))
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(20))
    assert "the last 10 rows" in episode.notes[0]


@pytest.mark.parametrize("start_s", [1650147496.5, 0.5, -3.0])
def test_times_that_do_not_count_from_the_videos_start_are_skipped(tmp_path, start_s):
    skipped = _read(tmp_path, _make_rows(start_s + np.arange(20) / 20))
    assert isinstance(skipped, Skipped) and "seconds since its start" in skipped.reason


def test_rows_that_all_lie_before_the_video_are_skipped(tmp_path):
    skipped = _read(tmp_path, _make_rows([-0.05]))
    assert isinstance(skipped, Skipped) and "no frame shows a row" in skipped.reason


def test_times_that_go_back_are_skipped_with_the_line(tmp_path):
    times = np.arange(20) / 20
    times[7] = 0.1
    assert "line 8: the timestamp goes back" in _read(tmp_path, _make_rows(times)).reason


def test_a_gap_in_the_rows_is_noted(tmp_path):
    times = np.concatenate((np.arange(8) / 20, 0.8 + np.arange(4) / 20))
    assert any("gap of 0.45 s" in note for note in _read(tmp_path, _make_rows(times)).notes)


def test_a_missing_camera_is_unknown_and_not_zero(tmp_path):
    rows = _make_rows(np.arange(20) / 20)
    for row in rows:
        del row["camera"], row["hotbar"], row["mouse"]["buttons"]
    for unit in ("absolute_deg", "delta_deg"):
        controls = _read(tmp_path, rows, unit=unit).controls
        assert np.isnan(controls["yaw_deg"][1:]).all() and (controls["hotbar"] == -1).all()


def test_a_single_row_is_read(tmp_path):
    episode = _read(tmp_path, _make_rows([0.0]))
    assert isinstance(episode, Episode) and episode.frame_ticks.tolist() == [0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("timestamp", "0"), ("timestamp", None), ("camera", 3), ("camera", ["a", 1]), ("keyboard", {"w": 1})],
)
def test_a_wrong_field_is_skipped_with_its_line(tmp_path, field, value):
    rows = _make_rows(np.arange(20) / 20)
    rows[2][field] = value
    assert f"line 3: {'the field ' if field == 'keyboard' else ''}{field}" in _read(tmp_path, rows).reason
