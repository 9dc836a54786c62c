"""Episodes of the simulated robot in the form of DROID's raw release, read by the source droid_raw as it is.

A folder an episode: trajectory.h5 with rows at 15 Hz (measured and commanded poses), metadata, and an mp4 of 5 Hz per camera; frame t
shows row 3 t. What is done in an episode is a script, drawn from the seed alone and without the simulator. Three kinds:

- `random`: correlated random displacements, gripper open;
- `reach`: straight from one drawn place to the next, gripper open;
- `push`: the closed gripper starts beside the block, pushes it roughly straight, then moves about at random.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import av
import numpy as np
from pydantic import Field
from tqdm import tqdm

from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import Count, CountOrZero, Once, Seed, Settings, Share
from jepa_cache.files import replaced_files
from jepa_cache.sample.build import INDEX, record_all, write_index
from jepa_cache.sample.episode import encode_video
from jepa_cache.sample.robot import (
    BLOCK_AREA_M,
    ROWS_PER_STEP,
    STEP_HZ,
    WORKSPACE_M,
    BlockedError,
    RobotWorld,
    find_assets,
    import_mujoco,
)

LAB = "SIMULATED"
"""The lab's name in keys, and the folder of all episodes."""
MAX_COMMAND_M = 0.06
"""Largest displacement along an axis of one step of a script."""
NUM_RECORDED_LOOKS = 2**31
"""Seeds of recorded looks lie below: a look of this seed or a higher one was never recorded."""

# From the block's centre to the closed fingers at the start. The gripper is wide along y: there it touches the block at 9 cm, along x at 4.
_PUSH_START_M, _MORE_ALONG_Y_M, _PUSH_START_RANGE_M = 0.05, 0.045, 0.04
_PUSH_HEIGHT_M = (0.03, 0.05)
MAX_ATTEMPTS = 20  # to draw a push that begins clear of the block; about one in a hundred does not at once
_SCRIPT, _LOOK = range(2)  # streams of random numbers, so that a change in one leaves the other as it was
_SHORT = {"exterior_1": "ext1", "exterior_2": "ext2", "wrist": "wrist"}  # in names of DROID's metadata


@dataclass(frozen=True)
class RobotSampleConfig(Settings):
    """Settings of one set of simulated episodes; the same settings give the same files on the same machine."""

    seed: Seed
    num_random: CountOrZero  # episodes of each kind
    num_reach: CountOrZero
    num_push: CountOrZero
    num_steps: Count  # of 0.2 s in a random or reach episode
    num_push_steps: Count
    random_looks: Share  # of the episodes have a look of their own; the others have the plain one
    cameras: Annotated[tuple[Literal["exterior_1", "exterior_2", "wrist"], ...], Field(min_length=1), Once]
    size: Annotated[int, Field(ge=32, le=1024, multiple_of=2)]  # pixels, square
    crf: Annotated[int, Field(ge=0, le=51)]  # x264 quality

    @property
    def kinds(self) -> list[str]:
        """The kind of every episode."""
        return ["random"] * self.num_random + ["reach"] * self.num_reach + ["push"] * self.num_push


class Script(NamedTuple):
    """What happens in one episode."""

    name: str
    kind: str
    look: int | None  # seed of a look; None: the plain one
    seed: int  # of what the options leave open
    start: dict[str, Any]  # options of `RobotWorld.reset`
    actions: np.ndarray  # [K, 7]


def draw_script(config: RobotSampleConfig, index: int, attempt: int = 0) -> Script:
    """The script of an episode: a pure function of the settings, the episode's number and, where one could not be played, the attempt."""
    kind = config.kinds[index]
    rng = np.random.default_rng([config.seed, _SCRIPT, index, *([attempt] if attempt else [])])
    if kind == "push":
        start, moves = draw_push(rng, config.num_push_steps)
    else:
        start = {"position": rng.uniform(*WORKSPACE_M), "gripper": 0.0}
        draw = _wander if kind == "random" else _visit
        moves = draw(rng, start["position"], config.num_steps)
    actions, place_m = np.zeros((len(moves), 7)), start["position"]
    for step, move in enumerate(np.clip(moves, -MAX_COMMAND_M, MAX_COMMAND_M)):
        after_m = np.clip(place_m + move, *WORKSPACE_M)
        actions[step, :3], place_m = after_m - place_m, after_m
    looks = np.random.default_rng([config.seed, _LOOK, index])
    own = looks.random() < config.random_looks
    look = int(looks.integers(NUM_RECORDED_LOOKS)) if own else None
    return Script(f"{kind}-{index:05d}", kind, look, int(rng.integers(2**31)), start, actions)


