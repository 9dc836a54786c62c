"""LeRobot data sets: what info.json says, where the episodes lie, which columns become controls, and which files make a unit."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jepa_cache.config.parsing import nearest
from jepa_cache.config.paths import spell_name, state_folder
from jepa_cache.episode import RecordingError
from jepa_cache.files import atomic_file
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.untrusted import RecordsError, iter_objects, iter_rows, read_object

MAX_INFO_BYTES = 16 << 20
# A field of the published templates. str.format itself would let a template read attributes and request a billion digits.
TEMPLATE_FIELD = re.compile(r"\{(\w+)(?::(0?[0-9]{1,2}d))?\}")


class LayoutError(ValueError):
    """A data set whose meta/ cannot be used; the message names the data set."""


class EpisodeLocation(NamedTuple):
    """One listed episode: its files, and where in the video it lies (None: the whole file is this episode)."""

    index: int
    num_rows: int
    data: Path
    video: Path
    span_s: tuple[float, float] | None


class Info(BaseModel):
    """What of meta/info.json is read: rate of rows and videos in Hz, column or video key to its description, path templates."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    codebase_version: Literal["v2.0", "v2.1", "v3.0"]
    fps: float = Field(gt=0)
    features: dict[str, Any]
    chunks_size: int = Field(default=1000, gt=0)  # episodes in a folder (v2)
    data_path: str
    video_path: str


