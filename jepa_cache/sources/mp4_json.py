"""Anyone's recordings: a folder of `<name>.mp4` with `<name>.json` beside it, which holds fps, actions and states."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.config.paths import spell_name
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.media.probe import DecodeError, measure_rate, probe_video
from jepa_cache.media.remote import BucketFile
from jepa_cache.media.tar import expand_inputs, is_file_name
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.placement import place_frames
from jepa_cache.sources.parsers.untrusted import check_fields, read_object

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

MAX_JSON_BYTES = 32 << 20
"""Two million numbers: an hour at 30 Hz with 14 columns. Parsed, JSON takes ten times its bytes and more."""


@dataclass(frozen=True)
class Mp4JsonOptions:
    """Options of the source: none."""


class Scalars(BaseModel):
    """The single values of a json."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    fps: float | None = Field(default=None, gt=0)
    success: bool | None = None


def build(options: Mapping[str, Any]) -> Mp4JsonSource:
    """Make the source from the `source_options` of a preset; a ValueError for an unknown option."""
    return Mp4JsonSource(parse_dataclass(Mp4JsonOptions, options, "source_options of mp4_json"))


class Mp4JsonSource:
    """Reads pairs of mp4 and json. A unit is one pair, or several (`encode.episodes_per_unit`).

    The json is an object: `fps` (rows per second, Hz; not needed beside `times`), `states` [M][S] (row i at i / fps
    seconds, before action i acts), `actions` [M][A] or [M-1][A], and optionally `times` [M] (seconds since the first
    frame, in place of i / fps; one for each frame says when that frame was taken) and `success` (true or false).
    Controls are action_0.., state_0.. and success.
    """

    def __init__(self, options: Mp4JsonOptions) -> None:
        self.recipe: dict[str, object] = {"source": "mp4_json", "recipe_version": RECIPE_VERSION, **asdict(options)}

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find pairs, sorted, and mp4 or json files without a partner; a ValueError where two pairs have one key."""
        pairs: dict[str, set[Path]] = {}  # by path without suffix; as text, for ten thousand paths take seconds
        for path in expand_inputs(inputs, base, "*.mp4", "*.json"):
            pairs.setdefault(os.path.splitext(path)[0], set()).add(path)  # noqa: PTH122
        keys: dict[str, str] = {}
        sessions = {folder: Path(folder).resolve().name for folder in {os.path.split(stem)[0] for stem in pairs}}
        for stem in sorted(pairs, key=lambda stem: stem.split(os.sep)):  # noqa: PTH206
            if len(pairs[stem]) == 1:
                pairs[stem] |= {path for path in map(Path, (f"{stem}.json", f"{stem}.mp4")) if is_file_name(path)}
            folder, name = os.path.split(stem)
            key = spell_name(f"{sessions[folder]}/{name}")
            if (other := keys.setdefault(key, stem)) != stem:
                raise ValueError(f"{other} and {stem} have one key, {key!r}; rename a file or its folder")
        # json first, because .json sorts before .mp4.
        return [Unit(key, tuple(sorted(pairs[stem]))) for key, stem in keys.items()]

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the pairs of a unit; as skipped, with the reason, one that cannot be used."""
        for pair in self.split_files(unit.files):
            first, files = pair[0], {path.suffix: path for path in pair}
            try:
                for suffix in (".mp4", ".json"):
                    if suffix not in files:
                        raise RecordingError(f"there is no {first.stem}{suffix} beside {first.name}")
                yield _read_episode(_find_key(first), files[".mp4"], files[".json"])
            except (RecordingError, DecodeError) as error:
                yield Skipped(_find_key(first), str(error))

    def split_files(self, files: Sequence[Path | BucketFile]) -> list[list[Path]]:
        """The files of each pair."""
        paths = (file for file in files if isinstance(file, Path))  # all of them: this source reads no bucket
        return [list(pair) for _, pair in groupby(paths, key=lambda path: path.with_suffix(""))]

    def name_skipped(self, unit: Unit, key: str) -> str:
        """The pair's present name; see `Source`."""
        return unit.name


def _find_key(path: Path) -> str:
    """The key of the pair that a file belongs to: its folder and its name without suffix."""
    return spell_name(f"{path.parent.resolve().name}/{path.stem}")


def _read_episode(key: str, video: Path, records: Path) -> Episode:
    fields = read_object(records, MAX_JSON_BYTES)
    states = _read_rows(fields, "states", records.name, 2)
    actions = _read_rows(fields, "actions", records.name, 2)
    if len(actions) == len(states) - 1:  # No action leads on from the last state.
        actions = np.concatenate([actions, np.full((1, actions.shape[1]), np.nan)])
    if len(actions) != len(states):
        raise RecordingError(
            f"{records.name}: {len(actions)} actions and {len(states)} states; there must be as many, or one action less"
        )
    scalars = check_fields(Scalars, fields, records.name)
    if "times" in fields:
        times_s = _read_rows(fields, "times", records.name, 1)
        if len(times_s) != len(states):
            raise RecordingError(
                f"{records.name}: {len(times_s)} times and {len(states)} states; there must be as many"
            )
    elif scalars.fps is None:
        raise RecordingError(f"{records.name}: the field fps, rows per second, is missing")
    else:
        times_s = np.arange(len(states)) / scalars.fps
    info = probe_video(video)
    placement = place_frames(times_s, info.num_frames, info.typical_fps, info.frame_times_s, measured="times" in fields)
    fps = info.fps if placement.frame_times_s is None else measure_rate(placement.frame_times_s, info.fps)
    controls = {f"action_{index}": column.copy() for index, column in enumerate(actions.T)}
    controls |= {f"state_{index}": column.copy() for index, column in enumerate(states.T)}
    if scalars.success is not None:
        controls["success"] = np.full(len(states), scalars.success)
    return Episode(
        key=key,
        video=video,
        fps=fps,
        controls=controls,
        frame_ticks=placement.frame_ticks,
        num_video_frames=info.num_frames,
        notes=placement.notes,
        frame_times_s=placement.frame_times_s,
    )


def _read_rows(fields: Mapping[str, Any], name: str, file: str, ndim: int) -> np.ndarray:
    """[M, K] or [M] float64, finite."""
    if name not in fields:
        raise RecordingError(f"{file}: the field {name} is missing; it holds {', '.join(map(repr, list(fields)[:20]))}")
    wanted = {1: "a list of numbers", 2: "a list of rows of equal length, each a list of numbers"}[ndim]
    try:
        values = np.asarray(fields[name])
    except ValueError as error:  # Rows of several lengths.
        raise RecordingError(f"{file}: {name} must be {wanted}") from error
    if values.ndim != ndim or values.size == 0 or values.dtype.kind not in "iuf":
        raise RecordingError(f"{file}: {name} must be {wanted}; got {values.dtype} of shape {values.shape}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise RecordingError(f"{file}: {name} must be finite; row {np.argwhere(~np.isfinite(values))[0][0]} is not")
    return values
