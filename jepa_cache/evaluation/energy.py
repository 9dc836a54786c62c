"""Energy: among many actions, does the recorded one lead where the recording went?

The energy of an action is the mean absolute difference between the step that the predictor foresees with it and the true next
step: low where they agree. A world model that uses its actions gives the recorded action a lower energy than others.

Source: the energy of V-JEPA 2-AC's planner (arXiv 2506.09985, section on planning) and the energy landscape published with it.
Ranks among sampled actions are ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from jepa_cache.actions import ActionSpace
from jepa_cache.control.motion import complete_actions
from jepa_cache.data.ablations import draw_others
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.windows import WindowIndex, first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext, Measurement, Picture, choose_windows
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, build_section, episode_means, write_table
from jepa_cache.evaluation.pictures import new_figure
from jepa_cache.predictor.rollout import repeat_past


class OneStep:
    """One held-out window of C + 1 steps: its context computed once, then the energy of any last action."""

    def __init__(self, evaluation: EvaluationContext, index: WindowIndex, number: int) -> None:
        """Read one window, whose last step is the one to be foreseen, and compute what all actions share."""
        batch, h = evaluation.read_windows(index, [number])
        states = batch.states
        self._evaluation = evaluation
        self._newest, self._target, self._state = h[:, -2:-1], h[:, -1], states[:, -2:-1]
        self._past = evaluation.model.read_past(h[:, :-1], batch.actions[:, :-1], states[:, :-1])

    def energies(self, actions: np.ndarray) -> np.ndarray:
        """Energies [n] float64 of unscaled actions [n, A]; the state stays as recorded."""
        evaluation, size = self._evaluation, self._evaluation.config.evaluate.batch_size
        scaled = torch.from_numpy(evaluation.scaler.actions.apply(actions)).to(evaluation.device)
        return torch.cat([self._pass(part[:, None]) for part in scaled.split(size)]).double().cpu().numpy()

    def _pass(self, actions: torch.Tensor) -> torch.Tensor:
        count = len(actions)
        tokens, states = (given.expand(count, *given.shape[1:]) for given in (self._newest, self._state))
        out = self._evaluation.model.predictor(tokens, actions, states, None, repeat_past(self._past, count), 0)
        z = self._evaluation.model.as_reps(out.tokens[:, 0])
        return (z - self._target).abs().mean(dim=(1, 2), dtype=torch.float64)


class ActionPool:
    """The recorded actions of a data set, to draw some of other episodes."""

    def __init__(self, dataset: CachedDataset, segments: Sequence[Segment]) -> None:
        """Collect the actions inside the segments.

        Args:
            dataset: The cached data set.
            segments: Of training and held-out episodes.
        """
        self._one_hot = np.array([column.kind == "onehot" for column in dataset.space.actions])
        self._dataset_of = [part.dataset for part, _ in dataset.manifest.stores]
        parts: dict[str, list[np.ndarray]] = {}
        rows_of: dict[str, dict[str, list[np.ndarray]]] = {}
        ends: dict[str, int] = {}
        for segment in segments:
            name = self._dataset_of[segment.store]
            rows = dataset.controls(segment.store)[0][segment.start : segment.stop - 1]
            first = ends.setdefault(name, 0)
            ends[name] += len(rows)
            parts.setdefault(name, []).append(rows)
            rows_of.setdefault(name, {}).setdefault(segment.episode, []).append(np.arange(first, ends[name]))
        self._actions = {name: np.concatenate(rows) for name, rows in parts.items()}
        self._rows_of = {
            name: {episode: np.concatenate(rows) for episode, rows in of.items()} for name, of in rows_of.items()
        }

    def draw(self, count: int, like: np.ndarray, segment: Segment, rng: np.random.Generator) -> np.ndarray:
        """Draw actions [count, A] with replacement from other episodes of the same data set.

        One-hot columns (the slot that is selected at the step) stay as in `like` [A]: the frame shows them, so another one
        would give an action away.

        Raises:
            ValueError: There is no other episode.
        """
        name = self._dataset_of[segment.store]
        actions, own = self._actions[name], self._rows_of[name].get(segment.episode, np.empty(0, np.int64))
        if len(own) == len(actions):
            raise ValueError(
                f"the energy of {segment.episode!r} is compared with actions of other episodes of data set {name!r}, and "
                "there are none; add recordings, or leave energy out of evaluate.measure"
            )
        drawn = actions[draw_others(own, len(actions), rng, count)]
        return np.where(self._one_hot, like, drawn)

    def deviations(self, segment: Segment) -> np.ndarray:
        """Standard deviation [A] of the actions of a segment's data set."""
        return self._actions[self._dataset_of[segment.store]].std(axis=0, dtype=np.float64)


