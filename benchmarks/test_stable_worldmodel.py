"""The bench on stable-worldmodel's ground, without that package.

Claims:
- what the writer leaves is read by the source `lerobot` as it was given: lengths, each row's action and state, every pixel;
- starts and goals are rows of one episode, `GOAL_OFFSET` apart, of episodes that are long enough;
- the exact dynamics let a plan through the door and nowhere else, and actions are clipped as the environment clips them.
"""

from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.stable_worldmodel import CAMERA, FPS, GOAL_OFFSET, ExactRooms, LerobotWriter, StartsAndGoals
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source


def make_episode(length, seed):
    rng = np.random.default_rng(seed)
    return {
        "pixels": list(rng.integers(0, 256, (length, 32, 48, 3), dtype=np.uint8)),
        "action": list(rng.uniform(-1, 1, (length, 2)).astype(np.float32)),
        "state": list(rng.uniform(0, 224, (length, 2)).astype(np.float32)),
        "proprio": [np.full(2, row, np.float32) for row in range(length)],
    }


def test_recorded_episodes_are_read_as_they_were_given(tmp_path):
    episodes = [make_episode(length, length) for length in (7, 30)]
    with LerobotWriter(tmp_path / "set", {"action": "action", "observation.state": "state"}) as writer:
        writer.write_episodes(iter(episodes))
    options = {"camera": CAMERA, "actions": ["action"], "states": ["observation.state"]}
    source = build_source("lerobot", options)
    units = source.list_units([str(tmp_path / "set")], tmp_path)
    read = list(source.iter_episodes(units[0]))
    assert len(units) == 1 and [episode.num_ticks for episode in read] == [7, 30]
    for given, episode in zip(episodes, read, strict=True):
        assert episode.fps == FPS and np.array_equal(episode.frame_ticks, np.arange(episode.num_ticks))
        for name in ("action", "state"):
            columns = np.stack([episode.controls[f"{name}_{number}"] for number in range(2)], axis=1)
            assert np.array_equal(columns.astype(np.float32), np.stack(given[name]))
        with open_video(episode.video, "pyav", first_frame=episode.first_frame) as video:
            assert np.array_equal(video.read(np.arange(episode.num_ticks)), np.stack(given["pixels"]))


def test_goals_lie_the_offset_after_their_starts():
    pairs = StartsAndGoals(0)
    pairs.write_episodes(make_episode(length, length) for length in (GOAL_OFFSET, GOAL_OFFSET + 1, 60, 60))
    assert len(pairs.pairs) == 3  # the first is too short
    loaded = pairs.load_chunk(np.arange(3), np.zeros(3, int), np.zeros(3, int))
    assert all(float(pair["proprio"][1, 0] - pair["proprio"][0, 0]) == GOAL_OFFSET for pair in loaded)
    assert tuple(loaded[0]["pixels"].shape) == (2, 3, 32, 48)  # as their readers give it


def test_the_exact_dynamics_pass_the_wall_at_the_door_alone():
    agent = {"radius": SimpleNamespace(value=np.array([7.0])), "speed": SimpleNamespace(value=np.array([5.0]))}
    env = SimpleNamespace(wall_axis=1, wall_thickness=10, variation_space={"agent": agent})
    env.BORDER_SIZE, env.IMG_SIZE, env.WALL_CENTER = 14, 224, 112
    env.door_positions, env.door_sizes = torch.tensor([49.0]), torch.tensor([14.0])
    starts = torch.tensor([[90.0, 49.0], [90.0, 150.0]])  # before the door, and before the wall
    info = {"state": starts[:, None, None], "goal_state": starts[:, None, None]}
    right = torch.tensor([5.0, 0.0]).repeat(2, 1, 2, 5)  # clipped to 1: two blocks of five rows, 50 pixels
    costs = ExactRooms(env).get_cost(info, right)
    assert costs.shape == (2, 1)
    assert costs[0, 0] == 50.0 and 0 < costs[1, 0] < 10
