"""The simulator that a data set was recorded in; imports nothing that takes long, as most data sets have none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.config.schema import Config
from jepa_cache.files import atomic_file, replaced_files
from jepa_cache.store.recipe import canonical_json

if TYPE_CHECKING:
    from jepa_cache.sample.robot import RobotWorld


FILM_FILES = ("film.*", "report.html")
"""Beside episodes.csv; where an experiment makes none, those of an earlier one go."""


def open_simulator(config: Config) -> RobotWorld | None:
    """The simulator of a data set, with the camera of the cache; None for a data set without.

    Raises:
        ValueError: The cache does not fit it (every setting is named), or something that it needs is not installed.
    """
    dataset, encode = config.dataset, config.encode
    rendered_by = dataset.sample if dataset.has_simulator else None
    if rendered_by is None:
        return None

    from jepa_cache.sample.robot import CAMERAS, STEP_HZ, RobotWorld
    from jepa_cache.sample.robot_episodes import RobotSampleConfig

    obstacles = []
    if encode.mode != "frame":
        obstacles.append(f"encode.mode must be frame, one picture a step; it is {encode.mode}")
    if encode.fps != STEP_HZ:
        obstacles.append(f"encode.fps must be {STEP_HZ:g}, the simulator's steps; it is {encode.fps:g}")
    if len(encode.cameras) != 1 or encode.cameras[0] not in CAMERAS:
        got = ", ".join(encode.cameras) or "none"
        obstacles.append(f"encode.cameras must name one of {', '.join(CAMERAS)}; got {got}")
    if obstacles:
        raise ValueError(f"nothing can be acted with this cache: {'; '.join(obstacles)}")
    sample = parse_dataclass(RobotSampleConfig, rendered_by, f"configs/dataset/{dataset.name}.yaml: sample")
    return RobotWorld(sample.size, camera=encode.cameras[0])


def write_nothing(out: Path, reason: str) -> None:
    """Say in metrics.json why nothing was done, for DVC, which wants its outs."""
    with replaced_files(out / "run", "episodes.csv", stale=FILM_FILES) as folder:
        (folder / "episodes.csv").write_text("policy\n", encoding="utf-8")
    for name, content in {"metrics.json": {"nothing_done": reason}, "summary.json": {}}.items():
        with atomic_file(out / name) as temporary:
            temporary.write_bytes(canonical_json(content))
