"""The closed loop of a program that owns a robot or a game: a frame and a state in, the next action out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_cache.control.costs import Cost
from jepa_cache.control.motion import Motion
from jepa_cache.control.planner import Context, Plan, PlannerSettings

log = logging.getLogger(__name__)

# Of a subgoal: reached when its cost is below this share of what it was at first, or has set no new low for so many steps.
REACHED_SHARE, PATIENCE = 0.25, 3
NEW_STATE_SHARE = 0.1  # of the recorded range of a state, beyond which a state is new to the predictor


class Controller:
    """Plans to a goal picture, hands out one action at a time, and plans again from what is seen then.

    Keeps the last steps as the predictor's context and begins each search where the last one ended, less what was carried out. Actions
    stay within the limits of one step. It never touches a robot: carry the action out, take the next frame, call `act` again.
    """

    def __init__(
        self,
        world: Any,
        goal_frames: np.ndarray | Sequence[np.ndarray],
        settings: str | PlannerSettings = "jump",
        *,
        motion: Motion | None = None,
        cost: str | Cost = "tokens",
        num_context_steps: int = 1,
        replan_every: int = 1,
        base_action: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        """Make a controller to one goal.

        Args:
            world: An `api.WorldModel`.
            goal_frames: [h, w, 3] uint8 RGB, in tubelet mode [G, h, w, 3]; or a list of them, subgoals first. A subgoal is left for the next
                one when its cost falls below a quarter of what it was at first, or has set no new low for three steps; the last one never.
            settings: Name in `planner.SETTINGS`, or your own. `jump` is for predictors of mixed step lengths.
            motion: What may move, from `world.build_motion("jump", max_step_m=0.03, fixed=("dgripper",))`; by default that of the settings.
            cost: A name, or a `control.costs.Cost`.
            num_context_steps: Steps that the predictor is shown, the present one included; 1 for those of mixed step lengths.
            replan_every: Steps between searches; in between the last plan goes on.
            base_action: [A] for columns that no plan searches (keys, slot); by default zeros, of vectors what was recorded.
            seed: Of the samples.
        """
        if num_context_steps < 1 or replan_every < 1:
            raise ValueError(
                f"num_context_steps and replan_every count steps from 1; got {num_context_steps} and {replan_every}"
            )
        self._world, self._settings = world, world.choose_settings(settings)
        self._motion, self._cost = motion or world.build_motion(settings), world.choose_cost(cost)
        self._num_context, self._replan_every, self._seed = num_context_steps, replan_every, seed
        base = self._motion.still if base_action is None else base_action
        self._base = world.check_values("base_action", base, world.space.actions)
        self.reset(goal_frames)

    def reset(self, goal_frames: np.ndarray | Sequence[np.ndarray] | None = None) -> None:
        """Begin an episode: forget what was seen and planned; a new goal takes the place of the old one."""
        if goal_frames is not None:
            listed = [goal_frames] if isinstance(goal_frames, np.ndarray) else list(goal_frames)
            if not listed:
                raise ValueError("a controller needs at least one goal frame; got an empty list")
            self._shape, *others = dict.fromkeys(map(np.shape, listed))
            if others:
                raise ValueError(f"goal frames must be of one camera and size; got {[self._shape, *others]}")
            self._goals = [self._see("goal frame", goal) for goal in listed]
            for goal in listed:  # refuses what is no picture
                self._world.see_goal(goal if goal.ndim == 4 else goal[None])
        self._steps: list[tuple[Tensor, np.ndarray]] = []  # tokens [N, E] and state [S] of the last steps
        self._taken: list[np.ndarray] = []  # actions [A] between them, and the one after
        self._rest: np.ndarray | None = None  # [H, K] of the last plan, less what was carried out
        self._told: set[int] = set()
        self.plan: Plan | None = None  # the last one
        self.goal = 0  # number of the goal that is aimed at
        self.distances: list[float] = []  # cost of the frames seen, for the goals that were aimed at
        self._number, self._of_goal = 0, []  # costs for the present goal

    def act(self, frame: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The next action [A] float64, unscaled, within the limits of one step.

        Args:
            frame: As the goal frames, of the same camera and size, RGB, one cache step after the last call (`world.fps`).
            state: [S] in the units of the action space; None for weights that were trained without states.

        Raises:
            ValueError: The frame has another shape or type than the goal's, or a number of the state is not finite.
        """
        if np.shape(frame) != self._shape:
            raise ValueError(
                f"the frame is {list(np.shape(frame))} and the goal frame {list(self._shape)}: take both with the same camera and size"
            )
        tokens = self._see("frame", frame)
        state = self._world.check_states(None if state is None else np.asarray(state)[None], 1)[0]
        self._warn_outside(state)
        self._steps = [*self._steps, (tokens, state)][-self._num_context :]
        self._taken = self._taken[len(self._taken) - len(self._steps) + 1 :]
        self._choose_goal(tokens)
        if self._rest is None or self._number % self._replan_every == 0:
            self.plan = self._search()
            self._rest = self.plan.searched
        self._number += 1
        action = self._carry_out(state)
        self._taken.append(action)
        return action

    def _search(self) -> Plan:
        tokens, states = (torch.stack([one for one, _ in self._steps]), np.stack([state for _, state in self._steps]))
        taken = np.stack(self._taken) if self._taken else np.zeros((0, len(self._base)))
        return self._world.search(
            Context(tokens, taken, states),
            self._goals[self.goal],
            self._settings,
            self._motion,
            cost=self._cost,
            base_action=self._base,
            start=self._rest,
            seed=self._seed + self._number,
        )

    def _carry_out(self, state: np.ndarray) -> np.ndarray:
        """The part of the plan that one step may do; what is left of it stays."""
        motion, rest = self._motion, self._rest
        step = np.clip(rest[0], motion.step_low, motion.step_high)
        if len(rest) > 1:
            self._rest = np.concatenate([rest[1:], motion.middle[None]])
        elif motion.adds:
            self._rest = np.clip(rest - step, motion.low, motion.high)
        step = np.where(np.abs(step) < motion.dead_zone, 0.0, step)
        return motion.carried_out(state, motion.actions(step, self._base))

    def _choose_goal(self, tokens: Tensor) -> None:
        """Note how far the goal is, and go on to the next one where a subgoal is reached or comes no nearer."""
        distance = float(self._cost(tokens[None], self._goals[self.goal]))
        self._of_goal.append(distance)
        reached = distance < REACHED_SHARE * self._of_goal[0]
        stuck = len(self._of_goal) - 1 - int(np.argmin(self._of_goal)) >= PATIENCE
        if self.goal + 1 < len(self._goals) and (reached or stuck):
            self.goal, self._rest = self.goal + 1, None
            distance = float(self._cost(tokens[None], self._goals[self.goal]))
            self._of_goal = [distance]
        self.distances.append(distance)

    def _see(self, what: str, frame: np.ndarray) -> Tensor:
        """Tokens [N, E] of one step."""
        if not isinstance(frame, np.ndarray) or frame.ndim not in (3, 4):
            got = list(frame.shape) if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"a {what} must be a numpy array of uint8 RGB, [height, width, 3]; got {got}")
        tokens = self._world.see(frame if frame.ndim == 4 else frame[None])
        if len(tokens) != 1:
            raise ValueError(f"a {what} is one step; got {len(tokens)}")
        return tokens[0]

    def _warn_outside(self, state: np.ndarray) -> None:
        """Say once for each column that its state is none that training saw."""
        recorded = self._world.recorded
        if recorded is None:
            return
        low, high = np.array(recorded.state_low), np.array(recorded.state_high)
        margin = NEW_STATE_SHARE * (high - low)
        for column in np.flatnonzero((state < low - margin) | (state > high + margin)):
            if column not in self._told:
                self._told.add(column)
                log.warning(
                    "the state %s is %g; the training episodes had %g to %g: what the predictor says there is a guess",
                    *(self._world.space.states[column].name, state[column], low[column], high[column]),
                )
