"""Planning to a goal frame by the cross-entropy method: sample actions, roll them out, keep the best, sample around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.control.motion import Motion
from jepa_cache.predictor.rollout import LatentModel, repeat_past

Scale = Callable[[np.ndarray], np.ndarray]


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

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not 2 <= self.num_elites <= self.num_samples or self.horizon < 1 or self.num_rounds < 1:
            raise ValueError(
                "a plan needs a horizon and rounds of at least 1, and 2 to num_samples elites; got "
                f"horizon {self.horizon}, {self.num_rounds} rounds, {self.num_elites} elites of {self.num_samples} samples"
            )
        for name, value in vars(self).items():
            if name.endswith("momentum") and not 0 <= value < 1:
                raise ValueError(f"{name} is the share of the old value that stays, from 0 to below 1; got {value}")
        if self.close_gripper_from is not None and self.close_gripper_from < 0:
            raise ValueError(
                f"close_gripper_from counts steps of the plan from 0; got {self.close_gripper_from}. Use None to leave the gripper to the search"
            )


SETTINGS = {
    "cem": PlannerSettings(1, 100, 10, 100, 0.25, 0.95),
    "world_model": PlannerSettings(2, 400, 10, 10, 0.15, 0.15),
    "notebook": PlannerSettings(2, 25, 10, 2, 0.15, 0.75),
    # The paper does not give the number of elites and the momenta of its robot runs: those of `world_model`.
    "paper": PlannerSettings(1, 800, 10, 10, 0.15, 0.15),
}
"""Published settings by name. Steps were limited to 0.05 m in the first two and 0.075 m in the others (`build_motion`)."""
MAX_STEP_M = {"cem": 0.05, "world_model": 0.05, "notebook": 0.075, "paper": 0.075}


class Plan(NamedTuple):
    """What a search found.

    Actions stay within what each state allows (a gripper that is open opens no further, pitch ends at 90 degrees).
    """

    actions: np.ndarray  # [H, A] float64, unscaled; the first one is to be carried out
    states: np.ndarray  # [H+1, S] float64, the current state and where the actions lead
    energies: np.ndarray  # [rounds, samples] float32; of the last predicted step against the goal, lower is nearer
    found: np.ndarray  # [H, A] float64, what the search ended with, as the published planner returns it


class Context(NamedTuple):
    """What is known when a plan is made."""

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
    scale_actions: Scale = np.asarray,
    scale_states: Scale = np.asarray,
    base_action: np.ndarray | None = None,
    seed: int = 0,
    noise: np.ndarray | None = None,
    batch_size: int | None = None,
) -> Plan:
    """Search for the actions after which the predictor sees the goal frame.

    The energy of a sample is the mean absolute difference between the tokens of the LAST predicted step and the goal's. Each
    round samples around a mean, and mean and deviation move towards those of the best samples. Samples are rolled out as one
    batch; the steps before the last one of the context are computed once for all of them.

    Args:
        model: Its predictor in eval mode.
        context: The steps so far, at least one.
        goal: [N, E] tokens of the goal frame, as the context's.
        motion: What may move.
        settings: Of the search.
        scale_actions: Of the training, [.., A] to [.., A].
        scale_states: The same for [.., S].
        base_action: [A] for the columns that are not searched; zeros by default.
        seed: Of the samples.
        noise: [rounds, H, samples, K] standard normal draws in place of the seed's.
        batch_size: Samples in one pass of the predictor; all by default.

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
    if base_action is None:
        base_action = np.zeros(context.actions.shape[1])
    mean = np.zeros((horizon, num_searched))
    std = np.tile(motion.first_std, (horizon, 1))
    keep_mean = np.where(motion.gripper, settings.gripper_mean_momentum, settings.mean_momentum)
    keep_std = np.where(motion.gripper, settings.gripper_std_momentum, settings.std_momentum)
    rollout = Rollout(model, context, motion, scale_actions, scale_states)
    energies = np.empty((settings.num_rounds, settings.num_samples), np.float32)
    for number in range(settings.num_rounds):
        samples = np.clip(noise[number] * std[:, None] + mean[:, None], -motion.limit, motion.limit)
        if settings.close_gripper_from is not None:
            samples[settings.close_gripper_from :, :, motion.gripper] = 1.0
        actions = motion.actions(samples.swapaxes(0, 1), base_action)  # [samples, H, A]
        energies[number] = rollout.energies(actions, goal, batch_size or settings.num_samples)
        if not np.isfinite(energies[number]).all():
            raise ValueError(
                f"round {number} has {int((~np.isfinite(energies[number])).sum())} energies of {settings.num_samples} that are not finite, so "
                "nothing can be ranked; look for NaN in the goal, the context and the predictor's weights, or for a scaler of other actions"
            )
        best = np.argsort(energies[number], kind="stable")[: settings.num_elites]
        elite = samples[:, best]
        mean = (1 - keep_mean) * elite.mean(axis=1) + keep_mean * mean
        std = (1 - keep_std) * elite.std(axis=1, ddof=1) + keep_std * std
    found = motion.actions(np.where(np.abs(mean) < motion.dead_zone, 0.0, mean), base_action)
    states = follow_actions(context.states[-1], found, motion)
    return Plan(motion.carried_out(states[:-1], found), states, energies, found)


def follow_actions(state: np.ndarray, actions: np.ndarray, motion: Motion) -> np.ndarray:
    """States [H+1, S] that actions [H, A] lead to from a state [S]."""
    states = [np.asarray(state, np.float64)]
    for action in actions:
        states.append(motion.integrate(states[-1], action))
    return np.stack(states)


class Rollout:
    """Rolls samples out from one context; what all samples share is computed once."""

    @torch.no_grad()
    def __init__(
        self, model: LatentModel, context: Context, motion: Motion | None, scale_actions: Scale, scale_states: Scale
    ) -> None:
        """Compute the steps before the last one of the context; as for `plan_actions`, and without `motion` for one step alone."""
        self._model, self._motion = model, motion
        self._scale_actions, self._scale_states = scale_actions, scale_states
        self._newest, self._state = context.tokens[-1:], np.asarray(context.states[-1], np.float64)
        given = (self._tensor(scale_actions(context.actions)), self._tensor(scale_states(context.states)))
        self._past = model.read_past(context.tokens[None], *(values[None] for values in given))

    @torch.no_grad()
    def energies(self, actions: np.ndarray, goal: Tensor, batch_size: int) -> np.ndarray:
        """Energy [samples] of whole unscaled actions [samples, H, A]: distance of the last predicted step from the goal [N, E]."""
        starts = range(0, len(actions), batch_size)
        parts = [self._roll_out(actions[start : start + batch_size], goal) for start in starts]
        return torch.cat(parts).float().cpu().numpy()

    def _roll_out(self, actions: np.ndarray, goal: Tensor) -> Tensor:
        num_samples, horizon = actions.shape[:2]
        tokens = self._newest.expand(num_samples, *self._newest.shape)
        states = np.tile(self._state, (num_samples, 1))
        past = repeat_past(self._past, num_samples)
        for step in range(horizon):
            if step:
                states = self._motion.integrate(states, actions[:, step - 1])
            action = self._tensor(self._scale_actions(actions[:, step : step + 1]))
            out = self._model.predictor(tokens, action, self._tensor(self._scale_states(states[:, None])), None, past)
            tokens, past = self._model.as_reps(out.tokens), out.past
        return (tokens[:, 0] - goal).abs().mean(dim=(1, 2))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=self._newest.device)
