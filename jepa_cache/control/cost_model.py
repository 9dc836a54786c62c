"""A world model as what other libraries' solvers call a cost model: an object with `get_cost(info, candidates)`.

The form is `Costable` of stable-worldmodel, whose solvers, policies and environments then plan with this predictor; nothing of it is
imported. Letters besides the project's: K environments, R rows (environment steps) of one block, which is one step of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_cache.control.costs import Cost


class CostModel:
    """Scores a solver's candidates by a world model: clipped as the environment clips, a block of rows composed to one action."""

    def __init__(
        self,
        world: Any,
        block: int,
        low: float | np.ndarray,
        high: float | np.ndarray,
        cost: str | Cost = "tokens",
        *,
        process: Any = None,
        state: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Wrap a world model.

        Args:
            world: An `api.WorldModel`.
            block: Rows (steps of the environment) that one step of the cache spans: their `action_block`.
            low: Least actions that the environment carries out, a number or [A]: it clips, most solvers do not.
            high: The largest.
            cost: A name, or a `control.costs.Cost`.
            process: The policy's scaler of actions, whose `inverse_transform` [n, A] gives the environment's actions; None where it has none.
            state: Entry of info that holds the states, for a predictor that reads them.
            batch_size: Candidates of one environment that go through the predictor at once; by default as many as 4 GiB are enough for.
        """
        if block < 1 or not np.all(np.asarray(low) < high):
            raise ValueError(
                f"a block has at least 1 row and actions lie between low < high; got block {block}, {low}, {high}"
            )
        if world.uses_states and state is None:
            raise ValueError(
                f"this predictor reads states ({', '.join(column.name for column in world.space.states)}): name the entry of info that holds "
                'them, as state="proprio", or train one that does not, with scaler.states=ignore'
            )
        self._world, self._block, self._low, self._high = world, block, low, high
        self._cost, self._process, self._state, self._batch_size = world.choose_cost(cost), process, state, batch_size

    @torch.no_grad()
    def get_cost(self, info_dict: Mapping[str, Any], action_candidates: Tensor) -> Tensor:
        """Costs [K, S] float32 of candidates [K, S, H, R * A]; lower is nearer to the goal.

        Args:
            info_dict: `pixels` and `goal` [K, T, h, w, 3] uint8 RGB, or as solvers repeat them, [K, S, T, h, w, 3]; of T frames the last
                step's count. The entry `state` [.., S] likewise, where the predictor reads states.
            action_candidates: On the scale of the process.

        Raises:
            ValueError: Frames are not uint8 RGB, candidates do not fit the block, or a gradient is asked for.
        """
        rows, width = self._block, len(self._world.space.actions)
        if action_candidates.requires_grad:
            raise ValueError(
                "costs of a world model carry no gradient; use a solver that samples (CEM, iCEM, MPPI, predictive sampling)"
            )
        if action_candidates.ndim != 4 or action_candidates.shape[-1] != rows * width:
            raise ValueError(
                f"candidates must be [environments, samples, horizon, {rows} x {width}] for a block of {rows} rows in action space "
                f"{self._world.space.name!r}; got {list(action_candidates.shape)}"
            )
        given = action_candidates.double().cpu().numpy().reshape(*action_candidates.shape[:3], rows, width)
        if self._process is not None:
            given = self._process.inverse_transform(given.reshape(-1, width)).reshape(given.shape)
        actions = self._world.space.compose(np.clip(given, self._low, self._high))
        group = self._world.frames_per_step
        frames, goals = (self._entry(info_dict, name, 4)[:, -group:] for name in ("pixels", "goal"))
        states = None if self._state is None else self._entry(info_dict, self._state, 2)[:, -1:].astype(np.float64)
        options = {"states": states, "cost": self._cost, "batch_size": self._batch_size}
        energies = self._world.energies(frames, goals[:, 0] if group == 1 else goals, actions, **options)
        return torch.from_numpy(energies).to(action_candidates.device)

    def _entry(self, info: Mapping[str, Any], name: str, num_axes: int) -> np.ndarray:
        """An entry [K, T, ..] of info, without the axis of samples that solvers put behind that of environments."""
        if name not in info:
            raise ValueError(f"info has no {name!r}; it has {', '.join(info)}")
        values = info[name].cpu().numpy() if isinstance(info[name], Tensor) else np.asarray(info[name])
        values = values[:, 0] if values.ndim == num_axes + 2 else values
        if values.ndim != num_axes + 1 or (num_axes == 4 and (values.dtype != np.uint8 or values.shape[-1] != 3)):
            raise ValueError(
                f"info[{name!r}] must be [environments, steps, {'height, width, 3] uint8' if num_axes == 4 else 'columns]'}; got "
                f"{values.dtype} {list(values.shape)}. Give it to the policy without a transform"
            )
        return values
