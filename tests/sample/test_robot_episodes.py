"""Claims about the simulated robot's recordings.

1. Scripts depend on the settings and the episode's number alone, stay in the workspace and the limits, and every look is drawn anew.
2. `droid_raw` reads the folder as it is: frame t shows row 3 t, the poses are those of the world, commands lead to them.
3. Pushes move the block, and the index says how far.
4. The bytes depend on the settings alone, not on the workers; the set is whole or the earlier one.
5. What was recorded and what not is told apart by the seeds of looks.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError, parse_dataclass
from jepa_cache.sample import robot_episodes
from jepa_cache.sample.robot import BLOCK_AREA_M, WORKSPACE_M, RobotWorld
from jepa_cache.sample.robot_episodes import (
    LAB,
    MAX_COMMAND_M,
    NUM_RECORDED_LOOKS,
    RobotSampleConfig,
    build_robot_sample,
    draw_script,
)
from jepa_cache.sources import build_source
from jepa_cache.sources.droid_raw import TRAJECTORY
from tests.droid_makers import decode
from tests.encoded import all_files
from tests.robot_worlds import needs_robot
from tests.workspace import SUITE_SETTINGS

PRESET = load_config(SUITE_SETTINGS, ["dataset=sample_robot"]).dataset
DEFAULT = parse_dataclass(RobotSampleConfig, PRESET.sample, "sample")
SMALL = dataclasses.replace(
    DEFAULT, num_random=1, num_reach=1, num_push=2, num_steps=4, num_push_steps=8, size=64, random_looks=0.5, seed=3
)


# 1. Scripts


def test_scripts_stay_in_the_workspace_and_the_limits_and_every_episode_has_a_look_of_its_own():
    scripts = [draw_script(DEFAULT, index) for index in range(len(DEFAULT.kinds))]
    for script in scripts:
        places = script.start["position"] + np.cumsum(script.actions[:, :3], axis=0)
        assert np.all((places > WORKSPACE_M[0] - 1e-9) & (places < WORKSPACE_M[1] + 1e-9))
        assert np.abs(script.actions[:, :3]).max() <= MAX_COMMAND_M + 1e-9 and not script.actions[:, 3:].any()
        if script.kind == "push":
            assert np.all((script.start["block"] > BLOCK_AREA_M[0]) & (script.start["block"] < BLOCK_AREA_M[1]))
    assert len({script.look for script in scripts}) == len({script.name for script in scripts}) == len(scripts)
    assert max(script.look for script in scripts) < NUM_RECORDED_LOOKS


def test_a_script_is_the_same_whatever_is_drawn_beside_it_and_other_seeds_draw_others():
    again, other = draw_script(SMALL, 3), draw_script(dataclasses.replace(SMALL, seed=4), 3)
    looks_off = draw_script(dataclasses.replace(SMALL, random_looks=0.0), 3)
    first = draw_script(SMALL, 3)
    for script in (again, looks_off):
        assert np.array_equal(script.actions, first.actions)
        assert np.array_equal(script.start["position"], first.start["position"]) and script.seed == first.seed
    assert looks_off.look is None
    assert other.seed != first.seed and not np.array_equal(other.actions, first.actions)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cameras": ["front"]}, "cameras is 'front'; known: exterior_1, exterior_2, wrist"),
        ({"cameras": []}, "cameras"),
        ({"size": 63}, "size must be a multiple of 2"),
        ({"random_looks": 2.0}, "random_looks must be at most 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        parse_dataclass(RobotSampleConfig, {**PRESET.sample, **change}, "sample")


# 2 to 5. Recordings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_robot_sample(tmp_path_factory.mktemp("robot"), SMALL, num_workers=1).parent


@pytest.fixture(scope="module")
def episodes(folder):
    """By key, as the source reads them."""
    source = build_source(PRESET.source, PRESET.source_options)
    units = source.list_units([str(folder)], folder)
    return {episode.key: episode for unit in units for episode in source.iter_episodes(unit)}


@needs_robot
def test_droid_raw_reads_every_episode_and_its_rows_are_what_the_world_did(folder, episodes):
    truths = json.loads((folder / "index.json").read_text())["episodes"]
    assert {truth["key"] for truth in truths} == set(episodes)
    world = RobotWorld(SMALL.size)
    for index in (0, 3):
        script, episode = draw_script(SMALL, index), episodes[truths[index]["key"]]
        observation, _ = world.reset(seed=script.seed, options={**script.start, "look": script.look})
        frames, states, targets = [observation["frame"]], [observation["state"]], []
        for action in script.actions:
            observation, *_, info = world.step(action)
            frames.append(observation["frame"])
            states.append(observation["state"])
            targets.append(info["target"])
        assert np.array_equal(episode.frame_ticks, 3 * np.arange(len(frames)))
        poses = np.stack(
            [episode.controls[name] for name in ("x_m", "y_m", "z_m", "rx_rad", "ry_rad", "rz_rad", "gripper")]
        )
        assert np.array_equal(poses.T[::3], states)
        commanded = np.stack([episode.controls[f"command_{name}"] for name in ("x_m", "y_m", "z_m")]).T
        assert np.array_equal(commanded[:-1:3], np.array(targets)[:, :3])
        seen = np.array(decode(Path(episode.video).read_bytes()), float)
        assert np.abs(seen - frames).mean() < 6, "h264"
        assert np.abs(seen - frames).mean() < 0.5 * np.abs(np.roll(seen, 1, axis=0) - frames).mean() or index == 0
    world.close()


@needs_robot
def test_pushes_move_the_block_and_the_index_says_how_far(folder):
    truths = json.loads((folder / "index.json").read_text())["episodes"]
    for truth in truths:
        moved = np.subtract(truth["block_last_m"], truth["block_first_m"])[:2]
        assert truth["block_moved_m"] == pytest.approx(np.linalg.norm(moved), abs=1e-9)
        assert (
            (truth["block_moved_m"] > 0.02)
            == (truth["kind"] == "push")
            == (truth["kind"] == "push" and "/success/" in truth["key"])
        )


@needs_robot
def test_the_bytes_depend_on_the_settings_alone_and_a_failed_run_leaves_the_earlier_set(folder, tmp_path, monkeypatch):
    out = tmp_path / "again"
    (out / LAB / "success").mkdir(parents=True)
    (out / LAB / "success" / TRAJECTORY).write_bytes(b"of an earlier set")
    build_robot_sample(out, SMALL, num_workers=2)
    assert all_files(out) == all_files(folder)
    monkeypatch.setattr(robot_episodes, "_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_robot_sample(out, DEFAULT, num_workers=1)
    assert all_files(out) == all_files(folder)


def test_no_episode_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="num_random, num_reach and num_push are all 0"):
        build_robot_sample(tmp_path, dataclasses.replace(DEFAULT, num_random=0, num_reach=0, num_push=0), num_workers=1)
    assert not any(tmp_path.iterdir())


@needs_robot
def test_a_push_that_would_begin_in_the_block_is_drawn_again(tmp_path, monkeypatch):
    reset, tried = RobotWorld.reset, []

    def blocked_twice(world, **options):
        tried.append(options["options"]["block"].tolist())
        if len(tried) <= 2:
            raise robot_episodes.BlockedError("a block would lie in the gripper")
        return reset(world, **options)

    monkeypatch.setattr(RobotWorld, "reset", blocked_twice)
    truth = robot_episodes._record(SMALL, tmp_path, 2)
    assert len(tried) == 3 and len({tuple(block) for block in tried}) == 3
    assert np.allclose(truth["block_first_m"][:2], tried[-1], atol=1e-3)
    tried[:] = []
    monkeypatch.setattr(robot_episodes, "MAX_ATTEMPTS", 2)
    with pytest.raises(robot_episodes.BlockedError):
        robot_episodes._record(SMALL, tmp_path / "second", 2)
