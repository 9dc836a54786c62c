"""LeRobot data sets: what info.json says, where the episodes lie, which columns become controls, and which files make a unit."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.config.machine import spell_name, state_folder
from jepa_cache.config.parsing import nearest
from jepa_cache.episode import RecordingError
from jepa_cache.files import atomic_file
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.untrusted import RecordsError, iter_objects, iter_rows, read_object, read_rate

VERSIONS = ("v2.0", "v2.1", "v3.0")
MAX_INFO_BYTES = 16 << 20
# Fields of the published templates; a format is digits such as 03d or nothing. str.format itself would let a template read
# attributes and ask for a billion digits.
TEMPLATE_FIELDS = ("episode_chunk", "episode_index", "video_key", "chunk_index", "file_index")
TEMPLATE_FORMAT = re.compile(r"(0?[0-9]{1,2}d)?")


class LayoutError(ValueError):
    """A data set whose meta/ cannot be used; the message names the data set."""


class Place(NamedTuple):
    """One listed episode: its files, and where in the video it lies (None: the whole file is this episode)."""

    index: int
    num_rows: int
    data: Path
    video: Path
    span_s: tuple[float, float] | None


@dataclass(frozen=True)
class Layout:
    """What meta/info.json says.

    Attributes:
        root: The folder of the data set.
        name: Its name in episode keys: the folder's, or owner/name for a snapshot from the hub.
        version: One of VERSIONS.
        fps: Hz, of rows and videos.
        features: Column or video key to its description.
        chunks_size: Episodes in a folder (v2).
        data_path: Template of the parquet files.
        video_path: Template of the videos.
    """

    root: Path
    name: str
    version: str
    fps: float
    features: Mapping[str, Any]
    chunks_size: int
    data_path: str
    video_path: str

    @property
    def packed(self) -> bool:
        """Whether files hold many episodes (v3.0)."""
        return self.version == "v3.0"

    def key(self, index: int) -> str:
        """The key of an episode."""
        return f"{self.name}/episode_{index:06d}"

    def lists(self) -> list[Path]:
        """The files that list the episodes."""
        if self.packed:
            return sorted((self.root / "meta" / "episodes").glob("**/*.parquet"))
        return [self.root / "meta" / "episodes.jsonl"]

    def check_camera(self, camera: str) -> None:
        """Check that `camera` is a video of this data set.

        Raises:
            LayoutError: It is not; the nearest video key is named.
        """
        kinds = {name: kind.get("dtype") for name, kind in self.features.items() if isinstance(kind, Mapping)}
        cameras = [name for name, kind in kinds.items() if kind == "video"]
        if camera not in cameras:
            if kinds.get(camera) == "image":
                raise LayoutError(f"{self.root}: {camera!r} holds images inside parquet files; only videos are read")
            raise LayoutError(
                f"{self.root}: there is no video {camera!r} in meta/info.json{nearest(camera, cameras)} "
                f"(source_options.camera; it lists {', '.join(cameras) or 'no video'})"
            )


def read_layout(root: Path) -> Layout:
    """Read meta/info.json.

    Raises:
        LayoutError: It is missing, damaged, or of another version.
    """
    info = read_object(root / "meta" / "info.json", MAX_INFO_BYTES)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise LayoutError(
            f"{root}: codebase_version is {version!r}; {', '.join(VERSIONS)} are read. Convert the data set with "
            "LeRobot's own scripts"
        )
    fps = read_rate(info, "fps", f"{root}, meta/info.json")
    features, chunks_size = info.get("features"), info.get("chunks_size", 1000)
    if not isinstance(features, Mapping):
        raise LayoutError(f"{root}: features in meta/info.json must be an object; got {type(features).__name__}")
    if isinstance(chunks_size, bool) or not isinstance(chunks_size, int) or chunks_size < 1:
        raise LayoutError(f"{root}: chunks_size in meta/info.json must be a positive integer; got {chunks_size!r}")
    templates = [info.get("data_path"), info.get("video_path")]
    for name, template in zip(("data_path", "video_path"), templates, strict=True):
        if not isinstance(template, str):
            raise LayoutError(f"{root}: {name} in meta/info.json must be a template; got {template!r}")
    return Layout(root, _find_name(root), version, fps, features, chunks_size, *templates)


def fill_template(layout: Layout, template: str, values: Mapping[str, int | str]) -> Path:
    """The path that a template of info.json means, inside the data set.

    Raises:
        LayoutError: An unknown field or format, or a path that is absolute or leaves the data set's folder.
    """
    parts = []
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise LayoutError(f"{layout.root}: the path template {template!r} is no template: {error}") from error
    for text, field, spec, conversion in fields:
        parts.append(text)
        if field is None:
            continue
        if (
            field not in TEMPLATE_FIELDS
            or field not in values
            or conversion
            or not TEMPLATE_FORMAT.fullmatch(spec or "")
        ):
            raise LayoutError(
                f"{layout.root}: the path template {template!r} uses {{{field}{'!' + conversion if conversion else ''}:{spec}}}; "
                f"allowed are {', '.join(values)} with formats such as 03d"
            )
        value = values[field]
        if isinstance(value, str) and spec:
            raise LayoutError(f"{layout.root}: the path template {template!r} gives {field} a format that does not fit")
        parts.append(format(value, spec) if spec else str(value))
    path = PurePosixPath("".join(parts))
    if path.is_absolute() or ".." in path.parts or "\\" in str(path) or "\0" in str(path) or not path.parts:
        raise LayoutError(f"{layout.root}: the path template {template!r} leads out of the data set: {str(path)!r}")
    return layout.root / path


def list_places(layout: Layout, camera: str) -> list[Place]:
    """List the episodes of a data set, in the order of meta/.

    Raises:
        LayoutError: meta/ lists no episodes, an entry that cannot be used, an index twice, or two episodes with the same frames.
    """
    places = list(_iter_packed(layout, camera) if layout.packed else _iter_single(layout, camera))
    by_index: dict[int, Place] = {}
    by_video: dict[Path, list[Place]] = {}
    for place in places:
        if place.index in by_index:
            raise LayoutError(
                f"{layout.root}: meta/ lists episode {place.index} twice; it is not known which entry is right"
            )
        by_index[place.index] = place
        by_video.setdefault(place.video, []).append(place)
    for video, sharing in by_video.items():
        spans = sorted((place.span_s or (0.0, math.inf), place.index) for place in sharing)
        spans = [(span, index) for span, index in spans if span[0] < span[1]]  # a wrong one costs its episode alone
        for (before, first), (after, second) in itertools.pairwise(spans):
            if after[0] < before[1] - 0.5 / layout.fps:
                raise LayoutError(
                    f"{layout.root}: meta/ gives episodes {first} and {second} the same frames of "
                    f"{video.relative_to(layout.root)} ({before[0]:g} to {before[1]:g} s, {after[0]:g} to {after[1]:g} s); rows would "
                    "be paired with another episode's frames"
                )
    return places


def _iter_single(layout: Layout, camera: str) -> Iterator[Place]:
    for entry in iter_objects(layout.lists()[0]):
        index, length = entry.get("episode_index"), entry.get("length", -1)
        if not _is_index(index) or isinstance(length, bool) or not isinstance(length, int):
            raise LayoutError(
                f"{layout.root}: meta/episodes.jsonl has an entry without a usable index: {repr(entry)[:80]}"
            )
        values = {"episode_chunk": index // layout.chunks_size, "episode_index": index}
        data = fill_template(layout, layout.data_path, values)
        video = fill_template(layout, layout.video_path, {**values, "video_key": camera})
        yield Place(index, length, data, video, None)


def list_columns(camera: str) -> tuple[str, ...]:
    """The columns of meta/episodes that say where an episode lies: four of the rows, two and two of the video."""
    of_rows = ("episode_index", "length", "data/chunk_index", "data/file_index")
    of_video = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    return (*of_rows, *(f"videos/{camera}/{name}" for name in of_video))


def _iter_packed(layout: Layout, camera: str) -> Iterator[Place]:
    columns = list_columns(camera)
    integers, times = columns[:6], columns[6:]
    lists = layout.lists()
    if not lists:
        raise LayoutError(f"{layout.root}: there is no parquet file in meta/episodes")
    for path in lists:
        try:
            for batch in iter_rows(path, columns):
                for row in range(len(batch["length"])):
                    numbers = [batch[name][row, 0] for name in integers]
                    if not all(float(number).is_integer() and 0 <= number < 2**31 for number in numbers):
                        raise LayoutError(
                            f"{layout.root}: {path.name} lists an episode with an index that is none: {numbers}"
                        )
                    index, length, chunk, file, video_chunk, video_file = (int(number) for number in numbers)
                    data = fill_template(layout, layout.data_path, {"chunk_index": chunk, "file_index": file})
                    values = {"video_key": camera, "chunk_index": video_chunk, "file_index": video_file}
                    video = fill_template(layout, layout.video_path, values)
                    span_s = (float(batch[times[0]][row, 0]), float(batch[times[1]][row, 0]))
                    yield Place(index, length, data, video, span_s)
        except RecordsError as error:
            raise LayoutError(f"{layout.root}: {error}") from error


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _find_name(root: Path) -> str:
    """owner/name for a snapshot in the hub's cache (datasets--owner--name/snapshots/<commit>), else the folder's name."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("datasets--"):
        return repository.removeprefix("datasets--").replace("--", "/")
    return spell_name(root.resolve().name)


