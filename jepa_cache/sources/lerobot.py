"""LeRobot data sets, v2.0, v2.1 (a parquet and an mp4 per episode) and v3.0 (many episodes in one), from disk or the hub."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jepa_cache.config.parsing import nearest, parse_dataclass
from jepa_cache.config.paths import printable, spell_name, state_folder
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.files import atomic_file
from jepa_cache.media.probe import DecodeError, VideoInfo, probe_video
from jepa_cache.media.remote import HUB_PREFIX, fetch_hub_dataset
from jepa_cache.media.tar import walk
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.placement import place_frames
from jepa_cache.sources.parsers.untrusted import RecordsError, check_fields, iter_objects, iter_rows, read_object

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

MAX_EPISODE_ROWS = 1 << 20  # ten hours at 30 Hz
MAX_INFO_BYTES = 16 << 20
MAX_NAME = 60  # characters of a joint's name that are shown
# A field of the published templates. str.format itself would let a template read attributes and request a billion digits.
TEMPLATE_FIELD = re.compile(r"\{(\w+)(?::(0?[0-9]{1,2}d))?\}")
SELECTION = re.compile(
    r"(?P<column>[^\[\]]+)(\[((?P<start>[0-9]{0,6}):(?P<stop>[0-9]{0,6})|(?P<index>[0-9]{1,6})|(?P<name>[^\[\]]+))\])?"
)
FLAGS = ("gui", "success")


@dataclass(frozen=True)
class LerobotOptions:
    """Options of the source. A selection is `column`, `column[3]`, `column[0:7]` or `column[name]`, names as in info.json.

    Attributes:
        camera: The video key, e.g. "observation.images.top".
        actions: Selections that together become action_0, action_1, ...
        states: Selections that together become state_0, state_1, ...
        columns: Control name to selection of one number, e.g. {x_m: "observation.state[0]", ...} for the action space
            pose7, or {success: is_episode_successful}.
    """

    camera: str
    actions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.selections:
            raise ValueError(
                "lerobot source: nothing is selected; name columns in source_options.actions and .states, "
                'e.g. actions: ["action"], states: ["observation.state"]'
            )
        for text in self.selections:
            parse_selection(text)

    @property
    def selections(self) -> tuple[str, ...]:
        """All selections."""
        return (*self.actions, *self.states, *self.columns.values())


class Selection(NamedTuple):
    """A column, and a range of its numbers or the name that info.json gives to one."""

    column: str
    part: slice | str


def parse_selection(text: str) -> Selection:
    """Read `column`, `column[3]`, `column[0:7]` or `column[name]`; a ValueError for something else."""
    match = SELECTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"lerobot source: {text!r} is no selection; write column, column[3], column[0:7] or column[name]"
        )
    if match["name"]:
        return Selection(match["column"], match["name"])
    if match["index"]:
        return Selection(match["column"], slice(int(match["index"]), int(match["index"]) + 1))
    bounds = (int(bound) if bound else None for bound in (match["start"], match["stop"]))
    return Selection(match["column"], slice(*bounds))


def build(options: Mapping[str, Any]) -> LerobotSource:
    """Make the source from the `source_options` of a preset; a ValueError for an unknown option or a wrong value."""
    return LerobotSource(parse_dataclass(LerobotOptions, options, "source_options of lerobot"))


class LerobotSource:
    """Reads LeRobot data sets. A unit is an episode's two files (v2), or a parquet file and the videos of its episodes (v3).

    Row i is read at the moment of the frame at its `timestamp`, and its action acts from there on. A unit's data set is
    found again by looking for meta/info.json above its files.
    """

    def __init__(self, options: LerobotOptions) -> None:
        self.options = options
        self.recipe: dict[str, object] = {
            "source": "lerobot",
            "recipe_version": RECIPE_VERSION,
            "camera": options.camera,
            "actions": list(options.actions),
            "states": list(options.states),
            "columns": dict(sorted(options.columns.items())),
        }
        self._layout: Layout | None = None

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find data sets (folders that hold meta/info.json, at any depth) and `hub:owner/name[@revision]`; list their units.

        Listed episodes of which no file is there make one more unit, whose file is the list; it yields them as skipped.
        """
        units: list[Unit] = []
        names: dict[str, Path] = {}
        for root in sorted({root for text in inputs for root in self._find_roots(text, base)}):
            layout = Layout(root, self.options.camera)
            if (other := names.setdefault(layout.name, root)) != root:
                raise ValueError(f"{other} and {root} have one name; rename a folder, episode keys begin with it")
            units += layout.list_units(self.options.selections)
        return units

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the episodes of a unit, one in memory at a time; a ValueError where meta/ cannot be used."""
        layout = self._open_layout(unit)
        if unit.path in layout.lists:
            for episode in layout.missing:
                yield Skipped(layout.key(episode.index), f"{episode.data.name} and its video are listed but not there")
            return
        waiting = {episode.index: episode for episode in layout.by_file[unit.path]}
        try:
            for index, rows in self._iter_rows(layout, next(iter(waiting.values()))):
                location, key = waiting.pop(index, None), layout.key(index)
                if location is None:
                    yield Skipped(key, f"its rows in {unit.path.name} are not listed in meta, or lie in two places")
                    continue
                try:
                    yield self._read_episode(layout, location, rows)
                except (RecordingError, DecodeError) as error:
                    yield Skipped(key, str(error))
            reason = f"{unit.path.name} holds none of its rows"
        except RecordingError as error:
            reason = str(error)
        for index in waiting:
            yield Skipped(layout.key(index), reason)

    def name_skipped(self, unit: Unit, key: str) -> str:
        """The episode by the data set's present name; see `Source`."""
        return f"{self._open_layout(unit).name}/{key.rpartition('/')[2]}"

    def _find_roots(self, text: str, base: Path) -> list[Path]:
        if text.startswith(HUB_PREFIX):
            return [fetch_hub_dataset(text, ("meta/*", "data/*", f"videos/*{self.options.camera}/*"))]
        folder = base / Path(text).expanduser()
        folders = walk(folder) if folder.is_dir() else ()
        if found := [path.parent for path, _, names in folders if path.name == "meta" and "info.json" in names]:
            return found
        raise ValueError(
            f"the input {text!r} holds no LeRobot data set: there is no meta/info.json in or below it; relative inputs "
            f"start from {base}. Give a data set's folder, or hub:owner/name"
        )

    def _open_layout(self, unit: Unit) -> Layout:
        root = next((folder for folder in unit.files[0].parents if (folder / "meta" / "info.json").is_file()), None)
        if root is None:
            raise ValueError(f"{unit.files[0]} lies in no LeRobot data set: no folder above it holds meta/info.json")
        if self._layout is None or (self._layout.root, self._layout.stamp) != (root, _stamp(root)):
            self._layout = Layout(root, self.options.camera)
        return self._layout

    def _iter_rows(self, layout: Layout, first: EpisodeLocation) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The rows of one episode after the other: index, and column to [M, W]."""
        path = first.data
        if not path.is_file():
            raise RecordingError(f"{path.name} is not there")
        columns = ["timestamp", *(parse_selection(text).column for text in self.options.selections)]
        columns += ["episode_index"] if layout.packed else []
        parts: list[dict[str, np.ndarray]] = []
        last, num_rows = first.index, 0
        for batch in iter_rows(path, tuple(dict.fromkeys(columns))):
            indices = batch["episode_index"][:, 0] if layout.packed else np.full(len(batch["timestamp"]), first.index)
            if not ((indices >= 0) & (indices < 2**31)).all():  # of a NaN neither holds
                raise RecordingError(f"{path.name} has rows whose episode_index is no index")
            bounds = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist(), len(indices)]
            for start, stop in itertools.pairwise(bounds):
                if parts and int(indices[start]) != last:
                    yield last, _join(parts)
                    parts, num_rows = [], 0
                last, num_rows = int(indices[start]), num_rows + stop - start
                parts.append({name: values[start:stop] for name, values in batch.items()})
                if num_rows > MAX_EPISODE_ROWS:
                    raise RecordingError(f"{path.name} holds an episode of more than {MAX_EPISODE_ROWS} rows")
        if not parts:
            raise RecordingError(f"{path.name} holds no row")
        yield last, _join(parts)

    def _read_episode(self, layout: Layout, location: EpisodeLocation, rows: Mapping[str, np.ndarray]) -> Episode:
        video, times_s = location.video, rows["timestamp"]
        if not video.is_file():
            raise RecordingError(f"its video {video.relative_to(layout.root)} is not there")
        info = probe_video(video)
        fps = info.typical_fps
        if not math.isclose(fps, layout.info.fps, rel_tol=0.01):
            raise RecordingError(f"meta/info.json says {layout.info.fps:g} Hz, but its video runs at {fps:g} Hz")
        first_frame, num_frames = _find_frames(location, info)
        if times_s.shape[1] != 1:
            raise RecordingError(f"timestamp holds {times_s.shape[1]} numbers in a row; one is needed")
        shown_s = info.frame_times_s
        if shown_s is not None:
            shown_s = shown_s[first_frame : first_frame + num_frames] - shown_s[first_frame]
        frame_ticks, notes, frame_times_s = place_frames(times_s[:, 0], num_frames, fps, shown_s)
        if location.num_rows not in (-1, len(times_s)):
            notes = (*notes, f"listed with {location.num_rows} rows, has {len(times_s)}")
        controls, column_names = self._build_controls(layout, rows)
        return Episode(
            key=layout.key(location.index),
            video=video,
            fps=fps,
            controls=controls,
            frame_ticks=frame_ticks,
            num_video_frames=num_frames,
            notes=notes,
            first_frame=first_frame,
            frame_times_s=frame_times_s,
            column_names=column_names,
        )

    def _build_controls(
        self, layout: Layout, rows: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Controls [M]: action_0.. and state_0.. in the order selected, and the columns that have a name of their own.

        And what info.json calls the numbers that became action_0.. and state_0..; nothing of those that it does not name.
        """
        controls, found = {}, dict[str, str]()
        for prefix, texts in (("action", self.options.actions), ("state", self.options.states)):
            chosen = [layout.select(text, rows) for text in texts]
            numbers = [column for values, _ in chosen for column in values.T]
            controls |= {f"{prefix}_{index}": column.copy() for index, column in enumerate(numbers)}
            # Without dollars: pictures would take what lies between two of them for a formula.
            names = [name.replace("$", "") for _, names in chosen for name in names]
            found |= {f"{prefix}_{index}": printable(name)[:MAX_NAME] for index, name in enumerate(names) if name}
        for name, text in self.options.columns.items():
            values, _ = layout.select(text, rows)
            if values.shape[1] != 1:
                raise RecordingError(f"{name}: {text} selects {values.shape[1]} numbers; one is needed, e.g. {text}[0]")
            kind = bool if name in FLAGS else np.float32 if name == "idle" else np.float64
            controls[name] = values[:, 0].astype(kind)
        return controls, found


