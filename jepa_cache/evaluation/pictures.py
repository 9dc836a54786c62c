"""The pictures that every evaluation leaves in pictures/: curves, and films of a few held-out windows.

A film shows what happened beside what was foreseen with the true actions, with another episode's, and by copying. Tokens are painted by
their first three principal components as red, green and blue, in one basis for all; as that says little to a human, above foreseen tokens
stands the recorded frame whose tokens are nearest. film<i>_<what> holds all steps side by side, measurements/films.json the words: the
page moves them.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.data.ablations import SHUFFLED, action_ablations
from jepa_cache.data.dataset import Segment
from jepa_cache.data.frames import read_frames
from jepa_cache.data.windows import WindowIndex, count_episodes, first_cached_rows, spread_windows
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, spread
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, write_json
from jepa_cache.evaluation.windows import COPY_LAST, MODEL, WindowErrors

if TYPE_CHECKING:
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
# That colours are fitted on; three components of more are the same to the eye.
NUM_COLOUR_WINDOWS, MAX_COLOUR_TOKENS = 8, 8192
PERCENTILES = (1, 99)  # of the fitted tokens, which span each colour's range
MOVING_SHARE = 0.1  # of the windows, those whose tokens move most, among which a film's is looked for
NUM_SEARCHED = 1024  # steps spread over the held-out episodes among which the nearest one is looked for, beside those of the films' episodes
FRAME_WIDTH, TOKEN_WIDTH, MAX_WIDTH = 480, 96, 60_000  # pixels of a step, and of all: a JPEG is at most 65,535 wide
FRAME_SHAPE = 9 / 16  # height over width of a frame, where the recording is not here
JPEG_QUALITY = 85
GREY = (136, 136, 136)  # nothing is foreseen; as far from a light page as from a dark one
DOWNWARDS = ("dpitch", "cameraY")  # columns that grow when a view turns down
SHORT_UNITS = ("deg", "rad", "m")
NUM_WRITTEN = 4  # numbers of an action that are written out
GONE = "its recording is not on this machine"


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


class Film(NamedTuple):
    """One of the measured windows, and why it was chosen."""

    title: str
    reason: str
    position: int


def choose_films(errors: WindowErrors) -> list[Film]:
    """A window that shows what the predictor can do, the median one and the worst, by their open-loop gain over copying; each once."""
    copied, foreseen = (errors.open_loop["l1"][name].mean(axis=1) for name in (COPY_LAST, MODEL))
    gains, count = 1 - foreseen / np.maximum(copied, 1e-12), len(copied)
    moving = np.argsort(-copied, kind="stable")[: max(1, round(MOVING_SHARE * count))]
    order = np.argsort(gains, kind="stable")
    chosen = {
        int(moving[gains[moving].argmax()]): (
            "Much motion, foreseen best",
            f"the largest gain over copying among the {len(moving)} of {count} windows whose tokens move most; picked to show what it can do",
        ),
        int(order[count // 2]): (
            "The median window",
            f"its gain over copying is the median of {count} windows; picked by that alone",
        ),
        int(order[0]): ("Foreseen worst", f"the lowest gain over copying of {count} windows"),
    }
    return [Film(*words, position) for position, words in chosen.items()]


@torch.no_grad()
def write_films(
    films: Sequence[Film],
    errors: WindowErrors,
    facts: Sequence[Mapping[str, Any]],
    evaluation: EvaluationContext,
    out: Path,
) -> None:
    """Write pictures and words of the films, each with four panels of T = C + K steps; `facts` are those of `figures.describe_windows`.

    Cost: reads up to `NUM_SEARCHED` steps and those of the films' episodes, and the units of all recordings that are shown.
    """
    dataset, settings, (index, numbers) = evaluation.dataset, evaluation.config.evaluate, errors.chosen
    context, horizon, apart = settings.num_context_steps, settings.horizon, settings.step_length
    num_steps, positions = context + horizon, [film.position for film in films]
    chosen = ChosenWindows(index, [numbers[position] for position in positions])
    batch, h = evaluation.read_windows(*chosen)
    true, states = h[:, :num_steps], batch.states[:, : num_steps - 1]
    other = action_ablations(dataset, evaluation.scaler, index, numbers, seed=settings.seed)[SHUFFLED][positions]
    actions = torch.stack([batch.actions, torch.from_numpy(other).to(h.device)], dim=1)[:, :, : num_steps - 1]
    both = [evaluation.model.open_loop(true[:, :context], given, states, horizon) for given in actions.unbind(1)]
    foreseen = torch.stack(both, dim=1)  # [films, 2, K, N, D]
    runs = [
        segment._replace(start=window.start, stop=window.start + (num_steps - 1) * apart + 1)
        for segment, window in zip(chosen.segments, chosen.windows, strict=True)
    ]
    nearest = find_nearest(evaluation, foreseen.flatten(0, 2), {run.episode for run in runs})
    frames = read_frames(evaluation.config, dataset, [*runs, *nearest], apart)
    _, fitted = evaluation.read_windows(index, spread(numbers, NUM_COLOUR_WINDOWS))
    colours = TokenColours(fitted.flatten(0, 1).cpu().numpy())
    moves, first_rows = describe_moves(evaluation, actions.cpu().numpy()), first_cached_rows(dataset.segments)
    shown = []
    for number, (film, run) in enumerate(zip(films, runs, strict=True)):
        mine = slice(2 * horizon * number, 2 * horizon * (number + 1))
        here = frames[number]
        shape = FRAME_SHAPE if here is None else here.shape[1] / here.shape[2]
        camera = [None] * num_steps if here is None else list(here)
        found = [None if some is None else some[0] for some in frames[len(films) :][mine]]
        near = [
            describe_nearest(one, run, run.start + (context + step % horizon) * apart, first_rows)
            + ("" if picture is not None else f"; {GONE}")
            for step, (one, picture) in enumerate(zip(nearest[mine], found, strict=True))
        ]
        paint = [colours.paint(some.cpu().numpy(), dataset.manifest.grid) for some in (true[number], *foreseen[number])]
        paint.append(paint[0][[context - 1] * horizon])
        l1 = [errors.open_loop["l1"][name][film.position] for name in (MODEL, SHUFFLED, COPY_LAST)]
        said = [[f"L1 {error:.3f}" for error in each] for each in l1]
        first, second, own = slice(0, horizon), slice(horizon, None), moves[number]
        here_words, copied = ["" if here is not None else GONE] * num_steps, [camera[context - 1]] * horizon
        panels = (
            Panel("What happened", camera, here_words, paint[0], ["true tokens"] * num_steps, own[0]),
            Panel("Foreseen with its actions", found[first], near[first], paint[1], said[0], own[0]),
            Panel("Foreseen with another episode's actions", found[second], near[second], paint[2], said[1], own[1]),
            Panel("Copying the last step", copied, ["the last step seen"] * horizon, paint[3], said[2], []),
        )
        fact = facts[film.position]
        shown.append(
            {
                "title": film.title,
                "reason": film.reason,
                "place": f"{run.episode}, from step {fact['first_step']} ({fact['start_s']:.1f} s)",
                "frame_shape": shape,
                "l1": [float(each.mean()) for each in l1],
                "panels": [
                    panel.save(num_steps, shape, out / "pictures", f"film{number + 1}_{place}")
                    for place, panel in enumerate(panels, start=1)
                ],
            }
        )
    counts = {
        "num_steps": num_steps,
        "num_context_steps": context,
        "token_shape": dataset.manifest.grid[0] / dataset.manifest.grid[1],
    }
    write_json({"films": shown, **counts}, out / MEASUREMENTS_FOLDER / "films.json")


class Panel(NamedTuple):
    """One of the four things that a film shows at each step; where rows are fewer than steps, the first ones were given and are empty."""

    title: str
    frames: Sequence[np.ndarray | None]  # uint8 [h, w, 3]; None where a recording is not here
    frame_words: Sequence[str]
    tokens: np.ndarray  # [.., H, W, 3] colours in [0, 1]
    token_words: Sequence[str]
    moves: Sequence[Mapping[str, Any]]

    def save(self, num_steps: int, shape: float, folder: Path, name: str) -> dict[str, Any]:
        """Write its pictures, all steps side by side, and return what films.json holds of it; `frames` is None where none is here."""
        most, (height, width) = MAX_WIDTH // num_steps, self.tokens.shape[1:3]
        frame_width, token_width = min(FRAME_WIDTH, most), min(TOKEN_WIDTH, most)
        tokens, frames = f"{name}_tokens.png", f"{name}_frames.jpg"
        cells = list((255 * self.tokens).astype(np.uint8))
        put_side_by_side(cells, num_steps, (token_width, round(token_width * height / width)), folder / tokens)
        is_here = any(frame is not None for frame in self.frames)
        if is_here:
            put_side_by_side(self.frames, num_steps, (frame_width, round(frame_width * shape)), folder / frames)
        words = {"frame_words": self.frame_words, "token_words": self.token_words, "moves": self.moves}
        return {
            "title": self.title,
            "tokens": tokens,
            "frames": frames if is_here else None,
            **{key: [None] * (num_steps - len(rows)) + list(rows) for key, rows in words.items()},
        }


def put_side_by_side(pictures: Sequence[np.ndarray | None], count: int, size: tuple[int, int], path: Path) -> None:
    """Write pictures uint8 [h, w, 3] as the last of `count` cells of a size (w, h), each as large as fits; the others stay grey."""
    from PIL import Image, ImageOps

    sheet = Image.new("RGB", (count * size[0], size[1]), GREY)
    method = Image.Resampling.NEAREST if path.suffix == ".png" else Image.Resampling.BILINEAR
    for cell, picture in enumerate(pictures, start=count - len(pictures)):
        if picture is not None:
            sheet.paste(ImageOps.pad(Image.fromarray(picture), size, method), (cell * size[0], 0))
    sheet.save(path, quality=JPEG_QUALITY, optimize=True)


def find_nearest(evaluation: EvaluationContext, wanted: Tensor, episodes: Collection[str]) -> list[Segment]:
    """The held-out step whose tokens are nearest (L1) to each of some [n, N, D], as a run of one step.

    Looked for among all steps of the given episodes, and up to `NUM_SEARCHED` spread over all held-out ones.
    """
    segments = evaluation.held_out_segments()
    index = WindowIndex(segments, 1)
    own = [row for place, _, rows in index.iter_runs() if segments[place].episode in episodes for row in rows]
    others = spread(spread_windows(index, -(-NUM_SEARCHED // count_episodes(segments))), NUM_SEARCHED)
    searched = ChosenWindows(index, sorted({*own, *others}))
    apart = [
        torch.cdist(h.flatten(1), wanted.flatten(1), p=1)
        for *_, h in evaluation.iter_windows(searched, "nearest frames")
    ]
    places = torch.cat(apart).argmin(dim=0).tolist()
    runs = [
        segment._replace(start=window.start, stop=window.start + 1)
        for segment, window in zip(searched.segments, searched.windows, strict=True)
    ]
    return [runs[place] for place in places]


def describe_nearest(found: Segment, run: Segment, true: int, first_rows: Mapping[tuple[int, str], int]) -> str:
    """Where the nearest step lies, beside the true one: row `true` of the store that the film's run lies in."""
    if (found.store, found.episode) != (run.store, run.episode):
        return f"nearest: {found.episode}, step {found.start - first_rows[found.store, found.episode]}"
    if not (apart := abs(found.start - true)):
        return "nearest: the true step"
    return f"nearest: {apart} step{'s' if apart > 1 else ''} {'before' if found.start < true else 'after'} the true one"


