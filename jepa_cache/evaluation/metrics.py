"""Errors of predicted tokens, what they say about episodes (means with bootstrap intervals, a paired test), and how figures are written."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.files import atomic_file
from jepa_cache.predictor.rollout import l1_error
from jepa_cache.store.recipe import canonical_json

MAX_EXACT_EPISODES = 13  # 2^13 signs at most are all tried; beyond, as many are drawn
NUM_SIGNS = 1 << MAX_EXACT_EPISODES


class Estimate(NamedTuple):
    """A mean over episodes and its 95 % interval."""

    mean: float
    low: float
    high: float


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
    place = {name: position for position, name in enumerate(sorted(set(episodes)))}
    owners = np.array([place[name] for name in episodes])
    order, sizes = np.argsort(owners, kind="stable"), np.bincount(owners)
    firsts = np.cumsum(sizes) - sizes
    means = np.empty((len(place), *values.shape[1:]))
    for size in np.unique(sizes):  # episodes of equally many windows together: one by one costs seconds for thousands
        alike = np.flatnonzero(sizes == size)
        own = values[order[firsts[alike, None] + np.arange(size)]].astype(np.float64)
        counts = np.isfinite(own).sum(axis=1)
        sums = np.where(np.isfinite(own), own, 0.0).sum(axis=1)
        means[alike] = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    return means


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
    resampled = _resample(values, num_resamples, seed)
    return _interval(values.mean(), resampled)


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
    resampled = [_resample(values, num_resamples, seed) for values in (parts, wholes)]
    return _interval(parts.mean() / wholes.mean(), resampled[0] / resampled[1])


def _interval(value: float, resampled: np.ndarray) -> Estimate:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def _resample(values: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Means [resamples] of values [episodes] drawn again."""
    if len(values) < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {len(values)}")
    picks = _draw_picks(len(values), num_resamples, seed)
    # Some rows at a time stay in the processor's cache; an evaluation does this hundreds of times.
    return np.concatenate([values[picks[row : row + 64]].mean(axis=1) for row in range(0, num_resamples, 64)])


@functools.lru_cache(maxsize=1)
def _draw_picks(num_episodes: int, num_resamples: int, seed: int) -> np.ndarray:
    """Episodes [resamples, episodes] drawn with replacement: the same for all figures of an evaluation."""
    return np.random.default_rng(seed).integers(num_episodes, size=(num_resamples, num_episodes)).astype(np.int32)


def paired_p_value(gaps: np.ndarray, *, seed: int) -> float:
    """Chance of a mean at least as far from 0 as that of `gaps` [episodes] if each sign were a coin's throw; two-sided.

    All signs are tried for up to `MAX_EXACT_EPISODES` episodes, else as many are drawn. It takes six episodes to come
    below 0.05, as 2 / 2^5 is above it.

    Source: the sign-flip test of Fisher (1935), as in `scipy.stats.permutation_test`.
    """
    from scipy.stats import permutation_test

    if not np.any(gaps):
        return 1.0
    if len(gaps) <= MAX_EXACT_EPISODES:
        result = permutation_test((gaps,), np.mean, permutation_type="samples", vectorized=True, n_resamples=NUM_SIGNS)
        return float(result.pvalue)
    signs, value = _draw_signs(len(gaps), seed), gaps.mean()
    means = np.concatenate([signs[row : row + 64] @ gaps for row in range(0, NUM_SIGNS, 64)]) / len(gaps)
    nearly = abs(100 * np.finfo(np.float64).eps * value)  # equal but for rounding
    num_extreme = min((means <= value + nearly).sum(), (means >= value - nearly).sum()) + 1
    return float(min(1.0, 2 * num_extreme / (NUM_SIGNS + 1)))


@functools.lru_cache(maxsize=1)
def _draw_signs(num_episodes: int, seed: int) -> np.ndarray:
    """Signs [NUM_SIGNS, episodes] int8 as `permutation_test` draws them: a second each for some thousand episodes, so once, not for each test."""
    rng, pairs = np.random.default_rng(seed), np.tile(np.arange(2, dtype=np.int8), (64, num_episodes, 1))
    drawn = [rng.permuted(pairs, axis=-1)[..., 0] for _ in range(0, NUM_SIGNS, 64)]
    return 1 - 2 * np.concatenate(drawn)


FORMULA = re.compile(r"'*[=+\-@\t\r]")
EPISODES_FILE, SETTINGS_FILE = "episodes.csv", "settings.json"  # what `jepa-cache compare` reads beside metrics.json
MEASUREMENTS_FOLDER = "measurements"
"""Folder of the tables of optional measurements below an evaluation's: one DVC out, whatever was asked for."""


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, *, columns: Sequence[str] = ()) -> None:
    """Write rows that share their keys as CSV with one header line, atomically; None is an empty cell. The folder is made.

    Args:
        rows: With the same keys.
        path: Of the file.
        columns: Where there may be no row; else those of the first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]))
        writer.writeheader()
        writer.writerows({name: guard_cell(value) for name, value in row.items()} for row in rows)


def guard_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, with the `'` before it that makes it a text; all else as it is."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def unguard_cell(text: str) -> str:
    """The text that `guard_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write JSON with sorted keys, atomically: equal content gives equal bytes. The folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(content))


def build_section(
    name: str, values: Mapping[str, np.ndarray], episodes: Sequence[str], settings: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """Means over episodes under `name`, and their 95 % intervals under `<name>_ci`.

    Args:
        name: Of the section in metrics.json.
        values: Figure name to [windows].
        episodes: Key of each window's episode.
        settings: Resamples and seed.

    Raises:
        ValueError: When there are fewer than two episodes.
    """
    estimates = {
        figure: bootstrap_mean(
            episode_means(per_window, episodes), num_resamples=settings.num_bootstrap, seed=settings.seed
        )
        for figure, per_window in values.items()
    }
    return {
        name: {figure: estimate.mean for figure, estimate in estimates.items()},
        f"{name}_ci": {figure: [estimate.low, estimate.high] for figure, estimate in estimates.items()},
    }
