"""Claims about the synthetic sample recordings.

1. They have the form of VPT contractor data: 640x360 h264 at 20 fps, the real key set in the real order, tar shards that
   WebDataset reads, names with a synthetic alias.
2. Line t holds the state before tick t, frame t is rendered from it, and the measured yaw, pitch and cursor laws hold.
3. Actions matter: turning moves the picture against dx at lag 0, walking moves the view.
4. Quirks are where the index says, and nowhere else.
5. The bytes depend on the settings alone, not on the number of workers or on what lay in the folder before.
"""

import io
import json
import re
import tarfile
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from jepa_cache.config.parsing import ConfigError, parse_dataclass
from jepa_cache.sample import build as build_module
from jepa_cache.sample import episode as episode_module
from jepa_cache.sample.build import build_sample
from jepa_cache.sample.config import SampleConfig
from jepa_cache.sample.episode import plan_quirks
from jepa_cache.sample.player import DEG_PER_COUNT, GUI_KEY, PlayerState, Tick, advance, write_script
from jepa_cache.sample.world import MAP_BLOCKS, World, build_scenery, build_world, is_free, render

REAL_LOGS = Path(__file__).parents[3] / "shared" / "data" / "vpt"
MOUSE_KEYS = ["x", "y", "dx", "dy", "scaledX", "scaledY", "dwheel", "buttons", "newButtons"]
KEYBOARD_KEYS = ["keys", "newKeys", "chars"]
LINE_KEYS = [
    *("mouse", "keyboard", "isGuiOpen", "isGuiInventory", "hotbar", "yaw", "pitch", "xpos", "ypos", "zpos"),
    *("tick", "milli", "inventory", "serverTick", "serverTickDurationMs", "stats"),
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

    def __init__(self, truth: dict, video: bytes, lines: bytes) -> None:
        self.truth, self.video = truth, video
        self.lines = [json.loads(line) for line in lines.splitlines()]
        self.yaw, self.pitch = self.column("yaw"), self.column("pitch")
        self.gui, self.hotbar = self.column("isGuiOpen"), self.column("hotbar")
        self.dx, self.dy = self.mouse("dx"), self.mouse("dy")

    def column(self, name: str) -> np.ndarray:
        return np.array([line[name] for line in self.lines])

    def mouse(self, name: str) -> np.ndarray:
        return np.array([line["mouse"][name] for line in self.lines])

    def keyboard(self, name: str = "keys") -> list[list[str]]:
        return [line["keyboard"][name] for line in self.lines]

    def frames(self) -> np.ndarray:
        """Luma, [F, 360, 640] float32."""
        with av.open(io.BytesIO(self.video)) as container:
            return np.stack([f.to_ndarray(format="gray").astype(np.float32) for f in container.decode(video=0)])


def read_episodes(folder: Path) -> list[Episode]:
    index = json.loads((folder / "index.json").read_text())
    episodes = []
    for entry in index["tars"]:
        with tarfile.open(folder / entry["name"]) as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for truth in entry["episodes"]:
            episodes.append(Episode(truth, members[truth["key"] + ".mp4"], members[truth["key"] + ".jsonl"]))
        assert len(members) == 2 * len(entry["episodes"])
    return episodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sample(tmp_path_factory.mktemp("sample"), CONFIG, num_workers=1).parent


@pytest.fixture(scope="module")
def episodes(folder: Path) -> list[Episode]:
    return read_episodes(folder)


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> Episode:
    """An episode of pure turning about the vertical, without quirks, so that only dx moves the picture."""
    config = replace(
        CONFIG,
        num_episodes=1,
        walking_share=0.0,
        pitch_std_deg_per_s=0.0,
        gui_share=0.0,
        wheel_share=0.0,
        line_mismatch_share=0.0,
    )
    return read_episodes(build_sample(tmp_path_factory.mktemp("turning"), config, num_workers=1).parent)[0]


def flat_world() -> World:
    shape = (MAP_BLOCKS, MAP_BLOCKS)
    return World(np.zeros(shape, np.float32), np.zeros(shape, np.int64), np.zeros(shape, np.float32))


def shift_right(before: np.ndarray, after: np.ndarray, most: int = 40) -> int:
    """Pixels by which a strip about the horizon moved to the right, by the best match over all shifts."""
    before, after = (frame[120:240, 220:420] - frame[120:240, 220:420].mean() for frame in (before, after))
    shifts = range(-most, most + 1)
    errors = [np.abs(before[:, most:-most] - after[:, most + s : after.shape[1] - most + s]).mean() for s in shifts]
    return shifts[int(np.argmin(errors))]


# 1. Form


def test_video_is_640x360_h264_at_20_fps_with_the_promised_frames(episodes: list[Episode]) -> None:
    for episode in episodes:
        with av.open(io.BytesIO(episode.video)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 640, 360)
            assert stream.average_rate == 20
            frames = [frame.pts for frame in container.decode(stream)]
        assert len(frames) == episode.truth["num_frames"] == 61
        assert len(set(np.diff(frames))) == 1


def test_every_line_has_the_real_keys_in_the_real_order(episodes: list[Episode]) -> None:
    for line in (line for episode in episodes for line in episode.lines):
        assert list(line) == LINE_KEYS
        assert list(line["mouse"]) == MOUSE_KEYS
        assert list(line["keyboard"]) == KEYBOARD_KEYS


@pytest.mark.skipif(not REAL_LOGS.is_dir(), reason="real VPT logs are not at ../shared/data/vpt")
def test_keys_and_value_types_equal_those_of_a_real_recording(episodes: list[Episode]) -> None:
    def types(line: dict) -> dict:
        flat = {**line, **line["mouse"], **line["keyboard"]}
        return {name: type(value) for name, value in flat.items()}

    for path in REAL_LOGS.glob("**/trimmed_*.jsonl"):
        real = json.loads(path.read_text().splitlines()[40])
        assert list(real) == LINE_KEYS
        assert types(real) == types(episodes[0].lines[40])


def test_names_are_segment_names_of_a_synthetic_alias(episodes: list[Episode]) -> None:
    keys = [episode.truth["key"] for episode in episodes]
    assert all(re.fullmatch(r"synthetic-[a-z]+-[a-z]+-[0-9a-f]{12}-\d{8}-\d{6}", key) for key in keys)
    assert len(set(keys)) == len(keys)


def test_tar_shards_are_split_as_configured_and_webdataset_reads_pairs(folder: Path) -> None:
    import webdataset

    index = json.loads((folder / "index.json").read_text())
    assert index["synthetic"] is True
    assert [len(entry["episodes"]) for entry in index["tars"]] == [3, 1]
    for entry in index["tars"]:
        samples = list(webdataset.WebDataset(str(folder / entry["name"]), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [truth["key"] for truth in entry["episodes"]]
        assert all({"mp4", "jsonl"} <= set(sample) for sample in samples)


# 2. The law of one tick


def test_line_holds_the_state_before_its_own_tick(episodes: list[Episode]) -> None:
    for episode in episodes:
        outside = ~episode.gui[:-1]
        np.testing.assert_allclose(np.diff(episode.yaw)[outside], 0.15 * episode.dx[:-1][outside], atol=1e-9)
        np.testing.assert_allclose(np.diff(episode.pitch)[outside], 0.15 * episode.dy[:-1][outside], atol=1e-9)
        assert episode.yaw[0] == episode.pitch[0] == 0 and np.ptp(episode.yaw) > 5
        assert (episode.dx[:-1][outside] % 1 == 0).all() and (episode.dy[:-1][outside] % 1 == 0).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_pitch_stops_at_90_degrees_and_yaw_is_not_wrapped(sign: int) -> None:
    state = PlayerState()
    for _ in range(5):
        state = advance(state, Tick(dx=sign * 1000.0, dy=sign * 200.0), flat_world())
    assert state.pitch_deg == sign * 90
    assert state.yaw_deg == sign * 750


def test_frame_t_is_rendered_from_line_t(episodes: list[Episode]) -> None:
    index = next(i for i, e in enumerate(episodes) if not e.truth["gui_span"] and e.truth["extra_lines"] >= 0)
    episode, frames = episodes[index], episodes[index].frames()
    world = build_world(episode_module._rng(CONFIG, episode_module._WORLD, index))
    scenery = build_scenery(episode_module._rng(CONFIG, episode_module._SCENERY, 0), CONFIG.contrast)

    def distance(frame: int, line: int) -> float:
        at = episode.lines[line]
        luma = render(world, scenery, at["xpos"], at["zpos"], at["yaw"], at["pitch"])[0] * 255 / 219
        return float(np.abs(frames[frame].reshape(90, 4, 160, 4).mean((1, 3)) - luma).mean())

    for t in (0, 20, 40, 60):
        assert distance(t, t) < 6, "levels of 255; h264 at crf 28 costs about 3"
    errors = {lag: np.mean([distance(t, t + lag) for t in range(5, 55, 5)]) for lag in (-1, 0, 1)}
    assert errors[0] < 0.7 * min(errors[-1], errors[1]), errors


# 3. Actions matter


def test_turning_right_moves_the_picture_left_at_lag_0(turning: Episode) -> None:
    frames = turning.frames()
    shifts = np.array([shift_right(a, b) for a, b in pairwise(frames)])
    dx = turning.dx[: len(shifts)]
    small = np.abs(dx) < 50
    correlation = {}
    for lag in (-2, -1, 0, 1, 2):
        t = np.arange(2, len(shifts) - 2)
        t = t[small[t]]
        correlation[lag] = np.corrcoef(shifts[t], dx[t + lag])[0, 1]
    assert correlation[0] < -0.9, correlation
    assert min(correlation, key=correlation.get) == 0, correlation


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
def test_walking_follows_minecraft_axes(yaw_deg: float, key: str, step: tuple[int, int]) -> None:
    before = PlayerState(yaw_deg=yaw_deg)
    after = advance(before, Tick(keys=(f"key.keyboard.{key}",)), flat_world())
    moved = (after.x_blocks - before.x_blocks, after.z_blocks - before.z_blocks)
    np.testing.assert_allclose(moved, np.multiply(step, 0.2158), atol=1e-9)


def test_a_block_seen_ahead_comes_nearer_when_walking() -> None:
    world, scenery = flat_world(), build_scenery(np.random.default_rng(0), 0.0)
    world.heights[32, 40], world.kinds[32, 40] = 3, 5
    sizes = []
    state = PlayerState()
    for _ in range(3):
        picture = render(world, scenery, state.x_blocks, state.z_blocks, 0.0, 0.0)
        red = picture[2] > 10
        sizes.append(int(red.sum()))
        assert red[:, 80].any(), "a block straight ahead (+z at yaw 0) must be in the middle"
        for _ in range(8):
            state = advance(state, Tick(keys=("key.keyboard.w",)), world)
    assert sizes[0] < sizes[1] < sizes[2], sizes


@pytest.mark.parametrize("width", [1, 9])
def test_walking_stops_at_blocks_however_narrow(width: int) -> None:
    world = flat_world()
    world.heights[32 - width // 2 : 33 + width // 2, 36] = 1
    state = PlayerState()
    for _ in range(60):
        state = advance(state, Tick(keys=("key.keyboard.w",)), world)
        assert is_free(world, state.x_blocks, state.z_blocks)
    assert 34.5 < state.z_blocks < 36


def test_player_moves_only_while_a_walking_key_is_held(episodes: list[Episode]) -> None:
    moved = []
    for episode in episodes:
        walking = [bool({"w", "a", "s", "d"} & {key[-1] for key in keys}) for keys in episode.keyboard()[:-1]]
        steps = np.hypot(np.diff(episode.column("xpos")), np.diff(episode.column("zpos")))
        assert (steps[~np.array(walking)] == 0).all()
        moved.append(steps.sum())
    assert max(moved) > 2, "blocks walked in 3 s"


def test_step_statistics_at_5_hz_are_those_that_were_tried() -> None:
    # Script only: 60 s of ticks without rendering. Bounds are wide as the turning rate is random.
    script = write_script(np.random.default_rng(0), SampleConfig(), 12_000, stuck_attack=False, wheel=False, gui=False)
    yaw = DEG_PER_COUNT * np.array([tick.dx for tick in script.ticks]).reshape(-1, 4).sum(1)
    pitch = DEG_PER_COUNT * np.array([tick.dy for tick in script.ticks]).reshape(-1, 4).sum(1)
    walking = np.mean([bool(tick.keys) for tick in script.ticks])
    assert 11 < yaw.std() < 17
    assert 0.25 < np.corrcoef(yaw[1:], yaw[:-1])[0, 1] < 0.5
    assert 4.5 < pitch.std() < 6.5
    assert 0.3 < walking < 0.5


# 4. Quirks


def test_each_quirk_falls_on_its_share_of_the_episodes() -> None:
    quirks = plan_quirks(SampleConfig(num_episodes=40, line_mismatch_share=0.1, gui_share=0.05, wheel_share=0.25))
    assert sum(q.gui for q in quirks) == 2
    assert sum(q.wheel for q in quirks) == 10
    assert sum(q.stuck_attack for q in quirks) == 38
    assert sorted(q.extra_lines for q in quirks if q.extra_lines) == [-1, -1, 1, 1]


def test_line_counts_differ_from_frames_as_the_index_says(episodes: list[Episode]) -> None:
    for episode in episodes:
        assert len(episode.lines) == episode.truth["num_lines"]
        assert episode.truth["num_lines"] - episode.truth["num_frames"] == episode.truth["extra_lines"]
    assert sorted(episode.truth["extra_lines"] for episode in episodes) == [-1, 0, 0, 1]


def test_stuck_attack_is_held_until_the_first_true_click(episodes: list[Episode]) -> None:
    assert sorted(episode.truth["stuck_attack"] for episode in episodes) == [False, False, True, True]
    for episode in episodes:
        first = episode.truth["first_attack_tick"]
        end = len(episode.lines) if first is None else min(first, len(episode.lines))
        new = [line["mouse"]["newButtons"] for line in episode.lines]
        held = [0 in line["mouse"]["buttons"] for line in episode.lines]
        assert (0 in new[0]) == episode.truth["stuck_attack"]
        assert not any(0 in buttons for buttons in new[1:end])
        assert all(held[t] == episode.truth["stuck_attack"] for t in range(end))
        if end < len(episode.lines):
            assert 0 in new[end]


def test_hotbar_changes_on_the_line_after_a_wheel_tick_without_a_key(episodes: list[Episode]) -> None:
    assert sum(bool(episode.truth["wheel_ticks"]) for episode in episodes) == 2
    for episode in episodes:
        assert np.flatnonzero(np.diff(episode.hotbar)).tolist() == episode.truth["wheel_ticks"]
        wheel = episode.mouse("dwheel")
        assert np.flatnonzero(wheel).tolist() == episode.truth["wheel_ticks"]
        assert (np.diff(episode.hotbar) % 9 == -wheel[:-1] % 9).all()
        assert not any(key[-1].isdigit() for keys in episode.keyboard() for key in keys)


def test_gui_span_freezes_the_view_and_moves_the_cursor_by_two_per_count(episodes: list[Episode]) -> None:
    assert sum(bool(episode.truth["gui_span"]) for episode in episodes) == 2
    for episode in episodes:
        span = episode.truth["gui_span"]
        expected = np.zeros(len(episode.lines), bool)
        if span:
            start, end = span
            expected[start:end] = True
            assert len(set(episode.yaw[start : end + 1])) == len(set(episode.pitch[start : end + 1])) == 1
            assert GUI_KEY in episode.keyboard("newKeys")[start - 1], "the press shows on the line before the GUI"
            assert (episode.mouse("x")[start], episode.mouse("y")[start]) == (640, 360)
            for axis, d in (("x", episode.dx), ("y", episode.dy)):
                cursor = episode.mouse(axis)[start:end]
                np.testing.assert_array_equal(np.diff(cursor), 2 * d[start : end - 1])
                assert np.ptp(cursor) > 0
        np.testing.assert_array_equal(episode.gui, expected)


def test_gui_frames_are_dimmed_and_still_behind_the_panel(episodes: list[Episode]) -> None:
    episode = next(e for e in episodes if e.truth["gui_span"])
    start, end = episode.truth["gui_span"]
    border = episode.frames()[:, :40].mean((1, 2))
    assert border[start:end].max() < 0.6 * border[start - 1]
    assert np.ptp(border[start:end]) < 3


# 5. Determinism


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_workers_or_on_an_earlier_data_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sample-000009.tar").write_bytes(b"of an earlier data set")
    build_sample(tmp_path, CONFIG, num_workers=2)
    assert files(tmp_path) == files(folder)


def test_an_interrupted_build_leaves_no_index(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.json").write_bytes((folder / "index.json").read_bytes())

    def fail(config: SampleConfig, index: int) -> None:
        raise RuntimeError("stopped half-way")

    monkeypatch.setattr(build_module, "record_episode", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        build_sample(tmp_path, CONFIG, num_workers=1)
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(
    "field", ["num_episodes", "episode_s", "contrast", "walking_share", "gui_share", "turn_tau_s", "crf", "seed"]
)
def test_a_value_out_of_range_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} .*-1"):
        parse_dataclass(SampleConfig, asdict(SampleConfig()) | {field: -1}, "sample")
