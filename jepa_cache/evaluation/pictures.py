"""The pictures that every evaluation leaves in pictures/: curves, actions, and rollouts as strips and as an animation.

Tokens are painted by their first three principal components as red, green and blue, in one basis for everything that is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jepa_cache.actions import Column
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.frames import read_frames
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext
from jepa_cache.evaluation.windows import WindowErrors

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


PANEL_WIDTH = 232  # pixels; two side by side suit a phone
GAP, LINE = 8, 20  # pixels between panels, and height of a line of text
STEP_MS, LAST_MS = 900, 2500  # how long each step and the last one are shown
NUM_LOOPS = 10  # then it stops: what moves for ever is hard to read beside
GREY, INK = (238, 238, 238), (34, 34, 34)


def write_animation(strip: Strip, path: Path) -> None:
    """Write one window as a GIF of 2 x 2 panels, a picture for each step, with the step's number above.

    Context steps are given to the predictor, so they have neither prediction nor error.
    """
    pictures = [_compose(strip, step) for step in range(len(strip.true))]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=[STEP_MS] * (len(pictures) - 1) + [LAST_MS],
        loop=NUM_LOOPS,
    )


def _compose(strip: Strip, step: int):
    """One picture of the animation."""
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = strip.true.shape[1:3]
    height = round(PANEL_WIDTH * rows / columns)
    context = len(strip.true) - len(strip.predicted)
    picture = Image.new("RGB", (2 * PANEL_WIDTH + 3 * GAP, 2 * (height + LINE + GAP) + LINE + GAP), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((GAP, GAP // 2), f"{label_step(step, context)}   ({step + 1} of {len(strip.true)})", INK, font)
    given = step < context
    panels = (
        ("recorded frame", None if strip.frames is None else strip.frames[step], "recording not here"),
        ("true tokens", _bytes(strip.true[step]), ""),
        ("predicted tokens", None if given else _bytes(strip.predicted[step - context]), "given, not predicted"),
        (_error_name(strip), None if given else _error_colours(strip, step - context), "given, not predicted"),
    )
    for number, (name, pixels, without) in enumerate(panels):
        left = GAP + (number % 2) * (PANEL_WIDTH + GAP)
        top = LINE + GAP + (number // 2) * (height + LINE + GAP)
        draw.text((left, top), name, INK, font)
        top += LINE
        draw.rectangle((left, top, left + PANEL_WIDTH - 1, top + height - 1), GREY)
        if pixels is None:
            draw.text((left + PANEL_WIDTH / 2, top + height / 2), without, INK, font, anchor="mm")
            continue
        scale = min(PANEL_WIDTH / pixels.shape[1], height / pixels.shape[0])
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        how = Image.Resampling.BILINEAR if number == 0 else Image.Resampling.NEAREST
        panel = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, how)
        picture.paste(panel, (left + (PANEL_WIDTH - size[0]) // 2, top + (height - size[1]) // 2))
    return picture


def _error_name(strip: Strip) -> str:
    return f"error, L1: 0 (dark) to {float(strip.error.max()):.2g}"


def _error_colours(strip: Strip, step: int) -> np.ndarray:
    from matplotlib import colormaps

    limit = float(strip.error.max()) or 1.0
    return _bytes(colormaps[ERROR_COLOURS](strip.error[step] / limit)[..., :3])


def _bytes(colours: np.ndarray) -> np.ndarray:
    """[H, W, 3] in [0, 1] as uint8."""
    return (colours * 255).round().astype(np.uint8)


MAX_FITTED = 8192  # tokens; three components of more are the same to the eye
PERCENTILES = (1, 99)  # of the fitted tokens, which span each colour's range


class TokenColours(NamedTuple):
    """A basis and a range.

    Attributes:
        mean: [D].
        components: [3, D].
        low: [3] component values shown as 0.
        span: [3] above `low`, shown as 1.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    span: np.ndarray

    def paint(self, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Colours [T, H, W, 3] in [0, 1] of tokens [T, N, D]; what lies outside the range is clipped, not rescaled.

        Args:
            tokens: True or predicted.
            grid: (H, W) rows and columns.
        """
        components = (tokens.reshape(-1, tokens.shape[-1]) - self.mean) @ self.components.T
        return np.clip((components - self.low) / self.span, 0, 1).reshape(-1, *grid, 3)


def fit_colours(tokens: np.ndarray) -> TokenColours:
    """Fit the basis on true tokens [T, N, D], best of several episodes.

    Predictions are painted in the basis of true tokens: where they differ, the colour differs for that reason alone.
    """
    from sklearn.decomposition import PCA

    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows[:: -(-len(rows) // MAX_FITTED)]
    fitted = PCA(3, svd_solver="full" if len(rows) < 500 else "covariance_eigh").fit(rows)
    low, high = np.percentile(fitted.transform(rows), PERCENTILES, axis=0)
    return TokenColours(fitted.mean_, fitted.components_, low, np.maximum(high - low, 1e-9))


CPU = torch.device("cpu")

NUM_FITTED = 8  # windows that the colours are fitted on


def spread_positions(count: int, num: int) -> list[int]:
    """Up to `num` positions spread over a list of `count`, away from its ends."""
    return sorted({(2 * i + 1) * count // (2 * num) for i in range(num)})


def fit_window_colours(errors: WindowErrors, evaluation: EvaluationContext) -> TokenColours:
    """Colours fitted on the true tokens of up to 8 windows, spread over all that were measured."""
    index, numbers = errors.chosen
    numbers = [numbers[position] for position in spread_positions(len(numbers), NUM_FITTED)]
    return fit_colours(evaluation.read_windows(index, numbers, CPU)[1].flatten(0, 1).numpy())


@torch.no_grad()
def build_strips(
    positions: Sequence[int], errors: WindowErrors, evaluation: EvaluationContext, colours: TokenColours
) -> list[Strip]:
    """Everything needed to draw the windows at `positions` of the measured ones, all painted in `colours`."""
    dataset, device = evaluation.dataset, evaluation.device
    settings, manifest = evaluation.config.evaluate, dataset.manifest
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    chosen = ChosenWindows(errors.chosen.index, [errors.chosen.numbers[position] for position in positions])
    runs = [
        segment._replace(start=window.start, stop=window.start + stop)
        for segment, window in zip(chosen.segments, chosen.windows, strict=True)
    ]
    batch, h = evaluation.read_windows(*chosen, CPU)
    h = h[:, :stop]
    predicted = evaluation.model.open_loop(
        h[:, :context].to(device),
        batch.actions[:, : stop - 1].to(device),
        batch.states[:, : stop - 1].to(device),
        settings.horizon,
    ).cpu()
    error = (predicted - h[:, context:]).abs().mean(dim=-1).unflatten(-1, manifest.grid).numpy()
    first_rows = first_cached_rows(dataset.segments)
    begins = [run.start - first_rows[run.store, run.episode] for run in runs]
    note = "" if manifest.encoder_trained else " (encoder untrained)"
    return [
        Strip(
            title=f"{segment.episode}, steps {begins[number]} to {begins[number] + stop - 1}{note}",
            frames=frames,
            true=colours.paint(h[number].numpy(), manifest.grid),
            predicted=colours.paint(predicted[number].numpy(), manifest.grid),
            error=error[number],
        )
        for number, (segment, frames) in enumerate(
            zip(chosen.segments, read_frames(evaluation.config, dataset, runs), strict=True)
        )
    ]


NUM_STRIPS = 2


def draw_pictures(
    errors: WindowErrors, evaluation: EvaluationContext, rows: Sequence[Mapping[str, float]], folder: Path
) -> None:
    """Draw horizon.png, actions.png, strip1.png and so on, and rollout1.gif.

    Args:
        errors: Of all measured windows; some of them are shown.
        evaluation: What was measured.
        rows: Of horizon.csv.
        folder: Where they go; it must be there.

    Cost: decodes the recordings of the windows that are shown, where they are on this machine.
    """
    dataset = evaluation.dataset
    draw_horizon(rows, folder / "horizon.png", note=evaluation.features)
    recorded = (
        read_segment_actions(dataset, part) for part in (evaluation.training_segments(), evaluation.held_out_segments())
    )
    draw_actions(dataset.space.actions, *recorded, folder / "actions.png")
    positions = spread_positions(len(errors.chosen.numbers), NUM_STRIPS)
    strips = build_strips(positions, errors, evaluation, fit_window_colours(errors, evaluation))
    for number, strip in enumerate(strips, start=1):
        draw_strip(strip, folder / f"strip{number}.png")
    write_animation(strips[0], folder / "rollout1.gif")
