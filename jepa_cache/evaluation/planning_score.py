"""An offline score of plans, without a robot or a game: from a recorded step to a later one, where do planned actions end?

For every start the goal is a later recorded step. Where the planned actions lead is compared with where the recorded ones led, and so
are no movement, random movements, and what the same search finds when it is given a goal of another held-out episode. Letters besides the project's: C context steps, K searched numbers an action.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import PlanConfig
from jepa_cache.control.motion import POSE_SPACES, Motion, build_motion, end_distances
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
from jepa_cache.data.windows import WindowIndex, first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext, choose_windows

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
        self._space = evaluation.dataset.space.name
        self.episode, self.first_step = (
            segment.episode,
            window.start - first_rows[segment.store, segment.episode] + self._now,
        )
        self._context = Context(self._h[:num_context], self._actions[: self._now], self._states[:num_context])
        self._base = np.zeros(self._actions.shape[1])
        if self._space not in POSE_SPACES and self._now:
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
                kind: {name: float(np.mean(value)) for name, value in end_distances(self._space, reached, end).items()}
                for kind, reached in ends.items()
            },
            moved={name: float(value) for name, value in end_distances(self._space, state, end).items()},
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
