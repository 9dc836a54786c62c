"""Energy around the true action, over two columns of the action: a valley at the recorded action is what a planner needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from jepa_cache.actions import ActionSpace
from jepa_cache.control.motion import POSE_SPACES, VIEW_SPACES, build_motion
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.candidates import ActionPool, open_window
from jepa_cache.evaluation.context import EvaluationContext, choose_windows
from jepa_cache.evaluation.tables import MEASUREMENTS_FOLDER, write_table

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
    complete = build_motion(space).complete if space.name in VIEW_SPACES else _as_it_is
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


def _as_it_is(actions: np.ndarray) -> np.ndarray:
    return actions


def _by_episode(episodes: Sequence[str], numbers: Sequence[int]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {}
    for episode, number in zip(episodes, numbers, strict=True):
        groups.setdefault(episode, []).append(number)
    return list(groups.items())


def _choose_axes(space: ActionSpace, asked: tuple[str, ...] | None, moving: np.ndarray) -> tuple[str, str] | None:
    """Names of two columns: those asked for, else the first two that ever change, in the order that suits the space."""
    follows = ("mouse_dx", "mouse_dy") if space.name in VIEW_SPACES else ()
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
    # As the published landscape has it: the hand's way along x and z.
    order = ["dx", "dz", *free] if space.name in POSE_SPACES else free
    usable = [name for name in dict.fromkeys(order) if name in changing]
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
