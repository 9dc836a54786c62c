"""Errors of predicted tokens and what they say about episodes: means with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor


class Estimate(NamedTuple):
    """A mean over episodes and its 95 % interval."""

    mean: float
    low: float
    high: float


def l1_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over tokens and channels: [B, T, N, D] twice to [B, T]."""
    return (predicted - target).abs().mean(dim=(-2, -1))


def cosine_similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of the angle between predicted and true tokens: [B, T, N, D] twice to [B, T]."""
    return F.cosine_similarity(predicted, target, dim=-1).mean(dim=-1)


def episode_means(values: np.ndarray, episodes: Sequence[str]) -> np.ndarray:
    """Mean of the windows of each episode: [windows] or [windows, K] to [episodes] or [episodes, K], sorted by key."""
    names = np.array(episodes)
    return np.stack([values[names == name].mean(axis=0) for name in sorted(set(episodes))])


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
    if len(values) < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {len(values)}")
    picks = np.random.default_rng(seed).integers(len(values), size=(num_resamples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))
