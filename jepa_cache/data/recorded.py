"""What recorded episodes did, written into the card of weights: the range of actions and states, and how states followed.

A planner in a space of any robot's vectors searches within that range, and lets states follow by the linear map that is fitted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import FiniteFloat, TypeAdapter
from pydantic.dataclasses import dataclass

from jepa_cache.data.dataset import CachedDataset, Segment

QUANTILES = (0.01, 0.99)
MAX_ROWS = 50_000  # that a description is made from, spread evenly over the segments
SMALL = 1e-6  # times the number of rows, added to the diagonal: columns that never change have no coefficients

Row = tuple[FiniteFloat, ...]


@dataclass(frozen=True)
class Recorded:
    """Unscaled columns of the training episodes."""

    action_low: Row  # [A], the 1 % quantiles
    action_high: Row  # [A], the 99 % quantiles
    state_low: Row  # [S], least and largest values
    state_high: Row
    # Of spaces that do not say where an action leads: [1 + A + S, S], the change of the state is [1, action, state] times it.
    change: tuple[Row, ...] = ()
    change_r2: Row = ()  # [S] of the change on these rows; 0 where the state never changes
    action_std: Row = ()  # [A]; empty in cards that came before it

    def follow(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """States [.., S] that actions [.., A] lead to from states [.., S] by the fitted map, float64."""
        states = np.asarray(states, np.float64)
        lead = np.broadcast_shapes(states.shape[:-1], actions.shape[:-1])
        parts = (np.ones((*lead, 1)), actions, states)
        given = np.concatenate([np.broadcast_to(part, (*lead, part.shape[-1])) for part in parts], axis=-1)
        return states + given @ np.array(self.change)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, for a card."""
        return asdict(self)


def find_recorded(card: Mapping[str, Any]) -> Recorded | None:
    """What a card of weights says of the recordings; None in cards of older versions, which did not write it down."""
    return TypeAdapter(Recorded).validate_python(card["recorded"]) if "recorded" in card else None


def describe_recorded(dataset: CachedDataset, segments: Sequence[Segment]) -> Recorded:
    """Describe segments of at least one step with an action; `data.scaler.fit_scaler` refuses others."""
    rows: list[tuple[np.ndarray, ...]] = []
    stride = 1 + sum(segment.stop - segment.start for segment in segments) // MAX_ROWS
    for segment in segments:
        actions, states = (values.astype(np.float64) for values in dataset.controls_of(segment))
        rows.append((actions[::stride], states[:-1][::stride], states[1:][::stride]))
    actions, states, after = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    low, high = np.quantile(actions, QUANTILES, axis=0)
    both = np.concatenate([states, after])
    ends = (values.tolist() for values in (low, high, both.min(axis=0), both.max(axis=0)))
    rule = dataset.space.motion
    fitted = fit_change(actions, states, after) if rule and rule.integrate is None else ((), ())
    return Recorded(*map(tuple, ends), *fitted, tuple(actions.std(axis=0).tolist()))


def fit_change(actions: np.ndarray, states: np.ndarray, after: np.ndarray) -> tuple[tuple[Row, ...], Row]:
    """Least squares of the change of states [n, S] on [1, action, state]: coefficients [1 + A + S, S] and R2 [S]."""
    given, change = np.concatenate([actions, states], axis=1), after - states
    mean, scale = given.mean(axis=0), given.std(axis=0)
    scale[scale == 0] = 1.0
    x, y = (given - mean) / scale, change - change.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + SMALL * len(x) * np.eye(x.shape[1]), x.T @ y)
    total = (y**2).sum(axis=0)
    r2 = 1 - ((y - x @ weights) ** 2).sum(axis=0) / np.where(total > 0, total, 1.0)
    weights /= scale[:, None]
    table = np.concatenate([(change.mean(axis=0) - mean @ weights)[None], weights])
    return tuple(map(tuple, table.tolist())), tuple(np.where(total > 0, r2, 0.0).tolist())
