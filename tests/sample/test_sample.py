"""Claims about the synthetic sample recordings.

1. They have the form of VPT contractor data: 640x360 h264 at 20 fps, the real key set in the real order, tar shards that
   WebDataset reads, names with a synthetic alias.
2. Line t holds the state before tick t, frame t is rendered from it, and the measured yaw, pitch and cursor laws hold.
3. Actions matter: turning moves the picture against dx at lag 0, walking moves the view.
4. Quirks are where the index says, and nowhere else.
5. The bytes depend on the settings alone, not on the number of workers or on what lay in the folder before.
"""

import functools
import io
import json
import re
from dataclasses import asdict, replace
from itertools import pairwise

import av
import numpy as np
import pytest

from jepa_cache.config.parsing import ConfigError, parse_dataclass
from jepa_cache.media.probe import VideoInfo, probe_video
from jepa_cache.media.tar import SUFFIXES, iter_samples
from jepa_cache.sample import build as build_module
from jepa_cache.sample import episode as episode_module
from jepa_cache.sample.build import build_sample
from jepa_cache.sample.player import (
    GUI_KEY,
    PlayerState,
    SampleConfig,
    Tick,
    advance,
)
from jepa_cache.sample.world import MAP_BLOCKS, World, build_scenery, build_world, render

LINE_KEYS = [
    *("mouse", "keyboard", "isGuiOpen", "isGuiInventory", "hotbar", "yaw", "pitch", "xpos", "ypos", "zpos"),
    *("tick", "milli", "inventory", "serverTick", "serverTickDurationMs", "stats"),
    *("x", "y", "dx", "dy", "scaledX", "scaledY", "dwheel", "buttons", "newButtons"),
    *("keys", "newKeys", "chars"),
]
# Four episodes: every quirk on half of them, one line more on one and one fewer on another.
CONFIG = SampleConfig(
    seed=5,
    num_episodes=4,
    episode_s=3.0,
    episodes_per_tar=3,
    stuck_attack_share=0.5,
    wheel_share=0.5,
    gui_share=0.5,
    line_mismatch_share=0.5,
)


class Episode:
    """One episode as read back from its tar shard, beside what the index says of it."""

    def __init__(self, truth, video, lines):
        self.truth, self.video = truth, video
        self.lines = [json.loads(line) for line in lines.splitlines()]
        self.yaw, self.pitch, self.gui, self.hotbar = map(self.column, ("yaw", "pitch", "isGuiOpen", "hotbar"))
        self.dx, self.dy, self.wheel = map(self.mouse, ("dx", "dy", "dwheel"))
        self.keys = [line["keyboard"]["keys"] for line in self.lines]

    def column(self, name):
        return np.array([line[name] for line in self.lines])

    def mouse(self, name):
        return np.array([line["mouse"][name] for line in self.lines])

    @functools.cached_property
    def frames(self):
        """Luma, [F, 360, 640] float32."""
        with av.open(io.BytesIO(self.video)) as container:
            return np.stack([f.to_ndarray(format="gray").astype(np.float32) for f in container.decode(video=0)])


def read_episodes(folder):
    episodes = []
    for entry in json.loads((folder / "index.json").read_text())["tars"]:
        samples = {sample.key: sample.members for sample in iter_samples(folder / entry["name"], SUFFIXES)}
        assert list(samples) == [truth["key"] for truth in entry["episodes"]]
        episodes += [Episode(truth, *(samples[truth["key"]][it] for it in SUFFIXES)) for truth in entry["episodes"]]
    return episodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_sample(tmp_path_factory.mktemp("sample"), CONFIG, num_workers=1).parent


@pytest.fixture(scope="module")
def episodes(folder):
    return read_episodes(folder)


def flat_world():
    shape = (MAP_BLOCKS, MAP_BLOCKS)
    return World(np.zeros(shape, np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.float32))


