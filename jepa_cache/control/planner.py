"""Planning to a goal frame by the cross-entropy method: sample actions, roll them out, keep the best, sample around them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from jepa_cache.control.costs import SUM, TOKENS, Cost
from jepa_cache.control.motion import Motion
from jepa_cache.data.scaler import Scaler
from jepa_cache.predictor.compressed import CompressedPredictor
from jepa_cache.predictor.rollout import LatentModel, repeat_past

log = logging.getLogger(__name__)

Integrate = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class PlannerSettings:
    """How a plan is searched for; `SETTINGS` holds the published ones."""

    horizon: int  # steps of the plan
    num_samples: int  # a round
    num_elites: int  # of them, the best
    num_rounds: int
    mean_momentum: float  # share of the old mean in the new one
    std_momentum: float
    gripper_mean_momentum: float = 0.15
    gripper_std_momentum: float = 0.15
    # Step of the plan from which the gripper closes (action 1); from the horizon on: never.
    close_gripper_from: int | None = None
    # Shares of the first deviation (`Motion.first_std`): what the first round has, and what none goes below.
    first_std: float = 1.0
    min_std: float = 0.0
    # Whether each round tries the mean and the best sample so far as well, and the best of all is the result: a mean may leave its basin.
    keeps_best: bool = False
    spread_first: float = 0.0  # share of the first round's samples that is drawn evenly over all that is searched
    # Of `build_motion`: the largest translation of a step, and the steps that one planned action may span.
    max_step_m: float = 0.05
    reach: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.num_elites <= self.num_samples or self.horizon < 1 or self.num_rounds < 1:
            raise ValueError(
                "a plan needs a horizon and rounds of at least 1, and 2 to num_samples elites; got "
                f"horizon {self.horizon}, {self.num_rounds} rounds, {self.num_elites} elites of {self.num_samples} samples"
            )
        for name, value in vars(self).items():
            if name.endswith("momentum") and not 0 <= value < 1:
                raise ValueError(f"{name} is the share of the old value that stays, from 0 to below 1; got {value}")
        if not 0 <= self.min_std <= self.first_std < np.inf or self.first_std == 0:
            raise ValueError(
                f"min_std lies from 0 to first_std, which is above 0; got {self.min_std} and {self.first_std}"
            )
        if self.close_gripper_from is not None and self.close_gripper_from < 0:
            raise ValueError(
                f"close_gripper_from counts steps of the plan from 0; got {self.close_gripper_from}. Use None to leave the gripper to the search"
            )

    @property
    def limits(self) -> dict[str, float]:
        """The `defaults` of `motion.build_motion`."""
        return {"max_step_m": self.max_step_m, "reach": self.reach}


JUMP = "jump"
SETTINGS = {
    "cem": PlannerSettings(1, 100, 10, 100, 0.25, 0.95),
    "world_model": PlannerSettings(2, 400, 10, 10, 0.15, 0.15),
    "notebook": PlannerSettings(2, 25, 10, 2, 0.15, 0.75, max_step_m=0.075),
    # The paper does not give the number of elites and the momenta of its robot runs: those of `world_model`.
    "paper": PlannerSettings(1, 800, 10, 10, 0.15, 0.15, max_step_m=0.075),
    # Ours, for predictors that were trained on mixed step lengths: one displacement, larger than what is carried out, and replanned.
    JUMP: PlannerSettings(
        1,
        128,
        13,
        8,
        mean_momentum=0.0,
        std_momentum=0.0,
        gripper_mean_momentum=0.0,
        gripper_std_momentum=0.0,
        first_std=0.4,
        min_std=0.02,
        keeps_best=True,
        spread_first=0.5,
        max_step_m=0.06,
        reach=4.0,
    ),
}
"""Settings by name, published ones but for `jump`."""


def warn_of_reach(reach: float, card: Mapping[str, Any]) -> None:
    """Say where one planned action may span steps of a predictor whose card says that it never saw several at once."""
    longest = max(card.get("description", {}).get("train", {}).get("step_lengths", [1]))
    if reach > 1 and longest == 1:
        log.warning(
            "one planned action may span %g steps, but this predictor was trained on single steps only: train with train.preset=jump (or "
            "train.step_lengths), or plan with a reach of 1",
            reach,
        )


class Plan(NamedTuple):
    """What a search found.

    Actions stay within what each state allows (a gripper that is open opens no further, pitch ends at 90 degrees).
    """

    actions: np.ndarray  # [H, A] float64, unscaled; the first one is to be carried out
    states: np.ndarray  # [H+1, S] float64, the current state and where the actions lead
    energies: np.ndarray  # [rounds, samples] float32; lower is nearer to the goal
    found: np.ndarray  # [H, A] float64, what the search ended with, as the published planner returns it
    searched: np.ndarray  # [H, K] float64, the numbers of `Motion` that it ended with, to begin the next search from


class Context(NamedTuple):
    """What is known when a plan is made; `Rollout` takes several at once, with their axes in front."""

    tokens: Tensor  # [C, N, E] of the steps so far, layer-normed where the predictor was trained so
    actions: np.ndarray  # [C-1, A] between them, unscaled
    states: np.ndarray  # [C, S], unscaled


@torch.no_grad()
def plan_actions(
    model: LatentModel,
    context: Context,
    goal: Tensor,
    motion: Motion,
    settings: PlannerSettings,
    *,
    scaler: Scaler | None = None,
    cost: Cost = TOKENS,
    base_action: np.ndarray | None = None,
    start: np.ndarray | None = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    batch_size: int | None = None,
) -> Plan:
    """Search for the actions after which the predictor sees the goal frame.

    The energy of a sample is its `cost`: by default the mean absolute difference between the tokens of the LAST predicted step and the
    goal's. Each round samples around a mean, and mean and deviation move towards those of the best samples. Samples are rolled out as one
    batch; the steps before the last one of the context are computed once for all of them.

    Args:
        model: Its predictor in eval mode.
        context: The steps so far, at least one.
        goal: [N, E] tokens of the goal frame, as the context's.
        motion: What may move.
        settings: Of the search.
        scaler: Of the training; None for a predictor of unscaled actions and states.
        cost: How far predicted steps are from the goal.
        base_action: [A] for the columns that are not searched; by default zeros, of vectors what was recorded (`Motion.still`).
        start: [H, K] numbers around which the first samples are drawn; by default the middle of their limits, which is 0 for changes.
        seed: Of the samples.
        noise: [rounds, H, samples, K] standard normal draws in place of the seed's.
        batch_size: Samples in one pass of the predictor; see `Rollout.energies`.

    Source: V-JEPA 2-AC, arXiv 2506.09985, and the planner published with it.
    """
    num_searched, horizon = len(motion.names), settings.horizon
    shape = (settings.num_rounds, horizon, settings.num_samples, num_searched)
    if noise is None:
        noise = np.random.default_rng(seed).standard_normal(shape)
    if noise.shape != shape:
        raise ValueError(
            f"noise must be [rounds, horizon, samples, searched columns] = {list(shape)}; got {list(noise.shape)}"
        )
    tokens, taken, states = context
    fits = tokens.ndim == 3 and states.ndim == taken.ndim == 2 and len(tokens) == len(states) == len(taken) + 1
    if not fits or goal.shape != tokens.shape[1:]:
        raise ValueError(
            "a context of C >= 1 steps is tokens [C, N, E], states [C, S] and actions [C-1, A], and its goal is the tokens [N, E] of one "
            f"step by the same encoder and pooling; got tokens {list(tokens.shape)}, states {list(states.shape)}, actions "
            f"{list(taken.shape)} and a goal {list(goal.shape)}"
        )
    if settings.close_gripper_from is not None and not motion.gripper.any():
        raise ValueError(
            f"close_gripper_from is {settings.close_gripper_from}, but no gripper is searched ({', '.join(motion.names)}); set it to None, or "
            "leave the gripper's column out of `fixed`"
        )
    base_action = motion.still if base_action is None else base_action
    mean = np.tile(motion.middle, (horizon, 1)) if start is None else np.asarray(start, np.float64)
    if mean.shape != (horizon, num_searched):
        raise ValueError(
            f"start must be [{horizon}, {num_searched}] (horizon, searched columns); got {list(mean.shape)}"
        )
    std = np.tile(motion.first_std * settings.first_std, (horizon, 1))
    keep_mean = np.where(motion.gripper, settings.gripper_mean_momentum, settings.mean_momentum)
    keep_std = np.where(motion.gripper, settings.gripper_std_momentum, settings.std_momentum)
    rollout = Rollout(model, context, motion.integrate, scaler=scaler)
    energies = np.empty((settings.num_rounds, settings.num_samples), np.float32)
    low, high = motion.find_limits(context.states[-1]) if horizon == 1 else (motion.low, motion.high)
    mean = np.clip(mean, low, high)
    best_sample, least = mean, np.inf
    for number in range(settings.num_rounds):
        samples = np.clip(noise[number] * std[:, None] + mean[:, None], low, high)
        if number == 0 and (num_spread := round(settings.spread_first * settings.num_samples)):
            samples[:, -num_spread:] = low + (high - low) * ndtr(noise[0, :, -num_spread:])
        if settings.keeps_best:
            samples[:, 0], samples[:, 1] = mean, best_sample
        if settings.close_gripper_from is not None:
            samples[settings.close_gripper_from :, :, motion.gripper] = 1.0
        actions = motion.actions(samples.swapaxes(0, 1), base_action)  # [samples, H, A]
        energies[number] = rollout.energies(actions, goal, cost, batch_size)
        if not np.isfinite(energies[number]).all():
            raise ValueError(
                f"round {number} has {int((~np.isfinite(energies[number])).sum())} energies of {settings.num_samples} that are not finite, so "
                "nothing can be ranked; look for NaN in the goal, the context and the predictor's weights, or for a scaler of other actions"
            )
        best = np.argsort(energies[number], kind="stable")[: settings.num_elites]
        elite = samples[:, best]
        if energies[number, best[0]] < least:
            best_sample, least = elite[:, 0].copy(), energies[number, best[0]]
        mean = (1 - keep_mean) * elite.mean(axis=1) + keep_mean * mean
        std = (1 - keep_std) * elite.std(axis=1, ddof=1) + keep_std * std
        std = np.maximum(std, settings.min_std * motion.first_std)
    if settings.keeps_best and rollout.energies(motion.actions(mean[None], base_action), goal, cost)[0] > least:
        mean = best_sample
    found = motion.actions(np.where(np.abs(mean) < motion.dead_zone, 0.0, mean), base_action)
    states = follow_actions(context.states[-1], found, motion)
    return Plan(motion.carried_out(states[:-1], found), states, energies, found, mean)


def follow_actions(state: np.ndarray, actions: np.ndarray, motion: Motion) -> np.ndarray:
    """States [H+1, S] that actions [H, A] lead to from a state [S]."""
    states = [np.asarray(state, np.float64)]
    for action in actions:
        states.append(motion.integrate(states[-1], action))
    return np.stack(states)


class Rollout:
    """Foresees where candidate actions lead from given contexts; what all candidates of a context share is computed once."""

    @torch.no_grad()
    def __init__(
        self, model: LatentModel, context: Context, integrate: Integrate | None = None, *, scaler: Scaler | None = None
    ) -> None:
        """Compute the steps before the last one of each context, [*contexts, C, ..].

        `integrate` takes states [n, S] and actions [n, A] to the states after them, for candidates of several steps.
        """
        self._model, self._integrate, self._scaler = model, integrate, scaler
        self._lead = context.tokens.shape[:-3]
        tokens = context.tokens.reshape(-1, *context.tokens.shape[-3:])
        actions, states = (np.asarray(rows).reshape(len(tokens), *rows.shape[-2:]) for rows in context[1:])
        self._newest, self._states = tokens[:, -1:], states[:, -1].astype(np.float64)
        self._num_past = tokens.shape[1] - 1
        self._past = model.read_past(tokens, *self._scaled(actions, states))

    @torch.no_grad()
    def energies(
        self, actions: np.ndarray, goal: Tensor, cost: Cost = TOKENS, batch_size: int | None = None
    ) -> np.ndarray:
        """Energies [.., S] float32 of S candidates of H whole unscaled actions, [.., S, H, A]: their cost for goals [.., N, E].

        The axes in front are those of the contexts, or broadcast to them and with them. `batch_size` candidates of one context go through
        the predictor at once, by default as many as `predictor.rollout.PASS_BYTES` are enough for.
        """
        lead = np.broadcast_shapes(self._lead, actions.shape[:-3], goal.shape[:-2])
        goals = goal.expand(*lead, *goal.shape[-2:]).reshape(-1, *goal.shape[-2:])
        parts = [
            cost(self._foresee(number, candidates, every_step=cost.steps == SUM), goals[place])
            for place, number, candidates in self._passes(actions, lead, batch_size)
        ]
        return torch.cat(parts).float().cpu().numpy().reshape(*lead, -1)

    @torch.no_grad()
    def predict(self, actions: np.ndarray, batch_size: int | None = None) -> Tensor:
        """Tokens [.., S, H, N, E] after each action of S candidates of H, [.., S, H, A]; axes in front as for `energies`."""
        lead = np.broadcast_shapes(self._lead, actions.shape[:-3])
        parts = [
            self._foresee(number, candidates, every_step=True)
            for _, number, candidates in self._passes(actions, lead, batch_size)
        ]
        return torch.cat(parts).reshape(*lead, *actions.shape[-3:-1], *self._newest.shape[-2:])

    def _passes(
        self, actions: np.ndarray, lead: tuple[int, ...], batch_size: int | None
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """What goes through the predictor at once: a place in `lead`, the number of its context, and candidates [n, H, A]."""
        numbers = np.broadcast_to(np.arange(len(self._newest)).reshape(self._lead), lead).ravel()
        actions = np.broadcast_to(actions, (*lead, *actions.shape[-3:])).reshape(-1, *actions.shape[-3:])
        # Of several steps the past of one is held while that of the next is made.
        horizon, num_past = actions.shape[2], self._num_past + actions.shape[2] - 1
        size = batch_size or self._model.rows_at_once(1, 2 * num_past - 1 if horizon > 1 else 0)
        for place, (number, candidates) in enumerate(zip(numbers.tolist(), actions, strict=True)):
            for start in range(0, len(candidates), size):
                yield place, number, candidates[start : start + size]

    def _foresee(self, number: int, actions: np.ndarray, *, every_step: bool) -> Tensor:
        """Tokens [n, H, N, E] after the actions of candidates [n, H, A] of one context, or [n, 1, N, E] after the last one alone."""
        num_samples, horizon = actions.shape[:2]
        newest = self._newest[number]
        rows = [np.tile(self._states[number], (num_samples, 1))]
        for step in range(horizon - 1):
            rows.append(self._integrate(rows[-1], actions[:, step]))
        scaled, states = self._scaled(actions, np.stack(rows, axis=1))
        if isinstance(self._model.predictor, CompressedPredictor) and not every_step:
            return self._model.as_reps(self._model.predictor.roll(newest, scaled, states))[:, None]
        tokens = newest.expand(num_samples, *newest.shape)
        own = self._past and [tuple(part[number : number + 1] for part in block) for block in self._past]
        past, seen = repeat_past(own, num_samples), []
        for step in range(horizon):
            now = slice(step, step + 1)
            # Nothing follows the last step: its keys and values would be held for nothing.
            kept = 0 if step == horizon - 1 else None
            out = self._model.predict(tokens, scaled[:, now], states[:, now], past, kept)
            tokens, past = self._model.as_reps(out.tokens), out.past
            if step == horizon - 1 or every_step:
                seen.append(tokens)
        return torch.cat(seen, dim=1)

    def _scaled(self, actions: np.ndarray, states: np.ndarray) -> list[Tensor]:
        if self._scaler is not None:
            actions, states = self._scaler.actions.apply(actions), self._scaler.states.apply(states)
        device = self._newest.device
        return [torch.tensor(np.asarray(rows), dtype=torch.float32, device=device) for rows in (actions, states)]