def open_window(evaluation: EvaluationContext, index: WindowIndex, number: int) -> tuple[OneStep, np.ndarray, Segment]:
    """A window of C + 1 steps, its last true action [A] unscaled, and the segment it lies in."""
    place = index[number]
    actions, _ = evaluation.dataset.controls(place.store)
    return OneStep(evaluation, index, number), actions[place.start + index.num_steps - 2], index.segments[place.segment]


MAP_STEPS = 13  # of each axis, odd: the true action lies in the middle
MAP_REACH = 2.0  # standard deviations of the recorded actions, to each side of the true one
MAX_MAPS = 6


class EnergyMaps(NamedTuple):
    """Energies around the true actions of some held-out windows, one of each episode.

    Attributes:
        axes: Names of the two action columns.
        units: Theirs.
        episodes: Key of each map's episode.
        first_steps: Step at which each window begins, counted from the first cached one of its episode.
        grids: [maps, 2, G] unscaled values along both axes; the true action's is the middle one.
        energies: [maps, G, G], [m, i, j] at (grids[m, 0, i], grids[m, 1, j]).
    """

    axes: tuple[str, str]
    units: tuple[str, str]
    episodes: list[str]
    first_steps: list[int]
    grids: np.ndarray
    energies: np.ndarray

    def above_true(self) -> np.ndarray:
        """Mean over the maps of the energy less the true action's, [G, G]."""
        middle = MAP_STEPS // 2
        return (self.energies - self.energies[:, middle : middle + 1, middle : middle + 1]).mean(axis=0)


