"""How far predicted steps are from a goal: what the planner minimises.

`tokens` and `tokens_l2` need nothing else; `latents` is of predictors on components; `readout` and `time` are of heads that training fits
(`predictor.heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_cache.predictor.compressed import CompressedPredictor
from jepa_cache.predictor.heads import HEADS, head_path, load_head

LAST, SUM = "last", "sum"
LATENTS = "latents"


def absolute(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference over tokens and channels, [.., N, E] twice to [..]: the energy of V-JEPA 2-AC (arXiv 2506.09985)."""
    return (one - other).abs().mean(dim=(-2, -1))


def squared(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference over tokens and channels."""
    return (one - other).square().mean(dim=(-2, -1))


def euclidean(one: Tensor, other: Tensor) -> Tensor:
    """Length of the difference of vectors, [.., K] twice to [..]."""
    return (one - other).square().sum(dim=-1).sqrt()


@dataclass(frozen=True)
class Cost:
    """A distance of predicted steps from a goal, of what a view makes of their tokens."""

    distance: Callable[[Tensor, Tensor], Tensor]  # of two views, to [..]
    view: Callable[[Tensor], Tensor] | None = None  # of tokens [.., N, E]; None: tokens themselves
    steps: str = LAST  # of a plan, that count

    def __call__(self, predicted: Tensor, goal: Tensor) -> Tensor:
        """Cost [..] of predicted steps [.., H, N, E] for goals [.., N, E]: of the last step, or the sum over all."""
        if self.steps == LAST:
            predicted = predicted[..., -1:, :, :]
        goal = goal[..., None, :, :]
        if self.view is not None:
            predicted, goal = self.view(predicted), self.view(goal)
        return self.distance(predicted, goal).sum(dim=-1)


TOKENS = Cost(absolute)
SIMPLE_COSTS = {"tokens": TOKENS, "tokens_l2": Cost(squared)}
"""That need nothing but tokens."""
COSTS = (*SIMPLE_COSTS, LATENTS, *HEADS)


def load_costs(weights: Path, card: Mapping[str, Any], predictor: object, device: torch.device) -> dict[str, Cost]:
    """All costs that a predictor has, by name: of the tokens, of its latents, and of the heads that lie beside its weights.

    Raises:
        CheckpointError: A head is damaged, or was fitted beside another predictor.
    """
    costs = dict(SIMPLE_COSTS)
    if isinstance(predictor, CompressedPredictor):
        costs[LATENTS] = Cost(euclidean, predictor.compressor.compress)
    for name in HEADS:
        path = head_path(weights, name)
        if path.is_file():
            costs[name] = Cost(euclidean, load_head(path, name, card).to(device))
    return costs


def choose_cost(costs: Mapping[str, Cost], name: str | Cost, steps: str = LAST) -> Cost:
    """One of a predictor's costs by its name, over the last step or summed over all; or your own, as it is.

    Raises:
        ValueError: There is none of this name, or this predictor does not have it; how it is had is said.
    """
    if isinstance(name, Cost):
        return name
    if name not in COSTS:
        raise ValueError(f"unknown cost {name!r}; known: {', '.join(COSTS)}, or give a Cost of your own")
    if steps not in (LAST, SUM):
        raise ValueError(f"the steps of a plan that count are {LAST} or {SUM}; got {steps!r}")
    if name not in costs:
        way = (
            f"it is a head that lies beside the weights: `python stages/train_predictor.py train.costs=[{name}]` with the settings of the "
            "training fits it in seconds (what is trained stays)"
            if name in HEADS
            else "it is the distance of components, which this predictor does not have: train predictor=compressed or linear"
        )
        raise ValueError(f"these weights have no cost {name!r}; {way}; here there are {', '.join(costs)}")
    return replace(costs[name], steps=steps)