PATTERN = re.compile(r"(?P<column>[^\[\]]+)(\[(?P<part>[^\[\]]+)\])?")
SLICE = re.compile(r"(?P<start>[0-9]{0,6}):(?P<stop>[0-9]{0,6})")
FLAGS = ("gui", "success")


class Selection(NamedTuple):
    """A column and what of it: an index, a slice, a name from info.json, or all (None)."""

    text: str
    column: str
    part: int | slice | str | None


def parse_selection(text: str) -> Selection:
    """Read `column`, `column[3]`, `column[0:7]` or `column[name]`.

    Raises:
        ValueError: Something else.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"lerobot source: {text!r} is no selection; write column, column[3], column[0:7] or column[name]"
        )
    part = match["part"]
    if part is None:
        return Selection(text, match["column"], None)
    if part.isdecimal():
        return Selection(text, match["column"], int(part))
    if (bounds := SLICE.fullmatch(part)) is not None:
        start, stop = (int(bounds[end]) if bounds[end] else None for end in ("start", "stop"))
        return Selection(text, match["column"], slice(start, stop))
    return Selection(text, match["column"], part)


def find_indices(texts: Sequence[str], features: Mapping[str, Any]) -> dict[str, int | None]:
    """Of the selections by name, which number of the column each means by info.json; None where it gives no such name."""
    indices = {}
    for selection in map(parse_selection, texts):
        if isinstance(selection.part, str):
            names = _read_names(features.get(selection.column))
            indices[selection.text] = names.index(selection.part) if selection.part in names else None
    return indices


def select(selection: Selection, rows: Mapping[str, np.ndarray], features: Mapping[str, Any]) -> np.ndarray:
    """The selected numbers of each row.

    Args:
        selection: What to take.
        rows: Column to [M, W].
        features: `features` of info.json, for names.

    Returns:
        [M, K].

    Raises:
        RecordingError: The column is narrower, or has no number of that name.
    """
    values = rows[selection.column]
    part = selection.part
    if isinstance(part, str):
        names = _read_names(features.get(selection.column))
        if part not in names:
            raise RecordingError(f"{selection.text}: meta/info.json gives no such name{nearest(part, names)}")
        part = names.index(part)
    if isinstance(part, int):
        part = slice(part, part + 1)
    width = values.shape[1]
    start, stop, _ = (part or slice(None)).indices(1 << 20)
    if part is not None and ((part.stop is not None and part.stop > width) or start >= min(stop, width)):
        raise RecordingError(f"{selection.text}: the column has {width} numbers, counted from 0")
    return values[:, part] if part is not None else values


def build_controls(
    rows: Mapping[str, np.ndarray],
    features: Mapping[str, Any],
    *,
    actions: tuple[str, ...],
    states: tuple[str, ...],
    columns: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Controls [M]: action_0.. and state_0.. in the order selected, and the columns that have a name of their own.

    Raises:
        RecordingError: A selection does not fit, or a named column selects more than one number.
    """
    controls = {}
    for prefix, texts in (("action", actions), ("state", states)):
        numbers = [column for text in texts for column in select(parse_selection(text), rows, features).T]
        controls |= {f"{prefix}_{index}": column.copy() for index, column in enumerate(numbers)}
    for name, text in columns.items():
        values = select(parse_selection(text), rows, features)
        if values.shape[1] != 1:
            raise RecordingError(f"{name}: {text} selects {values.shape[1]} numbers; one is needed, e.g. {text}[0]")
        kind = bool if name in FLAGS else np.float32 if name == "idle" else np.float64
        controls[name] = values[:, 0].astype(kind)
    return controls


