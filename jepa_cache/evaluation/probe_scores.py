"""Scores of the probes on held-out episodes, kept as sums per episode so that whole episodes can be drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

R2, QUADRATIC_R2, BALANCED_ACCURACY = "r2", "quadratic_r2", "balanced_accuracy"


class RegressionSums(NamedTuple):
    """Of the rows of each of E episodes: squared errors of the head, and of the training mean, [E] each."""

    errors: np.ndarray
    baseline_errors: np.ndarray

    def score(self, weights: np.ndarray) -> np.ndarray:
        """R2 [R] when episode e counts weights[r, e] times: one minus squared error over that of the training mean.

        Against the held-out rows' own mean, which no head can know, few episodes gave R2 of -1.3 to heads that said just the
        training mean, and intervals that chance did not explain. NaN where the training mean makes no error.

        Source: out-of-sample R2, Campbell and Thompson (2008).
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = weights @ self.baseline_errors
            return np.where(spread > 0, 1 - weights @ self.errors / spread, np.nan)

    def baseline(self) -> float:
        """R2 of the training mean: 0 by definition."""
        return 0.0


class LabelSums(NamedTuple):
    """Of each of E episodes: rows of each of C labels [E, C], how many of them were named right, and were so by the baseline."""

    counts: np.ndarray
    hits: np.ndarray
    baseline_hits: np.ndarray

    def score(self, weights: np.ndarray) -> np.ndarray:
        """Balanced accuracy [R] when episode e counts weights[r, e] times: mean over the labels there of the share named right."""
        return self._balanced(weights, self.hits)

    def baseline(self) -> float:
        """What always the most frequent training label gets: 1 / C, and 0 where no held-out row has it."""
        return float(self._balanced(np.ones((1, len(self.counts))), self.baseline_hits)[0])

    def _balanced(self, weights: np.ndarray, hits: np.ndarray) -> np.ndarray:
        counts = weights @ self.counts
        with np.errstate(invalid="ignore"):
            return np.nanmean(np.where(counts > 0, weights @ hits / counts, np.nan), axis=1)


def sum_regression(
    true: np.ndarray, predicted: np.ndarray, mean: np.ndarray, episodes: Sequence[str]
) -> RegressionSums:
    """Sums per episode, sorted by key, of [n, k] true and predicted values and the [k] training mean."""
    of_episode = _membership(episodes)
    return RegressionSums(*(of_episode @ ((told - true) ** 2).sum(axis=1) for told in (predicted, mean)))


def sum_labels(true: np.ndarray, predicted: np.ndarray, majority: str, episodes: Sequence[str]) -> LabelSums:
    """Sums per episode, sorted by key, of [n] true and predicted labels; the labels are those that occur among the true ones."""
    one_hot = (true[:, None] == np.unique(true)[None]).astype(np.float64)
    of_episode = _membership(episodes)
    right, baseline = (one_hot * (true == named)[:, None] for named in (predicted, majority))
    return LabelSums(of_episode @ one_hot, of_episode @ right, of_episode @ baseline)


def draw_episodes(num_episodes: int, *, num_resamples: int, seed: int) -> np.ndarray:
    """How often each episode counts: [1 + resamples, E]; first once each, then as in `metrics.bootstrap_mean`.

    Raises:
        ValueError: When there are fewer than two episodes.
    """
    if num_episodes < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {num_episodes}")
    picks = np.random.default_rng(seed).integers(num_episodes, size=(num_resamples, num_episodes))
    drawn = (picks[:, :, None] == np.arange(num_episodes)).sum(axis=1)
    return np.concatenate([np.ones((1, num_episodes)), drawn])


def _membership(episodes: Sequence[str]) -> np.ndarray:
    keys = np.array(episodes)
    return (np.unique(keys)[:, None] == keys[None]).astype(np.float64)
