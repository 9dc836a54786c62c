"""Folders of the raw DROID release: where episodes lie, and which files of an episode belong to a camera."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.config.machine import spell_name
from jepa_cache.config.parsing import nearest
from jepa_cache.idle import find_episode_key
from jepa_cache.media.tar import walk
from jepa_cache.sources._json_files import read_object

TRAJECTORY = "trajectory.h5"
MP4_FOLDER = "recordings/MP4"
MAX_METADATA_BYTES = 1 << 20  # a real one has about 3 kB
CAMERA_FIELDS = {"exterior_1": "ext1", "exterior_2": "ext2", "wrist": "wrist"}
CAMERAS = ("left", *CAMERA_FIELDS)
LIST_SUFFIXES = (".csv", ".txt")


class FolderError(ValueError):
    """An episode's folder that lacks something, or whose metadata cannot be used."""


class CameraFile(NamedTuple):
    """The video of one camera of an episode, and the camera's serial number."""

    path: Path
    serial: str


class LeftOut(NamedTuple):
    """A folder with a trajectory that is no complete episode, and why."""

    folder: Path
    reason: str


def find_folders(root: Path) -> Iterator[Path]:
    """Every folder at or below `root` that holds a trajectory.h5, sorted by path; links are followed, each folder once."""
    for folder, below, files in walk(root):
        if TRAJECTORY in files:
            below.clear()  # An episode holds no other; its recordings are many files.
            yield folder


def read_list(path: Path) -> list[Path]:
    """Folders of episodes from a text or CSV file as the official training takes it: the first column, split at spaces.

    Relative folders are meant from the file's own. Quoted ones may hold spaces. Empty lines are left out.

    Raises:
        ValueError: A folder that holds neither a trajectory nor metadata; or no folder at all.
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
            f"{f' (first: {absent[0]})' if absent else ''}. Each line must begin with the folder of one episode; make a new list "
            "with: jepa-cache index-droid ROOT OUT.csv"
        )
    return folders


def list_metadata(folder: Path) -> list[Path]:
    """The JSON files of an episode, metadata_*.json first."""
    return sorted(folder.glob("*.json"), key=lambda path: (not path.name.startswith("metadata_"), path.name))


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of an episode.

    Raises:
        FolderError: There is none (the release writes it for complete episodes only).
        ValueError: It is too large or no JSON object.
    """
    found = list_metadata(folder)
    if not found:
        raise FolderError("it has no metadata_*.json; the release writes one for complete episodes only")
    return read_object(found[0], MAX_METADATA_BYTES)


def find_camera_file(folder: Path, metadata: Mapping[str, Any], camera: str) -> CameraFile:
    """The mp4 of a camera.

    `left` is the one that the metadata call left_mp4_path, as the official loader takes it; the others go by `ext1_mp4_path`
    and so on, or by the camera's serial number. Only the file's name counts, below recordings/MP4 of the episode. Where
    `<serial>.mp4` is missing, `<serial>-stereo.mp4` is taken.

    Raises:
        FolderError: The metadata do not name it, name something that is no plain file name, or no such file is there.
    """
    fields = (
        ("left_mp4_path",)
        if camera == "left"
        else tuple(f"{CAMERA_FIELDS[camera]}_{end}" for end in ("mp4_path", "cam_serial"))
    )
    named = next((str(metadata[field]) for field in fields if metadata.get(field)), None)
    if named is None:
        there = [known for known in CAMERA_FIELDS if metadata.get(f"{CAMERA_FIELDS[known]}_cam_serial")]
        raise FolderError(
            f"its metadata have no {' or '.join(fields)}; cameras with a serial number: {', '.join(there) or 'none'}"
        )
    name = named.rpartition("/")[2]
    stem = name.removesuffix(".mp4")
    if not stem or stem in (".", "..") or "\\" in stem or "\0" in stem:
        raise FolderError(f"its metadata name {named[:200]!r} as the video, which is no file name")
    serial = stem.removesuffix("-stereo")
    candidates = dict.fromkeys((f"{stem}.mp4", f"{serial}.mp4", f"{serial}-stereo.mp4"))
    for candidate in candidates:
        if (path := folder / MP4_FOLDER / candidate).is_file():
            return CameraFile(path, serial)
    raise FolderError(
        f"the video of the camera {camera!r} is missing: {MP4_FOLDER}/ holds none of {', '.join(candidates)}"
    )


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


def index_folder(root: Path) -> tuple[list[Path], list[LeftOut]]:
    """The complete episodes below a folder, and the incomplete ones with the reason.

    An episode is complete when it has a trajectory, metadata, and the video that the metadata call left_mp4_path.

    Raises:
        ValueError: No trajectory.h5 anywhere below.
    """
    complete, left_out = [], []
    for folder in find_folders(root):
        try:
            find_camera_file(folder, read_metadata(folder), "left")
            complete.append(folder)
        except ValueError as error:
            left_out.append(LeftOut(folder, str(error)))
    if not complete and not left_out:
        raise ValueError(f"no folder below {root} holds a {TRAJECTORY}; name the folder of the raw DROID release")
    return complete, left_out


def check_camera(camera: str) -> None:
    """Raise a ValueError that names the nearest camera when there is none of this name."""
    if camera not in CAMERAS:
        raise ValueError(f"droid_raw source: there is no camera {camera!r}{nearest(camera, CAMERAS)}")