def _find_frames(location: EpisodeLocation, info: VideoInfo) -> tuple[int, int]:
    """First frame and number of frames of an episode in its video."""
    if location.span_s is None:
        return 0, info.num_frames
    start_s, stop_s = location.span_s
    start, stop = (_find_frame(time_s, info) for time_s in location.span_s)
    if not 0 <= start < stop < math.inf or abs(start - round(start)) > 0.25 or round(start) >= info.num_frames:
        raise RecordingError(
            f"meta/episodes places it from {start_s:g} to {stop_s:g} s of its video, which lasts {info.num_frames / info.fps:g} s; it "
            "must begin at one of its frames"
        )
    return round(start), max(1, min(round(stop), info.num_frames) - round(start))


def _find_frame(time_s: float, info: VideoInfo) -> float:
    """Number of the frame at a time; between two frames and behind the last one, a fraction."""
    if info.times_s is None or not math.isfinite(time_s):
        return time_s * info.fps
    later = max(0.0, time_s - info.times_s[-1]) * info.typical_fps
    return float(np.interp(time_s, info.times_s, np.arange(info.num_frames))) + later


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
        name: Its name in episode keys: the folder's, or owner/name for a snapshot from the hub.
        packed: Whether files hold many episodes (v3.0).
        lists: The files that list the episodes.
        missing: Listed episodes that no unit of files covers.
        by_file: Parquet file, or video where an episode of v2 has no parquet file, to its episodes.
    """

    def __init__(self, root: Path, camera: str) -> None:
        """Read meta/; a ValueError where it lists an index twice or two episodes with the same frames, or has no such camera."""
        self.root, self.stamp, self.name = root, _stamp(root), _find_name(root)
        try:
            hint = ". v2.0, v2.1 and v3.0 are read; convert others with LeRobot's own scripts"
            self.info = check_fields(
                Info, read_object(root / "meta" / "info.json", MAX_INFO_BYTES), "meta/info.json", hint
            )
            self.packed = self.info.codebase_version == "v3.0"
            self._check_camera(camera)
            self.lists = [root / "meta" / "episodes.jsonl"]
            if self.packed:
                self.lists = sorted((root / "meta" / "episodes").glob("**/*.parquet"))
            self.episodes = list(self._iter_packed(camera) if self.packed else self._iter_single(camera))
            self._check_overlaps()
        except ValueError as error:
            raise ValueError(f"{root}: {error}") from error
        self.missing: list[EpisodeLocation] = []
        self.by_file: dict[Path, list[EpisodeLocation]] = {}
        for episode in self.episodes:
            self.by_file.setdefault(episode.data, []).append(episode)
            if not episode.data.is_file():
                if self.packed or not episode.video.is_file():
                    self.missing.append(episode)
                if not self.packed:
                    self.by_file.setdefault(episode.video, []).append(episode)

    def key(self, index: int) -> str:
        """The key of an episode."""
        return f"{self.name}/episode_{index:06d}"

    def list_units(self, selections: Sequence[str]) -> list[Unit]:
        """A unit for each parquet file with its videos, and one, made of the lists, for episodes without files.

        Each also has a file, written on this machine, of what meta/ says of it and its numbers depend on: a data set
        whose meta/ was corrected has other units, and one that only grew has not.
        """
        units: list[Unit] = []
        chosen = {text: parse_selection(text) for text in selections}
        indices = {text: self._find_index(it) for text, it in chosen.items() if isinstance(it.part, str)}
        missing = {episode.index for episode in self.missing}
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
            raise ValueError(f"{camera!r} holds images inside parquet files; only videos are read")
        if camera not in cameras:
            there = {path.name for depth in ("*", "*/*") for path in (self.root / "videos").glob(depth)}
            cameras = [name for name in cameras if name in there] or cameras  # a camera may be listed without videos
            raise ValueError(
                f"there is no video {camera!r} in meta/info.json{nearest(camera, cameras)} "
                f"(source_options.camera; it lists {', '.join(cameras) or 'no video'})"
            )

    def _check_overlaps(self) -> None:
        seen: set[int] = set()
        by_video: dict[Path, list[EpisodeLocation]] = {}
        for episode in self.episodes:
            if episode.index in seen:
                raise ValueError(f"meta/ lists episode {episode.index} twice; which entry is right?")
            seen.add(episode.index)
            by_video.setdefault(episode.video, []).append(episode)
        for video, sharing in by_video.items():
            spans = sorted((episode.span_s or (0.0, math.inf), episode.index) for episode in sharing)
            spans = [(span, index) for span, index in spans if span[0] < span[1]]  # a wrong one costs its episode alone
            for (before, first), (after, second) in itertools.pairwise(spans):
                if after[0] < before[1] - 0.5 / self.info.fps:
                    raise ValueError(
                        f"meta/ gives episodes {first} and {second} the same frames of "
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
            raise ValueError(
                f"the path template {template!r} of meta/info.json gives {text!r}; it must lead into the data set, "
                f"with no fields but {', '.join(values)} and formats such as 03d"
            )
        return self.root / path

    def select(self, text: str, rows: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
        """The selected numbers [M, K] of each row, and their K names, empty where info.json does not name each number of the column.

        A RecordingError where there are none.
        """
        selection = parse_selection(text)
        values, part, names = rows[selection.column], selection.part, self._read_names(selection.column)
        width = values.shape[1]
        if isinstance(part, str):
            index = self._find_index(selection)
            if index is None:
                raise RecordingError(f"{text}: meta/info.json gives no such name{nearest(part, names)}")
            part = slice(index, index + 1)
        elif len(names) != width:
            names = [""] * width
        if (part.stop or 0) > width or not range(width)[part]:
            raise RecordingError(f"{text}: the column has {width} numbers, counted from 0")
        return values[:, part], names[part]

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
