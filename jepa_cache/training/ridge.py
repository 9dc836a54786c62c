"""How a `LatentRidge` is found: in closed form, by one pass over the training windows in place of all training steps.

What it is fitted with, a ridge and columns, is chosen on recordings whose likes are left out too: a world model meets new scenes and
tasks, which differ from those of its training more than two takes of one task do.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.actions import ActionSpace
from jepa_cache.predictor.compressed import LatentRidge
from jepa_cache.ridge import solve_sums, squared_error, sum_products, variances
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.losses import Objective
from jepa_cache.training.step import StepReport

NUM_JUDGED = 16  # recordings that errors are measured on, at most
LIKES = 5  # one in so many recordings is left out with a judged one, at least one
RIDGES = tuple(10.0**power for power in range(-6, 4))
"""Candidates, in units of each feature's own variance: at 1 a lone feature's weight is halved. Ten episodes of a robot took 10."""


class Choice(NamedTuple):
    """What a linear predictor is fitted with."""

    ridge: float
    kept: Tensor | None = None  # [features] bool, those whose weights are not 0; all where it is None
    words: str = ""


@torch.no_grad()
def choose(
    core: LatentRidge, data: TrainingData, apart: Collection[str] | None = None, space: ActionSpace | None = None
) -> Choice:
    """The ridge of `RIDGES`, and the columns, with the least squared error on recordings that were left out together with their likes.

    Columns are all, or where a space is given those of its positions alone. `apart` names the episodes that errors are measured on, all
    by default. Leaving out single ones, ten episodes of a robot took columns that made it worse on new tasks (docs/choosing.md).

    Raises:
        ValueError: There is one training recording only.
    """
    folds = _find_folds(core, data, apart)
    candidates: dict[str, Tensor | None] = {"": None}
    if space is not None and (kept := _keep_positions(core, space)) is not None:
        candidates = {", all columns": None, f", columns of {', '.join(space.positions)} alone": kept}
    total, *sums = _sum_products(core, data, [None, *(judged for judged, _ in folds), *(out for _, out in folds)])
    errors = dict.fromkeys(itertools.product(candidates, RIDGES), 0.0)
    for judged, left_out in zip(sums[: len(folds)], sums[len(folds) :], strict=True):
        for words, ridge in errors:
            weights = _solve(total - left_out, Choice(ridge, candidates[words]))
            errors[words, ridge] += squared_error(weights, judged)
    words, ridge = min(errors, key=errors.__getitem__)
    return Choice(ridge, candidates[words], f"ridge {ridge:g}{words}")


def _find_folds(
    core: LatentRidge, data: TrainingData, apart: Collection[str] | None
) -> list[tuple[set[str], set[str]]]:
    """Of up to `NUM_JUDGED` recordings the episodes that errors are measured on, and those not fitted to: its likes by mean latents too."""
    numbers = np.arange(data.num_windows)
    episodes = data.episodes_of(numbers)
    names, place = np.unique(data.recordings_of(numbers), return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"predictor linear chooses its ridge by episodes that it was not fitted to, and there is one training episode only ({names[0]}); "
            "add recordings, or take predictor=compressed"
        )
    total = np.zeros((len(names), len(core.bias)))
    for batch in data.batches_in_order():
        np.add.at(total, place[batch.numbers], batch.tokens[:, 0, 0].cpu().numpy())
    means = total / np.bincount(place)[:, None]
    copies: list[set[str]] = [set() for _ in names]
    for number, name in zip(place, episodes, strict=True):
        copies[number].add(name)
    judged = [own if apart is None else own.intersection(apart) for own in copies]
    centres = [number for number, own in enumerate(judged) if own]
    num_left_out = 1 + min(len(names) - 2, max(1, len(names) // LIKES))
    folds = []
    for centre in centres[:: -(-len(centres) // NUM_JUDGED)]:
        distance = np.linalg.norm(means - means[centre], axis=1)
        distance[centre] = -1  # before twins
        nearest = np.argsort(distance, kind="stable")[:num_left_out]
        folds.append((judged[centre], set().union(*(copies[number] for number in nearest))))
    return folds


def _keep_positions(core: LatentRidge, space: ActionSpace) -> Tensor | None:
    """[features] which are of latents, positions and actions that move along them; None where the space names no such actions."""
    columns = [column.name for column in space.actions], [column.name for column in space.states]
    like = {"dtype": core.weight.dtype, "device": core.weight.device}
    actions, states = (
        torch.tensor([name.removeprefix("d") in space.positions for name in some], **like) for some in columns
    )
    kept = core.features(torch.ones(len(core.bias), **like), actions, states) > 0
    return kept if actions.any() else None


@torch.no_grad()
def fit_step(core: LatentRidge, objective: Objective, data: TrainingData, choice: Choice) -> StepReport:
    """Set the weights to those of the ridge regression over all steps of all training windows, and report their losses.

    Sums of products are float64; memory does not grow with the windows.
    """
    (total,) = _sum_products(core, data, [None])
    core.set_weights(_solve(total, choice))
    return _report(objective, data)


def _sum_products(core: LatentRidge, data: TrainingData, parts: Sequence[Collection[str] | None]) -> list[Tensor]:
    """For each part of the episodes, None for all: sums of products over all steps of their windows."""
    size = 1 + core.weight.shape[1]
    sums = [torch.zeros(size, size + len(core.bias), dtype=torch.float64, device=core.bias.device) for _ in parts]
    for batch in data.batches_in_order():
        rows = core.rows(batch.tokens[:, :, 0], batch.actions, batch.states)
        episodes = data.episodes_of(batch.numbers)
        for total, part in zip(sums, parts, strict=True):
            own = [number for number, name in enumerate(episodes) if part is None or name in part]
            if own:
                total += sum_products(rows[own], len(core.bias))
    return sums


def _solve(sums: Tensor, choice: Choice) -> Tensor:
    """Weights [1 + features, P]."""
    rows = torch.ones(len(sums), dtype=torch.bool, device=sums.device)
    if choice.kept is not None:
        rows[1:] = choice.kept
    own = torch.cat([sums[rows][:, : len(sums)][:, rows], sums[rows, len(sums) :]], dim=1)
    weights = sums.new_zeros(len(sums), sums.shape[1] - len(sums))
    weights[rows] = solve_sums(own, choice.ridge * variances(own))
    return weights


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
    return StepReport(means, torch.zeros_like(means["total"]), np.concatenate(numbers), torch.cat(by_window))
