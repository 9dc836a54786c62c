"""Heads of the probes, from scikit-learn: fitted on training episodes alone, their regularisation chosen there by folds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

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
