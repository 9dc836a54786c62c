"""Energy: among many actions, does the recorded one lead where the recording went?

The energy of an action is the mean absolute difference between the step that the predictor foresees with it and the true next
step: low where they agree. A world model that uses its actions gives the recorded action a lower energy than others.

Source: the energy of V-JEPA 2-AC's planner (arXiv 2506.09985, section on planning) and the energy landscape published with it.
Ranks among sampled actions are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from jepa_cache.actions import ActionSpace
from jepa_cache.control.motion import complete_actions
from jepa_cache.control.planner import Context, Rollout
from jepa_cache.data.ablations import draw_others, positions_of
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.windows import Window, first_cached_rows
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, Measurement, Picture, choose_windows, spread
from jepa_cache.evaluation.metrics import build_section, episode_means
from jepa_cache.evaluation.pictures import new_figure, save_figure

MAP_STEPS = 13  # of each axis, odd: the true action lies in the middle
MIDDLE = MAP_STEPS // 2
FLAT_SHARE = 0.01  # of the mean energy; a map that differs by less is drawn and called flat
MAP_REACH = 2.0  # standard deviations of the recorded actions, to each side of the true one
MAX_MAPS, NUM_DRAWN = 6, 3
NUM_BINS = 10  # of ranks; the first holds the best tenth
# Energies nearer than this, relative to the true action's, are one energy: a batched float32 pass gives equal actions
# energies that differ by about 1e-7, from where they stand in the batch.
TIE_TOLERANCE = 1e-6


class ActionPool:
    """The recorded actions of a data set, to draw some of other episodes."""

    def __init__(self, dataset: CachedDataset, segments: Sequence[Segment], step_length: int = 1) -> None:
        """Collect the actions over `step_length` inside segments of training and held-out episodes."""
        self._one_hot = np.array([column.kind == "onehot" for column in dataset.space.actions])
        self._dataset_of = [part.dataset for part, _ in dataset.manifest.stores]
        rows: dict[str, list[np.ndarray]] = {}
        episodes: dict[str, list[str]] = {}
        for segment in segments:
            name = self._dataset_of[segment.store]
            own = dataset.controls(segment.store, step_length)[0][
                segment.start : max(segment.stop - step_length, segment.start)
            ]
            rows.setdefault(name, []).append(own)
            episodes.setdefault(name, []).extend([segment.episode] * len(own))
        self._actions = {name: np.concatenate(parts) for name, parts in rows.items()}
        self._rows_of = {name: positions_of(of) for name, of in episodes.items()}

    def draw(self, count: int, like: np.ndarray, segment: Segment, rng: np.random.Generator) -> np.ndarray:
        """Draw actions [count, A] with replacement from other episodes of the same data set.

        One-hot columns (the slot that is selected at the step) stay as in `like` [A]: the frame shows them, so another one
        would give an action away.
        """
        name = self._dataset_of[segment.store]
        actions, own = self._actions[name], self._rows_of[name].get(segment.episode, np.empty(0, np.int64))
        if len(own) == len(actions):
            raise ValueError(
                f"the energy of {segment.episode!r} is compared with actions of other episodes of data set {name!r}, and "
                "there are none; add recordings, or remove energy from evaluate.measure"
            )
        return np.where(self._one_hot, like, actions[draw_others(own, len(actions), rng, count)])

    def deviations(self, segment: Segment) -> np.ndarray:
        """Standard deviation [A] of the actions of a segment's data set."""
        return self._actions[self._dataset_of[segment.store]].std(axis=0, dtype=np.float64)


class OneStep:
    """One held-out window of C + 1 steps: its context is computed once, then the energy of any last action."""

    def __init__(self, evaluation: EvaluationContext, window: Window, h: Tensor) -> None:
        """Take a window and its tokens [C+1, N, D], whose last step is the one to be foreseen."""
        self._batch_size, rows = evaluation.config.evaluate.batch_size, window.rows(len(h) - 1)
        actions, states = (values[rows] for values in evaluation.dataset.controls(window.store, window.step_length))
        context = Context(h[:-1], actions[:-1], states)
        self._rollout, self._target = Rollout(evaluation.model, context, scaler=evaluation.scaler), h[-1]
        self.true, self.window = actions[-1], window

    def energies(self, actions: np.ndarray) -> np.ndarray:
        """Energies [n] float64 of unscaled actions [n, A]; the state stays as recorded."""
        return self._rollout.energies(actions[:, None], self._target, batch_size=self._batch_size).astype(np.float64)


