"""DROID as its raw release: a folder per episode with metadata, trajectory.h5 and an mp4 per camera."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.config.paths import spell_name
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.media.images import SideBySide
from jepa_cache.media.probe import probe_video
from jepa_cache.media.remote import BucketFile
from jepa_cache.media.tar import is_file_name, walk
from jepa_cache.poses import (
    CAMERA_CONTROLS,
    COMMAND_CONTROLS,
    JOINT_VELOCITY_CONTROLS,
    POSE_CONTROLS,
    find_episode_key,
    find_idle_rows,
)
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.placement import align_droid_frames
from jepa_cache.sources.parsers.untrusted import open_hdf5, read_array, read_object

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

# A single view of the release's cameras is 16:9 (1.78), two side by side are 3.56; by the size, because file names are not reliable.
MIN_STEREO_ASPECT = 2.5

TRAJECTORY = "trajectory.h5"
MP4_FOLDER = "recordings/MP4"
MAX_METADATA_BYTES = 1 << 20  # a real one has about 3 kB
CAMERA_FIELDS = {"exterior_1": "ext1", "exterior_2": "ext2", "wrist": "wrist"}
LIST_SUFFIXES = (".csv", ".txt")


@dataclass(frozen=True)
class RawOptions:
    """Options of the source.

    Attributes:
        camera: "left" (the one that the metadata call left_mp4_path, as in the official training), or a named one.
    """

    camera: Literal["left", "exterior_1", "exterior_2", "wrist"] = "left"


def build(options: Mapping[str, Any]) -> DroidRawSource:
    """Make the source from the `source_options` of a preset; a ValueError for an unknown option or a wrong value."""
    return DroidRawSource(parse_dataclass(RawOptions, options, "source_options of droid_raw"))


def _name_folder(folder: Path) -> str:
    return spell_name("/".join(folder.parts[-4:]))


class DroidRawSource:
    """Reads raw DROID episodes. A unit is the files of one episode and camera, or of several (`encode.episodes_per_unit`).

    Frame t shows the state of row t (the official loader's indexing); a video of another rate is placed by time. Where
    there are more frames than rows, or fewer, both begin together and the shorter decides.
    """

    def __init__(self, options: RawOptions) -> None:
        self.options = options
        self.recipe: dict[str, object] = {"source": "droid_raw", "recipe_version": RECIPE_VERSION, **asdict(options)}

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find episodes: folders, searched for trajectory.h5, or lists of episode folders (.csv, .txt), relative to `base`.

        An episode without metadata or video is a unit too, of the files that it has: it is then reported as skipped.
        """
        folders: dict[Path, Path] = {}
        for given in inputs:
            path, found = base / Path(given).expanduser(), list[Path]()
            if path.is_dir():
                found = list(find_folders(path))
            elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
                found = read_list(path)
            if not found:
                raise ValueError(
                    f"the input {given!r} finds no {TRAJECTORY}; relative inputs start from {base}. Give a folder of the raw "
                    f"release or a list of episode folders ({', '.join(LIST_SUFFIXES)}), one a line"
                )
            for folder in found:
                folders.setdefault(folder.resolve(), folder)
        return [self._make_unit(folder) for folder in sorted(folders.values())]

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the episodes of a unit; as skipped, with the reason, one that cannot be used."""
        for files in self.split_files(unit.files):
            folder = files[0].parent
            try:
                yield self._read_episode(folder)
            except ValueError as error:
                yield Skipped(_name_folder(folder), str(error))

    def split_files(self, files: Sequence[Path | BucketFile]) -> list[list[Path]]:
        """The files of each episode: the first lies in its folder, the others in or below it."""
        split: list[list[Path]] = []
        for file in (file for file in files if isinstance(file, Path)):  # all of them: this source reads no bucket
            if split and split[-1][0].parent in file.parents:
                split[-1].append(file)
            else:
                split.append([file])
        return split

    def name_skipped(self, unit: Unit, key: str) -> str:
        """The episode's present folder; see `Source`."""
        return unit.name

    def _make_unit(self, folder: Path) -> Unit:
        files = [folder / TRAJECTORY] if is_file_name(folder / TRAJECTORY) else []
        files += list_metadata(folder)[:1]
        with contextlib.suppress(ValueError):  # iter_episodes meets the same error and reports it.
            files.append(find_video(folder, read_metadata(folder), self.options.camera))
        return Unit(_name_folder(folder), tuple(files))

    def _read_episode(self, folder: Path) -> Episode:
        metadata = read_metadata(folder)
        video: Path | SideBySide = find_video(folder, metadata, self.options.camera)
        serial, info, notes = video.stem.removesuffix("-stereo"), probe_video(video), ()
        if info.width / info.height > MIN_STEREO_ASPECT:
            notes = (f"{video.name} is {info.width}x{info.height}, two views side by side: the left one is used",)
            video = SideBySide(video)
        key = name_episode(folder, metadata)
        with open_hdf5(folder / TRAJECTORY) as file:
            poses = _read_pose(file, "observation/robot_state")
            if poses is None:
                raise RecordingError(
                    f"{TRAJECTORY} has no observation/robot_state/cartesian_position and gripper_position"
                )
            controls = build_controls(
                poses,
                _read_pose(file, "action"),
                read_array(file, "action/joint_velocity", 7),
                read_array(file, f"observation/camera_extrinsics/{serial}_left", 6),
                find_success(key, metadata),
            )
            skipped = read_array(file, "observation/timestamp/skip_action", 1)
        if skipped is not None:
            controls["skip_action"] = skipped[:, 0] != 0  # for filter.drop_skipped_actions; no row is dropped here
        frame_ticks, clock_notes, frame_times_s = align_droid_frames(info, len(poses))
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


def _read_pose(file: Any, group: str) -> np.ndarray | None:
    """[M, 7] from cartesian_position and gripper_position; None where one of them is missing."""
    position = read_array(file, f"{group}/cartesian_position", 6)
    gripper = read_array(file, f"{group}/gripper_position", 1)
    if position is None or gripper is None:
        return None
    if len(position) != len(gripper):
        raise RecordingError(f"{group} has {len(position)} cartesian positions and {len(gripper)} gripper positions")
    return np.concatenate((position, gripper), axis=1)


def build_controls(
    poses: np.ndarray,
    commands: np.ndarray | None,
    joint_velocity_commands: np.ndarray | None,
    cameras: np.ndarray | None,
    success: bool | None,
) -> dict[str, np.ndarray]:
    """Columns [M] of an episode's controls; the names depend on what is there, never on the values.

    Args:
        poses: [M, 7] measured end-effector poses: x, y, z (m), extrinsic xyz Euler angles (rad), gripper 0 (open) to 1.
        commands: [M, 7] commanded poses, absolute, in the same form.
        joint_velocity_commands: [M, 7] rad/s; `idle` (float32) is 1 where they stay as they were.
        cameras: [M, 6] poses of the chosen camera in the robot's base frame.
        success: Whether the episode reached its goal; the same in every row.
    """
    if len(poses) == 0:
        raise RecordingError("the episode has no rows")
    groups = (
        (POSE_CONTROLS, poses),
        (COMMAND_CONTROLS, commands),
        (JOINT_VELOCITY_CONTROLS, joint_velocity_commands),
        (CAMERA_CONTROLS, cameras),
    )
    controls: dict[str, np.ndarray] = {}
    for names, array in groups:
        if array is None:
            continue
        if array.shape != (len(poses), len(names)):
            raise RecordingError(
                f"the episode's {', '.join(names)} must be [{len(poses)}, {len(names)}]; got {array.shape}"
            )
        controls |= {name: np.array(column, np.float64) for name, column in zip(names, array.T, strict=True)}
    if joint_velocity_commands is not None:
        controls["idle"] = find_idle_rows(joint_velocity_commands).astype(np.float32)
    if success is not None:
        controls["success"] = np.full(len(poses), success)
    return controls


def find_folders(root: Path) -> Iterator[Path]:
    """Every folder at or below `root` that holds a trajectory.h5, sorted by path; links are followed, each folder once."""
    for folder, below, files in walk(root):
        if TRAJECTORY in files:
            below.clear()  # An episode holds no other; its recordings are many files.
            yield folder


def read_list(path: Path) -> list[Path]:
    """Folders of episodes from a text or CSV file as the official training takes it: the first column, split at spaces.

    Relative folders start from the file's own. Quoted ones may hold spaces. A ValueError where one holds no episode, or
    none is listed.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            folders = [path.parent / row[0] for row in csv.reader(file, delimiter=" ") if row and row[0]]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no list of episode folders, one a line: {error}") from error
    absent = [folder for folder in folders if not (folder / TRAJECTORY).is_file() and not list_metadata(folder)]
    if absent or not folders:
        raise ValueError(
            f"{path} lists {len(folders)} folders, of which {len(absent)} hold no {TRAJECTORY}"
            f"{f' (first: {absent[0]})' if absent else ''}; list folders that hold one, or name the folder above them as input"
        )
    return folders


def list_metadata(folder: Path) -> list[Path]:
    """The JSON files of an episode, metadata_*.json first."""
    return sorted(folder.glob("*.json"), key=lambda path: (not path.name.startswith("metadata_"), path.name))


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of an episode; a RecordingError where there are none, or they are too large or no JSON object."""
    found = list_metadata(folder)
    if not found:
        raise RecordingError("it has no metadata_*.json; the release writes one for complete episodes only")
    return read_object(found[0], MAX_METADATA_BYTES)


def find_video(folder: Path, metadata: Mapping[str, Any], camera: str) -> Path:
    """The mp4 of a camera; a RecordingError where the metadata name none, or one that is not there.

    `left` is the one that the metadata call left_mp4_path, as the official loader takes it; the others go by
    `ext1_mp4_path` and so on, or by the camera's serial number. Only the file's name counts, below recordings/MP4 of
    the episode. Where `<serial>.mp4` is missing, `<serial>-stereo.mp4` is taken.
    """
    ends = ("mp4_path", "cam_serial")
    fields = ["left_mp4_path"] if camera == "left" else [f"{CAMERA_FIELDS[camera]}_{end}" for end in ends]
    named = next((str(metadata[field]) for field in fields if metadata.get(field)), None)
    if named is None:
        there = [known for known in CAMERA_FIELDS if metadata.get(f"{CAMERA_FIELDS[known]}_cam_serial")]
        raise RecordingError(
            f"its metadata have no {' or '.join(fields)}; cameras with a serial number: {', '.join(there) or 'none'}"
        )
    stem = named.rpartition("/")[2].removesuffix(".mp4")
    serial = stem.removesuffix("-stereo")
    candidates = dict.fromkeys((f"{stem}.mp4", f"{serial}.mp4", f"{serial}-stereo.mp4"))
    found = [path for name in candidates if (path := folder / MP4_FOLDER / name).is_file()]
    if not found:
        raise RecordingError(
            f"the video of the camera {camera!r} is missing: {MP4_FOLDER}/ holds none of {', '.join(candidates)}"
        )
    return found[0]


def name_episode(folder: Path, metadata: Mapping[str, Any]) -> str:
    """`<lab>/<outcome>/<date>/<episode>` by the metadata; else the uuid; else by the folder.

    The metadata come first, because a unit is known by its content: the same episode elsewhere keeps its name.
    """
    if (key := find_episode_key(f"{metadata.get('lab', '')}/{metadata.get('hdf5_path', '')}")) is not None:
        return key
    if metadata.get("uuid"):
        return str(metadata["uuid"])
    parts = [spell_name(part) for part in folder.resolve().parts[-4:]]
    return find_episode_key("/".join((*parts, ""))) or parts[-1]


def find_success(key: str, metadata: Mapping[str, Any]) -> bool | None:
    """Whether the episode reached its goal: by its folder, success or failure, else by the metadata; None if unknown."""
    if find_episode_key(f"{key}/") == key:
        return key.split("/")[1] == "success"
    return metadata["success"] if isinstance(metadata.get("success"), bool) else None
