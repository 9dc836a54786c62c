"""A picture of plans: how far they end from the recorded actions, what was planned against what was done, and the search itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.evaluation.planning_score import OTHER_GOAL, PLAN, RANDOM, ZERO, PlanningScore
from jepa_cache.evaluation.plots import new_figure

COLOURS = {
    PLAN: ("plan", "#1f77b4"),
    ZERO: ("not moving", "#7f7f7f"),
    RANDOM: ("random movements", "#d62728"),
    OTHER_GOAL: ("another episode's goal", "#ff7f0e"),
}


def draw_plans(score: PlanningScore, metrics: Mapping[str, Any], path: Path, *, note: str) -> None:
    """Draw distances by horizon with 95 % intervals, planned against recorded movement, and energy against round.

    Args:
        score: All plans.
        metrics: From `summarize_plans`.
        path: PNG.
        note: What the features are.
    """
    figure, _ = new_figure(13.5, 4.4, axes=False)
    distance, moves, search = figure.subplots(1, 3)
    name, horizons = score.names[0], sorted({record.horizon for record in score.records})
    for shift, (kind, (label, colour)) in zip((-0.12, -0.04, 0.04, 0.12), COLOURS.items(), strict=True):
        keys = [f"{name}_{kind}_h{horizon}" for horizon in horizons]
        mean = np.array([metrics["val"][key] for key in keys])
        ends = np.array([metrics["val_ci"][key] for key in keys]).T
        distance.errorbar(
            np.array(horizons) + shift, mean, yerr=np.abs(ends - mean), fmt="o", capsize=3, color=colour, label=label
        )
    distance.set(
        xlabel="steps to the goal", ylabel=f"{name} from where the recorded actions led", title="where plans end"
    )
    distance.set_xticks(horizons)
    distance.set_ylim(bottom=0)
    distance.legend(fontsize=8)
    for number, searched in enumerate(score.searched):
        planned = np.array([record.planned[number] for record in score.records])
        recorded = np.array([record.recorded[number] for record in score.records])
        moves.scatter(recorded, planned, s=14, alpha=0.6, label=searched)
    reach = max(np.abs(moves.get_xlim()).max(), np.abs(moves.get_ylim()).max())
    moves.plot([-reach, reach], [-reach, reach], color="#7f7f7f", linewidth=0.8)
    moves.set(xlabel="recorded, summed over the steps", ylabel="planned", title="planned against recorded movement")
    moves.legend(fontsize=8)
    for horizon in horizons:
        lowest = np.mean([record.energies for record in score.records if record.horizon == horizon], axis=0)
        recorded = np.mean([record.energy_recorded for record in score.records if record.horizon == horizon])
        (line,) = search.plot(
            range(1, len(lowest) + 1), lowest, marker="o", label=f"{horizon} step{'s' if horizon > 1 else ''}"
        )
        search.axhline(recorded, color=line.get_color(), linestyle=":", linewidth=1)
    search.set(xlabel="round of the search", ylabel="lowest energy", title="search (dotted: the recorded actions)")
    search.set_xticks(range(1, len(lowest) + 1))
    search.legend(fontsize=8)
    for axes in (distance, moves, search):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Plans to recorded goal frames ({note})", fontsize=11)
    figure.savefig(path, dpi=120)
