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
}


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


def token_colours(tokens: np.ndarray, others: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Colours from the first three principal components of the true tokens, the same basis for both.

    Args:
        tokens: [T, N, D] true tokens that the basis is fitted on.
        others: [K, N, D] shown in the same basis.
        grid: (H, W) rows and columns.

    Returns:
        [T, H, W, 3] and [K, H, W, 3] in [0, 1]; the 1st to 99th percentile of the true tokens spans the range.
    """
    from sklearn.decomposition import PCA

    width = tokens.shape[-1]
    basis = PCA(3, svd_solver="full").fit(tokens.reshape(-1, width))
    true, other = (basis.transform(values.reshape(-1, width)) for values in (tokens, others))
    low, high = np.percentile(true, [1, 99], axis=0)
    span = np.maximum(high - low, 1e-9)
    return tuple(np.clip((values - low) / span, 0, 1).reshape(-1, *grid, 3) for values in (true, other))


def draw_horizon(rows: Sequence[Mapping[str, float]], path: Path, *, note: str) -> None:
    """Error against open-loop step with 95 % bands; `note` says what the features are."""
    figure, axes = _figure(7.0, 4.6)
    steps = [row["horizon"] for row in rows]
    for name, (label, colour) in LABELS.items():
        axes.plot(steps, [row[name] for row in rows], marker="o", color=colour, label=label)
        axes.fill_between(
            steps, [row[f"{name}_low"] for row in rows], [row[f"{name}_high"] for row in rows], color=colour, alpha=0.15
        )
    axes.set_xticks(steps)
    axes.set_xlabel("open-loop step")
    axes.set_ylabel("L1 of layer-normed tokens (held-out episodes)")
    axes.set_title(f"Error against horizon\n{note}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_strip(strip: Strip, path: Path) -> None:
    """Rows: frames, true tokens, predicted tokens, error; columns: context steps, then open-loop steps."""
    num_steps, num_predicted = len(strip.true), len(strip.predicted)
    context = num_steps - num_predicted
    rows = ["recorded frame", "true tokens", "predicted tokens", "error (L1)"]
    figure, _ = _figure(1.7 * num_steps, 1.6 * len(rows) + 0.9, axes=False)
    grid = figure.subplots(len(rows), num_steps, squeeze=False)
    limit = float(strip.error.max()) or 1.0
    image = None
    for row, name in enumerate(rows):
        for step in range(num_steps):
            axes = grid[row][step]
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(
                    f"context {step + 1}" if step < context else f"open loop +{step - context + 1}", fontsize=9
                )
            if step == 0:
                axes.set_ylabel(name, fontsize=9)
            picture = _cell(strip, name, step, context)
            if picture is None:
                axes.set_facecolor("#eeeeee")
                axes.set_box_aspect(strip.true.shape[1] / strip.true.shape[2])  # as the cells that hold a picture
                if name == "recorded frame":
                    axes.text(
                        0.5, 0.5, "recording\nnot here", ha="center", va="center", fontsize=7, transform=axes.transAxes
                    )
            elif name == "error (L1)":
                image = axes.imshow(picture, cmap="magma", vmin=0, vmax=limit)
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


def _figure(width: float, height: float, *, axes: bool = True):
    """A figure of its own, not in pyplot's global list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots() if axes else None