def shift_right(before, after, most=40):
    """Pixels by which a strip about the horizon moved to the right, by the best match over all shifts."""
    before, after = (frame[120:240, 220:420] - frame[120:240, 220:420].mean() for frame in (before, after))
    shifts = range(-most, most + 1)
    errors = [np.abs(before[:, most:-most] - after[:, most + s : after.shape[1] - most + s]).mean() for s in shifts]
    return shifts[int(np.argmin(errors))]


# 1. Form


def test_video_and_lines_have_the_form_of_real_recordings_under_a_synthetic_name(folder, episodes):
    index = json.loads((folder / "index.json").read_text())
    assert index["synthetic"] is True and [len(entry["episodes"]) for entry in index["tars"]] == [3, 1]
    assert sorted(episode.truth["extra_lines"] for episode in episodes) == [-1, 0, 0, 1]
    for episode in episodes:
        assert len(episode.lines) == episode.truth["num_lines"] == 61 + episode.truth["extra_lines"]
        info = probe_video(episode.video)
        assert info == VideoInfo(61, 20.0, 360, 640, "h264") and episode.truth["num_frames"] == 61
        assert all(keys_of(line) == LINE_KEYS for line in episode.lines)
        assert re.fullmatch(r"synthetic-[a-z]+-[a-z]+-[0-9a-f]{12}-\d{8}-\d{6}", episode.truth["key"])
    assert len({episode.truth["key"] for episode in episodes}) == len(episodes)


def keys_of(line):
    return [*line, *line["mouse"], *line["keyboard"]]


# 2. The law of one tick


def test_line_holds_the_state_before_its_own_tick(episodes):
    for episode in episodes:
        outside = ~episode.gui[:-1]
        np.testing.assert_allclose(np.diff(episode.yaw)[outside], 0.15 * episode.dx[:-1][outside], atol=1e-9)
        np.testing.assert_allclose(np.diff(episode.pitch)[outside], 0.15 * episode.dy[:-1][outside], atol=1e-9)
        assert episode.yaw[0] == episode.pitch[0] == 0 and np.ptp(episode.yaw) > 5
        assert (episode.dx[:-1][outside] % 1 == 0).all() and (episode.dy[:-1][outside] % 1 == 0).all()


def test_frame_t_is_rendered_from_line_t(episodes):
    index = next(i for i, e in enumerate(episodes) if not e.truth["gui_span"] and e.truth["extra_lines"] >= 0)
    episode = episodes[index]
    world = build_world(episode_module._rng(CONFIG, episode_module._WORLD, index))
    scenery = build_scenery(episode_module._rng(CONFIG, episode_module._SCENERY, 0), CONFIG.contrast)

    def distance(frame, line):
        at = episode.lines[line]
        luma = render(world, scenery, at["xpos"], at["zpos"], at["yaw"], at["pitch"])[0] * 255 / 219
        return float(np.abs(episode.frames[frame].reshape(90, 4, 160, 4).mean((1, 3)) - luma).mean())

    for t in (0, 20, 40, 60):
        assert distance(t, t) < 6, "levels of 255; h264 at crf 28 costs about 3"
    errors = {lag: np.mean([distance(t, t + lag) for t in range(5, 55, 5)]) for lag in (-1, 0, 1)}
    assert errors[0] < 0.7 * min(errors[-1], errors[1]), errors


# 3. Actions matter


def test_turning_right_moves_the_picture_left_at_lag_0(tmp_path):
    # Without quirks, walking and pitch only dx moves the picture.
    still = {"walking_share": 0.0, "pitch_std_deg_per_s": 0.0, "gui_share": 0.0, "line_mismatch_share": 0.0}
    build_sample(tmp_path, replace(CONFIG, num_episodes=1, **still), num_workers=1)
    (episode,) = read_episodes(tmp_path)
    shifts = np.array([shift_right(a, b) for a, b in pairwise(episode.frames)])
    t = np.arange(2, len(shifts) - 2)
    t = t[np.abs(episode.dx[t]) < 50]
    correlation = {lag: np.corrcoef(shifts[t], episode.dx[t + lag])[0, 1] for lag in (-2, -1, 0, 1, 2)}
    assert correlation[0] < -0.9 and min(correlation, key=correlation.get) == 0, correlation