def describe_moves(evaluation: EvaluationContext, actions: np.ndarray) -> list[list[list[dict[str, Any]]]]:
    """Scaled actions [films, 2, T-1, A] as arrows and words: angle (degrees clockwise from the right), length (1: the film's longest), words.

    An arrow is of the two columns that the energy maps begin with; columns that a view turns down by point down.
    """
    space, scaler = evaluation.dataset.space, evaluation.scaler.actions
    values, columns = actions * np.array(scaler.scale) + np.array(scaler.mean), [it.name for it in space.actions]
    kinds, keys = {it.name: it.kind for it in space.actions}, [it.name for it in space.actions if it.kind == "binary"]
    searched = (
        [it.column for it in space.motion.searched if it.limit != "max_rotation_rad"] if space.motion else columns
    )
    numbers = [columns.index(name) for name in searched if kinds[name] == "continuous"]
    written, names = numbers[:NUM_WRITTEN], [evaluation.dataset.column_names.get(name, name) for name in columns]
    units = [f" {it.unit}" if it.unit in SHORT_UNITS else "" for it in space.actions]
    order = [columns.index(name) for name in (space.motion.map_axes if space.motion else ())] or numbers
    arrows = np.zeros((*values.shape[:-1], 2))
    for place, number in enumerate(order[:2]):
        arrows[..., place] = values[..., number] * (-1 if place and columns[number] not in DOWNWARDS else 1)
    lengths = np.hypot(*np.moveaxis(arrows, -1, 0))
    lengths /= np.maximum(lengths.max(axis=(1, 2), keepdims=True), 1e-12)
    arrows = np.stack([np.degrees(np.arctan2(arrows[..., 1], arrows[..., 0])), lengths], axis=-1)

    def describe(action: np.ndarray, arrow: np.ndarray) -> dict[str, Any]:
        said = [f"{names[number]} {round(float(action[number]), 4) + 0.0:+.3g}{units[number]}" for number in written]
        held = [name for name in keys if action[columns.index(name)] > 0]
        return {"angle": float(arrow[0]), "length": float(arrow[1]), "words": ", ".join(said + held)}

    return [
        [[describe(*pair) for pair in zip(*rows, strict=True)] for rows in zip(*two, strict=True)]
        for two in zip(values, arrows, strict=True)
    ]