def iter_one_steps(evaluation: EvaluationContext, chosen: ChosenWindows) -> Iterator[tuple[OneStep, int, Segment]]:
    """Read chosen windows one after the other, each with its number and its segment."""
    windows, segments = chosen.windows, chosen.segments
    for rows, batch, h in evaluation.iter_windows(chosen, "energy"):
        for window, segment, number, tokens in zip(windows[rows], segments[rows], batch.numbers, h, strict=True):
            yield OneStep(evaluation, window, tokens), int(number), segment


def rank_actions(num_better: np.ndarray, num_ties: np.ndarray, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the true action of each window stands, from how many of the other `num_samples` - 1 have less and equal energy.

    Returns:
        The share of the others that beat it [windows], a tie counting half; and the probability that its place lies in each
        tenth [windows, 10], tied places being equally likely.
    """
    edges = np.linspace(0, num_samples, NUM_BINS + 1)
    first, last = num_better[:, None], (num_better + num_ties + 1)[:, None]
    bins = np.maximum(np.minimum(last, edges[1:]) - np.maximum(first, edges[:-1]), 0) / (last - first)
    return (num_better + num_ties / 2) / (num_samples - 1), bins


def write_energy(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Draw the ranks of the true actions and the energy maps; return the sections of metrics.json.

    `energy`: `mean_rank` (chance 0.5) and `top10_rate` (chance 0.1) of the true action, `true_l1` and `others_l1` (energies)
    and `margin_l1`, the others' less the true one's; `energy_ci` their intervals over episodes.
    """
    segments, step_length = evaluation.held_out_segments(), evaluation.config.evaluate.step_length
    pool = ActionPool(evaluation.dataset, evaluation.training_segments() + segments, step_length)
    maps = measure_maps(evaluation, pool)
    sections, bins, episodes = measure_ranks(evaluation, pool)
    draw_ranks(episode_means(bins, episodes).mean(axis=0), out / "pictures/energy_ranks.png", note=evaluation.features)
    if maps:
        draw_maps(maps, out / "pictures/energy_maps.png", note=evaluation.features)
    return sections


def measure_ranks(
    evaluation: EvaluationContext, pool: ActionPool
) -> tuple[dict[str, dict[str, Any]], np.ndarray, list[str]]:
    """Rank the true last action of held-out windows by energy among `evaluate.energy_samples` - 1 of other episodes.

    Returns:
        The sections of metrics.json, the share of each tenth of the ranks [windows, 10], and the windows' episodes.
    """
    settings = evaluation.config.evaluate
    num_steps, apart = settings.num_context_steps + 1, settings.step_length
    chosen = choose_windows(evaluation.held_out_segments(), num_steps, settings.energy_windows, step_length=apart)
    found = []
    for step, number, segment in iter_one_steps(evaluation, chosen):
        rng = np.random.default_rng([settings.seed, number])
        drawn = pool.draw(settings.energy_samples - 1, step.true, segment, rng)
        energies = step.energies(np.concatenate([step.true[None], drawn]))
        energy, others = energies[0], energies[1:]
        tied = np.abs(others - energy) <= TIE_TOLERANCE * energy
        found.append(((~tied & (others < energy)).sum(), tied.sum(), energy, others.mean()))
    num_better, num_ties, energy, others = np.array(found, np.float64).T
    ranks, bins = rank_actions(num_better, num_ties, settings.energy_samples)
    values = {
        "mean_rank": ranks,
        "top10_rate": bins[:, 0],
        "true_l1": energy,
        "others_l1": others,
        "margin_l1": others - energy,
    }
    sections = build_section("energy", values, chosen.episodes, settings)
    sections["energy"] |= {"num_samples": settings.energy_samples, "num_windows": len(found)}
    return sections, bins, chosen.episodes


class EnergyMap(NamedTuple):
    """Energies around the true action of a held-out window."""

    episode: str
    first_step: int  # of the window, counted from the first cached one of its episode
    axes: tuple[tuple[str, str], tuple[str, str]]  # the two action columns, name and unit
    grid: np.ndarray  # [2, G] unscaled values along both axes; the true action's is the middle one
    energies: np.ndarray  # [G, G], [i, j] at (grid[0, i], grid[1, j])


def measure_maps(evaluation: EvaluationContext, pool: ActionPool) -> list[EnergyMap]:
    """Energies on a grid around the true action: the middle window of up to 6 held-out episodes, spread over them.

    The grid reaches two standard deviations of the recorded actions to each side. Where fewer than two columns that can be axes
    ever change there are no maps, and that is said on stderr.
    """
    dataset, settings, space = evaluation.dataset, evaluation.config.evaluate, evaluation.dataset.space
    num_steps, apart = settings.num_context_steps + 1, settings.step_length
    chosen = choose_windows(evaluation.held_out_segments(), num_steps, 3, step_length=apart)
    positions = positions_of(chosen.episodes)
    episodes = spread(sorted(positions), MAX_MAPS)
    numbers = [chosen.numbers[positions[episode][len(positions[episode]) // 2]] for episode in episodes]
    middle = ChosenWindows(chosen.index, numbers)
    moving = np.all([pool.deviations(segment) > 0 for segment in middle.segments], axis=0)
    axes = choose_axes(space, settings.energy_axes, moving)
    if len(axes) < 2:
        wanted = ", ".join(settings.energy_axes or list_axes(space))
        print(f"no energy map: fewer than two of {wanted} ever change in these recordings", file=sys.stderr)
        return []
    columns = [[column.name for column in space.actions].index(name) for name in axes]
    named = tuple((space.actions[column].name, space.actions[column].unit) for column in columns)
    first_rows, maps = first_cached_rows(dataset.segments), []
    for step, _, segment in iter_one_steps(evaluation, middle):
        reach = MAP_REACH * pool.deviations(segment)[columns]
        offsets = np.linspace(-reach, reach, MAP_STEPS, axis=1)  # [2, G]
        actions = shift_actions(space, step.true, columns, offsets).reshape(-1, len(space.actions))
        first_step = step.window.start - first_rows[segment.store, segment.episode]
        grid = step.true[columns].astype(np.float64)[:, None] + offsets
        energies = step.energies(actions).reshape(MAP_STEPS, MAP_STEPS)
        maps.append(EnergyMap(segment.episode, first_step, named, grid, energies))
    return maps


def shift_actions(space: ActionSpace, true: np.ndarray, columns: Sequence[int], offsets: np.ndarray) -> np.ndarray:
    """Actions [G, G, A] float32 around a true one [A]: two columns move by offsets [2, G], and what follows from them moves along.

    Of what follows only the change is taken, so that the true action itself stays what was recorded.
    """
    base, num_steps = true.astype(np.float64), offsets.shape[1]
    moved = np.broadcast_to(base, (num_steps, num_steps, len(true))).copy()
    moved[..., columns[0]] += offsets[0][:, None]
    moved[..., columns[1]] += offsets[1][None, :]
    return (base + complete_actions(space, moved) - complete_actions(space, base.copy())).astype(np.float32)


def list_axes(space: ActionSpace) -> list[str]:
    """Continuous columns that do not follow from another one."""
    follows = space.motion.follows if space.motion else ()
    return [column.name for column in space.actions if column.kind == "continuous" and column.name not in follows]


def check_axes(evaluation: EvaluationContext) -> None:
    """Refuse names in `evaluate.energy_axes` that cannot be axes, with those that can."""
    space = evaluation.dataset.space
    for name in evaluation.config.evaluate.energy_axes or ():
        if name not in list_axes(space):
            raise ValueError(
                f"evaluate.energy_axes: {name!r} cannot be an axis of {space.name}; choose two of {', '.join(list_axes(space))}"
            )


def choose_axes(space: ActionSpace, requested: tuple[str, str] | None, moving: np.ndarray) -> list[str]:
    """Up to two columns that ever change ([A] bool): of the requested ones, else in the order that suits the space."""
    changing = {column.name for column, moves in zip(space.actions, moving, strict=True) if moves}
    order = requested or (*(space.motion.map_axes if space.motion else ()), *list_axes(space))
    return [name for name in dict.fromkeys(order) if name in changing][:2]


def draw_ranks(shares: np.ndarray, path: Path, *, note: str) -> None:
    """How often the true action lies in each tenth of the ranks [10], against chance; `note` says what the features are."""
    figure = new_figure(7.0, 4.0)
    axes = figure.subplots()
    left = np.arange(NUM_BINS) / NUM_BINS
    axes.bar(left, shares, width=0.09, align="edge", color="#1f77b4", label="true action")
    axes.axhline(1 / NUM_BINS, color="#d62728", linestyle="--", label="chance: actions make no difference")
    axes.set(
        xlim=(0, 1),
        xlabel="rank of the true action among sampled ones (0: lowest energy, best)",
        ylabel="share of held-out windows",
    )
    axes.set_title(f"Does the true action lead to the true next step?\n{note}", fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_maps(maps: Sequence[EnergyMap], path: Path, *, note: str) -> None:
    """The mean landscape around the true action, and some single ones with the true action marked."""
    offsets = np.mean([single.grid - single.grid[:, [MIDDLE]] for single in maps], axis=0)
    above = np.mean([single.energies - single.energies[MIDDLE, MIDDLE] for single in maps], axis=0)
    pictures = [(f"mean of {len(maps)} windows, less the true action's energy", "change of ", offsets, above)]
    for single in spread(maps, NUM_DRAWN):
        name = single.episode if len(single.episode) <= 28 else f"...{single.episode[-25:]}"
        pictures.append((f"{name}, step {single.first_step}", "", single.grid, single.energies))
    least = FLAT_SHARE * float(np.mean([single.energies for single in maps]))
    figure = new_figure(4.2 * len(pictures), 4.4)
    places = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (title, what, grid, energies) in zip(places, pictures, strict=True):
        middle, span = (energies.max() + energies.min()) / 2, energies.max() - energies.min()
        if span < least:  # stretched over all colours, rounding would look like a landscape
            title = f"{title}\nflat: energies differ by {span:.1g}"
        half = max(span, least) / 2
        colours = {"cmap": "viridis", "shading": "nearest", "vmin": middle - half, "vmax": middle + half}
        image = axes.pcolormesh(grid[0], grid[1], energies.T, **colours)
        best = np.unravel_index(energies.argmin(), energies.shape)
        axes.plot(grid[0, best[0]], grid[1, best[1]], "o", mfc="none", mec="white", ms=10, mew=2, label="lowest")
        axes.plot(*grid[:, MIDDLE], "x", color="#ff3b30", ms=10, mew=2.5, label="true action")
        axes.set_title(title, fontsize=9)
        across, up = (f"{what}{name} ({unit})" for name, unit in maps[0].axes)
        axes.set(xlabel=across, ylabel=up)
        figure.colorbar(image, ax=axes, shrink=0.8, label="L1").formatter.set_useOffset(False)
    places[0].legend(fontsize=8, loc="upper right")
    figure.suptitle(f"Energy (L1 to the true next step) around the true action; {note}", fontsize=10)
    save_figure(figure, path)


ENERGY = Measurement(
    name="energy",
    section="energy",
    run=write_energy,
    heading="Energy: the true action among others",
    explanation="Rank 0: no sampled action leads nearer to the true next step than the recorded one; 0.5 is chance.",
    pictures=(
        Picture(
            "energy_ranks.png",
            "Histogram of the true action's rank among sampled actions",
            "Bars should be high on the left. A flat histogram at the dashed line says that actions make no difference.",
        ),
        Picture(
            "energy_maps.png",
            "Maps of energy over two action columns around the true action",
            "A valley at the cross says that a planner could find the action; a flat or tilted map that it could not.",
            wide=True,
        ),
    ),
    check=check_axes,
)
