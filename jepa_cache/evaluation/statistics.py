"""Distances between two sets of vectors, each from sums that can be taken group by group: Fréchet and maximum mean discrepancy.

Everything is float64. Letters: d dimensions, n and m vectors, G groups (of episodes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh, eigvalsh

from jepa_cache.evaluation.metrics import Estimate


class TooFewError(ValueError):
    """There is too little to estimate a distribution from; the message says of what, and the way out."""


class Moments(NamedTuple):
    """Sums over vectors from which mean and covariance follow; those of two sets add up.

    Attributes:
        count: [...] vectors.
        total: [..., d] sum.
        outer: [..., d, d] sum of outer products.
    """

    count: np.ndarray
    total: np.ndarray
    outer: np.ndarray

    def mean(self) -> np.ndarray:
        """Mean [d]."""
        return self.total / self.count

    def covariance(self) -> np.ndarray:
        """Unbiased covariance [d, d]."""
        mean = self.mean()
        return (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)


def sum_moments(vectors: np.ndarray, groups: np.ndarray, num_groups: int) -> Moments:
    """Moments of each group: vectors [n, d] with groups [n] in [0, G) to count [G], total [G, d], outer [G, d, d]."""
    size = vectors.shape[1]
    moments = Moments(np.zeros(num_groups), np.zeros((num_groups, size)), np.zeros((num_groups, size, size)))
    for group in np.unique(groups):
        rows = vectors[groups == group].astype(np.float64)
        moments.count[group] = len(rows)
        moments.total[group] = rows.sum(axis=0)
        moments.outer[group] = rows.T @ rows
    return moments


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Fréchet distance of the Gaussians that share mean and covariance with two sets.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in the unit of the vectors squared; at least 0. With few vectors it is biased
    upwards, the more the fewer there are.

    Source: Dowson and Landau 1982; as a distance of learned features, Heusel et al. 2017 (FID).
    """
    first, second = one.covariance(), other.covariance()
    values, basis = eigh(first)
    root = (basis * np.sqrt(np.maximum(values, 0))) @ basis.T
    # (C1 C2)^(1/2) and (C1^(1/2) C2 C1^(1/2))^(1/2) have the same trace; the second matrix is symmetric.
    cross = np.sqrt(np.maximum(eigvalsh(root @ second @ root), 0)).sum()
    shift = one.mean() - other.mean()
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))


class Kernels(NamedTuple):
    """Kernel values of two sets summed by group; those of groups add up.

    Attributes:
        within_first: [G, G] over pairs of the first set, a vector with itself left out.
        within_second: [G, G] likewise of the second.
        across: [G, G], first set's groups in rows.
        count_first: [G] vectors.
        count_second: [G].
    """

    within_first: np.ndarray
    within_second: np.ndarray
    across: np.ndarray
    count_first: np.ndarray
    count_second: np.ndarray


def sum_kernels(
    first: np.ndarray,
    second: np.ndarray,
    groups: tuple[np.ndarray, np.ndarray],
    num_groups: int,
    bandwidth: float,
) -> Kernels:
    """Gaussian kernel exp(-|x - y|^2 / (2 bandwidth^2)) of vectors [n, d] and [m, d], whose groups are [n] and [m]."""
    from sklearn.metrics.pairwise import euclidean_distances

    member = [np.eye(num_groups)[group] for group in groups]

    def summed(x: np.ndarray, y: np.ndarray, rows: int, columns: int) -> np.ndarray:
        distances = euclidean_distances(x.astype(np.float64), y.astype(np.float64), squared=True)
        kernel = np.exp(distances / (-2 * bandwidth**2))
        if rows == columns:
            np.fill_diagonal(kernel, 0)
        return member[rows].T @ kernel @ member[columns]

    return Kernels(
        summed(first, first, 0, 0),
        summed(second, second, 1, 1),
        summed(first, second, 0, 1),
        member[0].sum(axis=0),
        member[1].sum(axis=0),
    )


def mmd(kernels: Kernels, kept: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy over the kept groups, [G] bool.

    Its mean is 0 for two independent sets of one distribution, so it may come out below 0.

    Source: Gretton et al. 2012, lemma 6 (the U-statistic).
    """
    keep = kept.astype(np.float64)
    n, m = keep @ kernels.count_first, keep @ kernels.count_second
    within = keep @ kernels.within_first @ keep / (n * (n - 1)) + keep @ kernels.within_second @ keep / (m * (m - 1))
    return float(within - 2 * (keep @ kernels.across @ keep) / (n * m))


def median_distance(vectors: np.ndarray) -> float:
    """Median distance between different vectors [n, d]: the usual bandwidth (Gretton et al. 2012, section 8).

    Raises:
        TooFewError: More than half of the pairs are equal.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    distances = euclidean_distances(vectors.astype(np.float64))
    median = float(np.median(distances[np.triu_indices(len(vectors), 1)]))
    if median == 0:
        raise TooFewError(
            f"more than half of the pairs among {len(vectors)} token vectors are equal, so MMD has no bandwidth: these "
            "tokens tell nothing apart; leave distances out of evaluate.measure"
        )
    return median


def jackknife(statistic: Callable[[np.ndarray], float], num_groups: int) -> Estimate:
    """Value over all groups and its 95 % interval, from the values with one group left out at a time.

    The bootstrap repeats vectors, and both distances grow where vectors repeat; leaving out does not. The interval is that of
    Student's t with G - 1 degrees of freedom.

    Args:
        statistic: Of the kept groups, [G] bool.
        num_groups: G, at least 2.

    Source: the delete-a-group jackknife (Efron and Stein 1981).
    """
    from scipy.stats import t

    kept = np.ones(num_groups, bool)
    value = statistic(kept)
    without = np.array([statistic(np.arange(num_groups) != group) for group in range(num_groups)])
    error = np.sqrt((num_groups - 1) * without.var())
    reach = t.ppf(0.975, num_groups - 1) * error
    return Estimate(value, value - reach, value + reach)
