"""The pictures that every evaluation leaves in pictures/: curves, actions, and rollouts as strips and as an animation.

Tokens are painted by their first three principal components as red, green and blue, in one basis for everything that is shown.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from jepa_cache.actions import Column
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.frames import read_frames
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext
from jepa_cache.evaluation.windows import WindowErrors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "no_actions": ("linear model without actions", "#bcbd22"),
}
TRAINING, HELD_OUT = "#7f7f7f", "#1f77b4"
NUM_BINS = 40
NUM_COLUMNS = 24  # of actions, of a kind, that are drawn
RANGE = (0.5, 99.5)  # percentiles of the training actions that a histogram spans; what lies outside counts at its ends
NUM_STRIPS = 2
STEP_MS, LAST_MS = 900, 2500  # how long each step and the last one of the animation are shown
NUM_LOOPS = 10  # then it stops: what moves for ever is hard to read beside
# That colours are fitted on; three components of more are the same to the eye.
NUM_COLOUR_WINDOWS, MAX_COLOUR_TOKENS = 8, 8192
PERCENTILES = (1, 99)  # of the fitted tokens, which span each colour's range


def draw_pictures(
    errors: WindowErrors, evaluation: EvaluationContext, rows: Sequence[Mapping[str, float]], folder: Path
) -> None:
    """Draw horizon.png (from the rows of horizon.csv), actions.png, strip1.png and so on, and rollout1.gif.

    Cost: decodes the recordings of the windows that are shown, where they are on this machine.
    """
    dataset = evaluation.dataset
    draw_horizon(rows, folder / "horizon.png", note=evaluation.features)
    segments = evaluation.training_segments(), evaluation.held_out_segments()
    recorded = (read_segment_actions(dataset, part) for part in segments)
    draw_actions(dataset.space.actions, *recorded, folder / "actions.png")
    positions = spread_positions(len(errors.chosen.numbers), NUM_STRIPS)
    strips = build_strips(positions, errors, evaluation)
    for number, strip in enumerate(strips, start=1):
        draw_strip(strip, folder / f"strip{number}.png")
    write_animation(strips[0], folder / "rollout1.gif")


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, not in pyplot's global list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=110)


def spread_positions(count: int, num: int) -> list[int]:
    """Up to `num` positions spread over a list of `count`, away from its ends."""
    return sorted({(2 * i + 1) * count // (2 * num) for i in range(num)})


def draw_horizon(rows: Sequence[Mapping[str, float | None]], path: Path, *, note: str) -> None:
    """Every prediction's error against open-loop step with 95 % bands; the rows are those of horizon.csv."""
    names = [name for name in rows[0] if f"{name}_low" in rows[0]]
    figure = new_figure(7.0, 4.4 + 0.1 * len(names))
    axes, steps = figure.subplots(), [row["horizon"] for row in rows]
    for name in names:
        label, colour = LABELS[name]
        mean, low, high = (np.array([row[f"{name}{end}"] for row in rows], float) for end in ("", "_low", "_high"))
        size, width, order = (6, 2.5, 3) if name == "model" else (4, 1.4, 2)
        axes.plot(steps, mean, marker="o", ms=size, lw=width, color=colour, label=label, zorder=order)
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
    axes.set(xticks=steps, xlabel="open-loop step", ylabel="L1 between predicted and true tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    figure.suptitle(f"Error against horizon, held-out episodes\n{note}", fontsize=10)
    save_figure(figure, path)


def draw_training(history: Path, path: Path) -> None:
    """Losses and held-out losses against training step, from a run's train.csv."""
    with history.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    for name, label, style in (("total", "training", {"lw": 1.2}), ("val_total", "held out", {"marker": "o", "ms": 4})):
        points = np.array([(float(row["step"]), float(row[name])) for row in rows if row.get(name)]).reshape(-1, 2)
        axes.plot(*points.T, label=label, color=TRAINING if name == "total" else HELD_OUT, **style)
    axes.set(xlabel="training step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def read_segment_actions(dataset: CachedDataset, segments: Sequence[Segment]) -> np.ndarray:
    """Unscaled actions [n, A] between the steps of some segments: of each all but its last row, which leads out of it."""
    return np.concatenate([dataset.controls(s.store)[0][s.start : s.stop - 1] for s in segments])


def draw_actions(columns: Sequence[Column], training: np.ndarray, held_out: np.ndarray, path: Path) -> None:
    """A histogram of unscaled actions [n, A] for each continuous column, and bars for how often each of the others is on."""
    numbers = range(len(columns))
    continuous = [number for number in numbers if columns[number].kind == "continuous"][:NUM_COLUMNS]
    switches = [number for number in numbers if columns[number].kind != "continuous"][:NUM_COLUMNS]
    heights = [2.1] * -(-len(continuous) // 3) + ([0.28 * len(switches) + 0.9] if switches else [])
    figure = new_figure(8.0, sum(heights) + 0.7)
    rows = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    for place, number in enumerate(continuous):
        axes, column = figure.add_subplot(rows[place // 3, place % 3]), columns[number]
        low, high = np.percentile(training[:, number], RANGE)
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, NUM_BINS + 1)
        for values, style in (
            (training, {"color": TRAINING, "fill": True, "alpha": 0.5}),
            (held_out, {"color": HELD_OUT}),
        ):
            shares = np.histogram(np.clip(values[:, number], low, high), edges)[0] / len(values)
            axes.stairs(shares, edges, **style)
        axes.set_yscale("symlog", linthresh=0.01)  # rare and frequent values both show
        axes.set_ylim(0, 1)
        axes.set_yticks([0, 0.01, 0.1, 1], ["0", "1 %", "10 %", "100 %"])
        axes.set_ylabel("share of steps" if place % 3 == 0 else "", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{column.name} ({column.unit})" if column.unit else column.name, fontsize=9)
    if switches:
        axes, places = figure.add_subplot(rows[-1, :]), np.arange(len(switches))
        for offset, values, colour in ((0.2, training, TRAINING), (-0.2, held_out, HELD_OUT)):
            axes.barh(places - offset, (values[:, switches] != 0).mean(axis=0), height=0.38, color=colour)
        axes.set_yticks(places, [columns[number].name for number in switches])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share of steps in which it is on")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, axis="x")
    num_more = len(columns) - len(continuous) - len(switches)
    note = f"; {num_more} more columns are not drawn" if num_more else ""
    title = f"Recorded actions: {len(held_out)} held out (blue), {len(training)} of training (grey){note}"
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


class TokenColours:
    """A basis and a range, fitted on true tokens [T, N, D], best of several episodes.

    Predictions are painted in the basis of true tokens: where they differ, the colour differs for that reason alone.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        from sklearn.decomposition import PCA

        rows = tokens.reshape(-1, tokens.shape[-1])
        rows = rows[:: -(-len(rows) // MAX_COLOUR_TOKENS)]
        self.basis = PCA(3, svd_solver="full" if len(rows) < 500 else "covariance_eigh").fit(rows)
        self._low, high = np.percentile(self.basis.transform(rows), PERCENTILES, axis=0)
        self._span = np.maximum(high - self._low, 1e-9)

    def paint(self, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Colours [T, H, W, 3] in [0, 1] of tokens [T, N, D]; what lies outside the range is clipped, not rescaled."""
        components = self.basis.transform(tokens.reshape(-1, tokens.shape[-1]))
        return np.clip((components - self._low) / self._span, 0, 1).reshape(-1, *grid, 3)


class Strip(NamedTuple):
    """One held-out window, ready to draw."""

    title: str
    frames: np.ndarray | None  # [C + K, h, w, 3] uint8; None when the recording is not on this machine
    true: np.ndarray  # [C + K, H, W, 3] colours of the true tokens, in [0, 1]
    predicted: np.ndarray  # [K, H, W, 3] colours of the open-loop predictions in the same basis
    error: np.ndarray  # [K, H, W] L1 per token


@torch.no_grad()
def build_strips(positions: Sequence[int], errors: WindowErrors, evaluation: EvaluationContext) -> list[Strip]:
    """Everything needed to draw the windows at `positions` of the measured ones, all painted in the same colours."""
    dataset, settings, manifest = evaluation.dataset, evaluation.config.evaluate, evaluation.dataset.manifest
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    index, numbers = errors.chosen
    fitted = [numbers[position] for position in spread_positions(len(numbers), NUM_COLOUR_WINDOWS)]
    colours = TokenColours(evaluation.read_windows(index, fitted)[1].flatten(0, 1).cpu().numpy())
    chosen = ChosenWindows(index, [numbers[position] for position in positions])
    runs = [
        segment._replace(start=window.start, stop=window.start + (stop - 1) * window.step_length + 1)
        for segment, window in zip(chosen.segments, chosen.windows, strict=True)
    ]
    batch, h = evaluation.read_windows(*chosen)
    given = (h[:, :context], batch.actions[:, : stop - 1], batch.states[:, : stop - 1])
    predicted = evaluation.model.open_loop(*given, settings.horizon).cpu()
    true = h[:, :stop].cpu()
    error = (predicted - true[:, context:]).abs().mean(dim=-1).unflatten(-1, manifest.grid).numpy()
    first_rows, step_length = first_cached_rows(dataset.segments), settings.step_length
    note = "" if manifest.encoder_trained else " (encoder untrained)"
    strips = []
    for number, (run, frames) in enumerate(
        zip(runs, read_frames(evaluation.config, dataset, runs, step_length), strict=True)
    ):
        first = run.start - first_rows[run.store, run.episode]
        title = f"{run.episode}, steps {first} to {first + run.stop - run.start - 1}{note}"
        painted = (colours.paint(tokens[number].numpy(), manifest.grid) for tokens in (true, predicted))
        strips.append(Strip(title, frames, *painted, error[number]))
    return strips


def draw_strip(strip: Strip, path: Path) -> None:
    """Rows: frames, true tokens, predicted tokens, error; columns: context steps, then open-loop steps."""
    num_steps, token_shape = len(strip.true), strip.true.shape[1] / strip.true.shape[2]
    frame_shape = token_shape if strip.frames is None else strip.frames.shape[1] / strip.frames.shape[2]
    shapes = [frame_shape, *[token_shape] * 3]  # height over width
    figure = new_figure(1.7 * num_steps, 1.55 * sum(shapes) + 1.0)
    grid = figure.subplots(4, num_steps, squeeze=False, height_ratios=shapes)
    for step in range(num_steps):
        names = _draw_step(grid[:, step], strip, step)
        grid[0, step].set_title(_name_step(strip, step), fontsize=9)
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(name.replace(" ", "\n", 1), fontsize=9)
    figure.colorbar(grid[-1, -1].images[0], ax=grid[-1].tolist(), shrink=0.8, label="L1")
    figure.suptitle(strip.title, fontsize=10)
    save_figure(figure, path)


def write_animation(strip: Strip, path: Path) -> None:
    """Write one window as a GIF of 2 x 2 panels, a picture for each step, with the step's number above."""
    from PIL import Image

    pictures = []
    for step in range(len(strip.true)):
        figure = new_figure(4.8, 5.2)
        panels = figure.subplots(2, 2).flatten()
        for axes, name in zip(panels, _draw_step(panels, strip, step), strict=True):
            axes.set_title(name, fontsize=9)
        figure.suptitle(f"{_name_step(strip, step)}   ({step + 1} of {len(strip.true)})", fontsize=10)
        figure.canvas.draw()
        pictures.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))
    durations = [STEP_MS] * (len(pictures) - 1) + [LAST_MS]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=NUM_LOOPS)


def _name_step(strip: Strip, step: int) -> str:
    ahead = step - (len(strip.true) - len(strip.predicted))
    return f"context {step + 1}" if ahead < 0 else f"open loop +{ahead + 1}"


def _draw_step(panels: Sequence[Axes], strip: Strip, step: int) -> list[str]:
    """Draw one step's four pictures and return what they are; context steps are given, so they have no prediction and no error."""
    ahead, shape = step - (len(strip.true) - len(strip.predicted)), strip.true.shape[1] / strip.true.shape[2]
    given = "given,\nnot predicted"
    pictures = {
        "recorded frame": (None if strip.frames is None else strip.frames[step], "recording\nnot here"),
        "true tokens": (strip.true[step], ""),
        "predicted tokens": (None if ahead < 0 else strip.predicted[ahead], given),
        "error (L1)": (None if ahead < 0 else strip.error[ahead], given),
    }
    for axes, (picture, without) in zip(panels, pictures.values(), strict=True):
        axes.set(xticks=[], yticks=[])
        if picture is None:
            axes.set(facecolor="#eeeeee", box_aspect=shape)  # as the cells that hold a picture
            axes.text(0.5, 0.5, without, ha="center", va="center", fontsize=7, transform=axes.transAxes)
        else:
            axes.imshow(picture, cmap="magma", vmin=0, vmax=float(strip.error.max()) or 1.0)
    return list(pictures)
