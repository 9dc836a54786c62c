"""What an evaluation of plans leaves behind: metrics.json, timing.json, plans.csv, a picture, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.evaluation.context import open_evaluation
from jepa_cache.evaluation.metrics import bootstrap_mean, episode_means, paired_p_value
from jepa_cache.evaluation.planning_plots import draw_plans
from jepa_cache.evaluation.planning_score import KINDS, OTHER_GOAL, PLAN, RANDOM, ZERO, PlanningScore, score_plans
from jepa_cache.evaluation.tables import write_json, write_table
from jepa_cache.evaluation.verdict import MIN_EPISODES, NO, SIGNIFICANCE, UNCLEAR, YES
from jepa_cache.files import replaced_files

BASELINES = {
    ZERO: "not moving",
    RANDOM: "random movements",
    OTHER_GOAL: "the same search for another episode's goal",
}


def plan_run(config: Config, dataset: CachedDataset, weights: Path, out: Path) -> dict[str, Any]:
    """Score the plans of trained weights on the held-out episodes and write what was found.

    Args:
        config: Its `plan`, `evaluate` (batch size, resamples) and `split` sections count.
        dataset: The cached features.
        weights: predictor.safetensors of a training run.
        out: Folder for the results.

    Raises:
        ValueError: As `open_evaluation` and `score_plans`, or fewer than two held-out episodes are long enough.
    """
    evaluation = open_evaluation(config, dataset, weights)
    score = score_plans(evaluation)
    metrics = summarize_plans(score, config) | {
        "encoder_trained": dataset.manifest.encoder_trained,
        "comparable": dataset.manifest.comparable,
        "mode": dataset.manifest.mode,
    }
    metrics["verdict"] = judge_plans(metrics, score)
    with replaced_files(out, "metrics.json") as folder:
        write_json(metrics, folder / "metrics.json")
        # Beside the metrics, so that equal runs leave equal metrics.
        write_json(describe_timing(score), folder / "timing.json")
        write_table(plan_table(score), folder / "plans.csv")
        draw_plans(score, metrics, folder / "plans.png", note=evaluation.features)
    return metrics | {"timing": describe_timing(score)}


def summarize_plans(score: PlanningScore, config: Config) -> dict[str, Any]:
    """Means over episodes, their 95 % intervals and the gaps' p values, by distance, kind and horizon; a gap above 0: plans end nearer."""
    values, episodes = {}, {}
    for horizon in sorted({record.horizon for record in score.records}):
        chosen = [record for record in score.records if record.horizon == horizon]
        for name in score.names:
            by_kind = {kind: np.array([record.distances[kind][name] for record in chosen]) for kind in KINDS}
            figures = {f"{name}_{kind}_h{horizon}": by_kind[kind] for kind in KINDS}
            figures[f"{name}_moved_h{horizon}"] = np.array([record.moved[name] for record in chosen])
            figures |= {f"{name}_gap_{kind}_h{horizon}": by_kind[kind] - by_kind[PLAN] for kind in BASELINES}
            values |= figures
            episodes |= {key: [record.episode for record in chosen] for key in figures}
        energies = {
            f"energy_plan_h{horizon}": np.array([record.energies[-1] for record in chosen]),
            f"energy_recorded_h{horizon}": np.array([record.energy_recorded for record in chosen]),
        }
        values |= energies
        episodes |= {key: [record.episode for record in chosen] for key in energies}
    settings = config.evaluate
    per_episode = {name: episode_means(per_plan, episodes[name]) for name, per_plan in values.items()}
    estimates = {
        name: bootstrap_mean(means, num_resamples=settings.num_bootstrap, seed=settings.seed)
        for name, means in per_episode.items()
    }
    return {
        "num_episodes": len({record.episode for record in score.records}),
        "num_plans": len(score.records),
        "val": {name: estimate.mean for name, estimate in estimates.items()},
        "val_ci": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "p_value": {
            name: paired_p_value(means, seed=settings.seed) for name, means in per_episode.items() if "_gap_" in name
        },
    }


