"""Distances of distributions, on made sets with a known answer.

Claims:
- the Fréchet distance of sets with exactly known moments equals the formula for Gaussians, worked out by hand and by `sqrtm`;
- moments and kernel sums of groups give what the whole set gives, whichever groups are kept;
- MMD equals a plain double loop, has mean 0 for equal distributions, and its population value for two known Gaussians;
- the jackknife's interval of a mean is Student's.
"""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import t

from jepa_cache.evaluation.distances import (
    Moments,
    frechet_distance,
    jackknife,
    median_distance,
    mmd,
    sum_kernels,
    sum_moments,
)


def exact_set(mean: np.ndarray, covariance: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Vectors [count, d] whose mean and unbiased covariance are exactly the given ones."""
    vectors = rng.normal(size=(count, len(mean)))
    vectors -= vectors.mean(axis=0)
    vectors = vectors @ np.linalg.inv(np.linalg.cholesky(np.cov(vectors.T))).T
    return vectors @ np.linalg.cholesky(covariance).T + mean


def whole(vectors: np.ndarray) -> Moments:
    return Moments(*(part[0] for part in sum_moments(vectors, np.zeros(len(vectors), int), 1)))


def test_frechet_of_axis_aligned_gaussians_is_the_sum_over_axes():
    # |m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances: 9 + 16 + (2 - 1)^2 + (3 - 5)^2.
    rng = np.random.default_rng(0)
    one = exact_set(np.array([0.0, 0.0]), np.diag([4.0, 9.0]), 50, rng)
    other = exact_set(np.array([3.0, -4.0]), np.diag([1.0, 25.0]), 70, rng)
    assert frechet_distance(whole(one), whole(other)) == pytest.approx(30.0, abs=1e-9)


def test_frechet_of_covariances_that_do_not_commute_equals_sqrtm():
    rng = np.random.default_rng(1)
    one, other = (rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5) for _ in range(2))
    first, second = np.cov(one.T), np.cov(other.T)
    shift = one.mean(axis=0) - other.mean(axis=0)
    expected = shift @ shift + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(whole(one), whole(other)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_a_set_with_itself_is_zero_also_where_the_covariance_has_no_full_rank():
    flat = np.random.default_rng(2).normal(size=(40, 3)) @ np.ones((3, 6))
    assert frechet_distance(whole(flat), whole(flat)) == pytest.approx(0, abs=1e-6)


def test_kept_groups_give_what_their_vectors_give():
    rng = np.random.default_rng(3)
    sets, groups = [rng.normal(size=(30, 4)), rng.normal(size=(24, 4)) + 0.5], [np.arange(30) % 3, np.arange(24) % 3]
    kept = np.array([True, False, True])
    moments = [sum_moments(x, g, 3) for x, g in zip(sets, groups, strict=True)]
    left = [x[kept[g]] for x, g in zip(sets, groups, strict=True)]
    parts = [Moments(*(part[kept].sum(axis=0) for part in m)) for m in moments]
    assert parts[0].mean() == pytest.approx(left[0].mean(axis=0))
    assert parts[0].covariance() == pytest.approx(np.cov(left[0].T))
    kernels = sum_kernels(*sets, (groups[0], groups[1]), 3, 1.3)
    assert mmd(kernels, kept) == pytest.approx(plain_mmd(*left, 1.3))


def plain_mmd(one: np.ndarray, other: np.ndarray, bandwidth: float) -> float:
    kernel = lambda x, y: np.exp(-((x - y) ** 2).sum() / (2 * bandwidth**2))  # noqa: E731
    within = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (one, other)]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in one for y in other])


def test_mmd_is_unbiased_and_meets_the_value_of_known_gaussians():
    # For N(m, I) and N(0, I) in d dimensions and bandwidth 1: 2 (1/3)^(d/2) (1 - exp(-|m|^2 / 6)).
    rng, size, shift = np.random.default_rng(4), 2, 1.0
    mean = np.array([shift, 0.0])

    def draws(offset: np.ndarray) -> np.ndarray:
        found = []
        for _ in range(300):
            one, other = rng.normal(size=(20, size)) + offset, rng.normal(size=(20, size))
            whole_set = np.zeros(20, int)
            found.append(mmd(sum_kernels(one, other, (whole_set, whole_set), 1, 1.0), np.array([True])))
        return np.array(found)

    expected = 2 * (1 / 3) ** (size / 2) * (1 - np.exp(-(shift**2) / 6))
    for values, truth in ((draws(0 * mean), 0.0), (draws(mean), expected)):
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - truth) < 4 * error, (values.mean(), truth, error)
    assert (draws(0 * mean) < 0).any()  # an estimate that were squared or clipped would have a mean above 0


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(5).normal(size=9)
    found = jackknife(lambda kept: float(values[kept].mean()), 9)
    reach = t.ppf(0.975, 8) * values.std(ddof=1) / 3
    assert found == pytest.approx((values.mean(), values.mean() - reach, values.mean() + reach))


def test_vectors_that_are_all_equal_have_no_bandwidth():
    assert median_distance(np.array([[0.0], [3.0], [4.0]])) == 3.0
    with pytest.raises(ValueError, match="no bandwidth"):
        median_distance(np.ones((5, 2)))