@pytest.mark.parametrize(
    ("yaw_deg", "key", "step"),
    [
        (0, "w", (0, 1)),
        (90, "w", (-1, 0)),
        (180, "w", (0, -1)),
        (0, "s", (0, -1)),
        (0, "d", (-1, 0)),
        (90, "a", (0, 1)),
    ],
)
def test_walking_follows_minecraft_axes(yaw_deg, key, step):
    before = PlayerState(yaw_deg=yaw_deg)
    after = advance(before, Tick(keys=(f"key.keyboard.{key}",)), flat_world())
    moved = (after.x_blocks - before.x_blocks, after.z_blocks - before.z_blocks)
    np.testing.assert_allclose(moved, np.multiply(step, 0.2158), atol=1e-9)


# 4. Quirks


def test_stuck_attack_is_held_until_the_first_true_click(episodes):
    assert sorted(episode.truth["stuck_attack"] for episode in episodes) == [False, False, True, True]
    for episode in episodes:
        first, stuck = episode.truth["first_attack_tick"], episode.truth["stuck_attack"]
        new = [0 in line["mouse"]["newButtons"] for line in episode.lines]
        held = [0 in line["mouse"]["buttons"] for line in episode.lines]
        assert held[:first] == [stuck] * len(held[:first])
        assert new[:first] == [stuck, *[False] * (len(new[:first]) - 1)]
        assert first is None or new[first : first + 1] in ([True], [])


def test_hotbar_changes_on_the_line_after_a_wheel_tick_without_a_key(episodes):
    assert sum(bool(episode.truth["wheel_ticks"]) for episode in episodes) == 2
    for episode in episodes:
        for changed in (np.diff(episode.hotbar), episode.wheel):
            assert np.flatnonzero(changed).tolist() == episode.truth["wheel_ticks"]
        assert (np.diff(episode.hotbar) % 9 == -episode.wheel[:-1] % 9).all()
        assert not any(key[-1].isdigit() for keys in episode.keys for key in keys)


def test_gui_span_freezes_the_view_and_moves_the_cursor_by_two_per_count(episodes):
    assert sum(bool(episode.truth["gui_span"]) for episode in episodes) == 2
    for episode in episodes:
        span = episode.truth["gui_span"]
        expected = np.zeros(len(episode.lines), bool)
        if span:
            start, end = span
            expected[start:end] = True
            assert len(set(episode.yaw[start : end + 1])) == len(set(episode.pitch[start : end + 1])) == 1
            assert GUI_KEY in episode.lines[start - 1]["keyboard"]["newKeys"], (
                "the press shows on the line before the GUI"
            )
            assert (episode.mouse("x")[start], episode.mouse("y")[start]) == (640, 360)
            for axis, d in (("x", episode.dx), ("y", episode.dy)):
                cursor = episode.mouse(axis)[start:end]
                np.testing.assert_array_equal(np.diff(cursor), 2 * d[start : end - 1])
                assert np.ptp(cursor) > 0
        np.testing.assert_array_equal(episode.gui, expected)


# 5. Determinism


def test_bytes_do_not_depend_on_workers_or_on_an_earlier_data_set(folder, tmp_path):
    (tmp_path / "sample-000009.tar").write_bytes(b"of an earlier data set")
    build_sample(tmp_path, CONFIG, num_workers=2)
    one, other = ({path.name: path.read_bytes() for path in it.iterdir()} for it in (folder, tmp_path))
    assert one == other


def test_an_interrupted_build_leaves_the_earlier_set(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(build_module, "record_episode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_sample(folder, CONFIG, num_workers=1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "field", ["num_episodes", "episode_s", "contrast", "walking_share", "gui_share", "turn_tau_s", "crf", "seed"]
)
def test_a_value_out_of_range_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"{field} .*-1"):
        parse_dataclass(SampleConfig, asdict(SampleConfig()) | {field: -1}, "sample")
