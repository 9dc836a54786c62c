"""Errors and what they say about episodes.

Claims:
- L1 and cosine are means over tokens and channels; windows of one episode count as one;
- the interval covers a known mean at about the stated rate, needs two episodes, and is the same by seed;
- p values of many episodes are scipy's, to the last bit;
- the paired test is exact for few episodes, and cannot reject with five.
"""

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test

from jepa_cache.evaluation.metrics import (
    bootstrap_mean,
    cosine_similarity,
    episode_means,
    l1_error,
    l2_error,
    paired_p_value,
)


def test_errors_are_means_over_tokens_and_channels():
    target = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5) + 1
    assert torch.allclose(l1_error(target + 0.5, target), torch.full((2, 3), 0.5))
    assert torch.allclose(l2_error(target + 0.5, target), torch.full((2, 3), 0.5))
    half = target.clone()
    half[..., :2, :] += 3.0
    assert torch.allclose(l1_error(half, target), torch.full((2, 3), 1.5))
    assert torch.allclose(l2_error(half, target), torch.full((2, 3), 4.5**0.5))
    assert torch.allclose(cosine_similarity(2 * target, target), torch.ones(2, 3))
    assert torch.allclose(cosine_similarity(-target, target), -torch.ones(2, 3))


def test_an_episode_counts_once_however_many_windows_it_has():
    values, episodes = np.array([1.0, 3.0, 10.0]), ["b", "b", "a"]
    assert episode_means(np.tile(values, 5), episodes * 5).tolist() == [10.0, 2.0]
    assert episode_means(values, episodes).tolist() == [10.0, 2.0]
    assert episode_means(np.stack([values, -values], axis=1), episodes).tolist() == [[10.0, -10.0], [2.0, -2.0]]
    values, episodes = np.array([1.0, np.nan, 3.0, np.nan]), ["a", "a", "b", "c"]  # NaN: a prediction does not exist
    assert np.array_equal(episode_means(values, episodes), [1.0, 3.0, np.nan], equal_nan=True)


def test_the_interval_covers_the_true_mean_at_about_the_stated_rate():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(600):
        low, high = bootstrap_mean(rng.gamma(2.0, 1.5, size=40), num_resamples=400, seed=trial)[1:]
        covered += low <= 3.0 <= high
    # 95 % less the known shortfall of percentiles on skewed data of 40; binomial deviation of the count is 1 %.
    assert 0.90 <= covered / 600 <= 0.97


def test_the_interval_is_the_same_by_seed_and_holds_the_mean():
    values = np.random.default_rng(3).standard_normal(9)
    first = bootstrap_mean(values, num_resamples=500, seed=2)
    assert (
        first == bootstrap_mean(values, num_resamples=500, seed=2) != bootstrap_mean(values, num_resamples=500, seed=3)
    )
    assert first.low < first.mean < first.high and first.mean == pytest.approx(values.mean())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_episodes_have_no_interval(count):
    with pytest.raises(ValueError, match=f"at least two held-out episodes; got {count}"):
        bootstrap_mean(np.zeros(count), num_resamples=10, seed=0)


def test_the_interval_of_a_ratio_draws_both_parts_together():
    wholes = np.random.default_rng(0).uniform(1, 5, 8)
    ratio = bootstrap_mean(0.2 * wholes, wholes, num_resamples=100, seed=0)
    assert np.allclose(ratio, 0.2)


def test_the_paired_test_is_exact_for_few_episodes():
    assert paired_p_value(np.zeros(7), seed=0) == 1
    assert paired_p_value(np.ones(6), seed=0) == pytest.approx(2 / 2**6)
    assert paired_p_value(np.array([1.0, 2, 3, -0.5]), seed=0) == pytest.approx(4 / 2**4)
    assert paired_p_value(np.ones(5), seed=0) > 0.05


@pytest.mark.parametrize("count", [14, 90])
def test_the_paired_test_of_many_episodes_is_scipy_s(count):
    gaps = np.random.default_rng(count).standard_normal(count).round(1) + 0.1
    theirs = permutation_test((gaps,), np.mean, permutation_type="samples", vectorized=True, n_resamples=8192, rng=3)
    assert paired_p_value(gaps, seed=3) == theirs.pvalue
