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
from jepa_cache.media.tar import walk
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.lerobot_layout import EpisodeLocation, Layout, parse_selection
from jepa_cache.sources.parsers.placement import place_frames
from jepa_cache.sources.parsers.untrusted import iter_rows

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

MAX_EPISODE_ROWS = 1 << 20  # ten hours at 30 Hz


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


def build(options: Mapping[str, Any]) -> LerobotSource:
    """Make the source from the `source_options` of a preset; a ValueError for an unknown option or a wrong value."""
    return LerobotSource(parse_dataclass(LerobotOptions, options, "source_options of lerobot"))


class LerobotSource:
    """Reads LeRobot data sets. A unit is an episode's two files (v2), or a parquet file and the videos of its episodes (v3).

    Row i is read at the moment of the frame at its `timestamp`, and its action acts from there on. A unit's data set is found
    again by looking for meta/info.json above its files.
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

        Raises:
            ValueError: An input finds no data set, meta/ cannot be used, the camera does not exist, or two data sets have
                one name.
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
        """Yield the episodes of a unit, one in memory at a time.

        Skipped, with the reason: a listed episode whose files are missing, damaged or of another clock than info.json says,
        a column that is missing or holds no numbers, rows or frames that do not fit the list.

        Raises:
            ValueError: meta/ cannot be used.
        """
        layout = self._open_layout(unit)
        path = unit.files[0]
        if path in layout.lists:
            for episode in layout.list_missing():
                yield Skipped(layout.key(episode.index), f"{episode.data.name} and its video are listed but not there")
            return
        waiting = {episode.index: episode for episode in layout.by_file[path]}
        try:
            for index, rows in self._iter_rows(layout, next(iter(waiting.values()))):
                location, key = waiting.pop(index, None), layout.key(index)
                if location is None:
                    yield Skipped(key, f"its rows in {path.name} are not listed in meta, or lie in two places")
                    continue
                try:
                    yield self._read_episode(layout, location, rows)
                except (RecordingError, DecodeError) as error:
                    yield Skipped(key, str(error))
            reason = f"{path.name} holds none of its rows"
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
        if self._layout is None or not self._layout.is_of(root):
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
        options = self.options
        return Episode(
            key=layout.key(location.index),
            video=video,
            fps=fps,
            controls=layout.build_controls(
                rows, actions=options.actions, states=options.states, columns=options.columns
            ),
            frame_ticks=frame_ticks,
            num_video_frames=num_frames,
            notes=notes,
            first_frame=first_frame,
            frame_times_s=frame_times_s,
        )


def _find_frames(location: EpisodeLocation, info: VideoInfo) -> tuple[int, int]:
    """First frame and number of frames of an episode in its video."""
    if location.span_s is None:
        return 0, info.num_frames
    start_s, stop_s = location.span_s
    start, stop = (_find_frame(time_s, info) for time_s in location.span_s)
    if not (math.isfinite(start) and math.isfinite(stop) and 0 <= start < stop):
        raise RecordingError(f"meta/episodes places it from {start_s} to {stop_s} s of its video")
    if abs(start - round(start)) > 0.25:
        raise RecordingError(f"meta/episodes places its start at {start_s} s, between two frames of its video")
    if round(start) >= info.num_frames:
        lasts_s = info.num_frames / info.fps
        raise RecordingError(f"meta/episodes places it from {start_s:g} s on, but its video lasts {lasts_s:g} s")
    return round(start), max(1, min(round(stop), info.num_frames) - round(start))


def _find_frame(time_s: float, info: VideoInfo) -> float:
    """Number of the frame at a time; between two frames and behind the last one, a fraction."""
    if info.times_s is None or not math.isfinite(time_s):
        return time_s * info.fps
    later = max(0.0, time_s - info.times_s[-1]) * info.typical_fps
    return float(np.interp(time_s, info.times_s, np.arange(info.num_frames))) + later


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
