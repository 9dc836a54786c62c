"""Pictures of the recorded actions: are those of the held-out episodes like those that the predictor was trained on?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jepa_cache.actions import Column
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.evaluation.plots import new_figure

TRAINING, HELD_OUT = "#7f7f7f", "#1f77b4"
NUM_BINS = 40
NUM_DRAWN = 24  # columns of a kind
RANGE = (0.5, 99.5)  # percentiles of the training actions that a histogram spans; what lies outside counts at its ends


def read_segment_actions(dataset: CachedDataset, segments: Sequence[Segment]) -> np.ndarray:
    """Unscaled actions [n, A] between the steps of some segments: of each all but its last row, which leads out of it."""
    rows = [dataset.controls(segment.store)[0][segment.start : segment.stop - 1] for segment in segments]
    return np.concatenate(rows)


def draw_actions(columns: Sequence[Column], training: np.ndarray, held_out: np.ndarray, path: Path) -> None:
    """A histogram for each continuous column, and bars for how often each of the others is on.

    Args:
        columns: The A action columns.
        training: [n, A] unscaled.
        held_out: [m, A] unscaled.
        path: Where the PNG goes.
    """
    numbers = range(len(columns))
    continuous = [number for number in numbers if columns[number].kind == "continuous"][:NUM_DRAWN]
    switches = [number for number in numbers if columns[number].kind != "continuous"][:NUM_DRAWN]
    num_rows = -(-len(continuous) // 3)
    bars_height = 0.28 * len(switches) + 0.9 if switches else 0.0
    heights = [2.1] * num_rows + ([bars_height] if switches else [])
    figure, _ = new_figure(8.0, sum(heights) + 0.7, axes=False)
    rows = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for place, number in enumerate(continuous):
        axes = figure.add_subplot(rows[place // 3, place % 3])
        _draw_column(axes, columns[number], training[:, number], held_out[:, number])
    if switches:
        _draw_rates(figure.add_subplot(rows[-1, :]), [columns[n].name for n in switches], training, held_out, switches)
    left_out = sum(column.kind == "continuous" for column in columns) - len(continuous)
    left_out += sum(column.kind != "continuous" for column in columns) - len(switches)
    note = f"; {left_out} more columns are not drawn" if left_out else ""
    figure.suptitle(
        f"Recorded actions: {len(held_out)} held out (blue), {len(training)} of training (grey){note}", fontsize=10
    )
    figure.savefig(path, dpi=110)


def _draw_column(axes, column: Column, training: np.ndarray, held_out: np.ndarray) -> None:
    low, high = np.percentile(training, RANGE)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, NUM_BINS + 1)
    for values, colour in ((training, TRAINING), (held_out, HELD_OUT)):
        shares = np.histogram(np.clip(values, low, high), edges)[0] / len(values)
        axes.stairs(shares, edges, color=colour, fill=colour == TRAINING, alpha=0.5 if colour == TRAINING else 1.0)
    axes.set_yscale("symlog", linthresh=0.01)  # rare and frequent values both show
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "1 %", "10 %", "100 %"], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{column.name} ({column.unit})" if column.unit else column.name, fontsize=9)


def _draw_rates(axes, names: list[str], training: np.ndarray, held_out: np.ndarray, numbers: list[int]) -> None:
    places = np.arange(len(names))
    for offset, values, colour in ((0.2, training, TRAINING), (-0.2, held_out, HELD_OUT)):
        rates = (values[:, numbers] != 0).mean(axis=0)
        axes.barh(places - offset, rates, height=0.38, color=colour, alpha=0.5 if colour == TRAINING else 1.0)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of steps in which it is on", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="x")
