"""DROID as its raw release: a folder per episode with metadata, trajectory.h5 and an mp4 per camera."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.config.machine import spell_name
from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.media.images import SideBySide
from jepa_cache.media.probe import probe_video
from jepa_cache.media.tar import is_file_name
from jepa_cache.sources import Unit
from jepa_cache.sources._droid_folders import (
    LIST_SUFFIXES,
    TRAJECTORY,
    check_camera,
    find_camera_file,
    find_folders,
    find_success,
    list_metadata,
    name_episode,
    read_list,
    read_metadata,
)
from jepa_cache.sources._droid_rows import Rows, align_frames, build_controls
from jepa_cache.sources._hdf5 import Hdf5File

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

# A single view of the release's cameras is 16:9 (1.78), two side by side are 3.56; by the size, because file names are not reliable.
MIN_STEREO_ASPECT = 2.5


@dataclass(frozen=True)
class RawOptions:
    """Options of the source.

    Attributes:
        camera: "left" (the one that the metadata call left_mp4_path, as in the official training), "exterior_1",
            "exterior_2" or "wrist".
    """

    camera: str = "left"

    def __post_init__(self) -> None:
        """Check the values."""
        check_camera(self.camera)


def build(options: Mapping[str, Any]) -> DroidRawSource:
    """Make the source from the `source_options` of a preset.

    Raises:
        ValueError: An unknown option (the nearest known one is named) or a wrong value.
    """
    return DroidRawSource(parse_dataclass(RawOptions, options, "source_options of droid_raw"))


class DroidRawSource:
    """Reads raw DROID episodes; holds its options and nothing else. A unit is the files of one episode and camera.

    Frame t shows the state of row t (the official loader's indexing); a video of another rate is placed by time. Where
    there are more frames than rows, or fewer, both begin together and the shorter decides.
    """

    def __init__(self, options: RawOptions) -> None:
        """Hold the options."""
        self.options = options
        self.recipe: dict[str, object] = {"source": "droid_raw", "recipe_version": RECIPE_VERSION, **asdict(options)}

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find episodes: folders, searched for trajectory.h5, or lists of episode folders (.csv, .txt), relative to `base`.

        An episode without metadata or video is a unit too, of the files that it has: it is then reported as skipped.

        Raises:
            ValueError: An input finds no episode, or a list names a folder that holds none.
        """
        folders: dict[Path, Path] = {}
        for given in inputs:
            path = base / Path(given).expanduser()
            if path.is_dir():
                found = list(find_folders(path))
            elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
                found = read_list(path)
            else:
                found = []
            if not found:
                raise ValueError(
                    f"the input {given!r} finds no {TRAJECTORY}; relative inputs start from {base}. Give a folder of the raw "
                    f"release or a list of episode folders ({', '.join(LIST_SUFFIXES)}), as jepa-cache index-droid writes it"
                )
            for folder in found:
                folders.setdefault(folder.resolve(), folder)
        return [self._make_unit(folder) for folder in sorted(folders.values())]

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the one episode of a unit.

        Skipped, with the reason: no or unreadable metadata, a missing, damaged or unplaceable video, a trajectory.h5 that
        is missing, damaged, links to other files or has arrays of other shapes.
        """
        folder = unit.files[0].parent
        try:
            yield self._read_episode(folder)
        except ValueError as error:
            yield Skipped(unit.name, str(error))

    def name_skipped(self, unit: Unit, key: str) -> str:
        """The episode's present folder; see `Source`."""
        return unit.name

    def _make_unit(self, folder: Path) -> Unit:
        files = [folder / TRAJECTORY] if is_file_name(folder / TRAJECTORY) else []
        files += list_metadata(folder)[:1]
        with contextlib.suppress(ValueError):  # iter_episodes meets the same error and reports it.
            files.append(find_camera_file(folder, read_metadata(folder), self.options.camera).path)
        return Unit(spell_name("/".join(folder.parts[-4:])), tuple(files))

    def _read_episode(self, folder: Path) -> Episode:
        metadata = read_metadata(folder)
        camera = find_camera_file(folder, metadata, self.options.camera)
        video: Path | SideBySide = camera.path
        info = probe_video(video)
        notes: list[str] = []
        if info.width / info.height > MIN_STEREO_ASPECT:
            video = SideBySide(camera.path)
            notes.append(
                f"{camera.path.name} is {info.width}x{info.height}, two views side by side: the left one is used"
            )
            info = probe_video(video)
        key = name_episode(folder, metadata)
        with Hdf5File(folder / TRAJECTORY) as file:
            poses = _read_pose(file, "observation/robot_state")
            if poses is None:
                raise RecordingError(
                    f"{TRAJECTORY} has no observation/robot_state/cartesian_position and gripper_position"
                )
            rows = Rows(
                poses,
                _read_pose(file, "action"),
                file.read("action/joint_velocity", 7),
                file.read(f"observation/camera_extrinsics/{camera.serial}_left", 6),
                find_success(key, metadata),
            )
            skipped = file.read("observation/timestamp/skip_action", 1)
        controls = build_controls(rows)
        num_rows = len(poses)
        if skipped is not None:
            if len(skipped) != num_rows:
                raise RecordingError(f"{TRAJECTORY} has {num_rows} rows, but {len(skipped)} in skip_action")
            controls["skip_action"] = skipped[:, 0] != 0  # for filter.drop_skipped_actions; no row is dropped here
        frame_ticks, clock_notes, frame_times_s = align_frames(info, num_rows)
        return Episode(
            key=key,
            video=video,
            fps=info.fps if frame_times_s is None else info.typical_fps,
            controls=controls,
            frame_ticks=frame_ticks,
            num_video_frames=info.num_frames,
            notes=(*notes, *clock_notes),
            frame_times_s=frame_times_s,
        )


def _read_pose(file: Hdf5File, group: str) -> np.ndarray | None:
    """[M, 7] from cartesian_position and gripper_position; None where one of them is missing."""
    position, gripper = file.read(f"{group}/cartesian_position", 6), file.read(f"{group}/gripper_position", 1)
    if position is None or gripper is None:
        return None
    if len(position) != len(gripper):
        raise RecordingError(f"{group} has {len(position)} cartesian positions and {len(gripper)} gripper positions")
    return np.concatenate((position, gripper), axis=1)
