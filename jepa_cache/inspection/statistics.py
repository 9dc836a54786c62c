"""A data set under the lens: every recording's report, and statistics of the action columns that it would be trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import ActionSpace
from jepa_cache.episode import Episode, Skipped
from jepa_cache.inspection.recording import RecordingReport, inspect_recording
from jepa_cache.media.probe import header_counts
from jepa_cache.sources import Source, Unit, iter_recordings

MAX_ROWS = 200_000
"""Action rows that are kept for histograms; of larger data sets every second, fourth, ... row."""
NUM_BINS = 40
NUM_FIRST_DECODED, DECODED_EVERY = 100, 50
"""Frames are decoded of the first recordings and of every 50th after them: an open video is milliseconds, 200 frames half a second."""


class ColumnStatistics(NamedTuple):
    """One action column over the data set: exact mean, std, minimum, maximum and share of zeros; a histogram of the middle.

    `edges` [bins+1] span the 0.5 to the 99.5 % quantile, `counts` [bins] are of the kept rows inside.
    """

    name: str
    unit: str
    kind: str
    mean: float
    std: float
    minimum: float
    maximum: float
    zero_share: float
    edges: list[float]
    counts: list[int]


class InspectionReport(NamedTuple):
    """What was found: recordings, those that were skipped (unit, key, reason), and the action columns over all of them.

    `name` is that of the data set preset, with the camera where one was chosen; `source` is the module that read it.
    """

    name: str
    source: str
    action_space: str
    step_hz: float
    num_actions: int
    recordings: list[RecordingReport]
    skipped: list[dict[str, str]]
    columns: list[ColumnStatistics]

    def to_json(self) -> dict[str, Any]:
        """JSON types only, without pictures; null where something is not known."""
        recordings = []
        for recording in self.recordings:
            entry = asdict(recording)
            del entry["picture"]
            recordings.append(entry)
        return {
            "name": self.name,
            "source": self.source,
            "action_space": self.action_space,
            "step_hz": self.step_hz,
            "num_actions": self.num_actions,
            "num_suspicious": sum(bool(recording.suspicions) for recording in self.recordings),
            "recordings": recordings,
            "skipped": self.skipped,
            "action_columns": [column._asdict() for column in self.columns],
        }


@dataclass
class _ActionRows:
    """Running statistics of action rows [A], and a thinned sample of them in bounded memory."""

    space: ActionSpace
    count: int = 0
    sums: np.ndarray = field(init=False)
    squares: np.ndarray = field(init=False)
    zeros: np.ndarray = field(init=False)
    bounds: np.ndarray = field(init=False)
    _kept: list[np.ndarray] = field(default_factory=list)
    _num_kept: int = 0
    _stride: int = 1

    def __post_init__(self) -> None:
        width = len(self.space.actions)
        self.sums, self.squares, self.zeros = np.zeros(width), np.zeros(width), np.zeros(width)
        self.bounds = np.stack([np.full(width, np.inf), np.full(width, -np.inf)])

    def add(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        if len(rows) == 0:
            return
        self._kept.append(rows[-self.count % self._stride :: self._stride].astype(np.float32))
        self._num_kept += len(self._kept[-1])
        self.count += len(rows)
        self.sums += rows.sum(axis=0)
        self.squares += (rows**2).sum(axis=0)
        self.zeros += (rows == 0).sum(axis=0)
        self.bounds[0] = np.minimum(self.bounds[0], rows.min(axis=0))
        self.bounds[1] = np.maximum(self.bounds[1], rows.max(axis=0))
        if self._num_kept > MAX_ROWS:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._num_kept = len(self._kept[0])
            self._stride *= 2

    def columns(self) -> list[ColumnStatistics]:
        if self.count == 0:
            return []
        kept, mean = np.concatenate(self._kept), self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return [
            ColumnStatistics(
                *column,
                float(mean[index]),
                float(std[index]),
                *(float(bound) for bound in self.bounds[:, index]),
                float(self.zeros[index] / self.count),
                *_histogram(kept[:, index]),
            )
            for index, column in enumerate(self.space.actions)
        ]


def _histogram(values: np.ndarray) -> tuple[list[float], list[int]]:
    low, high = np.quantile(values, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, NUM_BINS, (low, high))
    return edges.tolist(), counts.tolist()


def inspect_units(
    source: Source,
    units: Iterable[Unit],
    space: ActionSpace,
    *,
    name: str,
    step_hz: float,
    plan: Callable[[Episode], np.ndarray],
    limit: int | None = None,
    pictures: bool = False,
) -> InspectionReport:
    """Report on every recording of some units: its records, and its video's header; nothing is encoded.

    200 frames are decoded of the first hundred recordings and of every fiftieth after them.

    Args:
        source: Reads the units.
        units: May be made while they are read.
        space: The action space whose columns are measured.
        name: Of the data set, for the report.
        step_hz: Steps per second that the actions lead between; as in stage one the true rate may be a little lower.
        plan: The video frames of a recording that its steps stand for in stage one; a ValueError where stage one would skip it.
        limit: Recordings to look at, of all units together; None means all.
        pictures: Keep a picture of each recording of which frames are decoded.

    Cost: linear; a recording's records, a few milliseconds for the header of its video, and half a second for 200 frames of 640x360.
    """
    rows = _ActionRows(space)
    recordings: list[RecordingReport] = []
    skipped: list[dict[str, str]] = []
    for number, (unit, result) in enumerate(_iter_limited(source, units, limit)):
        if isinstance(result, Skipped):
            skipped.append({"unit": unit.name, "key": result.key, "reason": result.reason})
            continue
        report = inspect_recording(result, unit.name, decode=_is_decoded(number), picture=pictures)
        try:
            anchors = plan(result)
        except ValueError as error:
            report = replace(report, suspicions=(*report.suspicions, f"stage one skips it: {error}"))
        else:
            try:
                rows.add(space.aggregate(result.controls, result.frame_ticks[anchors]).actions)
            except ValueError as error:
                reason = f"the action space {space.name} cannot describe it: {error}"
                report = replace(report, suspicions=(*report.suspicions, reason))
        recordings.append(report)
    reader = str(source.recipe.get("source", type(source).__name__))
    return InspectionReport(name, reader, space.name, step_hz, rows.count, recordings, skipped, rows.columns())


def _iter_limited(source: Source, units: Iterable[Unit], limit: int | None) -> Iterator[tuple[Unit, Episode | Skipped]]:
    number = 0
    for unit in units:
        results = iter_recordings(source, unit)
        while number != limit:
            # Where nothing is decoded, the source need not count a video's packets either.
            with contextlib.nullcontext() if _is_decoded(number) else header_counts():
                result = next(results, None)
            if result is None:
                break
            number += 1
            yield unit, result
        else:
            return


def _is_decoded(number: int) -> bool:
    """Whether frames are decoded of the recording with this number, counted from 0."""
    return number < NUM_FIRST_DECODED or number % DECODED_EVERY == 0
