"""How far predicted steps are from a goal: what the planner minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

LAST, SUM = "last", "sum"


def absolute(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference over tokens and channels, [.., N, E] twice to [..]: the energy of V-JEPA 2-AC (arXiv 2506.09985)."""
    return (one - other).abs().mean(dim=(-2, -1))


def squared(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference over tokens and channels."""
    return (one - other).square().mean(dim=(-2, -1))


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