def judge_plans(metrics: Mapping[str, Any], score: PlanningScore) -> dict[str, dict[str, str]]:
    """For each baseline whether plans end nearer to where the recorded actions led, at every horizon, in one word and in words.

    "yes" needs at every horizon an interval of the gap above 0 and a sign-flip test below 0.05, which takes six episodes; "no" an
    interval below 0; all else is "unclear". It is said of the chief distance alone.
    """
    name, verdict = score.names[0], {}
    for kind, words in BASELINES.items():
        answers, said = [], []
        for horizon in sorted({record.horizon for record in score.records}):
            key = f"{name}_gap_{kind}_h{horizon}"
            (low, high), p = metrics["val_ci"][key], metrics["p_value"][key]
            answers.append(YES if low > 0 and p < SIGNIFICANCE else NO if high < 0 else UNCLEAR)
            said.append(
                f"{horizon} step{'s' if horizon > 1 else ''}: {answers[-1]}, {metrics['val'][f'{name}_{PLAN}_h{horizon}']:.3g} "
                f"against {metrics['val'][f'{name}_{kind}_h{horizon}']:.3g}, gap {metrics['val'][key]:.3g} [{low:.3g}, {high:.3g}], p {p:.2g}"
            )
        answer = answers[0] if len(set(answers)) == 1 else UNCLEAR
        verdict[kind] = {"answer": answer, "words": f"{name}, plans end nearer than {words}: {'; '.join(said)}"}
    return verdict


def describe_timing(score: PlanningScore) -> dict[str, Any]:
    """What searching took, as plain JSON."""
    timing = score.timing
    return {
        "seconds_per_plan": {f"h{horizon}": seconds for horizon, seconds in timing.seconds_per_plan.items()},
        "samples_per_s": timing.samples_per_s,
    }


def plan_table(score: PlanningScore) -> list[dict[str, Any]]:
    """One row per plan: where it began, distances of each kind, what was planned and recorded, energies."""
    rows = []
    for record in score.records:
        row: dict[str, Any] = {"episode": record.episode, "first_step": record.first_step, "horizon": record.horizon}
        row |= {f"{name}_{kind}": record.distances[kind][name] for name in score.names for kind in KINDS}
        row |= {f"{name}_moved": record.moved[name] for name in score.names}
        row |= {f"planned_{name}": value for name, value in zip(score.searched, record.planned, strict=True)}
        row |= {f"recorded_{name}": value for name, value in zip(score.searched, record.recorded, strict=True)}
        rows.append(row | {"energy_plan": record.energies[-1], "energy_recorded": record.energy_recorded})
    return rows


def describe_plans(metrics: Mapping[str, Any]) -> str:
    """The verdict and the times in a few lines."""
    timing = metrics["timing"]
    lines = [
        f"{metrics['num_plans']} plans in {metrics['num_episodes']} held-out episodes, 95 % intervals over episodes"
    ]
    lines += [f"  {judged['words']}" for judged in metrics["verdict"].values()]
    seconds = ", ".join(f"{key[1:]} steps {value:.2f} s" for key, value in timing["seconds_per_plan"].items())
    lines.append(f"  a plan takes: {seconds}; {timing['samples_per_s']:.0f} samples/s")
    if metrics["num_episodes"] < MIN_EPISODES:
        lines.append(
            f"  fewer than {MIN_EPISODES} held-out episodes: no answer is yes; raise split.val_share or add recordings"
        )
    if not metrics["encoder_trained"]:
        lines.append(
            "  the encoder has random weights: these figures show that the path works, nothing about the world"
        )
    if not metrics["comparable"]:
        lines.append("  clip mode: early steps have seen later frames; not comparable with frame or tubelet mode")
    return "\n".join(lines)
