"""How a `LatentRidge` is found: in closed form, by one pass over the training windows in place of all training steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from jepa_cache.predictor.compressed import LatentRidge
from jepa_cache.ridge import solve_sums, squared_error, sum_products, variances
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.losses import Objective
from jepa_cache.training.step import StepReport

NUM_FOLDS = 5
RIDGES = tuple(10.0**power for power in range(-6, 4))
"""Candidates, in units of each feature's own variance: at 1 a lone feature's weight is halved. Ten episodes of a robot took 10."""


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
    sums = _sum_products(core, data, fold_of)
    total, folds = sum(sums.values()), [own for fold, own in sums.items() if fold is not None]
    errors = [sum(squared_error(_solve(total - own, ridge), own) for own in folds) for ridge in RIDGES]
    return RIDGES[int(np.argmin(errors))]


@torch.no_grad()
def fit_step(core: LatentRidge, objective: Objective, data: TrainingData, ridge: float) -> StepReport:
    """Set the weights to those of the ridge regression over all steps of all training windows, and report their losses.

    Sums of products are float64; memory does not grow with the windows.
    """
    (total,) = _sum_products(core, data, {}).values()
    core.set_weights(_solve(total, ridge))
    return _report(objective, data)


def _sum_products(core: LatentRidge, data: TrainingData, fold_of: Mapping[str, int]) -> dict[int | None, Tensor]:
    """By fold of the episodes, None for those without: sums of products over all steps of their windows."""
    sums: dict[int | None, Tensor] = {}
    for batch in data.batches_in_order():
        rows = core.rows(batch.tokens[:, :, 0], batch.actions, batch.states)
        folds = [fold_of.get(episode) for episode in data.episodes_of(batch.numbers)]
        for fold in dict.fromkeys(folds):
            own = sum_products(rows[[other == fold for other in folds]], len(core.bias))
            sums[fold] = sums.get(fold, 0.0) + own
    return sums


def _solve(sums: Tensor, ridge: float) -> Tensor:
    return solve_sums(sums, ridge * variances(sums))


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
