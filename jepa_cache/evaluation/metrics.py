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
BESIDE = ("l2", "cosine")
"""Measured of the predictor alone, for comparison with other work: whatever is held against something else is L1."""


def episode_means(values: np.ndarray, episodes: Sequence[str]) -> np.ndarray:
    """Mean of the windows of each episode: [windows] or [windows, K] to [episodes] or [episodes, K] float64, sorted by key.

    NaN stands for windows that a prediction does not exist for: they do not count, and an episode of such ones alone is NaN.
    """
    names, owners = np.unique(np.array(episodes), return_inverse=True)
    exists = np.isfinite(values)
    sums, counts = np.zeros((2, len(names), *values.shape[1:]))
    np.add.at(sums, owners, np.where(exists, values, 0.0))
    np.add.at(counts, owners, exists)
    return np.where(counts, sums / np.maximum(counts, 1), np.nan)


def bootstrap_mean(values: np.ndarray, wholes: np.ndarray | None = None, *, num_resamples: int, seed: int) -> Estimate:
    """Mean and 95 % percentile interval when whole episodes are drawn again with replacement.

    Windows of one episode resemble each other, so episodes, not windows, are the unit of chance. Values are [episodes], for a gap
    the paired differences; where `wholes` [episodes] are given, the estimate is of the ratio of the two means.

    Source: the percentile bootstrap of Efron (1979).
    """
    counts = draw_episodes(len(values), num_resamples=num_resamples, seed=seed)
    drawn, mean = counts @ values, values.mean()
    if wholes is None:
        drawn /= len(values)
    else:
        drawn, mean = drawn / (counts @ wholes), mean / wholes.mean()
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(mean), float(low), float(high))


@functools.lru_cache(maxsize=1)
def draw_episodes(num_episodes: int, *, num_resamples: int, seed: int) -> np.ndarray:
    """How often each episode counts in each resample: [resamples, episodes] float64, the same for all figures of an evaluation."""
    if num_episodes < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {num_episodes}")
    picks = np.random.default_rng(seed).integers(num_episodes, size=(num_resamples, num_episodes))
    places = picks + num_episodes * np.arange(num_resamples)[:, None]
    return np.bincount(places.ravel(), minlength=picks.size).reshape(picks.shape).astype(np.float64)


def paired_p_value(gaps: np.ndarray, *, seed: int) -> float:
    """Chance of a mean at least as far from 0 as that of `gaps` [episodes] if each sign were a coin's throw; two-sided.

    All signs are tried for up to `MAX_EXACT_EPISODES` episodes, else as many are drawn. It takes six episodes to come
    below 0.05, as 2 / 2^5 is above it.

    Source: the sign-flip test of Fisher (1935), as in `scipy.stats.permutation_test`, to the last bit.
    """
    if not np.any(gaps):
        return 1.0
    signs, value = _draw_signs(len(gaps), seed), gaps.mean()
    # Some rows at a time stay in the processor's cache; an evaluation does this dozens of times.
    means = np.concatenate([signs[row : row + 64] @ gaps for row in range(0, len(signs), 64)]) / len(gaps)
    nearly = abs(100 * np.finfo(np.float64).eps * value)  # equal but for rounding
    drawn = len(gaps) > MAX_EXACT_EPISODES  # then the observed signs count as one more draw
    num_extreme = min((means <= value + nearly).sum(), (means >= value - nearly).sum()) + drawn
    return float(min(1.0, 2 * num_extreme / (len(signs) + drawn)))


@functools.lru_cache(maxsize=1)
def _draw_signs(num_episodes: int, seed: int) -> np.ndarray:
    """Signs [draws, episodes] int8, all there are or as scipy draws them: a second each for some thousand episodes, so once a run."""
    if num_episodes <= MAX_EXACT_EPISODES:
        return 1 - 2 * (np.arange(1 << num_episodes)[:, None] >> np.arange(num_episodes) & 1)
    rng, pairs = np.random.default_rng(seed), np.tile(np.arange(2, dtype=np.int8), (64, num_episodes, 1))
    drawn = [rng.permuted(pairs, axis=-1)[..., 0] for _ in range(0, NUM_SIGNS, 64)]
    return 1 - 2 * np.concatenate(drawn)


def build_section(
    name: str, values: Mapping[str, np.ndarray], episodes: Sequence[str], settings: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """Sections of metrics.json: means over episodes of figures of windows, and under `<name>_ci` their 95 % intervals."""
    resampling = {"num_resamples": settings.num_bootstrap, "seed": settings.seed}
    estimates = {
        figure: bootstrap_mean(episode_means(of_windows, episodes), **resampling)
        for figure, of_windows in values.items()
    }
    return {
        name: {figure: estimate.mean for figure, estimate in estimates.items()},
        f"{name}_ci": {figure: [estimate.low, estimate.high] for figure, estimate in estimates.items()},
    }


FORMULA = re.compile(r"'*[=+\-@\t\r]")
MEASUREMENTS_FOLDER = "measurements"
"""Folder of the tables of optional measurements below an evaluation's: one DVC out, whatever was requested."""


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, *, columns: Sequence[str] = ()) -> None:
    """Write rows that share their keys (`columns`, where there may be no row) as CSV, atomically; None is an empty cell."""
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
    """Write JSON with sorted keys, atomically: equal content gives equal bytes."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(content))
