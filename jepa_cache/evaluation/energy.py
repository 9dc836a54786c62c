"""Energy: among many actions, does the recorded one lead where the recording went?

The energy of an action is the mean absolute difference between the step that the predictor foresees with it and the true next
step: low where they agree. A world model that uses its actions gives the recorded action a lower energy than others.

Source: the energy of V-JEPA 2-AC's planner (arXiv 2506.09985, section on planning) and the energy landscape published with it.
Ranks among sampled actions are ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from jepa_cache.evaluation.candidates import ActionPool, open_window
from jepa_cache.evaluation.context import EvaluationContext, choose_windows
from jepa_cache.evaluation.energy_map import measure_maps, write_maps
from jepa_cache.evaluation.energy_plots import draw_maps, draw_ranks
from jepa_cache.evaluation.metrics import episode_means
from jepa_cache.evaluation.tables import MEASUREMENTS_FOLDER, build_section, write_table

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
