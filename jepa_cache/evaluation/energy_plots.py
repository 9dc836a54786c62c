"""Pictures of energies: where the true action ranks among others, and the landscape around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jepa_cache.evaluation.energy_map import MAP_STEPS, EnergyMaps
from jepa_cache.evaluation.plots import new_figure

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
