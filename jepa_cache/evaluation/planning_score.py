"""An offline score of plans, without a robot or a game: from a recorded step to a later one, where do planned actions end?

For every start the goal is a later recorded step. Where the planned actions lead is compared with where the recorded ones led, and so
are no movement, random movements, and what the same search finds when it is given a goal of another held-out episode. Letters besides the project's: C context steps, K searched numbers an action.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import PlanConfig
from jepa_cache.data.ablations import choose_donors
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.windows import WindowIndex, first_cached_rows, spread_windows
from jepa_cache.evaluation.motion import POSE_SPACES, Motion, build_motion, end_distances
from jepa_cache.evaluation.planner import (
    MAX_STEP_M,
    SETTINGS,
    Context,
    Plan,
    PlannerSettings,
    Rollout,
    follow_actions,
    plan_actions,
)
from jepa_cache.evaluation.subject import Subject
from jepa_cache.predictor.rollout import as_reps, open_loop

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
        speed_up: Plain loop / shared context and batches, on the same samples in turn; NaN where nothing was timed.
        largest_difference: Between the energies of both ways.
    """

    seconds_per_plan: dict[int, float]
    samples_per_s: float
    speed_up: float
    largest_difference: float


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
def score_plans(subject: Subject) -> PlanningScore:
    """Plan from starts spread over the held-out episodes to the recorded steps 1, 2, ... later, as `config.plan` says.

    Columns that are not searched stay as in the action before the start (keys, slot), or 0 in spaces of poses.

    Raises:
        ValueError: The action space says nothing of where an action leads, no held-out segment is long enough, or one episode alone.
    """
    torch.set_num_threads(default_num_threads())
    config, dataset = subject.config.plan, subject.dataset
    settings = choose_settings(config)
    motion = build_motion(
        dataset.space,
        max_step_m=config.max_step_m or MAX_STEP_M[config.settings],
        max_rotation_rad=config.max_rotation_rad,
        max_turn_deg=config.max_turn_deg,
    )
    index = WindowIndex(subject.held_out_segments(), config.num_context_steps + max(config.horizons))
    loader = WindowLoader(dataset, index, subject.scaler)
    numbers = spread_windows(index, config.starts_per_episode)
    donors = choose_donors([index.segments[index[number].segment].episode for number in numbers], seed=config.seed)
    first_rows = first_cached_rows(dataset.segments)
    records, timed = [], []
    with tqdm(total=len(numbers) * len(config.horizons), desc="planning", unit="plan", dynamic_ncols=True) as bar:
        for position, number in enumerate(numbers):
            pair = to_device(loader.read([number, numbers[donors[position]]]), subject.device)
            h, other = as_reps(pair.tokens, subject.normalize_reps)
            start = _Start(subject, motion, index, number, (h, other), config.num_context_steps, first_rows)
            for horizon in config.horizons:
                rng = np.random.default_rng([config.seed, position, horizon])
                records.append(start.plan(replace(settings, horizon=horizon), config.num_random, rng))
                bar.update()
            if position < config.num_timed:
                timed.append(start.compare_loops(replace(settings, horizon=max(config.horizons)), config.seed))
    return PlanningScore(
        records,
        tuple(records[0].moved),
        motion.names,
        _summarize_timing(records, settings, config.horizons, timed),
    )


class _Start:
    """One start of plans: the recorded steps before it, and those after it as goals, as are those of a window of another episode."""

    def __init__(
        self,
        subject: Subject,
        motion: Motion,
        index: WindowIndex,
        number: int,
        reps: tuple[Tensor, Tensor],
        num_context: int,
        first_rows: Mapping[tuple[int, str], int],
    ) -> None:
        window = index[number]
        segment = index.segments[window.segment]
        actions, states = subject.dataset.controls(window.store)
        rows = slice(window.start, window.start + index.num_steps)
        self._actions, self._states = (values[rows].astype(np.float64) for values in (actions, states))
        self._subject, self._motion, self._now = subject, motion, num_context - 1
        self._h, self._other_h = reps
        self._space = subject.dataset.space.name
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
        subject = self._subject
        return plan_actions(
            subject.predictor,
            self._context,
            goal,
            self._motion,
            settings,
            scale_actions=subject.scaler.actions.apply,
            scale_states=subject.scaler.states.apply,
            base_action=self._base,
            normalize_reps=subject.normalize_reps,
            noise=noise,
            batch_size=subject.config.evaluate.batch_size,
        )

    def compare_loops(self, settings: PlannerSettings, seed: int) -> tuple[float, float, float]:
        """Seconds of one round by the plain loop and by ours on the same samples, and the largest difference of their energies."""
        motion, horizon = self._motion, settings.horizon
        noise = np.random.default_rng(seed).standard_normal((settings.num_samples, horizon, len(motion.names)))
        samples = motion.actions(np.clip(noise * motion.first_std, -motion.limit, motion.limit), self._base)
        goal = self._h[self._now + horizon]
        began = time.perf_counter()
        plain = np.array([self._plain_energy(actions, goal) for actions in samples])
        between = time.perf_counter()
        ours = self._rollout().energies(samples, goal, self._subject.config.evaluate.batch_size)
        return between - began, time.perf_counter() - between, float(np.abs(plain - ours).max())

    def _plain_energy(self, actions: np.ndarray, goal: Tensor) -> float:
        """One sample alone, its context computed anew."""
        subject, context = self._subject, self._context
        states = np.concatenate([context.states, follow_actions(context.states[-1], actions, self._motion)[1:-1]])
        given = np.concatenate([context.actions, actions])
        scaled = (subject.scaler.actions.apply(given), subject.scaler.states.apply(states))
        actions_t, states_t = (torch.from_numpy(values)[None].to(subject.device) for values in scaled)
        rolled = open_loop(
            subject.predictor,
            context.tokens[None],
            actions_t,
            states_t,
            len(actions),
            normalize_reps=subject.normalize_reps,
        )
        return float((rolled[0, -1] - goal).abs().mean())

    def _rollout(self) -> Rollout:
        subject = self._subject
        scale = subject.scaler.actions.apply, subject.scaler.states.apply
        return Rollout(subject.predictor, self._context, self._motion, *scale, subject.normalize_reps)

    def _follow(self, actions: np.ndarray) -> np.ndarray:
        return follow_actions(self._states[self._now], actions, self._motion)[-1]


def _summarize_timing(
    records: Sequence[PlanRecord], settings: PlannerSettings, horizons: Sequence[int], timed: Sequence[tuple[Any, ...]]
) -> Timing:
    per_plan = settings.num_samples * settings.num_rounds
    plain, ours, differences = np.array(timed).reshape(-1, 3).T
    return Timing(
        {h: float(np.mean([record.seconds for record in records if record.horizon == h])) for h in horizons},
        per_plan * len(records) / sum(record.seconds for record in records),
        float(plain.sum() / ours.sum()) if len(plain) else float("nan"),
        float(differences.max()) if len(differences) else 0.0,
    )