def draw_push(rng: np.random.Generator, num_steps: int) -> tuple[dict[str, Any], np.ndarray]:
    """Options of `reset` that put the closed gripper beside a block, and displacements [K, 3] m that push it and then wander."""
    while True:
        block = rng.uniform(*BLOCK_AREA_M)
        angle = rng.integers(4) * np.pi / 2 + rng.uniform(-0.7, 0.7)  # against a face: at an edge the block slips away
        ahead = np.array([np.cos(angle), np.sin(angle)])
        away_m = _PUSH_START_M + _MORE_ALONG_Y_M * ahead[1] ** 2 + rng.uniform(0, _PUSH_START_RANGE_M)
        way_m = away_m + rng.uniform(0, 0.10)
        start = block - away_m * ahead + rng.normal(0, 0.008) * np.array([-ahead[1], ahead[0]])
        ends = np.stack((start, start + way_m * ahead))
        if np.all((ends > WORKSPACE_M[0, :2]) & (ends < WORKSPACE_M[1, :2])):
            break
    position = np.array([*start, rng.uniform(*_PUSH_HEIGHT_M)])
    pace_m = rng.uniform(0.02, 0.055)
    num_pushing = min(num_steps, round(way_m / pace_m))
    moves = np.zeros((num_steps, 3))
    moves[:num_pushing, :2] = pace_m * ahead + rng.normal(0, 0.006, (num_pushing, 2))
    moves[:num_pushing, 2] = rng.normal(0, 0.002, num_pushing)
    moves[num_pushing:] = _wander(rng, position + moves[:num_pushing].sum(axis=0), num_steps - num_pushing)
    return {"position": position, "block": block, "gripper": 1.0}, moves


def _wander(rng: np.random.Generator, place_m: np.ndarray, num_steps: int) -> np.ndarray:
    """Correlated random displacements [K, 3] m, turned back where they would leave the workspace."""
    moves, speed = np.zeros((num_steps, 3)), np.zeros(3)
    for step in range(num_steps):
        speed = np.clip(0.6 * speed + rng.normal(0, 0.03, 3), -MAX_COMMAND_M, MAX_COMMAND_M)
        outside = (place_m + speed < WORKSPACE_M[0]) | (place_m + speed > WORKSPACE_M[1])
        speed = np.where(outside, -speed, speed)
        moves[step], place_m = speed, place_m + speed
    return moves


def _visit(rng: np.random.Generator, place_m: np.ndarray, num_steps: int) -> np.ndarray:
    """Displacements [K, 3] m straight to places drawn one after the other, with a little noise."""
    moves, goal_m = np.zeros((num_steps, 3)), rng.uniform(*WORKSPACE_M)
    for step in range(num_steps):
        if np.abs(goal_m - place_m).max() < 0.01:
            goal_m = rng.uniform(*WORKSPACE_M)
        way_m = goal_m - place_m
        moves[step] = way_m * min(1.0, 0.05 / np.abs(way_m).max()) + rng.normal(0, 0.003, 3)
        place_m = place_m + moves[step]
    return moves


def build_robot_sample(out: Path, config: RobotSampleConfig, *, num_workers: int) -> Path:
    """Record the episodes into `out` with an index, and return the index's path.

    All episodes are published at once in place of earlier ones, `index.json` last, so its presence means complete. The bytes depend on the
    settings and library versions only, not on the workers.

    Cost: 33 ms of CPU time a frame of 256 pixels (a busy core) and 4 kB.

    Raises:
        ValueError: MuJoCo, the model files or an OpenGL library are missing, or no episode is asked for.
        RuntimeError: The physics became unstable.
    """
    if not config.kinds:
        raise ConfigError("num_random, num_reach and num_push are all 0; at least one episode is needed")
    import_mujoco()  # what is missing is said here, before workers start
    find_assets()
    with replaced_files(out, INDEX) as fresh:
        record, num_episodes = functools.partial(_record, config, fresh / LAB), len(config.kinds)
        recorded = record_all(record, num_episodes, min(num_workers, num_episodes))
        truths = list(tqdm(recorded, total=num_episodes, desc="sample (simulated robot)", unit="episode"))
        _open_world.cache_clear()
        write_index(fresh, config, fps_hz=STEP_HZ, episodes=truths)
    return out / INDEX


