"""One training batch under the lens: shapes and ranges of what the predictor is given, column by column and window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import ActionSpace, Column


class Spread(NamedTuple):
    """Of the finite values of an array; None where there is none. `num_bad` are those that are not finite."""

    minimum: float | None
    mean: float | None
    maximum: float | None
    std: float | None
    num_bad: int


class TensorReport(NamedTuple):
    """One tensor of the batch: `axes` names its shape by the letters of the code, `meaning` says what it is."""

    name: str
    axes: str
    shape: list[int]
    dtype: str
    meaning: str
    spread: Spread


class ColumnReport(NamedTuple):
    """One action or state column over the batch: as the predictor gets it, and as it was recorded."""

    name: str
    unit: str
    kind: str
    scaled: Spread
    raw: Spread


class WindowReport(NamedTuple):
    """Where one window of the batch comes from; `first_step` counts from the start of its episode, one entry a step in the lists."""

    dataset: str
    camera: str | None
    phase: int
    episode: str
    first_step: int
    frames: list[int]  # of the video
    ticks: list[int]  # rows of the controls


class BatchReport(NamedTuple):
    """A batch as the predictor gets it. `settings` say what it was made with, in the order in which they are shown."""

    settings: dict[str, Any]
    tensors: list[TensorReport]
    actions: list[ColumnReport]
    states: list[ColumnReport]
    windows: list[WindowReport]

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "settings": self.settings,
            "tensors": [{**tensor._asdict(), "spread": tensor.spread._asdict()} for tensor in self.tensors],
            "actions": [_column_json(column) for column in self.actions],
            "states": [_column_json(column) for column in self.states],
            "windows": [window._asdict() for window in self.windows],
        }


def measure_spread(parts: Sequence[np.ndarray]) -> Spread:
    """Minimum, mean, maximum and deviation over all values of some arrays, in float64."""
    finite = [part[np.isfinite(part)].astype(np.float64) for part in parts]
    count, num_values = sum(map(len, finite)), sum(part.size for part in parts)
    if count == 0:
        return Spread(None, None, None, None, num_values)
    finite = [values for values in finite if len(values)]
    mean = sum(float(values.sum()) for values in finite) / count
    variance = sum(float(((values - mean) ** 2).sum()) for values in finite) / count
    low, high = min(values.min() for values in finite), max(values.max() for values in finite)
    return Spread(float(low), mean, float(high), variance**0.5, num_values - count)


def describe_tensor(name: str, axes: str, meaning: str, dtype: str, parts: Sequence[np.ndarray]) -> TensorReport:
    """Describe a tensor from its windows, one array each."""
    return TensorReport(name, axes, [len(parts), *parts[0].shape], dtype, meaning, measure_spread(parts))


def describe_columns(columns: Sequence[Column], scaled: np.ndarray, raw: np.ndarray) -> list[ColumnReport]:
    """Describe the columns of [B, T, C] values, scaled and raw."""
    return [
        ColumnReport(*column, measure_spread([scaled[..., index]]), measure_spread([raw[..., index]]))
        for index, column in enumerate(columns)
    ]


def describe_batch(
    settings: Mapping[str, Any],
    space: ActionSpace,
    tensors: Sequence[TensorReport],
    *,
    actions: tuple[np.ndarray, np.ndarray],
    states: tuple[np.ndarray, np.ndarray],
    windows: Sequence[WindowReport],
) -> BatchReport:
    """Put the report of a batch together.

    Args:
        settings: What it was made with, to be shown.
        space: Names the columns.
        tensors: In the order in which they are shown.
        actions: [B, T-1, A] scaled and raw.
        states: [B, T, S] scaled and raw.
        windows: B of them.
    """
    return BatchReport(
        dict(settings),
        list(tensors),
        describe_columns(space.actions, *actions),
        describe_columns(space.states, *states),
        list(windows),
    )


def name_window(window: WindowReport) -> str:
    """A window in words: data set, camera, phase, episode and steps."""
    camera = f", {window.camera}" if window.camera else ""
    phase = f", phase {window.phase}" if window.phase else ""
    stop = window.first_step + len(window.frames) - 1
    return f"{window.episode}, steps {window.first_step} to {stop} ({window.dataset}{camera}{phase})"


def _column_json(column: ColumnReport) -> dict[str, Any]:
    return {**column._asdict(), "scaled": column.scaled._asdict(), "raw": column.raw._asdict()}
