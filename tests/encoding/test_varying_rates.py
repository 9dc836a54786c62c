"""Claims: frames are placed and sampled by their own times, and only recordings in which that matters have other names.

Rows tell the time of their frame, also where frames were dropped or the camera slowed down; times that were written down one for each
frame win over the container's. A recording of one rate is read, sampled and named as ever, whatever its times were rounded to.
"""

import json

import numpy as np
import pytest

from jepa_cache.encoding import groups
from jepa_cache.episode import Episode
from jepa_cache.media.probe import find_varying_times, measure_rate, probe_video
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from tests.encoded import encode, plan_steps, tiniest_config
from tests.makers import make_rows, make_video, to_jsonl, write_vpt_tar
from tests.sources.lerobot_makers import CAMERA, FPS, write_v3
from tests.videos import make_pixels, make_timed_video, read_numbers, turn_video

CONSTANT = np.arange(80) / 20
DROPPED = np.delete(CONSTANT, slice(30, 50))
SLOWER = np.concatenate([np.arange(40) / 20, 2 + np.arange(20) / 10])
STUTTERING = np.delete(CONSTANT, [7, 8, 21, 40, 41, 55])
VARYING = {"dropped frames": DROPPED, "a slower second half": SLOWER, "dropped here and there": STUTTERING}
ROWS_HZ = 50