@functools.lru_cache(maxsize=1)
def _open_world(size: int) -> RobotWorld:
    """The world of this process: making one takes 2 s, and what an episode leaves behind ends with the next reset."""
    return RobotWorld(size)


def _record(config: RobotSampleConfig, folder: Path, index: int) -> dict[str, Any]:
    """Play one script and write its episode below `folder`; gives what is true of it."""
    world = _open_world(config.size)
    for attempt in range(MAX_ATTEMPTS):
        script = draw_script(config, index, attempt)
        try:
            seen, info = world.reset(seed=script.seed, options={**script.start, "look": script.look})
            break
        except BlockedError as error:  # of a push that was to begin close to the block
            blocked = error
    else:
        raise blocked
    first_block, rows, commands = info["block"], [], []

    def look(camera: str) -> np.ndarray:
        return seen["frame"] if camera == world.camera else world.render(camera)

    pictures: dict[str, list[np.ndarray]] = {camera: [look(camera)] for camera in config.cameras}
    for action in script.actions:
        seen, *_, info = world.step(action)
        rows.append(info["rows"])
        commands.append(np.repeat(info["target"][None], ROWS_PER_STEP, axis=0))
        for camera, taken in pictures.items():
            taken.append(look(camera))
    poses = np.concatenate((*rows, world.state()[None]))
    commanded = np.concatenate((*commands, info["target"][None]))
    moved_m = float(np.linalg.norm((info["block"] - first_block)[:2]))
    outcome = "failure" if script.kind == "push" and moved_m < 0.02 else "success"
    inside = f"{outcome}/2025-01-01/{script.name}"
    truth = {
        "key": f"{LAB}/{inside}",
        "kind": script.kind,
        "look": script.look,
        "num_steps": len(script.actions),
        "block_first_m": first_block.tolist(),
        "block_last_m": info["block"].tolist(),
        "block_moved_m": moved_m,
    }
    _write_episode(
        folder / inside, truth, poses, commanded, {it: encode_pictures(pictures[it], config.crf) for it in pictures}
    )
    return truth


def _write_episode(
    folder: Path, truth: dict[str, Any], poses: np.ndarray, commands: np.ndarray, videos: dict[str, bytes]
) -> None:
    """Write an episode's folder as DROID's raw release has it; poses and commands are [M, 7]."""
    import h5py

    (folder / "recordings/MP4").mkdir(parents=True)
    inside = truth["key"].removeprefix(f"{LAB}/")
    metadata = {
        "uuid": f"{LAB}+{folder.name}",
        "lab": LAB,
        "success": inside.startswith("success"),
        "hdf5_path": f"{inside}/trajectory.h5",
        "trajectory_length": len(poses),
        "current_task": f"simulated robot: {truth['kind']}",
        "synthetic": True,
    }
    for camera, video in videos.items():
        serial = f"sim-{camera}"
        path = f"{inside}/recordings/MP4/{serial}.mp4"
        (folder / f"recordings/MP4/{serial}.mp4").write_bytes(video)
        metadata |= {f"{_SHORT[camera]}_cam_serial": serial, f"{_SHORT[camera]}_mp4_path": path}
        metadata.setdefault("left_mp4_path", path)
    (folder / f"metadata_{metadata['uuid']}.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    with h5py.File(folder / "trajectory.h5", "w") as file:
        for group, values in (("observation/robot_state", poses), ("action", commands)):
            file[f"{group}/cartesian_position"] = values[:, :6]
            file[f"{group}/gripper_position"] = values[:, 6]


def encode_pictures(pictures: Sequence[np.ndarray], crf: int) -> bytes:
    """An h264 mp4 of uint8 pictures [h, w, 3] at STEP_HZ."""
    height, width = pictures[0].shape[:2]
    frames = (av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures)
    return encode_video(frames, width, height, STEP_HZ, preset="veryfast", crf=str(crf))
