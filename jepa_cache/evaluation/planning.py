"""An offline score of plans, without a robot or a game: from a recorded step to a later one, where do planned actions end?

For every start the goal is a later recorded step. Where the planned actions lead is compared with where the recorded ones led, and so
are no movement, random movements, and what the same search finds when it is given a goal of another held-out episode. In spaces of
vectors, where only a fit to the recordings says where an action leads, the actions themselves are compared first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.actions import ActionSpace
from jepa_cache.config.paths import default_num_threads
from jepa_cache.config.schema import Config, SearchConfig
from jepa_cache.control.costs import SIMPLE_COSTS, Cost, choose_cost, load_costs
from jepa_cache.control.motion import LIMITS, Motion, build_motion
from jepa_cache.control.planner import (
    JUMP,
    SETTINGS,
    Context,
    Plan,
    PlannerSettings,
    Rollout,
    follow_actions,
    plan_actions,
    warn_of_reach,
)
from jepa_cache.data.ablations import choose_donors
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.recorded import Recorded, find_recorded
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext, choose_windows, open_evaluation
from jepa_cache.evaluation.metrics import bootstrap_mean, episode_means, paired_p_value, write_json, write_table
from jepa_cache.evaluation.pictures import new_figure, save_figure
from jepa_cache.evaluation.verdict import NO, SIGNIFICANCE, UNCLEAR, YES, list_limits
from jepa_cache.files import replaced_files
from jepa_cache.predictor.checkpoints import read_card

ACTION_SCORE_PER_M, ACTION_SCORE_END_M = 800.0, 0.1
PLAN, RANDOM, ZERO, OTHER_GOAL = "plan", "random", "zero", "other_goal"
MOVED, RECORDED_END = "moved", "recorded"
ACTION = "action"  # distance of actions, composed over all steps, in halves of the recorded range of one step: root mean square of columns
CONTEXT_STEPS = 3  # true steps before a plan, where nothing else is said; 1 where one displacement is planned
# Ends that are compared, with their colours; those of the plan first.
KINDS = {
    PLAN: ("plan", "#1f77b4"),
    RANDOM: ("random movements", "#d62728"),
    ZERO: ("not moving", "#7f7f7f"),
    OTHER_GOAL: ("the same search for another episode's goal", "#ff7f0e"),
}


class Score(NamedTuple):
    """All plans of an evaluation, one per start and horizon.

    The table is that of plans.csv: `episode`, `camera`, `phase`, `first_step` (of the plan, counted from the first cached one of the episode), `horizon`;
    `<distance>_<kind>` between the end of each kind of plan and of the recorded actions (of random plans the mean), and
    `<distance>_moved` of the recorded ones from the start; in spaces of vectors the end is the recorded state, and `<distance>_recorded`
    is where the recorded actions lead by the fit; `planned_<number>` and `recorded_<number>`, sums over the steps;
    `energy_plan` and `energy_recorded`.
    """

    table: dict[str, np.ndarray]  # column to [plans]
    energies: np.ndarray  # [plans, rounds] lowest of each round
    seconds: np.ndarray  # [plans] that each search took
    distances: tuple[str, ...]  # names, the chief one first
    searched: tuple[str, ...]  # names of the numbers of an action that are searched


def choose_settings(config: SearchConfig) -> PlannerSettings:
    """The published settings that a configuration names, with what it says otherwise; elites keep their share."""
    published = SETTINGS[config.settings]
    num_samples = config.num_samples or published.num_samples
    return replace(
        published,
        num_samples=num_samples,
        num_elites=max(2, round(published.num_elites * num_samples / published.num_samples)),
        num_rounds=config.num_rounds or published.num_rounds,
        max_step_m=config.max_step_m or published.max_step_m,
        reach=config.reach or published.reach,
    )


@torch.no_grad()
def score_plans(
    evaluation: EvaluationContext, *, recorded: Recorded | None = None, costs: Mapping[str, Cost] = SIMPLE_COSTS
) -> Score:
    """Plan from starts spread over the held-out episodes to the recorded steps 1, 2, ... later, as `config.plan` says.

    Columns that are not searched stay as in the action before the start (keys, slot, commands), or as `Motion.still` has them. Settings
    `jump` plan one action that spans all steps to the goal. `recorded` and `costs` are those of the weights.
    """
    torch.set_num_threads(default_num_threads())
    config, dataset = evaluation.config.plan, evaluation.dataset
    search = choose_settings(config)
    motion = build_motion(
        dataset.space,
        max_step_m=config.max_step_m,
        max_rotation_rad=config.max_rotation_rad,
        max_turn_deg=None
        if config.max_turn_deg == LIMITS["max_turn_deg"]
        else config.max_turn_deg,  # params.yaml always has one
        reach=config.reach,
        defaults=search.limits,
        recorded=recorded,
    )
    cost, jumps = choose_cost(costs, config.cost, config.cost_steps), config.settings == JUMP
    if jumps:  # refused here where actions of several steps are not one
        dataset.space.compose(np.zeros((1, len(dataset.space.actions))))
    num_context = config.num_context_steps or (1 if jumps else CONTEXT_STEPS)
    now = max(num_context - 1, int(dataset.space.motion.holds))  # what holds is in the action before
    num_steps = now + 1 + max(config.horizons)
    index, numbers = chosen = choose_windows(evaluation.held_out_segments(), num_steps, config.starts_per_episode)
    donors = choose_donors(chosen.episodes, seed=config.seed)
    first_rows = first_cached_rows(dataset.segments)
    rows, searches = [], []
    with tqdm(total=len(numbers) * len(config.horizons), desc="planning", unit="plan", dynamic_ncols=True) as bar:
        for position, (window, segment) in enumerate(zip(chosen.windows, chosen.segments, strict=True)):
            _, (h, other_h) = evaluation.read_windows(index, [numbers[position], numbers[donors[position]]])
            own = slice(window.start, window.start + num_steps)
            actions, states = (values[own].astype(np.float64) for values in dataset.controls(window.store))
            seen = slice(now + 1 - num_context, now + 1)
            context = Context(h[seen], actions[seen.start : now], states[seen])
            base = actions[now - 1] if dataset.space.motion.holds else motion.still
            part = dataset.manifest.stores[window.store][0]
            first_step = window.start - first_rows[segment.store, segment.episode] + now
            for horizon in config.horizons:
                settings = replace(search, horizon=1 if jumps else horizon)
                rng = np.random.default_rng([config.seed, position, horizon])
                goals = h[now + horizon], other_h[now + horizon]
                done = actions[now : now + horizon], states[now + horizon]
                where = {"episode": segment.episode, "camera": part.camera or "", "phase": str(part.phase)}
                row, *searched = _plan_once(evaluation, motion, settings, cost, context, base, goals, done, rng)
                rows.append({**where, "first_step": first_step, "horizon": horizon, **row})
                searches.append(searched)
                bar.update()
    names = tuple(dataset.space.motion.distances(states[0], states[0]))
    names = names if dataset.space.motion.integrate else (ACTION, *names)
    energies, seconds = (np.array(values) for values in zip(*searches, strict=True))
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Score(table, energies, seconds, names, motion.names)


def _plan_once(
    evaluation: EvaluationContext,
    motion: Motion,
    settings: PlannerSettings,
    cost: Cost,
    context: Context,
    base: np.ndarray,
    goals: tuple[Tensor, Tensor],
    done: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> tuple[dict[str, float], np.ndarray, float]:
    """Search for a plan to the first goal: columns of plans.csv, the lowest energy of each round, and the seconds of the search.

    `done` is what was recorded from the start to the goal: actions [h, A], and the state [S] at the goal.
    """
    space, num_searched, now = evaluation.dataset.space, len(motion.names), context.states[-1]
    recorded, end = done
    noise = rng.standard_normal((settings.num_rounds, settings.horizon, settings.num_samples, num_searched))
    batch_size = evaluation.config.evaluate.batch_size

    def search(goal: Tensor) -> Plan:
        options = {"base_action": base, "noise": noise, "batch_size": batch_size, "cost": cost}
        return plan_actions(evaluation.model, context, goal, motion, settings, scaler=evaluation.scaler, **options)

    began = time.perf_counter()
    found = search(goals[0])
    seconds = time.perf_counter() - began
    drawn = rng.standard_normal((evaluation.config.plan.num_random, settings.horizon, num_searched))
    drawn = np.clip(motion.middle + drawn * motion.first_std * settings.first_std, motion.low, motion.high)
    nothing = np.zeros(num_searched) if motion.adds else base[motion.columns]  # the last command holds
    plans = {
        PLAN: found.actions[None],
        RANDOM: motion.actions(drawn, base),
        ZERO: motion.actions(np.tile(nothing, (1, settings.horizon, 1)), base),
        OTHER_GOAL: search(goals[1]).actions[None],
    }
    if space.motion.integrate is not None:
        end = follow_actions(now, recorded, motion)[-1]
    else:
        plans[RECORDED_END] = recorded[None]
    distances = {kind: _distances(space, motion, now, plan, (recorded, end)) for kind, plan in plans.items()}
    distances[MOVED] = distances[ZERO] | space.motion.distances(now, end)
    row = {f"{name}_{kind}": float(np.mean(distances[kind][name])) for name in distances[PLAN] for kind in distances}
    for what, actions in (("planned", found.actions), ("recorded", recorded)):
        sums = actions[:, motion.columns].sum(axis=0).tolist()
        row |= {f"{what}_{name}": total for name, total in zip(motion.names, sums, strict=True)}
    lowest = found.energies.min(axis=1)
    if len(recorded) > settings.horizon:
        recorded = space.compose(recorded)[None]
    rollout = Rollout(evaluation.model, context, motion.integrate, scaler=evaluation.scaler)
    of_recorded = rollout.energies(recorded[None], goals[0], cost)
    return row | {"energy_plan": float(lowest[-1]), "energy_recorded": float(of_recorded[0])}, lowest, seconds


def _distances(
    space: ActionSpace, motion: Motion, now: np.ndarray, plans: np.ndarray, done: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """Distances [n] of the ends of plans [n, H, A] from a state [S]; `done` are the recorded actions [h, A] and the end [S]."""
    recorded, end = done
    ends = np.stack([follow_actions(now, plan, motion)[-1] for plan in plans])
    distances = space.motion.distances(ends, end)
    if space.motion.integrate is not None:
        return distances
    apart = (space.compose(plans) - space.compose(recorded))[:, motion.columns]
    share = 2 * apart / (motion.step_high - motion.step_low)
    return {ACTION: np.sqrt(np.mean(share**2, axis=1)), **distances}


def plan_run(config: Config, dataset: CachedDataset, weights: Path, out: Path) -> dict[str, Any]:
    """Score the plans of trained weights on the held-out episodes and write what was found to `out`.

    Raises:
        ValueError: The weights do not fit, the space says nothing of where an action leads, or too few episodes are held out.
    """
    evaluation, card = open_evaluation(config, dataset, weights), read_card(weights)
    settings = choose_settings(config.plan)
    warn_of_reach(settings.reach, card)
    recorded = find_recorded(card)
    costs = load_costs(weights, card, evaluation.model.predictor, evaluation.device)
    score = score_plans(evaluation, recorded=recorded, costs=costs)
    metrics = summarize_plans(score, config) | {
        "run": card["run"],
        "cost": config.plan.cost,
        "searched": list(score.searched),
        "change_r2": dict(zip((column.name for column in dataset.space.states), recorded.change_r2, strict=True))
        if recorded and recorded.change_r2
        else {},
        "encoder_trained": dataset.manifest.encoder_trained,
        "comparable": dataset.manifest.comparable,
        "mode": dataset.manifest.mode,
    }
    metrics["verdict"] = judge_plans(metrics, score)
    num_sampled, horizons = settings.num_samples * settings.num_rounds * len(score.seconds), score.table["horizon"]
    took = {f"h{horizon}": float(score.seconds[horizons == horizon].mean()) for horizon in np.unique(horizons)}
    timing = {"seconds_per_plan": took, "samples_per_s": num_sampled / float(score.seconds.sum())}
    with replaced_files(out, "metrics.json") as folder:
        write_json(metrics, folder / "metrics.json")
        write_json(timing, folder / "timing.json")  # beside the metrics, so that equal runs leave equal metrics
        rows = zip(*(values.tolist() for values in score.table.values()), strict=True)
        write_table([dict(zip(score.table, row, strict=True)) for row in rows], folder / "plans.csv")
        draw_plans(score, metrics, folder / "plans.png", note=evaluation.features)
    return metrics | {"timing": timing}


def summarize_plans(score: Score, config: Config) -> dict[str, Any]:
    """Means over episodes, their 95 % intervals and the gaps' p values, by distance, kind and horizon; a gap above 0: plans end nearer."""
    resampling = {"num_resamples": config.evaluate.num_bootstrap, "seed": config.evaluate.seed}
    table, metrics = score.table, {"val": {}, "val_ci": {}, "p_value": {}}
    gaps = {
        f"{name}_gap_{kind}": table[f"{name}_{kind}"] - table[f"{name}_{PLAN}"]
        for name in score.distances
        for kind in (ZERO, RANDOM, OTHER_GOAL)
    }
    ends = [f"{name}_{kind}" for name in score.distances for kind in (*KINDS, MOVED, RECORDED_END)]
    ends = [name for name in ends if name in table]
    values = (
        {name: table[name] for name in (*ends, "energy_plan", "energy_recorded")} | gaps | score_translations(table)
    )
    for horizon in np.unique(table["horizon"]):
        chosen = table["horizon"] == horizon
        for name, of_plans in values.items():
            means, key = episode_means(of_plans[chosen], table["episode"][chosen]), f"{name}_h{horizon}"
            metrics["val"][key], *metrics["val_ci"][key] = bootstrap_mean(means, **resampling)
            if name in gaps:
                metrics["p_value"][key] = paired_p_value(means, seed=config.evaluate.seed)
    return {"num_episodes": len(set(table["episode"])), "num_plans": len(score.seconds), **metrics}


