"""LeRobot data sets, v2.0, v2.1 (a parquet and an mp4 per episode) and v3.0 (many episodes in one), from disk or the hub."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.media.probe import DecodeError, VideoInfo, probe_video
from jepa_cache.media.remote import HUB_PREFIX, fetch_hub_dataset
from jepa_cache.media.tar import UnreadableFolderError, expand_inputs
from jepa_cache.sources import Head, Unit
from jepa_cache.sources._lerobot_subset import copy_first_episodes
from jepa_cache.sources.parsers.lerobot_layout import Layout, Listing, Place, build_controls, parse_selection
from jepa_cache.sources.parsers.placement import place_frames
from jepa_cache.sources.parsers.untrusted import iter_rows

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

MAX_EPISODE_BYTES = 1 << 30


@dataclass(frozen=True)
class LerobotOptions:
    """Options of the source. A selection is `column`, `column[3]`, `column[0:7]` or `column[name]`, names as in info.json.

    Attributes:
        camera: The video key, e.g. "observation.images.top".
        actions: Selections that together become action_0, action_1, ...
        states: Selections that together become state_0, state_1, ...
        columns: Control name to selection of one number, e.g. {x_m: "observation.state[0]", ...} for the action space pose7,
            or {success: is_episode_successful}.
    """

    camera: str
    actions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every selection can be read and that there is one."""
        if not (self.actions or self.states or self.columns):
            raise ValueError(
                "lerobot source: nothing is selected; name columns in source_options.actions and .states, "
                'e.g. actions: ["action"], states: ["observation.state"]'
            )
        for name, text in self.columns.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise ValueError(f"lerobot source: columns maps control names to selections; got {name!r}: {text!r}")
        for text in self.selections:
            parse_selection(text)

    @property
    def selections(self) -> tuple[str, ...]:
        """All selections."""
        return (*self.actions, *self.states, *self.columns.values())


def build(options: Mapping[str, Any]) -> LerobotSource:
    """Make the source from the `source_options` of a preset.

    Raises:
        ValueError: An unknown option (the nearest known one is named) or a wrong value.
    """
    return LerobotSource(parse_dataclass(LerobotOptions, options, "source_options of lerobot"))


