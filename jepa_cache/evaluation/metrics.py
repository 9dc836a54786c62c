"""Errors of predicted tokens and what they say about episodes: means with bootstrap intervals, and a paired test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

MAX_EXACT_EPISODES = 13  # 2^13 signs at most are all tried; beyond, as many are drawn
NUM_SIGNS = 1 << MAX_EXACT_EPISODES


class Estimate(NamedTuple):
    """A mean over episodes and its 95 % interval."""

    mean: float
    low: float
    high: float


def l1_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over tokens and channels: [B, T, N, D] twice to [B, T]."""
    return (predicted - target).abs().mean(dim=(-2, -1))


def l2_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Root of the mean squared difference over tokens and channels of a step: [B, T, N, D] twice to [B, T]."""
    return (predicted - target).square().mean(dim=(-2, -1)).sqrt()


def cosine_similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of the angle between predicted and true tokens: [B, T, N, D] twice to [B, T]."""
    return F.cosine_similarity(predicted, target, dim=-1).mean(dim=-1)


MEASURES = {"l1": l1_error, "l2": l2_error, "cosine": cosine_similarity}
"""By name: what is measured of every predicted step."""


def episode_means(values: np.ndarray, episodes: Sequence[str]) -> np.ndarray:
    """Mean of the windows of each episode: [windows] or [windows, K] to [episodes] or [episodes, K] float64, sorted by key.

    NaN stands for windows that a prediction does not exist for: they are left out, and an episode of such ones alone is NaN.
    """
    names = np.array(episodes)
    means = []
    for name in sorted(set(episodes)):
        own = values[names == name].astype(np.float64)
        counts = np.isfinite(own).sum(axis=0)
        sums = np.where(np.isfinite(own), own, 0.0).sum(axis=0)
        means.append(np.where(counts, sums / np.maximum(counts, 1), np.nan))
    return np.stack(means)


def bootstrap_mean(values: np.ndarray, *, num_resamples: int, seed: int) -> Estimate:
    """Mean and 95 % percentile interval when whole episodes are drawn again with replacement.

    Windows of one episode resemble each other, so episodes, not windows, are the unit of chance.

    Args:
        values: [episodes], one number each; for a gap, the paired difference.
        num_resamples: Resamples of the episodes.
        seed: Of the resampling.

    Raises:
        ValueError: When there are fewer than two episodes.

    Source: the percentile bootstrap of Efron (1979).
    """
    return bootstrap_ratio(values, np.ones(len(values)), num_resamples=num_resamples, seed=seed)


def bootstrap_ratio(parts: np.ndarray, wholes: np.ndarray, *, num_resamples: int, seed: int) -> Estimate:
    """Ratio of two means over the same episodes, both drawn again together: [episodes] twice.

    Args:
        parts: Such as the paired differences between two errors.
        wholes: Such as the larger error.
        num_resamples: Resamples of the episodes.
        seed: Of the resampling.

    Raises:
        ValueError: When there are fewer than two episodes.
    """
    if len(parts) < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {len(parts)}")
    picks = np.random.default_rng(seed).integers(len(parts), size=(num_resamples, len(parts)))
    low, high = np.percentile(parts[picks].mean(axis=1) / wholes[picks].mean(axis=1), [2.5, 97.5])
    return Estimate(float(parts.mean() / wholes.mean()), float(low), float(high))


def paired_p_value(gaps: np.ndarray, *, seed: int) -> float:
    """Chance of a mean at least as far from 0 as that of `gaps` [episodes] if each sign were a coin's throw; two-sided.

    All signs are tried for up to `MAX_EXACT_EPISODES` episodes, else as many are drawn. It takes six episodes to come
    below 0.05, as 2 / 2^5 is above it.

    Source: the sign-flip test of Fisher (1935), by `scipy.stats.permutation_test`.
    """
    from scipy.stats import permutation_test

    if not np.any(gaps):
        return 1.0
    result = permutation_test(
        (gaps,), np.mean, permutation_type="samples", vectorized=True, n_resamples=NUM_SIGNS, rng=seed
    )
    return float(result.pvalue)
