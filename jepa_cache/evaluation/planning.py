"""An offline score of plans, without a robot or a game: from a recorded step to a later one, where do planned actions end?

For every start the goal is a later recorded step. Where the planned actions lead is compared with where the recorded ones led, and so
are no movement, random movements, and what the same search finds when it is given a goal of another held-out episode. Letters besides the project's: C context steps, K searched numbers an action.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config, PlanConfig
from jepa_cache.control.motion import Motion, build_motion
from jepa_cache.control.planner import (
    MAX_STEP_M,
    SETTINGS,
    Context,
    Plan,
    PlannerSettings,
    Rollout,
    follow_actions,
    plan_actions,
)
from jepa_cache.data.ablations import choose_donors
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.windows import WindowIndex, first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext, choose_windows, open_evaluation
from jepa_cache.evaluation.metrics import bootstrap_mean, episode_means, paired_p_value, write_json, write_table
from jepa_cache.evaluation.pictures import new_figure
from jepa_cache.evaluation.verdict import MIN_EPISODES, NO, SIGNIFICANCE, UNCLEAR, YES
from jepa_cache.files import replaced_files

PLAN, RANDOM, ZERO, OTHER_GOAL = "plan", "random", "zero", "other_goal"
KINDS = (PLAN, RANDOM, ZERO, OTHER_GOAL)


@dataclass(frozen=True)
class PlanRecord:
    """One start and horizon.

    Attributes:
        episode: Its key.
        first_step: Step at which the plan begins, counted from the first cached one of its episode.
        horizon: Steps to the goal.
        distances: Kind of plan to name of distance to its value; of random plans the mean.
        moved: Name of distance to how far the recorded actions moved.
        planned: [K] sum of the planned numbers.
        recorded: [K] sum of the recorded ones.
        energies: [rounds] lowest of each round.
        energy_recorded: Of the recorded actions.
        seconds: That the search took.
    """

    episode: str
    first_step: int
    horizon: int
    distances: dict[str, dict[str, float]]
    moved: dict[str, float]
    planned: np.ndarray
    recorded: np.ndarray
    energies: np.ndarray
    energy_recorded: float
    seconds: float


@dataclass(frozen=True)
class Timing:
    """What searching takes.

    Attributes:
        seconds_per_plan: Horizon to the mean.
        samples_per_s: Sampled plans rolled out in a second, over all searches.
    """

    seconds_per_plan: dict[int, float]
    samples_per_s: float


@dataclass(frozen=True)
class PlanningScore:
    """All plans of an evaluation.

    Attributes:
        records: One per start and horizon.
        names: Of the distances, the chief one first.
        searched: Names of the K searched numbers.
        timing: What they took.
    """

    records: list[PlanRecord]
    names: tuple[str, ...]
    searched: tuple[str, ...]
    timing: Timing


def choose_settings(config: PlanConfig) -> PlannerSettings:
    """The published settings that a configuration names, with its own samples and rounds; elites keep their share."""
    published = SETTINGS[config.settings]
    num_samples = config.num_samples or published.num_samples
    return replace(
        published,
        num_samples=num_samples,
        num_elites=max(2, round(published.num_elites * num_samples / published.num_samples)),
        num_rounds=config.num_rounds or published.num_rounds,
    )


@torch.no_grad()
def score_plans(evaluation: EvaluationContext) -> PlanningScore:
    """Plan from starts spread over the held-out episodes to the recorded steps 1, 2, ... later, as `config.plan` says.

    Columns that are not searched stay as in the action before the start (keys, slot), or 0 in spaces of poses.

    Raises:
        ValueError: The action space says nothing of where an action leads, no held-out segment is long enough, or one episode alone.
    """
    torch.set_num_threads(default_num_threads())
    config, dataset = evaluation.config.plan, evaluation.dataset
    settings = choose_settings(config)
    motion = build_motion(
        dataset.space,
        max_step_m=config.max_step_m or MAX_STEP_M[config.settings],
        max_rotation_rad=config.max_rotation_rad,
        max_turn_deg=config.max_turn_deg,
    )
    num_steps = config.num_context_steps + max(config.horizons)
    index, numbers = chosen = choose_windows(evaluation.held_out_segments(), num_steps, config.starts_per_episode)
    donors = choose_donors(chosen.episodes, seed=config.seed)
    first_rows = first_cached_rows(dataset.segments)
    records = []
    with tqdm(total=len(numbers) * len(config.horizons), desc="planning", unit="plan", dynamic_ncols=True) as bar:
        for position, number in enumerate(numbers):
            _, (h, other) = evaluation.read_windows(index, [number, numbers[donors[position]]])
            start = _Start(evaluation, motion, index, number, (h, other), config.num_context_steps, first_rows)
            for horizon in config.horizons:
                rng = np.random.default_rng([config.seed, position, horizon])
                records.append(start.plan(replace(settings, horizon=horizon), config.num_random, rng))
                bar.update()
    return PlanningScore(
        records,
        tuple(records[0].moved),
        motion.names,
        _summarize_timing(records, settings, config.horizons),
    )


class _Start:
    """One start of plans: the recorded steps before it, and those after it as goals, as are those of a window of another episode."""

    def __init__(
        self,
        evaluation: EvaluationContext,
        motion: Motion,
        index: WindowIndex,
        number: int,
        reps: tuple[Tensor, Tensor],
        num_context: int,
        first_rows: Mapping[tuple[int, str], int],
    ) -> None:
        window = index[number]
        segment = index.segments[window.segment]
        actions, states = evaluation.dataset.controls(window.store)
        rows = slice(window.start, window.start + index.num_steps)
        self._actions, self._states = (values[rows].astype(np.float64) for values in (actions, states))
        self._evaluation, self._motion, self._now = evaluation, motion, num_context - 1
        self._h, self._other_h = reps
        self._rule = evaluation.dataset.space.motion
        self.episode, self.first_step = (
            segment.episode,
            window.start - first_rows[segment.store, segment.episode] + self._now,
        )
        self._context = Context(self._h[:num_context], self._actions[: self._now], self._states[:num_context])
        self._base = np.zeros(self._actions.shape[1])
        if self._rule.holds and self._now:
            self._base = self._actions[self._now - 1]

    def plan(self, settings: PlannerSettings, num_random: int, rng: np.random.Generator) -> PlanRecord:
        """Search for a plan of `settings.horizon` steps, and compare where it ends."""
        motion, horizon, state = self._motion, settings.horizon, self._states[self._now]
        noise = rng.standard_normal((settings.num_rounds, horizon, settings.num_samples, len(motion.names)))
        recorded = self._actions[self._now : self._now + horizon]
        goal, other_goal = (h[self._now + horizon] for h in (self._h, self._other_h))
        began = time.perf_counter()
        found = self._search(goal, settings, noise)
        seconds = time.perf_counter() - began
        drawn = np.clip(
            rng.standard_normal((num_random, horizon, len(motion.names))) * motion.first_std,
            -motion.limit,
            motion.limit,
        )
        end = self._follow(recorded)
        ends = {
            PLAN: found.states[-1],
            ZERO: self._follow(motion.actions(np.zeros((horizon, len(motion.names))), self._base)),
            RANDOM: np.stack([self._follow(motion.actions(moves, self._base)) for moves in drawn]),
            OTHER_GOAL: self._search(other_goal, settings, noise).states[-1],
        }
        return PlanRecord(
            episode=self.episode,
            first_step=self.first_step,
            horizon=horizon,
            distances={
                kind: {name: float(np.mean(value)) for name, value in self._rule.distances(reached, end).items()}
                for kind, reached in ends.items()
            },
            moved={name: float(value) for name, value in self._rule.distances(state, end).items()},
            planned=found.actions[:, motion.columns].sum(axis=0),
            recorded=recorded[:, motion.columns].sum(axis=0),
            energies=found.energies.min(axis=1),
            energy_recorded=float(self._rollout().energies(recorded[None], goal, 1)[0]),
            seconds=seconds,
        )

    def _search(self, goal: Tensor, settings: PlannerSettings, noise: np.ndarray) -> Plan:
        evaluation = self._evaluation
        return plan_actions(
            evaluation.model,
            self._context,
            goal,
            self._motion,
            settings,
            scale_actions=evaluation.scaler.actions.apply,
            scale_states=evaluation.scaler.states.apply,
            base_action=self._base,
            noise=noise,
            batch_size=evaluation.config.evaluate.batch_size,
        )

    def _rollout(self) -> Rollout:
        evaluation = self._evaluation
        scale = evaluation.scaler.actions.apply, evaluation.scaler.states.apply
        return Rollout(evaluation.model, self._context, self._motion, *scale)

    def _follow(self, actions: np.ndarray) -> np.ndarray:
        return follow_actions(self._states[self._now], actions, self._motion)[-1]


def _summarize_timing(records: Sequence[PlanRecord], settings: PlannerSettings, horizons: Sequence[int]) -> Timing:
    per_plan = settings.num_samples * settings.num_rounds
    return Timing(
        {h: float(np.mean([record.seconds for record in records if record.horizon == h])) for h in horizons},
        per_plan * len(records) / sum(record.seconds for record in records),
    )


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