def _read_names(feature: Any) -> list[str]:
    """The names of a feature's numbers: a list, or lists in an object ({"motors": [...]})."""
    names = feature.get("names") if isinstance(feature, Mapping) else None
    if isinstance(names, Mapping):
        names = [name for part in names.values() if isinstance(part, list) for name in part]
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


class Listing:
    """The listed episodes of one data set by the files they lie in; holds as long as nothing in meta/ changes.

    Attributes:
        root: The data set's folder.
        layout: What info.json says.
        lists: The files that list the episodes.
        places: The episodes, in the order of the lists.
        by_file: Parquet file, or video where an episode of v2 has no parquet file, to its episodes.
    """

    def __init__(self, root: Path, camera: str) -> None:
        """Read meta/ of the data set at `root`.

        Raises:
            ValueError: meta/ cannot be used, or has no such camera.
        """
        self._stamp = _stamp(root)
        self.root = root
        self.layout = read_layout(root)
        self.layout.check_camera(camera)
        self.lists = self.layout.lists()
        self.places = list_places(self.layout, camera)
        self.by_file: dict[Path, list[Place]] = {}
        for place in self.places:
            self.by_file.setdefault(place.data, []).append(place)
            if not self.layout.packed and not place.data.is_file():
                self.by_file.setdefault(place.video, []).append(place)

    def is_of(self, root: Path) -> bool:
        """Whether this is the list of `root`, and still true."""
        return self.root == root and self._stamp == _stamp(root)

    def missing(self) -> list[Place]:
        """Listed episodes that no unit of files covers."""
        return [
            place
            for place in self.places
            if not place.data.is_file() and (self.layout.packed or not place.video.is_file())
        ]

    def list_units(self, selections: Sequence[str]) -> list[Unit]:
        """A unit for each parquet file with its videos, and one, made of the lists, for episodes without files.

        Each also has a file, written on this machine, of what meta/ says of it and its numbers depend on: a data set whose
        meta/ was corrected has other units, and one that only grew has not.
        """
        units = []
        shared = {"fps": self.layout.fps, "indices": find_indices(selections, self.layout.features)}
        missing = {place.index for place in self.missing()}
        groups: dict[Path, dict[Path, None]] = {}
        for place in self.places:
            if place.index not in missing:
                groups.setdefault(place.data, {})[place.video] = None
        for data, videos in groups.items():
            files = [path for path in (data, *sorted(videos)) if path.is_file()]
            places = self.by_file[data] if self.layout.packed else ()
            spans = [(place.index, place.num_rows, place.span_s) for place in places]
            files.append(_write_once({**shared, "episodes": spans}))
            units.append(Unit(f"{self.layout.name}/{data.relative_to(self.root).as_posix()}", tuple(files)))
        if missing:
            files = (*self.lists, _write_once({"missing": sorted(missing)}))
            units.append(Unit(f"{self.layout.name}: {len(missing)} listed episodes without files", files))
        return units


def _write_once(content: dict[str, Any]) -> Path:
    """A file of this content, named by it, in the folder of what this machine remembers."""
    data = json.dumps(content, sort_keys=True).encode()
    path = state_folder() / "lerobot" / f"{hashlib.sha256(data).hexdigest()[:32]}.json"
    if not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    return path


def _stamp(root: Path) -> list[tuple[str, int, int]]:
    paths = sorted(path for path in (root / "meta").rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