@torch.no_grad()
def measure_maps(evaluation: EvaluationContext) -> EnergyMaps | None:
    """Energies on a grid around the true action: the middle window of up to 6 held-out episodes, spread over them.

    The grid reaches two standard deviations of the recorded actions to each side. What follows from a column moves with it: a
    turn of the view takes its mouse counts along.

    Returns:
        None where fewer than two continuous columns ever change; that is said on stderr.

    Raises:
        ValueError: `evaluate.energy_axes` names a column that the action space does not have, or that cannot be an axis.
    """
    space = evaluation.dataset.space
    pool = ActionPool(evaluation.dataset, evaluation.training_segments() + evaluation.held_out_segments())
    index, numbers = windows = choose_windows(
        evaluation.held_out_segments(), evaluation.config.evaluate.num_context_steps + 1, 3
    )
    middle: dict[str, int] = {}
    for episode, group in _by_episode(windows.episodes, numbers):
        middle[episode] = group[len(group) // 2]
    chosen = sorted(middle)
    chosen = [
        chosen[pick]
        for pick in np.unique(np.linspace(0, len(chosen) - 1, min(MAX_MAPS, len(chosen))).round().astype(int))
    ]
    windows = [open_window(evaluation, index, middle[episode]) for episode in chosen]
    moving = np.all([pool.deviations(segment) > 0 for _, _, segment in windows], axis=0)
    axes = _choose_axes(space, evaluation.config.evaluate.energy_axes, moving)
    if axes is None:
        print(
            f"no energy map: of the continuous columns of {space.name} fewer than two ever change in these recordings",
            file=sys.stderr,
        )
        return None
    columns = [[column.name for column in space.actions].index(name) for name in axes]
    complete = partial(complete_actions, space)
    first_rows = first_cached_rows(evaluation.dataset.segments)
    first_steps = [
        index[middle[episode]].start - first_rows[segment.store, episode]
        for episode, (_, _, segment) in zip(chosen, windows, strict=True)
    ]
    grids, energies = [], []
    for window, true, segment in windows:
        reach = MAP_REACH * pool.deviations(segment)[columns]
        offsets = np.linspace(-reach, reach, MAP_STEPS, axis=1)  # [2, G]
        actions = shift_actions(true, columns, offsets, complete)
        energies.append(window.energies(actions.reshape(-1, len(true))).reshape(MAP_STEPS, MAP_STEPS))
        grids.append(true[columns].astype(np.float64)[:, None] + offsets)
    return EnergyMaps(
        axes,
        tuple(space.actions[column].unit for column in columns),
        chosen,
        first_steps,
        np.stack(grids),
        np.stack(energies),
    )


def shift_actions(
    true: np.ndarray, columns: Sequence[int], offsets: np.ndarray, complete: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Actions [G, G, A] float32 around a true one.

    Args:
        true: [A].
        columns: The two that move.
        offsets: [2, G] of the two columns.
        complete: Sets the columns that follow from them (`Motion.complete`); only their change is taken, so that the true
            action itself stays what was recorded.
    """
    base = true.astype(np.float64)
    moved = np.broadcast_to(base, (offsets.shape[1], offsets.shape[1], len(true))).copy()
    moved[..., columns[0]] += offsets[0][:, None]
    moved[..., columns[1]] += offsets[1][None, :]
    return (base + complete(moved) - complete(base.copy())).astype(np.float32)


def _by_episode(episodes: Sequence[str], numbers: Sequence[int]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {}
    for episode, number in zip(episodes, numbers, strict=True):
        groups.setdefault(episode, []).append(number)
    return list(groups.items())


def _choose_axes(space: ActionSpace, asked: tuple[str, ...] | None, moving: np.ndarray) -> tuple[str, str] | None:
    """Names of two columns: those asked for, else the first two that ever change, in the order that suits the space."""
    follows, first = (space.motion.follows, space.motion.map_axes) if space.motion else ((), ())
    free = [column.name for column in space.actions if column.kind == "continuous" and column.name not in follows]
    changing = [column.name for column, moves in zip(space.actions, moving, strict=True) if moves]
    if asked is not None:
        for name in asked:
            if name not in free:
                raise ValueError(
                    f"evaluate.energy_axes: {name!r} cannot be an axis of {space.name}; choose two of {', '.join(free)}"
                )
            if name not in changing:
                raise ValueError(
                    f"evaluate.energy_axes: {name!r} never changes in these recordings; choose two of "
                    f"{', '.join(other for other in free if other in changing)}"
                )
        return asked
    usable = [name for name in dict.fromkeys((*first, *free)) if name in changing]
    return (usable[0], usable[1]) if len(usable) >= 2 else None


def write_maps(maps: EnergyMaps, out: Path) -> None:
    """Write energy_map<i>.csv (x, y, energy) for each map and energy_maps.csv, which says what they show."""
    middle, listing = MAP_STEPS // 2, []
    for number, (grid, energies) in enumerate(zip(maps.grids, maps.energies, strict=True), start=1):
        write_table(
            [
                {"x": float(grid[0, i]), "y": float(grid[1, j]), "energy": float(energies[i, j])}
                for i in range(MAP_STEPS)
                for j in range(MAP_STEPS)
            ],
            out / MEASUREMENTS_FOLDER / f"energy_map{number}.csv",
        )
        listing.append(
            {
                "map": number,
                "episode": maps.episodes[number - 1],
                "first_step": maps.first_steps[number - 1],
                "x": maps.axes[0],
                "x_unit": maps.units[0],
                "y": maps.axes[1],
                "y_unit": maps.units[1],
                "x_true": float(grid[0, middle]),
                "y_true": float(grid[1, middle]),
                "energy_true": float(energies[middle, middle]),
            }
        )
    write_table(listing, out / MEASUREMENTS_FOLDER / "energy_maps.csv")


NUM_BINS = 10  # of ranks; the first holds the best tenth
# Energies nearer than this, relative to the true action's, are one energy: a batched float32 pass gives equal actions
# energies that differ by about 1e-7, from where they stand in the batch.
TIE_TOLERANCE = 1e-6


class EnergyRanks(NamedTuple):
    """How the true action of each held-out window does among others.

    Attributes:
        episodes: Key of each window's episode.
        num_better: [windows] other actions with a lower energy than the true one's.
        num_ties: [windows] other actions with the same energy.
        energy: [windows] of the true action.
        others: [windows] mean energy of the others.
        num_samples: Actions of a window, the true one included.
    """

    episodes: list[str]
    num_better: np.ndarray
    num_ties: np.ndarray
    energy: np.ndarray
    others: np.ndarray
    num_samples: int

    def ranks(self) -> np.ndarray:
        """Share of the others that beat the true action, [windows] in [0, 1]; a tie counts half. Chance: 0.5."""
        return (self.num_better + self.num_ties / 2) / (self.num_samples - 1)

    def bins(self) -> np.ndarray:
        """Probability that the true action's place lies in each tenth, [windows, 10]; tied places are equally likely."""
        edges = np.linspace(0, self.num_samples, NUM_BINS + 1)
        first, last = self.num_better[:, None], (self.num_better + self.num_ties + 1)[:, None]
        overlap = np.minimum(last, edges[1:]) - np.maximum(first, edges[:-1])
        return np.maximum(overlap, 0) / (last - first)


@torch.no_grad()
def measure_ranks(evaluation: EvaluationContext) -> EnergyRanks:
    """Rank the true action of held-out windows among sampled ones by energy.

    Each window has `evaluate.num_context_steps` true steps with their true actions; only the last action changes. The other
    `evaluate.energy_samples` - 1 are drawn from the recorded actions of other episodes.

    Raises:
        ValueError: No held-out segment is long enough, or there is no other episode.
    """
    settings = evaluation.config.evaluate
    num_steps = settings.num_context_steps + 1
    chosen = choose_windows(evaluation.held_out_segments(), num_steps, settings.energy_windows)
    pool = ActionPool(evaluation.dataset, evaluation.training_segments() + evaluation.held_out_segments())
    found: list[tuple[float, ...]] = []
    for number in tqdm(chosen.numbers, desc="energy", unit="window", dynamic_ncols=True):
        window, true, segment = open_window(evaluation, chosen.index, number)
        rng = np.random.default_rng([settings.seed, number])
        others = pool.draw(settings.energy_samples - 1, true, segment, rng)
        energies = window.energies(np.concatenate([true[None], others]))
        energy, others = energies[0], energies[1:]
        tied = np.abs(others - energy) <= TIE_TOLERANCE * energy
        found.append((float(((others < energy) & ~tied).sum()), float(tied.sum()), energy, others.mean()))
    num_better, num_ties, energy, others = np.array(found).T
    return EnergyRanks(chosen.episodes, num_better, num_ties, energy, others, settings.energy_samples)


def rank_table(ranks: EnergyRanks) -> list[dict[str, float]]:
    """Rows of energy_ranks.csv: the share of windows (episodes count alike) in each tenth of the ranks, and chance."""
    shares = episode_means(ranks.bins(), ranks.episodes).mean(axis=0)
    return [
        {
            "rank_bin_low": number / NUM_BINS,
            "rank_bin_high": (number + 1) / NUM_BINS,
            "share": float(share),
            "chance": 1 / NUM_BINS,
        }
        for number, share in enumerate(shares)
    ]


def write_energy(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Write energy_ranks.csv, the energy maps and their pictures; return the sections of metrics.json.

    `energy`: `mean_rank` (chance 0.5) and `top10_rate` (chance 0.1) of the true action, `true_l1` and `others_l1` (energies)
    and `margin_l1`, the others' less the true one's; `energy_ci` their intervals over episodes.

    Raises:
        ValueError: Fewer than two episodes with a long enough segment are held out, or the axes do not fit the action space.
    """
    ranks = measure_ranks(evaluation)
    values = {
        "mean_rank": ranks.ranks(),
        "top10_rate": ranks.bins()[:, 0],
        "true_l1": ranks.energy,
        "others_l1": ranks.others,
        "margin_l1": ranks.others - ranks.energy,
    }
    sections = build_section("energy", values, ranks.episodes, evaluation.config.evaluate)
    sections["energy"] |= {"num_samples": ranks.num_samples, "num_windows": len(ranks.episodes)}
    rows = rank_table(ranks)
    write_table(rows, out / MEASUREMENTS_FOLDER / "energy_ranks.csv")
    note = evaluation.features
    draw_ranks(rows, out / "pictures/energy_ranks.png", note=note)
    maps = measure_maps(evaluation)
    if maps is not None:
        write_maps(maps, out)
        draw_maps(maps, out / "pictures/energy_maps.png", note=note)
    return sections


NUM_DRAWN = 3  # single maps beside their mean


def draw_ranks(rows: Sequence[Mapping[str, float]], path: Path, *, note: str) -> None:
    """How often the true action lies in each tenth of the ranks, against chance; `note` says what the features are."""
    figure, axes = new_figure(7.0, 4.0)
    left = np.array([row["rank_bin_low"] for row in rows])
    axes.bar(left, [row["share"] for row in rows], width=0.09, align="edge", color="#1f77b4", label="true action")
    axes.axhline(rows[0]["chance"], color="#d62728", linestyle="--", label="chance: actions make no difference")
    axes.set_xlim(0, 1)
    axes.set_xlabel("rank of the true action among sampled ones (0: lowest energy, best)")
    axes.set_ylabel("share of held-out windows")
    axes.set_title(f"Does the true action lead to the true next step?\n{note}", fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_maps(maps: EnergyMaps, path: Path, *, note: str) -> None:
    """The mean landscape around the true action, and some single ones with the true action marked."""
    drawn = np.unique(np.linspace(0, len(maps.grids) - 1, min(NUM_DRAWN, len(maps.grids))).round().astype(int))
    figure, _ = new_figure(4.2 * (len(drawn) + 1), 4.4, axes=False)
    places = figure.subplots(1, len(drawn) + 1, squeeze=False)[0]
    middle = MAP_STEPS // 2
    offsets = (maps.grids - maps.grids[:, :, middle : middle + 1]).mean(axis=0)
    titles = [f"mean of {len(maps.grids)} windows, less the true action's energy"]
    pictures = [(offsets, maps.above_true(), (0.0, 0.0))]
    for number in drawn:
        grid = maps.grids[number]
        titles.append(f"{_shorten(maps.episodes[number])}, step {maps.first_steps[number]}")
        pictures.append((grid, maps.energies[number], tuple(grid[:, middle])))
    for axes, title, (grid, energies, true) in zip(places, titles, pictures, strict=True):
        image = axes.pcolormesh(grid[0], grid[1], energies.T, cmap="viridis", shading="nearest")
        best = np.unravel_index(energies.argmin(), energies.shape)
        axes.plot(grid[0, best[0]], grid[1, best[1]], "o", mfc="none", mec="white", ms=10, mew=2, label="lowest")
        axes.plot(*true, "x", color="#ff3b30", ms=10, mew=2.5, label="true action")
        axes.set_title(title, fontsize=9)
        offset = "change of " if axes is places[0] else ""
        axes.set_xlabel(f"{offset}{maps.axes[0]} ({maps.units[0]})")
        axes.set_ylabel(f"{offset}{maps.axes[1]} ({maps.units[1]})")
        figure.colorbar(image, ax=axes, shrink=0.8)
    places[0].legend(fontsize=8, loc="upper right")
    figure.suptitle(f"Energy (L1 to the true next step) around the true action; {note}", fontsize=10)
    figure.savefig(path, dpi=110)


def _shorten(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"...{name[3 - length :]}"


ENERGY = Measurement(
    name="energy",
    section="energy",
    run=write_energy,
    heading="Energy: the true action among others",
    explanation="Rank 0: no sampled action leads nearer to the true next step than the recorded one; 0.5 is chance.",
    tables=("energy_ranks.csv", "energy_maps.csv"),
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
)
