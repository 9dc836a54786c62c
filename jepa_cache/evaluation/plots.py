"""Pictures of an evaluation: error against horizon, and a strip of frames with their true and predicted tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

LABELS = {
    "model": ("predictor", "#1f77b4"),
    "copy_last": ("copy the last step", "#7f7f7f"),
    "mean": ("training mean", "#c7c7c7"),
    "shuffled_actions": ("predictor, shuffled actions", "#d62728"),
    "zero_actions": ("predictor, zero actions", "#ff7f0e"),
    "permuted_actions": ("predictor, permuted actions", "#e377c2"),
    "next_actions": ("predictor, next step's actions", "#9467bd"),
    "previous_actions": ("predictor, previous step's actions", "#8c564b"),
    "extrapolation": ("straight line", "#17becf"),
    "regression": ("linear regression on actions", "#2ca02c"),
}

OTHER_COLOURS = ("#bcbd22", "#393b79", "#637939", "#843c39")  # of predictions without a label here
ERROR_COLOURS = "magma"


class Strip(NamedTuple):
    """One held-out window, ready to draw.

    Attributes:
        title: What it shows.
        frames: [C + K, h, w, 3] uint8, or None when the recording is not on this machine.
        true: [C + K, H, W, 3] colours of the true tokens, in [0, 1].
        predicted: [K, H, W, 3] colours of the open-loop predictions in the same basis.
        error: [K, H, W] L1 per token.
    """

    title: str
    frames: np.ndarray | None
    true: np.ndarray
    predicted: np.ndarray
    error: np.ndarray


def list_series(columns: Sequence[str]) -> list[str]:
    """The predictions that a table of errors per open-loop step holds: columns that have interval ends."""
    return [name for name in columns if f"{name}_low" in columns and f"{name}_high" in columns]


def draw_horizon(rows: Sequence[Mapping[str, float | None]], path: Path, *, note: str) -> None:
    """Every prediction's error against open-loop step with 95 % bands.

    Args:
        rows: Of horizon.csv; None where a prediction does not exist at a step.
        path: Where the PNG goes.
        note: Says what the features are.
    """
    names = list_series(list(rows[0]))
    figure, axes = new_figure(7.0, 4.4 + 0.1 * len(names))
    steps = [row["horizon"] for row in rows]
    for position, name in enumerate(names):
        label, colour = LABELS.get(name, (name.replace("_", " "), OTHER_COLOURS[position % len(OTHER_COLOURS)]))
        first = position == 0
        mean, low, high = (
            np.array([row[f"{name}{end}"] for row in rows], dtype=float) for end in ("", "_low", "_high")
        )
        size, width, order = (6, 2.5, 3) if first else (4, 1.4, 2)
        axes.plot(steps, mean, marker="o", ms=size, lw=width, color=colour, label=label, zorder=order)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
    axes.set_xticks(steps)
    axes.set_xlabel("open-loop step")
    axes.set_ylabel("L1 between predicted and true tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    figure.suptitle(f"Error against horizon, held-out episodes\n{note}", fontsize=10)
    figure.savefig(path, dpi=120)


def label_step(step: int, context: int) -> str:
    """Of a window's step: "context 2", "open loop +1"."""
    return f"context {step + 1}" if step < context else f"open loop +{step - context + 1}"


def draw_strip(strip: Strip, path: Path) -> None:
    """Rows: frames, true tokens, predicted tokens, error; columns: context steps, then open-loop steps."""
    num_steps, num_predicted = len(strip.true), len(strip.predicted)
    context = num_steps - num_predicted
    rows = ["recorded frame", "true tokens", "predicted tokens", "error (L1)"]
    token_shape = strip.true.shape[1] / strip.true.shape[2]
    frame_shape = token_shape if strip.frames is None else strip.frames.shape[1] / strip.frames.shape[2]
    shapes = [frame_shape, *[token_shape] * (len(rows) - 1)]  # height over width
    figure, _ = new_figure(1.7 * num_steps, 1.55 * sum(shapes) + 1.0, axes=False)
    grid = figure.subplots(len(rows), num_steps, squeeze=False, height_ratios=shapes)
    limit = float(strip.error.max()) or 1.0
    image = None
    for row, name in enumerate(rows):
        for step in range(num_steps):
            axes = grid[row][step]
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(label_step(step, context), fontsize=9)
            if step == 0:
                axes.set_ylabel(name.replace(" ", "\n", 1), fontsize=9)
            picture = _cell(strip, name, step, context)
            if picture is None:
                axes.set_facecolor("#eeeeee")
                axes.set_box_aspect(shapes[row])  # as the cells that hold a picture
                words = "recording\nnot here" if name == "recorded frame" else "given,\nnot predicted"
                axes.text(0.5, 0.5, words, ha="center", va="center", fontsize=7, transform=axes.transAxes)
            elif name == "error (L1)":
                image = axes.imshow(picture, cmap=ERROR_COLOURS, vmin=0, vmax=limit)
            else:
                axes.imshow(picture)
    if image is not None:
        figure.colorbar(image, ax=grid[-1].tolist(), shrink=0.8, label="L1")
    figure.suptitle(strip.title, fontsize=10)
    figure.savefig(path, dpi=110)


def _cell(strip: Strip, name: str, step: int, context: int) -> np.ndarray | None:
    if name == "recorded frame":
        return None if strip.frames is None else strip.frames[step]
    if name == "true tokens":
        return strip.true[step]
    if step < context:
        return None
    return strip.predicted[step - context] if name == "predicted tokens" else strip.error[step - context]


def new_figure(width: float, height: float, *, axes: bool = True):
    """A figure of its own, not in pyplot's global list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots() if axes else None