class LerobotSource:
    """Reads LeRobot data sets. A unit is an episode's two files (v2), or a parquet file and the videos of its episodes (v3).

    Row i is read at the moment of the frame at its `timestamp`, and its action acts from there on. A unit's data set is found
    again by looking for meta/info.json above its files.
    """

    def __init__(self, options: LerobotOptions) -> None:
        """Hold the options."""
        self.options = options
        self.recipe: dict[str, object] = {
            "source": "lerobot",
            "recipe_version": RECIPE_VERSION,
            "camera": options.camera,
            "actions": list(options.actions),
            "states": list(options.states),
            "columns": dict(sorted(options.columns.items())),
        }
        self._listing: Listing | None = None

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find data sets (folders that hold meta/info.json, at any depth) and `hub:owner/name[@revision]`; list their units.

        Listed episodes of which no file is there make one more unit, whose file is the list; it yields them as skipped.

        Raises:
            ValueError: An input finds no data set, meta/ cannot be used, the camera does not exist, or two data sets have
                one name.
        """
        units: list[Unit] = []
        names: dict[str, Path] = {}
        for root in self._find_roots(inputs, base):
            listing = Listing(root, self.options.camera)
            name = listing.layout.name
            if name in names:
                raise ValueError(f"{names[name]} and {root} have one name; rename a folder, episode keys begin with it")
            names[name] = root
            units += listing.list_units(self.options.selections)
        return units

    def take_first(self, unit: Unit, most: int, folder: Path) -> Head:
        """The first listed episodes of a parquet file in a data set of their own, written below `folder`; see `Source`."""
        listing = self._open_listing(unit)
        places = listing.missing() if unit.files[0] in listing.lists else listing.by_file[unit.files[0]]
        if len(places) <= most or not listing.layout.packed:
            return Head(unit, len(places))
        columns = dict.fromkeys(("episode_index", *self._columns))
        root = copy_first_episodes(listing.layout, self.options.camera, places[:most], tuple(columns), folder)
        (first,) = Listing(root, self.options.camera).list_units(self.options.selections)
        return Head(first._replace(name=f"{unit.name}, first {most}"), most)

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the episodes of a unit, one in memory at a time.

        Skipped, with the reason: a listed episode whose files are missing, damaged or of another clock than info.json says,
        a column that is missing or holds no numbers, rows or frames that do not fit the list.

        Raises:
            ValueError: meta/ cannot be used.
        """
        listing = self._open_listing(unit)
        if unit.files[0] in listing.lists:
            for place in listing.missing():
                yield Skipped(
                    listing.layout.key(place.index), f"{place.data.name} and its video are listed but not there"
                )
            return
        infos: dict[Path, VideoInfo] = {}
        waiting = {place.index: place for place in listing.by_file[unit.files[0]]}
        try:
            for index, rows in self._iter_rows(listing, waiting):
                place = waiting.pop(index, None)
                key = listing.layout.key(index)
                if place is None:
                    yield Skipped(key, f"its rows in {unit.files[0].name} are not listed in meta, or lie in two places")
                    continue
                try:
                    yield self._read_episode(listing.layout, place, rows, infos)
                except (RecordingError, DecodeError) as error:
                    yield Skipped(key, str(error))
            reason = f"{unit.files[0].name} holds none of its rows"
        except RecordingError as error:
            reason = str(error)
        for index in waiting:
            yield Skipped(listing.layout.key(index), reason)

    def name_skipped(self, unit: Unit, key: str) -> str:
        """The episode by the data set's present name; see `Source`."""
        return f"{self._open_listing(unit).layout.name}/{key.rpartition('/')[2]}"

    @property
    def _columns(self) -> tuple[str, ...]:
        """The columns of rows that are read, each once."""
        return tuple(dict.fromkeys(["timestamp", *(parse_selection(text).column for text in self.options.selections)]))

    def _find_roots(self, inputs: Sequence[str], base: Path) -> list[Path]:
        patterns = ("meta/*", "data/*", f"videos/*{self.options.camera}/*")
        roots = [fetch_hub_dataset(text, patterns) for text in inputs if text.startswith(HUB_PREFIX)]
        for text in inputs:
            if text.startswith(HUB_PREFIX):
                continue
            try:
                found = expand_inputs([text], base, "info.json")
            except UnreadableFolderError:
                raise
            except ValueError:  # Its message tells of files and ranges; a data set is a folder.
                found = []
            here = [path.parent.parent for path in found if path.name == "info.json" and path.parent.name == "meta"]
            if not here:
                raise ValueError(
                    f"the input {text!r} holds no LeRobot data set: there is no meta/info.json in or below it; relative inputs "
                    f"start from {base}. Give a data set's folder, or hub:owner/name"
                )
            roots += here
        return sorted(set(roots))

    def _open_listing(self, unit: Unit) -> Listing:
        root = next((folder for folder in unit.files[0].parents if (folder / "meta" / "info.json").is_file()), None)
        if root is None:
            raise ValueError(f"{unit.files[0]} lies in no LeRobot data set: no folder above it holds meta/info.json")
        if self._listing is None or not self._listing.is_of(root):
            self._listing = Listing(root, self.options.camera)
        return self._listing

    def _iter_rows(self, listing: Listing, places: Mapping[int, Place]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The rows of one episode after the other: index, and column to [M, W]."""
        first = next(iter(places.values()))
        if not first.data.is_file():
            raise RecordingError(f"{first.data.name} is not there")
        columns = self._columns
        if not listing.layout.packed:
            yield first.index, _join(list(_bounded(iter_rows(first.data, columns), first.data)))
            return
        parts: list[dict[str, np.ndarray]] = []
        last: int | None = None
        for batch in iter_rows(first.data, tuple(dict.fromkeys((*columns, "episode_index")))):
            indices = batch["episode_index"][:, 0]
            if not (np.isfinite(indices).all() and (indices >= 0).all() and (indices < 2**31).all()):
                raise RecordingError(f"{first.data.name} has rows whose episode_index is no index")
            bounds = [0, *(np.flatnonzero(np.diff(indices)) + 1).tolist(), len(indices)]
            for start, stop in itertools.pairwise(bounds):
                if start == stop:
                    continue
                if last is not None and int(indices[start]) != last:
                    yield last, _join(parts)
                    parts = []
                last = int(indices[start])
                parts.append({name: values[start:stop] for name, values in batch.items()})
                list(_bounded(iter(parts), first.data))
        if last is not None:
            yield last, _join(parts)

    def _read_episode(
        self, layout: Layout, place: Place, rows: Mapping[str, np.ndarray], infos: dict[Path, VideoInfo]
    ) -> Episode:
        if not place.video.is_file():
            raise RecordingError(f"its video {place.video.relative_to(layout.root)} is not there")
        if place.video not in infos:
            infos[place.video] = probe_video(place.video)
        info = infos[place.video]
        fps = info.typical_fps
        if not math.isclose(fps, layout.fps, rel_tol=0.01):
            raise RecordingError(f"meta/info.json says {layout.fps:g} Hz, but its video runs at {fps:g} Hz")
        first_frame, num_frames = _find_frames(place, info)
        if rows["timestamp"].shape[1] != 1:
            raise RecordingError(f"timestamp holds {rows['timestamp'].shape[1]} numbers in a row; one is needed")
        shown_s = info.frame_times_s
        if shown_s is not None:
            shown_s = shown_s[first_frame : first_frame + num_frames] - shown_s[first_frame]
        frame_ticks, notes, frame_times_s = place_frames(rows["timestamp"][:, 0], num_frames, fps, shown_s)
        num_rows = len(rows["timestamp"])
        if place.num_rows not in (-1, num_rows):
            notes = (*notes, f"listed with {place.num_rows} rows, has {num_rows}")
        options = self.options
        return Episode(
            key=layout.key(place.index),
            video=place.video,
            fps=fps,
            controls=build_controls(
                rows, layout.features, actions=options.actions, states=options.states, columns=options.columns
            ),
            frame_ticks=frame_ticks,
            num_video_frames=num_frames,
            notes=notes,
            first_frame=first_frame,
            frame_times_s=frame_times_s,
        )


def _find_frames(place: Place, info: VideoInfo) -> tuple[int, int]:
    """First frame and number of frames of an episode in its video."""
    if place.span_s is None:
        return 0, info.num_frames
    start, stop = (_find_frame(time_s, info) for time_s in place.span_s)
    if not (math.isfinite(start) and math.isfinite(stop) and 0 <= start < stop):
        raise RecordingError(f"meta/episodes places it from {place.span_s[0]} to {place.span_s[1]} s of its video")
    if abs(start - round(start)) > 0.25:
        raise RecordingError(f"meta/episodes places its start at {place.span_s[0]} s, between two frames of its video")
    if round(start) >= info.num_frames:
        raise RecordingError(
            f"meta/episodes places it from {place.span_s[0]:g} s on, but its video lasts {info.num_frames / info.fps:g} s"
        )
    return round(start), max(1, min(round(stop), info.num_frames) - round(start))


def _find_frame(time_s: float, info: VideoInfo) -> float:
    """Number of the frame at a time; between two frames and behind the last one, a fraction."""
    if info.times_s is None or not math.isfinite(time_s):
        return time_s * info.fps
    later = max(0.0, time_s - info.times_s[-1]) * info.typical_fps
    return float(np.interp(time_s, info.times_s, np.arange(info.num_frames))) + later


def _bounded(parts: Iterator[dict[str, np.ndarray]], path: Path) -> Iterator[dict[str, np.ndarray]]:
    size_bytes = 0
    for part in parts:
        size_bytes += sum(values.nbytes for values in part.values())
        if size_bytes > MAX_EPISODE_BYTES:
            raise RecordingError(f"{path.name} holds an episode with more than {MAX_EPISODE_BYTES} bytes of rows")
        yield part


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not parts:
        raise RecordingError("the file holds no row")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
