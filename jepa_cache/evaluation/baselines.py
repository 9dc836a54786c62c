"""Predictions that need no predictor, and controls that take its actions away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex, spread_windows
from jepa_cache.predictor.rollout import as_reps

TRAINING_WINDOWS_PER_EPISODE = 8
CPU = torch.device("cpu")


def training_mean(
    dataset: CachedDataset, segments: Sequence[Segment], scaler: Scaler, *, num_steps: int, normalize_reps: bool
) -> Tensor:
    """Mean of the training tokens at each position, [N, D] float32, over windows spread evenly over each episode."""
    index = WindowIndex(segments, num_steps)
    numbers = spread_windows(index, TRAINING_WINDOWS_PER_EPISODE)
    loader = WindowLoader(dataset, index, scaler)
    total, count = torch.zeros(()), 0
    for batch in loader.iterate([numbers[start : start + 16] for start in range(0, len(numbers), 16)]):
        reps = as_reps(to_device(batch, CPU).tokens, normalize_reps)
        total = total + reps.sum(dim=(0, 1))
        count += reps.shape[0] * reps.shape[1]
    return total / count


def choose_donors(episodes: Sequence[str], *, seed: int) -> np.ndarray:
    """For every window another one, of another episode, whose actions it is given: [windows] positions.

    Shuffled actions keep their marginals; only what links them to the frames is gone.

    Raises:
        ValueError: When all windows are of one episode.
    """
    names = np.array(episodes)
    generator = np.random.default_rng(seed)
    if len(set(episodes)) < 2:
        raise ValueError(
            "the control with shuffled actions needs at least two held-out episodes; raise split.val_share, try another "
            f"split.seed, or add recordings (held out: {', '.join(sorted(set(episodes))) or 'none'})"
        )
    return np.array([generator.choice(np.flatnonzero(names != name)) for name in names])
