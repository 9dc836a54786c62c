"""What the probes read: steps of the cache as short rows of numbers, with the actions, states and labels that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from sklearn.random_projection import SparseRandomProjection
from torch import Tensor

from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.windows import Window, count_episodes
from jepa_cache.evaluation.context import EvaluationContext, choose_windows

MAX_CELLS = (
    4  # of the coarse grid along each side: 16 places tell a turn from a walk, and 256 would not fit a linear head
)
BATCH_BYTES = 64 << 20  # of float32 tokens at a time
PROJECTION_SEED = 0


class Sample(NamedTuple):
    """n windows of T steps from some episodes.

    Attributes:
        features: [n, T, P] float32, rows of each step; see `StepFeatures`.
        actions: [n, T-1, A] float32, unscaled.
        states: [n, T, S] float32, unscaled.
        windows: Where they lie.
        episodes: Key of each window's episode.
    """

    features: np.ndarray
    actions: np.ndarray
    states: np.ndarray
    windows: list[Window]
    episodes: list[str]


class StepFeatures:
    """Tokens of a step as a row of at most `width` numbers.

    Tokens are averaged over the cells of a grid of at most 4 x 4 (which the mean over all tokens is a sum of); where these cells
    have more numbers than `width`, a sparse random projection with a fixed seed shortens them. It is the same for every data set
    of a shape, so it learns nothing from anybody.

    Source: Li, Hastie and Church, "Very sparse random projections" (2006), as in scikit-learn.
    """

    def __init__(self, grid: tuple[int, int], token_width: int, *, width: int) -> None:
        """Prepare the projection.

        Args:
            grid: Rows and columns of a step's tokens.
            token_width: D.
            width: P at most.
        """
        self._grid = grid
        self._cells = tuple(min(side, MAX_CELLS) for side in grid)
        num_numbers = self._cells[0] * self._cells[1] * token_width
        self.width = min(num_numbers, width)
        self._projection = None
        if num_numbers > width:
            projection = SparseRandomProjection(width, dense_output=True, random_state=PROJECTION_SEED)
            self._projection = projection.fit(np.zeros((1, num_numbers), np.float32))

    def __call__(self, reps: Tensor) -> np.ndarray:
        """Rows [B, T, P] float32 of tokens [B, T, N, D]."""
        num_windows, num_steps, _, token_width = reps.shape
        pictures = reps.reshape(num_windows * num_steps, *self._grid, token_width).permute(0, 3, 1, 2)
        rows = F.adaptive_avg_pool2d(pictures, self._cells).flatten(1).cpu().numpy()
        if self._projection is not None:
            rows = self._projection.transform(rows)
        return rows.reshape(num_windows, num_steps, self.width).astype(np.float32)


def read_sample(evaluation: EvaluationContext, segments: Sequence[Segment], *, num_steps: int) -> Sample:
    """Read windows spread evenly over the episodes of some segments, `evaluate.probe_windows` at most.

    Tokens are layer-normed where the predictor sees them so. Memory: 4 n T P bytes and one batch of tokens, whatever N and D.

    Raises:
        ValueError: No segment has `num_steps` steps.
    """
    dataset, settings, manifest = evaluation.dataset, evaluation.config.evaluate, evaluation.dataset.manifest
    per_episode = -(-settings.probe_windows // count_episodes(segments))
    chosen = choose_windows(segments, num_steps, per_episode, limit=settings.probe_windows)
    to_row = StepFeatures(manifest.grid, manifest.width, width=settings.probe_width)
    batch_size = max(1, BATCH_BYTES // (4 * num_steps * manifest.num_tokens * manifest.width))
    features = [to_row(h) for _, _, h in evaluation.iter_windows(chosen, "probing", batch_size=batch_size)]
    actions, states, windows = [], [], chosen.windows
    for store, start, _ in windows:
        store_actions, store_states = dataset.controls(store)
        actions.append(store_actions[start : start + num_steps - 1])
        states.append(store_states[start : start + num_steps])
    return Sample(
        np.concatenate(features),
        np.stack(actions),
        np.stack(states),
        windows,
        chosen.episodes,
    )


def window_labels(dataset: CachedDataset, sample: Sample) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Labels of windows that this data set has, and why it lacks the others.

    `dataset` and `camera` are those that the window was recorded with, `gui` says whether a screen is open at one of its steps,
    `success` whether its episode ended well.

    Returns:
        Label to [n] texts, and label to reason.
    """
    num_steps = sample.features.shape[1]
    stores = sorted({window.store for window in sample.windows})
    parts = {store: dataset.manifest.stores[store][0] for store in stores}
    labels = {
        "dataset": np.array([parts[window.store].dataset for window in sample.windows]),
        "camera": np.array([str(parts[window.store].camera) for window in sample.windows]),
    }
    reasons: dict[str, str] = {}
    gui = {store: dataset.steps(store).column("gui").to_numpy() for store in stores}
    labels["gui"] = np.array([str(bool(gui[w.store][w.start : w.start + num_steps].any())) for w in sample.windows])
    success = {store: _episode_successes(dataset, store) for store in stores}
    if any(None in endings.values() for endings in success.values()):
        reasons["success"] = "not every episode records how it ended"
    else:
        labels["success"] = np.array(
            [str(success[w.store][episode]) for w, episode in zip(sample.windows, sample.episodes, strict=True)]
        )
    return labels, reasons


def _episode_successes(dataset: CachedDataset, store: int) -> dict[str, bool | None]:
    controls = dataset.read_native_controls(store)
    return {
        episode: bool(columns["success"].any()) if "success" in columns else None
        for episode, columns in controls.items()
    }
