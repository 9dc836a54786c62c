"""How a `LatentRidge` is found: in closed form, by one pass over the training windows in place of all training steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.predictor.compressed import LatentRidge
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.losses import Objective
from jepa_cache.training.step import StepReport

NUM_FOLDS = 5
RIDGES = tuple(10.0**power for power in range(-6, 4))
"""Candidates, in units of each feature's own variance: at 1 a lone feature's weight is halved. Ten episodes of a robot took 10."""


class Solution(NamedTuple):
    """W [P, features] and b [P], float64."""

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def choose_ridge(core: LatentRidge, data: TrainingData, apart: Collection[str] | None = None) -> float:
    """The ridge of `RIDGES` with the least squared error on training episodes that it was not fitted to, in five folds.

    `apart` names the episodes that errors are measured on, all by default; fitted is to all others of a fold.

    Raises:
        ValueError: There is one training episode only.
    """
    names = sorted(set(data.episodes_of(np.arange(data.num_windows))))
    if len(names) < 2:
        raise ValueError(
            f"predictor linear chooses its ridge by episodes that it was not fitted to, and there is one training episode only ({names[0]}); "
            "add recordings, or take predictor=compressed"
        )
    judged = [name for name in names if apart is None or name in apart] or names
    fold_of = {name: place % NUM_FOLDS for place, name in enumerate(judged)}
    grams = _sum_products(core, data, fold_of)
    total, size = sum(grams.values()), 1 + core.weight.shape[1]
    folds = [gram for fold, gram in grams.items() if fold is not None]
    errors = [sum(_squared_error(_solve(total - gram, size, ridge), gram, size) for gram in folds) for ridge in RIDGES]
    return RIDGES[int(np.argmin(errors))]


@torch.no_grad()
def fit_step(core: LatentRidge, objective: Objective, data: TrainingData, ridge: float) -> StepReport:
    """Set the weights to those of the ridge regression over all steps of all training windows, and report their losses.

    Sums of products are float64; memory does not grow with the windows.
    """
    (total,) = _sum_products(core, data, {}).values()
    solution = _solve(total, 1 + core.weight.shape[1], ridge)
    core.weight.copy_(solution.weight)
    core.bias.copy_(solution.bias)
    return _report(objective, data)


def _sum_products(core: LatentRidge, data: TrainingData, fold_of: Mapping[str, int]) -> dict[int | None, Tensor]:
    """By fold of the episodes, None for those without: sums of products of [1, features, changes] over all steps of their windows."""
    grams: dict[int | None, Tensor] = {}
    for batch in data.batches_in_order():
        z = batch.tokens[:, :, 0]
        features = core.features(z[:, :-1], batch.actions, batch.states[:, :-1])
        joint = torch.cat([torch.ones_like(features[..., :1]), features, z.diff(dim=1)], dim=-1).double()
        folds = [fold_of.get(episode) for episode in data.episodes_of(batch.numbers)]
        for fold in dict.fromkeys(folds):
            rows = joint[[other == fold for other in folds]].flatten(0, 1)
            grams[fold] = grams.get(fold, 0.0) + rows.T @ rows
    return grams


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