def score_translations(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of plans [n] in spaces of poses: `action_l1_m`, mean over x, y, z of |planned - recorded| summed over the steps, and `action_score`.

    Source: 800 * (0.1 - d), the offline score of jepa-wms on DROID (arXiv 2512.24497). Whether its d is the mean or the sum over the axes
    is not said there; ours is the mean.
    """
    axes = ("dx", "dy", "dz")
    if not all(f"planned_{axis}" in table for axis in axes):
        return {}
    distance = np.mean([np.abs(table[f"planned_{axis}"] - table[f"recorded_{axis}"]) for axis in axes], axis=0)
    return {"action_l1_m": distance, "action_score": ACTION_SCORE_PER_M * (ACTION_SCORE_END_M - distance)}


def judge_plans(metrics: Mapping[str, Any], score: Score) -> dict[str, dict[str, str]]:
    """For each baseline whether plans end nearer to where the recorded actions led, at every horizon, in one word and in words.

    "yes" needs at every horizon an interval of the gap above 0 and a sign-flip test below 0.05, which takes six episodes; "no" an
    interval below 0; all else is "unclear". It is said of the chief distance alone.
    """
    name, verdict = score.distances[0], {}
    for kind in (ZERO, RANDOM, OTHER_GOAL):
        answers, said = [], []
        for horizon in np.unique(score.table["horizon"]):
            key, val = f"{name}_gap_{kind}_h{horizon}", metrics["val"]
            (low, high), p = metrics["val_ci"][key], metrics["p_value"][key]
            answers.append(YES if low > 0 and p < SIGNIFICANCE else NO if high < 0 else UNCLEAR)
            said.append(
                f"{horizon} step{'s' if horizon > 1 else ''}: {answers[-1]}, {val[f'{name}_{PLAN}_h{horizon}']:.3g} "
                f"against {val[f'{name}_{kind}_h{horizon}']:.3g}, gap {val[key]:.3g} [{low:.3g}, {high:.3g}], p {p:.2g}"
            )
        answer = answers[0] if len(set(answers)) == 1 else UNCLEAR
        words = f"{name}, plans end nearer than {KINDS[kind][0]}: {'; '.join(said)}"
        verdict[kind] = {"answer": answer, "words": words}
    return verdict


def describe_plans(metrics: Mapping[str, Any]) -> str:
    """The verdict and the times in a few lines."""
    timing, lines = metrics["timing"], [f"  {judged['words']}" for judged in metrics["verdict"].values()]
    if metrics["change_r2"]:  # a space that does not say how states follow actions
        told = ", ".join(f"{name} {r2:.2f}" for name, r2 in metrics["change_r2"].items())
        lines.append(
            f"  states follow actions by a linear fit to the training episodes; R2 of their change in one step: {told}"
        )
    seconds = ", ".join(f"{key[1:]} steps {value:.2f} s" for key, value in timing["seconds_per_plan"].items())
    return "\n".join(
        [
            f"{metrics['num_plans']} plans in {metrics['num_episodes']} held-out episodes, 95 % intervals over episodes",
            *lines,
            f"  a plan takes: {seconds}; {timing['samples_per_s']:.0f} samples/s",
            *(f"  {limit}" for limit in list_limits(metrics)),
        ]
    )


def draw_plans(score: Score, metrics: Mapping[str, Any], path: Path, *, note: str) -> None:
    """Draw distances by horizon with 95 % intervals, planned against recorded movement, and energy against round."""
    figure = new_figure(13.5, 4.4)
    distance, moves, search = figure.subplots(1, 3)
    table, name = score.table, score.distances[0]
    horizons = np.unique(table["horizon"])
    for shift, (kind, (label, colour)) in zip((-0.12, -0.04, 0.04, 0.12), KINDS.items(), strict=True):
        keys = [f"{name}_{kind}_h{horizon}" for horizon in horizons]
        mean, ends = (np.array([metrics[part][key] for key in keys]) for part in ("val", "val_ci"))
        reach = np.abs(ends.T - mean)
        distance.errorbar(horizons + shift, mean, yerr=reach, fmt="o", capsize=3, color=colour, label=label)
    distance.set(
        xlabel="steps to the goal", ylabel=f"{name} from where the recorded actions led", title="where plans end"
    )
    distance.set_xticks(horizons)
    distance.set_ylim(bottom=0)
    for searched in score.searched:
        moves.scatter(table[f"recorded_{searched}"], table[f"planned_{searched}"], s=14, alpha=0.6, label=searched)
    moves.axline((0, 0), slope=1, color="#7f7f7f", linewidth=0.8)
    moves.set(xlabel="recorded, summed over the steps", ylabel="planned", title="planned against recorded movement")
    rounds = range(1, score.energies.shape[1] + 1)
    for horizon in horizons:
        chosen, label = table["horizon"] == horizon, f"{horizon} step{'s' if horizon > 1 else ''}"
        (line,) = search.plot(rounds, score.energies[chosen].mean(axis=0), marker="o", label=label)
        recorded = table["energy_recorded"][chosen].mean()
        search.axhline(recorded, color=line.get_color(), linestyle=":", linewidth=1)
    search.set(xlabel="round of the search", ylabel="lowest energy", title="search (dotted: the recorded actions)")
    search.set_xticks(rounds)
    for axes in (distance, moves, search):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"Plans to recorded goal frames ({note})", fontsize=11)
    save_figure(figure, path)
