"""How a `LatentRidge` is found: in closed form, by one pass over the training windows in place of all training steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.predictor.compressed import LatentRidge
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.losses import Objective
from jepa_cache.training.step import StepReport

NUM_FOLDS = 5
RIDGES = tuple(10.0**power for power in range(-6, 2))
"""Candidates, in units of each feature's own variance: at 1 a lone feature's weight is halved."""


class Solution(NamedTuple):
    """W [P, features] and b [P], float64."""

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def fit_step(core: LatentRidge, objective: Objective, data: TrainingData) -> StepReport:
    """Set the weights to those of the ridge regression over all steps of all training windows, and report their losses.

    The ridge is that of `RIDGES` with the least squared error on episodes that it was not fitted to: five folds of the training episodes.
    Sums of products are float64; memory does not grow with the windows.

    Raises:
        ValueError: There is one training episode only.
    """
    episodes = data.episodes_of(np.arange(data.num_windows))
    names = sorted(set(episodes))
    if len(names) < 2:
        raise ValueError(
            f"predictor linear chooses its ridge by episodes that it was not fitted to, and there is one training episode only ({names[0]}); "
            "add recordings, or take predictor=compressed"
        )
    fold_of = {name: place % NUM_FOLDS for place, name in enumerate(names)}
    grams: list[Tensor | float] = [0.0] * min(NUM_FOLDS, len(names))
    for batch in data.batches_in_order():
        z = batch.tokens[:, :, 0]
        features = core.features(z[:, :-1], batch.actions, batch.states[:, :-1])
        joint = torch.cat([torch.ones_like(features[..., :1]), features, z.diff(dim=1)], dim=-1).double()
        folds = np.array([fold_of[episodes[number]] for number in batch.numbers])
        for fold in np.unique(folds):
            rows = joint[torch.from_numpy(folds == fold)].flatten(0, 1)
            grams[fold] += rows.T @ rows
    total, size = sum(grams), 1 + core.weight.shape[1]
    errors = [sum(_squared_error(_solve(total - gram, size, ridge), gram, size) for gram in grams) for ridge in RIDGES]
    solution = _solve(total, size, RIDGES[int(np.argmin(errors))])
    core.weight.copy_(solution.weight)
    core.bias.copy_(solution.bias)
    return _report(objective, data)


def _solve(gram: Tensor, size: int, ridge: float) -> Solution:
    """Ridge regression from the sums of products of [1, features, targets], `size` being 1 + features; the constant is not shrunk."""
    count, means = gram[0, 0], gram[0] / gram[0, 0]
    covariance = gram / count - means[:, None] * means[None]
    deviation = covariance.diagonal()[1:size].clamp(min=0).sqrt()
    deviation = torch.where(
        deviation > 1e-6, deviation, torch.ones_like(deviation)
    )  # columns that never change get no weight
    inner = covariance[1:size, 1:size] / (deviation[:, None] * deviation)
    inner += ridge * torch.eye(size - 1, dtype=inner.dtype, device=inner.device)
    weight = (torch.linalg.solve(inner, covariance[1:size, size:] / deviation[:, None]) / deviation[:, None]).T
    return Solution(weight, means[size:] - weight @ means[1:size])


def _squared_error(solution: Solution, gram: Tensor, size: int) -> float:
    """Sum of squared errors over the rows that a matrix of sums of products is of."""
    columns = torch.cat(
        [
            -solution.bias[:, None],
            -solution.weight,
            torch.eye(len(solution.bias), dtype=gram.dtype, device=gram.device),
        ],
        dim=1,
    )
    return float(((columns @ gram) * columns).sum())


def _report(objective: Objective, data: TrainingData) -> StepReport:
    """The losses of all training windows, as means over them."""
    sums: dict[str, Tensor] = {}
    numbers, by_window = [], []
    for batch in data.batches_in_order():
        losses = objective(batch.tokens, batch.actions, batch.states)
        for name, value in losses.scalars.items():
            sums[name] = sums.get(name, 0.0) + value.double() * len(batch.tokens)
        numbers.append(batch.numbers)
        by_window.append(losses.jloss_by_window)
    means = {name: (value / data.num_windows).float() for name, value in sums.items()}
    return StepReport(means, torch.zeros(()), np.concatenate(numbers), torch.cat(by_window))
