"""Example data of every source for the contract test: one function per source, named like its module.

To add a source: a function of its name that returns its Examples. `write(folder, seeds)` writes one recording (or a few) per
seed, always the same bytes for the same seed, so that a longer list of seeds adds recordings and changes none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.droid_makers import CAMERAS, decode, droid_features, make_episode, to_example, to_jpeg, write_raw, write_tfds
from tests.makers import make_vpt_pair, write_vpt_tar
from tests.sources.lerobot_makers import CAMERA, cached_video, write_v2, write_v3


@dataclass(frozen=True)
class Example:
    """Tiny data of one source.

    Attributes:
        options: The source's options.
        action_space: One whose controls the source provides.
        write: Writes the recordings of these seeds below a folder, which is then the input.
        damage: Damages the recording of a seed that was written.
        rows_hz: Rows of controls per second.
        changes: Options that differ from `options`, each of which must change the recipe; together they name every option.
    """

    options: Mapping[str, Any]
    action_space: str
    write: Callable[[Path, Sequence[int]], object]
    damage: Callable[[Path, int], object]
    rows_hz: float
    changes: Sequence[Mapping[str, Any]] = ()


def vpt() -> dict[str, Example]:
    """Tar shards of one contractor recording each."""

    def write(folder: Path, seeds: Sequence[int]) -> None:
        for seed in seeds:
            write_vpt_tar(folder / f"{seed:03d}.tar", {f"segment-{seed}": _vpt_pair(seed)})

    def damage(folder: Path, seed: int) -> None:
        video, lines = _vpt_pair(seed)
        write_vpt_tar(folder / f"{seed:03d}.tar", {f"segment-{seed}": (video, lines.replace(b'"dx"', b'"xd"', 1))})

    simple = {"schema": "simple", "camera_unit": "delta_deg"}
    contractor = {"schema": "contractor"}
    changes = [simple, {**simple, "camera_unit": "absolute_rad"}]
    return {"contractor": Example(contractor, "vpt36", write, damage, 20.0, changes)}


def lerobot() -> dict[str, Example]:
    """v2.1 with an episode per seed; v3.0 with two episodes in a file per seed."""
    options = {"camera": CAMERA, "actions": ["action"], "states": ["observation.state"]}
    changes = [
        {**options, "camera": "observation.images.wrist"},
        {**options, "actions": ["action[0]"]},
        {**options, "states": ["observation.state[pan]"]},
        {**options, "columns": {"success": "is_episode_successful"}},
    ]

    def write_single(folder: Path, seeds: Sequence[int]) -> None:
        write_v2(folder / "arm", dict.fromkeys(seeds, 12))

    def damage_single(folder: Path, seed: int) -> None:
        (folder / f"arm/videos/chunk-000/{CAMERA}/episode_{seed:06d}.mp4").write_bytes(b"no video at all")

    def write_packed(folder: Path, seeds: Sequence[int]) -> None:
        write_v3(folder / "arm", [{2 * seed: 12, 2 * seed + 1: 9} for seed in seeds])

    def damage_packed(folder: Path, seed: int) -> None:
        (folder / f"arm/data/chunk-000/file-{seed:03d}.parquet").write_bytes(b"PAR1 no table PAR1")

    return {
        "v2": Example(options, "vector_last2x3", write_single, damage_single, 10.0, changes),
        "v3": Example(options, "vector_sum2x3", write_packed, damage_packed, 10.0, changes),
    }


def mp4_json() -> dict[str, Example]:
    """A pair per seed: 2-D moves of a pointer, one for each frame."""

    def write(folder: Path, seeds: Sequence[int]) -> None:
        for seed in seeds:
            rng = np.random.default_rng(seed)
            actions = rng.normal(size=(12, 2)).round(3)
            states = np.cumsum(actions, axis=0) - actions
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{seed:03d}.mp4").write_bytes(cached_video(12, seed % 3))
            records = {"fps": 10, "actions": actions.tolist(), "states": states.tolist()}
            (folder / f"{seed:03d}.json").write_text(json.dumps(records))

    def damage(folder: Path, seed: int) -> None:
        (folder / f"{seed:03d}.json").write_text('{"fps": 10, "actions": [[1, 2], [3]]}')

    return {"pairs": Example({}, "vector_sum2x2", write, damage, 10.0)}


def _vpt_pair(seed: int) -> tuple[bytes, bytes]:
    return cached_video(12, seed % 3, 20), make_vpt_pair(1, seed, num_lines=12)[1]


def droid_rlds() -> dict[str, Example]:
    """A TFDS directory of one shard and one episode per seed."""
    path = "steps/observation/wrist_image_left"
    changes = [
        {"camera": "wrist"},
        {"split": "val"},
        {"native_hz": 5.0},
        {"cameras": {"exterior_1": path}},
        {"pose": ["steps/action"]},
        {"command": []},
        {"joint_velocity_command": "steps/action_dict/joint_position"},
        {"success": "episode_metadata/recording_folderpath"},
        {"episode_key": ["episode_metadata/file_path"]},
        {"gripper_one_is": "open"},
    ]

    def write_one(folder: Path, seed: int, *, damaged: bool = False) -> None:
        episode = make_episode(seed, 12)
        pictures = [to_jpeg(frame) for frame in decode(episode.videos["exterior_1"])]
        images = dict.fromkeys(CAMERAS, pictures)
        if damaged:
            images["exterior_1"] = [b"no picture at all"] * 12
        place = folder / f"droid_{seed}" / "1.0.0"
        if place.exists():
            shutil.rmtree(place)
        write_tfds(place, droid_features((48, 64)), [[to_example(episode, images)]])

    def write(folder: Path, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if not (folder / f"droid_{seed}").exists():  # Protobuf may write the same record in other bytes.
                write_one(folder, seed)

    def damage(folder: Path, seed: int) -> None:
        write_one(folder, seed, damaged=True)

    return {"shard": Example({}, "droid_command7", write, damage, 15.0, changes)}


def droid_raw() -> dict[str, Example]:
    """A folder of the raw release per seed."""

    def write(folder: Path, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if not (folder / f"ILIAD/success/2023-04-21/made-{seed}").exists():
                write_raw(folder, make_episode(seed, 24))

    def damage(folder: Path, seed: int) -> None:
        shutil.rmtree(folder / f"ILIAD/success/2023-04-21/made-{seed}/recordings")

    changes = [{"camera": "wrist"}]
    return {"episode": Example({"camera": "exterior_1"}, "pose7_camera", write, damage, 15.0, changes)}
