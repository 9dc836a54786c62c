"""What the probes read, their heads (from scikit-learn), and scores that are kept as sums per episode.

Heads are fitted on training episodes alone; their regularisation is chosen there by folds of whole episodes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
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


NUM_FOLDS = 3
# Times the number of rows, on standardised features; the last leaves hardly more than the mean.
RIDGE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
KERNEL_PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
LOGISTIC_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MAX_ITERATIONS = 1000


class RegressionHead(NamedTuple):
    """Regressions of several targets at once.

    Attributes:
        pipeline: Standardisation and the regressions, [n, P] to [n, K] differences from the means.
        columns: Target to its columns among the K.
        means: [K], of the training rows: what the baseline says.
        penalties: Chosen one of each target.
    """

    pipeline: Pipeline
    columns: dict[str, slice]
    means: np.ndarray
    penalties: dict[str, float]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """[n, K] of rows [n, P]."""
        return self.pipeline.predict(features).reshape(len(features), -1) + self.means


class LabelHead(NamedTuple):
    """A logistic regression of one label, its classes weighted alike.

    Attributes:
        pipeline: Standardisation and the regression, [n, P] to [n] labels.
        majority: Most frequent label of the training rows: what the baseline says.
        strength: Chosen one, of `LOGISTIC_STRENGTHS`.
    """

    pipeline: Pipeline
    majority: str
    strength: float


def fit_linear(features: np.ndarray, targets: Mapping[str, np.ndarray], episodes: Sequence[str]) -> RegressionHead:
    """Fit a ridge regression for each target; its penalty is the best one on left-out training episodes.

    Args:
        features: [n, P] of the training rows.
        targets: Target to [n, k] values, k = 2 for an angle's sine and cosine.
        episodes: [n] keys; an episode is never on both sides of a fold.

    Raises:
        ValueError: There are fewer than two episodes.
    """
    columns, joined, means = _join(targets)
    scaler = StandardScaler().fit(features)
    scaled, penalties = scaler.transform(features), [share * len(features) for share in RIDGE_PENALTIES]
    chosen = _choose(lambda penalty: Ridge(alpha=penalty), penalties, scaled, joined, columns, episodes)
    head = Ridge(alpha=_per_column(chosen, columns)).fit(scaled, joined)
    return RegressionHead(Pipeline([("scale", scaler), ("head", head)]), columns, means, chosen)


def fit_quadratic(features: np.ndarray, targets: Mapping[str, np.ndarray], episodes: Sequence[str]) -> RegressionHead:
    """As `fit_linear`, by kernel ridge regression on all products of two numbers of a row.

    What moved is in how two frames go together, not in their sum: on the sample data turns of the view are found by this head
    alone. Memory: 8 n^2 bytes for the kernel.
    """
    columns, joined, means = _join(targets)
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    kernel = {"degree": 2, "gamma": 1 / features.shape[1], "coef0": 1}
    gram = polynomial_kernel(scaled, **kernel)
    build = lambda penalty: KernelRidge(alpha=penalty, kernel="precomputed")  # noqa: E731
    chosen = _choose(build, KERNEL_PENALTIES, gram, joined, columns, episodes)
    head = KernelRidge(alpha=_per_column(chosen, columns), kernel="poly", **kernel).fit(scaled, joined)
    return RegressionHead(Pipeline([("scale", scaler), ("head", head)]), columns, means, chosen)


def fit_label(features: np.ndarray, labels: np.ndarray, episodes: Sequence[str]) -> LabelHead | str:
    """Fit a logistic regression of one label, or say why it cannot be fitted.

    Args:
        features: [n, P] of the training rows.
        labels: [n] texts.
        episodes: [n] keys; an episode is never on both sides of a fold.

    Raises:
        ValueError: There are fewer than two episodes.
    """
    names, counts = np.unique(labels, return_counts=True)
    keys = np.array(episodes)
    usable = [name for name in names if len(set(keys[labels == name])) > 1]
    if len(names) < 2:
        return f"it is always {str(names[0])!r} in the training windows"
    if len(usable) < 2:
        return "fewer than two of its values occur in two training episodes or more"
    folds = list(StratifiedGroupKFold(_num_folds(episodes)).split(features, labels, keys))
    if any(len(set(labels[rows])) < 2 for rows, _ in folds):
        return "its values cannot be spread over folds of whole training episodes"
    scores = []
    for strength in LOGISTIC_STRENGTHS:
        predicted = cross_val_predict(_logistic(strength), features, labels, cv=folds)
        scores.append(balanced_accuracy_score(labels, predicted))
    strength = LOGISTIC_STRENGTHS[int(np.argmax(scores))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # the folds may stop early, what is reported may not
        pipeline = _logistic(strength).fit(features, labels)
    return LabelHead(pipeline, str(names[counts.argmax()]), strength)


def _num_folds(episodes: Sequence[str]) -> int:
    num_episodes = len(set(episodes))
    if num_episodes < 2:
        raise ValueError(
            f"probes choose their regularisation on left-out training episodes and need at least two; got {num_episodes}: "
            "lower split.val_share or add recordings"
        )
    return min(NUM_FOLDS, num_episodes)


def _join(targets: Mapping[str, np.ndarray]) -> tuple[dict[str, slice], np.ndarray, np.ndarray]:
    """Where each target lies among all columns, their values less their means [n, K], and the means [K]."""
    columns, start = {}, 0
    for name, values in targets.items():
        columns[name] = slice(start, start + values.shape[1])
        start += values.shape[1]
    joined = np.concatenate([values.astype(np.float64) for values in targets.values()], axis=1)
    means = joined.mean(axis=0)
    return columns, joined - means, means


def _choose(
    build: Callable[[float], BaseEstimator],
    penalties: Sequence[float],
    features: np.ndarray,
    joined: np.ndarray,
    columns: Mapping[str, slice],
    episodes: Sequence[str],
) -> dict[str, float]:
    """The penalty of each target with the least squared error on left-out episodes."""
    folds, errors = GroupKFold(_num_folds(episodes)), []
    for penalty in penalties:
        predicted = cross_val_predict(build(penalty), features, joined, groups=episodes, cv=folds)
        errors.append(((predicted.reshape(joined.shape) - joined) ** 2).sum(axis=0))
    table = np.array(errors)
    return {name: penalties[int(table[:, span].sum(axis=1).argmin())] for name, span in columns.items()}


def _per_column(chosen: Mapping[str, float], columns: Mapping[str, slice]) -> np.ndarray:
    return np.concatenate([np.full(span.stop - span.start, chosen[name]) for name, span in columns.items()])


def _logistic(strength: float) -> Pipeline:
    head = LogisticRegression(C=strength, class_weight="balanced", max_iter=MAX_ITERATIONS, tol=1e-3)
    return make_pipeline(StandardScaler(), head)


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