def write_pair(folder, times_s, *, name="push", rows_s=None, video_s=None):
    """A pair whose state is the time of its row, and whose frames count themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    times = {} if rows_s is None else {"times": rows_s}
    if rows_s is None:
        rows_s = (np.arange(round((times_s[-1] + 0.05) * ROWS_HZ)) / ROWS_HZ).tolist()
    rows = {"states": [[row, 0.0] for row in rows_s], "actions": [[1.0, 0.0] for _ in rows_s]}
    (folder / f"{name}.json").write_text(json.dumps({"fps": ROWS_HZ, **times, **rows}))
    (folder / f"{name}.mp4").write_bytes(make_timed_video(times_s if video_s is None else video_s))
    return folder


def read_one(name, folder, options=()):
    source = build_source(name, dict(options))
    (episode,) = [item for unit in source.list_units(["."], folder) for item in source.iter_episodes(unit)]
    assert isinstance(episode, Episode), episode
    return episode


@pytest.mark.parametrize("times_s", VARYING.values(), ids=VARYING)
def test_rows_tell_the_time_of_their_frame(times_s, tmp_path):
    episode = read_one("mp4_json", write_pair(tmp_path / "a", times_s))
    assert len(episode.frame_ticks) == len(times_s)
    told_s = episode.controls["state_0"][episode.frame_ticks]
    assert np.abs(told_s - times_s).max() <= 0.5 / ROWS_HZ + 1e-9
    assert any("rate of its frames varies" in note for note in episode.notes)
    with open_video(episode.video) as video:
        assert np.array_equal(read_numbers(video.read(np.arange(len(times_s)))), np.arange(len(times_s)) % 50)


@pytest.mark.parametrize(("mode", "step_s"), [("frame", 0.25), ("tubelet", 0.5), ("clip", 0.5)])
def test_steps_are_evenly_spaced_in_time_within_a_segment(mode, step_s):
    settings = {"fps": 4.0, "mode": mode, "frames_per_clip": 4}
    for times_s in VARYING.values():
        plan = plan_steps(len(times_s), 20.0, times_s=times_s + 7.0, **settings)
        assert plan.step_hz == 1 / step_s and np.all(np.diff(plan.inputs.reshape(-1)) > 0)
        for start, stop in plan.segments:
            anchors_s = times_s[plan.anchors[start:stop]]
            assert np.abs(anchors_s - anchors_s[0] - step_s * np.arange(stop - start)).max() <= 2 * 0.25 / 4 + 1e-9
        assert (len(plan.segments) == 1) == (mode != "clip" and np.diff(times_s).max() < 0.3)
    for phase in (0, 3):  # times of one rate give the steps that counting gives
        counted, timed = (
            plan_steps(83, 20.0, times_s=it, phase=phase, **settings) for it in (None, np.arange(83) / 20)
        )
        assert all(np.array_equal(one, other) for one, other in zip(counted, timed, strict=True))


def test_a_step_begins_at_the_first_frame_after_a_gap_and_no_frame_is_repeated_for_a_slow_camera():
    plan = plan_steps(60, 20.0, fps=4.0, mode="frame", times_s=DROPPED)
    assert DROPPED[plan.anchors].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.45, 2.5, 2.75, 3, 3.25, 3.5, 3.75]
    plan = plan_steps(60, 20.0, fps=20.0, mode="frame", times_s=SLOWER)
    assert np.all(np.diff(plan.anchors) > 0)
    assert plan.segments[0].tolist() == [0, 41] and np.all(np.diff(plan.segments[1:]) == 1)
    plan = plan_steps(5, 4.0, fps=4.0, mode="frame", times_s=np.array([0, 0.25, 0.58, 0.75, 1]))
    assert plan.segments.tolist() == [[0, 2], [2, 4]], "more than a quarter of a step off is a gap"
    plan = plan_steps(5, 4.0, fps=4.0, mode="frame", times_s=np.array([0, 0.25, 0.45, 0.55, 0.75]))
    assert plan.anchors.tolist() == [0, 1, 2, 4], "the earlier of two equally near"


@pytest.mark.parametrize("container_says", ["the same", "one rate"])
def test_times_written_down_for_each_frame_win(container_says, tmp_path):
    video_s = SLOWER if container_says == "the same" else np.arange(60) / 20
    episode = read_one("mp4_json", write_pair(tmp_path / "a", SLOWER, rows_s=SLOWER.tolist(), video_s=video_s))
    assert np.array_equal(episode.frame_ticks, np.arange(60))
    assert np.allclose(episode.frame_times_s, SLOWER) and episode.fps == 20.0


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
def test_rounded_times_of_one_rate_are_no_varying_rate(container):
    for fps in (30, 15, 7):
        info = probe_video(make_video(100, fps=fps, container=container, options={"g": "10", "bf": "0"}))
        assert (info.times_s, info.typical_fps) == (None, fps)
        assert probe_video(make_timed_video(np.round(np.arange(100) / fps, 3), fps=fps)).times_s is None


def test_a_header_with_another_rate_than_the_frames_is_not_believed():
    times_s = np.arange(600) * 0.07  # FFmpeg says 57/4 Hz of a transport stream of 100/7 Hz.
    assert find_varying_times(times_s, 57 / 4, 1 / 90_000) is times_s
    assert abs(measure_rate(times_s, 57 / 4) - 100 / 7) < 1e-9
    assert find_varying_times(times_s, 14.2857, 1 / 90_000) is None


def test_dropped_frames_of_a_vpt_recording_are_placed_by_time_and_a_frame_per_tick_by_count(tmp_path):
    lagging = np.cumsum(np.where(np.arange(60) % 9, 0.05, 0.09))  # as where the game lags
    for name, times_s, num_rows in (("dropped", DROPPED, 80), ("lagging", lagging, 60)):
        video, folder = make_timed_video(times_s), tmp_path / name
        write_vpt_tar(folder / "a.tar", {name: (video, to_jsonl(make_rows(num_rows)))})
        episode = read_one("vpt", folder)
        by_count = name == "lagging"
        assert np.array_equal(episode.frame_ticks, np.arange(60) if by_count else np.round(DROPPED * 20))
        assert (episode.frame_times_s is None) == by_count and (not by_count or episode.fps == 20.0)


def test_episodes_in_one_video_with_dropped_frames_are_found_by_time(tmp_path):
    root = write_v3(tmp_path / "set", [{0: 20, 1: 15}])
    (video,) = root.rglob("*.mp4")
    video.write_bytes(make_timed_video(np.delete(np.arange(35) / FPS, [5, 6, 7, 8]), fps=FPS))
    source = build_source("lerobot", {"camera": CAMERA, "states": ["observation.state"]})
    (unit,) = source.list_units(["."], root)
    first, second = source.iter_episodes(unit)
    assert np.array_equal(first.frame_ticks, np.delete(np.arange(20), [5, 6, 7, 8]))
    assert (second.first_frame, second.fps) == (16, FPS) and np.array_equal(second.frame_ticks, np.arange(15))


@pytest.mark.parametrize(
    ("make", "otherwise"),
    [
        (lambda: make_video(20), ()),
        (lambda: make_timed_video(np.delete(np.arange(20) / 20, 7)), ("auto", "pyav")),
        (lambda: turn_video(make_video(20), (0, 1, -1, 0)), ("auto", "pyav")),
        (lambda: make_pixels("yuv420p10le", 20), ("auto",)),
        (lambda: make_video(20, container="mpegts"), ("auto",)),
        (lambda: make_video(20, codec="libsvtav1", size=(64, 64), options={"preset": "12"}), ()),
    ],
    ids=["plain", "varying", "turned", "10 bits", "transport stream", "AV1"],
)
def test_units_are_named_anew_only_where_the_first_release_read_them_otherwise(make, otherwise, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    write_vpt_tar(tmp_path / "a.tar", {"one": (make(), to_jsonl(make_rows(20)))})
    source = build_source("vpt", {})
    (unit,) = source.list_units(["a.tar"], tmp_path)
    for decoder in ("auto", "pyav"):
        wanted = [groups.READING if decoder in otherwise else 1]
        assert groups.find_readings(source, [unit._replace(digest="digest")], decoder) == wanted


def test_only_recordings_whose_rate_varies_have_another_name(tmp_path, monkeypatch):
    folder, root = tmp_path / "data", tmp_path / "cache"
    config = tiniest_config("mp4_json", fps=4.0)
    write_pair(folder, CONSTANT, name="even")
    write_pair(folder, DROPPED, name="dropped")
    with monkeypatch.context() as first_release:  # It named both alike.
        first_release.setattr(groups, "_find_reading", lambda *_: 1)
        before = encode(folder, root, config).manifest
    for table in tmp_path.rglob("digests.sqlite"):
        table.unlink()
    assert before.parts[0].recipe["source"] == build_source("mp4_json", {}).recipe
    stores = {path: path.stat().st_mtime_ns for path in root.rglob("store.json")}

    result = encode(folder, root, config)
    first, second = result.manifest.parts
    assert (result.num_encoded, len(first.entries), len(second.entries)) == (1, 1, 1)
    assert first.fingerprint == before.parts[0].fingerprint
    assert first.entries[0] in before.parts[0].entries, "the recording of one rate is found again"
    assert second.fingerprint != first.fingerprint and second.action_fingerprint != first.action_fingerprint
    assert second.recipe == {**first.recipe, "source": {**first.recipe["source"], "reading": 2}}
    assert stores.items() <= {path: path.stat().st_mtime_ns for path in root.rglob("store.json")}.items()
    monkeypatch.setattr(groups, "_find_reading", lambda *_: pytest.fail("looked again"))
    assert encode(folder, root, config).num_encoded == 0
