"""Ridge regressions in closed form: from rows that memory holds, and from sums of products over any number of rows.

The constant is never shrunk. A strength is judged by squared errors on episodes that the regression was not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

NUM_FOLDS = 3
RIDGES = tuple(10.0**power for power in range(-5, 4))
"""Candidates of `fit_rows`, in units of the mean variance of the rows along the directions that they span."""


class RowsFit(NamedTuple):
    """What `fit_rows` found of K targets."""

    weight: Tensor  # [P, K]
    bias: Tensor  # [K]
    r2: Tensor  # [K] on left-out episodes


def fit_rows(x: Tensor, y: Tensor, episodes: Sequence[str]) -> RowsFit:
    """Ridge regression of y [n, K] on x [n, P]; each target's strength is the best in folds of whole episodes [n].

    The smaller of both systems is solved, of rows or of numbers: time grows with the cube of that. Memory: x once more, in float64 where its
    numbers are fewer than its rows, and some 32 bytes times the square of the smaller.

    Raises:
        ValueError: There is one episode only.
    """
    names = {name: place for place, name in enumerate(sorted(set(episodes)))}
    if len(names) < 2:
        raise ValueError(
            f"a strength is chosen on left-out episodes, and there is one only ({episodes[0]}); add recordings"
        )
    fold = torch.tensor([names[name] % NUM_FOLDS for name in episodes], device=x.device)
    mean, y = x.mean(dim=0), y.to(x.device).double()
    x = x - mean
    unit = float(x.square().sum(dtype=torch.float64)) / min(x.shape) or 1.0
    if len(x) <= x.shape[1]:
        kernel = (x @ x.T).double()
        tell, fit = partial(_tell_by_kernel, kernel), partial(_fit_by_kernel, x, kernel)
    else:
        x = x.double()
        tell, fit = partial(_tell_by_numbers, x), partial(_fit_by_numbers, x)
    strengths, errors = [ridge * unit for ridge in RIDGES], y.new_zeros(len(RIDGES), y.shape[1])
    for number in fold.unique():
        aside = fold == number
        for place, told in enumerate(tell(y, ~aside, strengths)):
            errors[place] += (y - told)[aside].square().sum(dim=0)
    least, best = errors.min(dim=0)
    weight = mean.new_empty(len(mean), y.shape[1])
    for place in best.unique():
        weight[:, best == place] = fit(y[:, best == place], strengths[place]).to(mean.dtype)
    bias = y.mean(dim=0) - mean.double() @ weight.double()
    return RowsFit(weight, bias.to(mean.dtype), 1 - least / (y - y.mean(dim=0)).square().sum(dim=0).clamp(min=1e-12))


def _tell_by_kernel(kernel: Tensor, y: Tensor, rows: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
    """What is told of all rows [n, K] by regressions that are fitted to some of them, from the products of all [n, n]."""
    for dual in _solve_dual(kernel[rows][:, rows], y[rows], strengths):
        told = kernel[:, rows] @ dual
        yield told + (y - told)[rows].mean(dim=0)


def _fit_by_kernel(x: Tensor, kernel: Tensor, y: Tensor, strength: float) -> Tensor:
    (dual,) = _solve_dual(kernel, y, [strength])
    return x.T @ dual.to(x.dtype)


def _solve_dual(kernel: Tensor, y: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
    """Dual weights [n, K] of rows with products `kernel`, once they and y are centred; they sum to 0."""
    kernel = kernel - kernel.mean(dim=0)
    kernel, y = kernel - kernel.mean(dim=1, keepdim=True), y - y.mean(dim=0)
    for strength in strengths:
        yield torch.cholesky_solve(
            y, torch.linalg.cholesky(kernel + strength * torch.eye(len(kernel), device=y.device))
        )


def _tell_by_numbers(x: Tensor, y: Tensor, rows: Tensor, strengths: Sequence[float]) -> Iterator[Tensor]:
    """As `_tell_by_kernel`, from the rows themselves."""
    sums = sum_products(torch.cat([torch.ones_like(y[:, :1]), x, y], dim=1)[rows], y.shape[1])
    for strength in strengths:
        weight = solve_sums(sums, strength / float(sums[0, 0]))
        yield x @ weight[1:] + weight[0]


def _fit_by_numbers(x: Tensor, y: Tensor, strength: float) -> Tensor:
    sums = sum_products(torch.cat([torch.ones_like(y[:, :1]), x, y], dim=1), y.shape[1])
    return solve_sums(sums, strength / len(x))[1:]


def sum_products(rows: Tensor, num_targets: int) -> Tensor:
    """Sums [1 + F, 1 + F + K] over rows [..., 1 + F + K], which are [1, x, y], of products of [1, x] with all."""
    rows = rows.flatten(0, -2)
    return rows[:, : rows.shape[1] - num_targets].T @ rows


def solve_sums(sums: Tensor, strength: Tensor | float) -> Tensor:
    """Weights [1 + F, K] of the ridge regression of y on [1, x], from what `sum_products` gives.

    `strength` is for each row: one for all F numbers of x, or [F].
    """
    size = len(sums)
    penalty = sums.new_zeros(size)
    penalty[1:] = strength
    return torch.linalg.solve(sums[:, :size] + sums[0, 0] * penalty.diag(), sums[:, size:])


def variances(sums: Tensor) -> Tensor:
    """Variances [F] of the numbers x that `sums` is of; 1 of those that never change, which so get no weight."""
    means = sums[0, 1 : len(sums)] / sums[0, 0]
    found = sums.diagonal()[1:] / sums[0, 0] - means**2
    return torch.where(found > 1e-12, found, 1.0)


def squared_error(weights: Tensor, sums: Tensor) -> float:
    """Sum of squared errors over the rows that `sums` is of, less that of saying 0."""
    size = len(sums)
    return float((weights * (sums[:, :size] @ weights - 2 * sums[:, size:])).sum())