class Layout:
    """The listed episodes of one data set by the files they lie in; holds as long as nothing in meta/ changes.

    Attributes:
        root: The data set's folder.
        name: Its name in episode keys: the folder's, or owner/name for a snapshot from the hub.
        info: What info.json says.
        packed: Whether files hold many episodes (v3.0).
        lists: The files that list the episodes.
        episodes: The episodes, in the order of the lists.
        by_file: Parquet file, or video where an episode of v2 has no parquet file, to its episodes.
    """

    def __init__(self, root: Path, camera: str) -> None:
        """Read meta/ of the data set at `root`.

        Raises:
            ValueError: meta/ cannot be used, lists an index twice or two episodes with the same frames, or has no such camera.
        """
        self._stamp = _stamp(root)
        self.root = root
        self.name = _find_name(root)
        try:
            self.info = Info.model_validate(read_object(root / "meta" / "info.json", MAX_INFO_BYTES))
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            raise LayoutError(
                f"{root}: {'.'.join(map(str, wrong['loc']))} in meta/info.json: {wrong['msg']}; got {repr(wrong['input'])[:60]}. "
                "v2.0, v2.1 and v3.0 are read; convert others with LeRobot's own scripts"
            ) from error
        self.packed = self.info.codebase_version == "v3.0"
        self._check_camera(camera)
        self.lists = [root / "meta" / "episodes.jsonl"]
        if self.packed:
            self.lists = sorted((root / "meta" / "episodes").glob("**/*.parquet"))
        try:
            self.episodes = list(self._iter_packed(camera) if self.packed else self._iter_single(camera))
        except RecordsError as error:
            raise LayoutError(f"{root}: {error}") from error
        self._check_overlaps()
        self.by_file: dict[Path, list[EpisodeLocation]] = {}
        for episode in self.episodes:
            self.by_file.setdefault(episode.data, []).append(episode)
            if not self.packed and not episode.data.is_file():
                self.by_file.setdefault(episode.video, []).append(episode)

    def is_of(self, root: Path) -> bool:
        """Whether this is the layout of `root`, and still true."""
        return self.root == root and self._stamp == _stamp(root)

    def key(self, index: int) -> str:
        """The key of an episode."""
        return f"{self.name}/episode_{index:06d}"

    def list_missing(self) -> list[EpisodeLocation]:
        """Listed episodes that no unit of files covers."""
        return [
            episode
            for episode in self.episodes
            if not episode.data.is_file() and (self.packed or not episode.video.is_file())
        ]

    def list_units(self, selections: Sequence[str]) -> list[Unit]:
        """A unit for each parquet file with its videos, and one, made of the lists, for episodes without files.

        Each also has a file, written on this machine, of what meta/ says of it and its numbers depend on: a data set whose
        meta/ was corrected has other units, and one that only grew has not.
        """
        units = []
        chosen = map(parse_selection, selections)
        indices = {it.text: self._find_index(it) for it in chosen if isinstance(it.part, str)}
        missing = {episode.index for episode in self.list_missing()}
        groups: dict[Path, dict[Path, None]] = {}
        for episode in self.episodes:
            if episode.index not in missing:
                groups.setdefault(episode.data, {})[episode.video] = None
        for data, videos in groups.items():
            files = [path for path in (data, *sorted(videos)) if path.is_file()]
            spans = [(it.index, it.num_rows, it.span_s) for it in self.by_file[data]] if self.packed else []
            files.append(_write_once({"fps": self.info.fps, "indices": indices, "episodes": spans}))
            units.append(Unit(f"{self.name}/{data.relative_to(self.root).as_posix()}", tuple(files)))
        if missing:
            files = (*self.lists, _write_once({"missing": sorted(missing)}))
            units.append(Unit(f"{self.name}: {len(missing)} listed episodes without files", files))
        return units

    def _check_camera(self, camera: str) -> None:
        kinds = {name: kind.get("dtype") for name, kind in self.info.features.items() if isinstance(kind, Mapping)}
        cameras = [name for name, kind in kinds.items() if kind == "video"]
        if kinds.get(camera) == "image":
            raise LayoutError(f"{self.root}: {camera!r} holds images inside parquet files; only videos are read")
        if camera not in cameras:
            raise LayoutError(
                f"{self.root}: there is no video {camera!r} in meta/info.json{nearest(camera, cameras)} "
                f"(source_options.camera; it lists {', '.join(cameras) or 'no video'})"
            )

    def _check_overlaps(self) -> None:
        seen: set[int] = set()
        by_video: dict[Path, list[EpisodeLocation]] = {}
        for episode in self.episodes:
            if episode.index in seen:
                raise LayoutError(f"{self.root}: meta/ lists episode {episode.index} twice; which entry is right?")
            seen.add(episode.index)
            by_video.setdefault(episode.video, []).append(episode)
        for video, sharing in by_video.items():
            spans = sorted((episode.span_s or (0.0, math.inf), episode.index) for episode in sharing)
            spans = [(span, index) for span, index in spans if span[0] < span[1]]  # a wrong one costs its episode alone
            for (before, first), (after, second) in itertools.pairwise(spans):
                if after[0] < before[1] - 0.5 / self.info.fps:
                    raise LayoutError(
                        f"{self.root}: meta/ gives episodes {first} and {second} the same frames of "
                        f"{video.relative_to(self.root)} ({before[0]:g} to {before[1]:g} s, {after[0]:g} to {after[1]:g} s); rows "
                        "would be paired with another episode's frames"
                    )

    def _iter_single(self, camera: str) -> Iterator[EpisodeLocation]:
        for entry in iter_objects(self.lists[0]):
            index, length = entry.get("episode_index"), entry.get("length", -1)
            if type(index) is not int or not 0 <= index < 2**31 or type(length) is not int:
                raise RecordsError(f"meta/episodes.jsonl has an entry without a usable index: {repr(entry)[:80]}")
            values = {"episode_chunk": index // self.info.chunks_size, "episode_index": index}
            video = self._fill(self.info.video_path, {**values, "video_key": camera})
            yield EpisodeLocation(index, length, self._fill(self.info.data_path, values), video, None)

    def _iter_packed(self, camera: str) -> Iterator[EpisodeLocation]:
        integers = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        integers += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index")]
        times = [f"videos/{camera}/{name}" for name in ("from_timestamp", "to_timestamp")]
        if not self.lists:
            raise RecordsError("there is no parquet file in meta/episodes")
        for path in self.lists:
            for batch in iter_rows(path, (*integers, *times)):
                table = np.concatenate([batch[name][:, :1] for name in (*integers, *times)], axis=1)
                for *numbers, start_s, stop_s in table.tolist():
                    if not all(number.is_integer() and 0 <= number < 2**31 for number in numbers):
                        raise RecordsError(f"{path.name} lists an episode with an index that is none: {numbers}")
                    index, length, chunk, file, video_chunk, video_file = map(int, numbers)
                    data = self._fill(self.info.data_path, {"chunk_index": chunk, "file_index": file})
                    values = {"video_key": camera, "chunk_index": video_chunk, "file_index": video_file}
                    video = self._fill(self.info.video_path, values)
                    yield EpisodeLocation(index, length, data, video, (start_s, stop_s))

    def _fill(self, template: str, values: Mapping[str, int | str]) -> Path:
        """The path that a template of info.json means, inside the data set."""

        def fill(match: re.Match[str]) -> str:
            name, digits = match.groups()
            if name not in values or (digits and isinstance(values[name], str)):
                return match[0]
            return format(values[name], digits or "")

        text = TEMPLATE_FIELD.sub(fill, template)
        path = PurePosixPath(text)
        outside = path.is_absolute() or ".." in path.parts or not path.parts
        if outside or any(sign in text for sign in "{}\\\0"):
            raise LayoutError(
                f"{self.root}: the path template {template!r} of meta/info.json gives {text!r}; it must lead into the data set, "
                f"with no fields but {', '.join(values)} and formats such as 03d"
            )
        return self.root / path

    def build_controls(
        self,
        rows: Mapping[str, np.ndarray],
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
            numbers = [column for text in texts for column in self._select(text, rows).T]
            controls |= {f"{prefix}_{index}": column.copy() for index, column in enumerate(numbers)}
        for name, text in columns.items():
            values = self._select(text, rows)
            if values.shape[1] != 1:
                raise RecordingError(f"{name}: {text} selects {values.shape[1]} numbers; one is needed, e.g. {text}[0]")
            kind = bool if name in FLAGS else np.float32 if name == "idle" else np.float64
            controls[name] = values[:, 0].astype(kind)
        return controls

    def _select(self, text: str, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """The selected numbers [M, K] of each row."""
        selection = parse_selection(text)
        values, part = rows[selection.column], selection.part
        if isinstance(part, str):
            part = self._find_index(selection)
            if part is None:
                hint = nearest(str(selection.part), self._read_names(selection.column))
                raise RecordingError(f"{text}: meta/info.json gives no such name{hint}")
        if isinstance(part, int):
            part = slice(part, part + 1)
        start, stop, _ = (part or slice(None)).indices(1 << 20)
        width = values.shape[1]
        if part is not None and ((part.stop is not None and part.stop > width) or start >= min(stop, width)):
            raise RecordingError(f"{text}: the column has {width} numbers, counted from 0")
        return values[:, part] if part is not None else values

    def _find_index(self, selection: Selection) -> int | None:
        """Which number of the column a selection by name means by info.json; None where it gives no such name."""
        names = self._read_names(selection.column)
        return names.index(selection.part) if selection.part in names else None

    def _read_names(self, column: str) -> list[str]:
        """The names of a column's numbers: a list, or lists in an object ({"motors": [...]})."""
        feature = self.info.features.get(column)
        names = feature.get("names") if isinstance(feature, Mapping) else None
        if isinstance(names, Mapping):
            names = [name for part in names.values() if isinstance(part, list) for name in part]
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _find_name(root: Path) -> str:
    """owner/name for a snapshot in the hub's cache (datasets--owner--name/snapshots/<commit>), else the folder's name."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("datasets--"):
        return repository.removeprefix("datasets--").replace("--", "/")
    return spell_name(root.resolve().name)


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


SELECTION = re.compile(r"(?P<column>[^\[\]]+)(\[(?P<part>[^\[\]]+)\])?")
SLICE = re.compile(r"([0-9]{0,6}):([0-9]{0,6})")
FLAGS = ("gui", "success")


class Selection(NamedTuple):
    """A column and what of it: an index, a slice, a name from info.json, or all (None)."""

    text: str
    column: str
    part: int | slice | str | None


def parse_selection(text: str) -> Selection:
    """Read `column`, `column[3]`, `column[0:7]` or `column[name]`; a ValueError for something else."""
    match = SELECTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"lerobot source: {text!r} is no selection; write column, column[3], column[0:7] or column[name]"
        )
    part = match["part"]
    if part is not None and part.isdecimal():
        part = int(part)
    elif part is not None and (bounds := SLICE.fullmatch(part)) is not None:
        part = slice(*(int(bound) if bound else None for bound in bounds.groups()))
    return Selection(text, match["column"], part)
