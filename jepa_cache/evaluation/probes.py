"""Does the cache hold the action at all? Probes on tokens, fitted on training episodes and scored on held-out ones.

They tell what a predictor can be expected to use, and need none themselves. What a head does not find may still be there: a probe
shows that something is in the tokens, never that it is not. Regularisation is chosen by folds of whole training episodes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

from jepa_cache.actions import Column
from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.windows import Window, count_episodes
from jepa_cache.evaluation.context import EvaluationContext, Measurement, choose_windows
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, draw_episodes, write_table

PROBES_FILE = "probes.csv"
PROBE_COLUMNS = ("probe", "target", "metric", "value", "low", "high", "baseline")
INVERSE_DYNAMICS, STATE, ANTICIPATION, CLASSIFICATION = "inverse_dynamics", "state", "anticipation", "classification"
R2, QUADRATIC_R2, BALANCED_ACCURACY = "r2", "quadratic_r2", "balanced_accuracy"
# Of the coarse grid along each side: 16 places tell a turn from a walk, and 256 would not fit a linear head.
MAX_CELLS = 4
PROJECTION_SEED = 0
NUM_FOLDS = 3
# Ridge: times the number of rows, on standardised features; the last leaves hardly more than the mean.
PENALTIES = {R2: (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0), QUADRATIC_R2: (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)}
LOGISTIC_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MAX_ITERATIONS = 1000


class Sample(NamedTuple):
    """n windows of T steps from some episodes."""

    features: np.ndarray  # [n, T, P] float32, rows of each step; see `step_features`
    actions: np.ndarray  # [n, T-1, A] float32, unscaled
    states: np.ndarray  # [n, T, S] float32, unscaled
    windows: list[Window]
    episodes: list[str]  # key of each window's episode


def step_features(reps: Tensor, grid: tuple[int, int], *, width: int) -> np.ndarray:
    """Tokens [B, T, N, D] of steps as rows [B, T, P] float32 of at most `width` numbers; `grid` is that of the N tokens.

    Tokens are averaged over the cells of a grid of at most 4 x 4 (which the mean over all tokens is a sum of); where these cells
    have more numbers than `width`, a sparse random projection with a fixed seed shortens them. It is the same for every data set
    of a shape, so it learns nothing from anybody.

    Source: Li, Hastie and Church, "Very sparse random projections" (2006), as in scikit-learn.
    """
    cells = tuple(min(side, MAX_CELLS) for side in grid)
    pictures = reps.flatten(0, 1).unflatten(1, grid).permute(0, 3, 1, 2)
    rows = F.adaptive_avg_pool2d(pictures, cells).flatten(1).cpu().numpy()
    if rows.shape[1] > width:
        rows = _projection(rows.shape[1], width).transform(rows)
    return rows.reshape(*reps.shape[:2], -1).astype(np.float32)


@functools.cache
def _projection(num_numbers: int, width: int) -> SparseRandomProjection:
    projection = SparseRandomProjection(width, dense_output=True, random_state=PROJECTION_SEED)
    return projection.fit(np.zeros((1, num_numbers), np.float32))


def read_sample(evaluation: EvaluationContext, segments: Sequence[Segment], *, num_steps: int) -> Sample:
    """Read windows spread evenly over the episodes of some segments, `evaluate.probe_windows` at most.

    Tokens are layer-normed where the predictor sees them so. Memory: 4 n T P bytes and one batch of tokens, whatever N and D.
    """
    dataset, settings = evaluation.dataset, evaluation.config.evaluate
    per_episode = -(-settings.probe_windows // count_episodes(segments))
    step_length = settings.step_length
    chosen = choose_windows(segments, num_steps, per_episode, step_length=step_length, limit=settings.probe_windows)
    grid, width = dataset.manifest.grid, settings.probe_width
    features = [step_features(h, grid, width=width) for _, _, h in evaluation.iter_windows(chosen, "probing")]
    windows = chosen.windows
    controls = [[values[w.rows(num_steps)] for values in dataset.controls(w.store, step_length)] for w in windows]
    actions, states = (np.stack(values) for values in zip(*controls, strict=True))
    return Sample(np.concatenate(features), actions[:, :-1], states, windows, chosen.episodes)


Targets = dict[str, np.ndarray]
"""What rows are to tell: name to [n, k] numbers, or to [n] labels."""


def action_targets(sample: Sample, columns: Sequence[Column]) -> Targets:
    """The action of each window's first step: continuous columns as numbers, binary ones and one-hot groups as labels."""
    actions, targets = sample.actions[:, 0], {}
    groups: dict[str, list[int]] = {}
    for number, column in enumerate(columns):
        if column.kind == "continuous":
            targets[column.name] = actions[:, number : number + 1]
        elif column.kind == "binary":
            targets[column.name] = (actions[:, number] > 0).astype(int).astype(str)
        else:
            groups.setdefault(column.name.partition(".")[0], []).append(number)
    for name, members in groups.items():
        targets[name] = np.array([columns[members[index]].name for index in actions[:, members].argmax(axis=1)])
    return targets


def state_targets(sample: Sample, columns: Sequence[Column]) -> Targets:
    """The state of each window's first step: angles (in degrees or radians) as sine and cosine, else the number itself."""
    targets = {}
    for number, column in enumerate(columns):
        values = sample.states[:, 0, number].astype(np.float64)
        if column.unit.startswith(("deg", "rad")):
            angles = np.radians(values) if column.unit.startswith("deg") else values
            targets[column.name] = np.stack([np.sin(angles), np.cos(angles)], axis=1)
        else:
            targets[column.name] = values[:, None]
    return targets


def window_labels(dataset: CachedDataset, sample: Sample) -> Targets:
    """Labels of windows that this data set has.

    `dataset` and `camera` are those that the window was recorded with, `gui` says whether a screen is open at one of its steps,
    `success` whether its episode ended well; it is absent unless every episode records that.
    """
    num_steps, windows = sample.features.shape[1], sample.windows
    stores = sorted({window.store for window in windows})
    parts = [dataset.manifest.stores[window.store][0] for window in windows]
    gui = {store: dataset.steps(store).column("gui").to_numpy() for store in stores}
    native = {store: dataset.read_native_controls(store) for store in stores}
    labels = {
        "dataset": [part.dataset for part in parts],
        "camera": [str(part.camera) for part in parts],
        "gui": [str(bool(gui[w.store][w.rows(num_steps)].any())) for w in windows],
    }
    if all("success" in columns for episodes in native.values() for columns in episodes.values()):
        places = zip(windows, sample.episodes, strict=True)
        labels["success"] = [str(bool(native[w.store][episode]["success"].any())) for w, episode in places]
    return {name: np.array(values) for name, values in labels.items()}


class Rows(NamedTuple):
    """What a probe reads and is to tell, of n windows."""

    features: np.ndarray  # [n, P]
    targets: Targets
    episodes: Sequence[str]


class Score(NamedTuple):
    """One target of one probe on the held-out episodes."""

    probe: str
    target: str
    metric: str  # `R2`, `QUADRATIC_R2` or `BALANCED_ACCURACY`
    drawn: np.ndarray  # [1 + resamples] the score over all episodes, then over those drawn again
    baseline: float  # score of what is said without looking: the training rows' mean, or most frequent label


def measure_probe(
    probe: str, train: Rows, held_out: Rows, settings: EvaluateConfig
) -> tuple[list[Score], dict[str, str]]:
    """Fit heads on training rows and score them on held-out ones; and say which targets have no score, and why."""
    names, owners = np.unique(np.array(held_out.episodes), return_inverse=True)
    drawn = draw_episodes(len(names), num_resamples=settings.num_bootstrap, seed=settings.seed)
    weights = np.concatenate([np.ones((1, len(names))), drawn])
    told: dict[tuple[str, str], np.ndarray] = {}
    reasons = {
        name: "it never changes in the training windows"
        for name, values in train.targets.items()
        if not _varies(values)
    }
    moving = {name: values for name, values in train.targets.items() if name not in reasons}
    numbers = {name: values for name, values in moving.items() if values.ndim == 2}
    for metric in (R2, QUADRATIC_R2) if numbers else ():
        found = tell_numbers(metric, train._replace(targets=numbers), held_out.features)
        told |= {(name, metric): values for name, values in found.items()}
    for name in moving:
        if name in numbers:
            continue
        found = tell_label(train, name, held_out.features)
        if isinstance(found, str):
            reasons[name] = found
        else:
            told[name, BALANCED_ACCURACY] = found
    scores = []
    for (name, metric), values in told.items():
        true, known = held_out.targets[name], train.targets[name]
        if not _varies(true):
            reasons[name] = "it never changes in the held-out windows"
        elif metric == BALANCED_ACCURACY:
            scores.append(Score(probe, name, metric, *_measure_balanced_accuracy(true, values, known, owners, weights)))
        else:
            scores.append(Score(probe, name, metric, measure_r2(true, values, known, owners, weights), 0.0))
    return scores, reasons


def tell_numbers(metric: str, train: Rows, features: np.ndarray) -> Targets:
    """Tell targets for rows [m, P] by ridge regressions on training rows, whose penalties do best on left-out episodes.

    `QUADRATIC_R2` is by kernel ridge regression on all products of two numbers of a row. What moved is in how two frames go
    together, not in their sum: on the sample data turns of the view are found by this head alone. Memory: 8 n^2 bytes.
    """
    scaler = StandardScaler().fit(train.features)
    train_rows, rows = scaler.transform(train.features), scaler.transform(features)
    penalties: Sequence[float] = PENALTIES[metric]
    if metric == R2:
        penalties = [share * len(train_rows) for share in penalties]
        build: Callable[[Any], BaseEstimator] = lambda penalty: Ridge(alpha=penalty)  # noqa: E731
    else:
        kernel = {"degree": 2, "gamma": 1 / features.shape[1], "coef0": 1}
        rows, train_rows = (polynomial_kernel(some, train_rows, **kernel) for some in (rows, train_rows))
        build = lambda penalty: KernelRidge(alpha=penalty, kernel="precomputed")  # noqa: E731
    joined = np.concatenate([values.astype(np.float64) for values in train.targets.values()], axis=1)
    means = joined.mean(axis=0)
    joined -= means
    errors = np.empty((len(penalties), joined.shape[1]))  # on left-out episodes
    folds = GroupKFold(_num_folds(train.episodes))
    for number, penalty in enumerate(penalties):
        told = cross_val_predict(build(penalty), train_rows, joined, groups=train.episodes, cv=folds)
        errors[number] = ((told.reshape(joined.shape) - joined) ** 2).sum(axis=0)
    sizes = [values.shape[1] for values in train.targets.values()]
    ends = np.cumsum(sizes)[:-1]
    chosen = [penalties[own.sum(axis=1).argmin()] for own in np.split(errors, ends, axis=1)]
    fitted = build(np.repeat(chosen, sizes)).fit(train_rows, joined)
    told = fitted.predict(rows).reshape(len(features), -1) + means
    return dict(zip(train.targets, np.split(told, ends, axis=1), strict=True))


def tell_label(train: Rows, name: str, features: np.ndarray) -> np.ndarray | str:
    """Tell a label for rows [m, P] by a logistic regression, its classes weighted alike, or say why it cannot be fitted."""
    labels, keys = train.targets[name], np.array(train.episodes)
    usable = [value for value in set(labels) if len(set(keys[labels == value])) > 1]
    if len(usable) < 2:
        return "fewer than two of its values occur in two training episodes or more"
    folds = list(StratifiedGroupKFold(_num_folds(keys)).split(train.features, labels, keys))
    if any(len(set(labels[rows])) < 2 for rows, _ in folds):
        return "its values cannot be spread over folds of whole training episodes"

    def build(strength: float) -> Pipeline:
        head = LogisticRegression(C=strength, class_weight="balanced", max_iter=MAX_ITERATIONS, tol=1e-3)
        return make_pipeline(StandardScaler(), head)

    scores = [
        balanced_accuracy_score(labels, cross_val_predict(build(strength), train.features, labels, cv=folds))
        for strength in LOGISTIC_STRENGTHS
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # the folds may stop early, what is reported may not
        return build(LOGISTIC_STRENGTHS[int(np.argmax(scores))]).fit(train.features, labels).predict(features)


def _num_folds(episodes: Sequence[str]) -> int:
    num_episodes = len(set(episodes))
    if num_episodes < 2:
        raise ValueError(
            f"probes choose their regularisation on left-out training episodes and need at least two; got {num_episodes}: "
            "lower split.val_share or add recordings"
        )
    return min(NUM_FOLDS, num_episodes)


def _varies(values: np.ndarray) -> bool:
    return bool((values != values[0]).any())


def measure_r2(
    true: np.ndarray, predicted: np.ndarray, known: np.ndarray, owners: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """R2 [R] when episode e counts weights[r, e] times: one minus squared error over that of the training mean, whose R2 is 0.

    Against the held-out rows' own mean, which no head can know, few episodes gave R2 of -1.3 to heads that said just the
    training mean, and intervals that chance did not explain. NaN where the training mean makes no error.

    Source: out-of-sample R2, Campbell and Thompson (2008).
    """
    errors, spread = (
        weights @ np.bincount(owners, ((told - true) ** 2).sum(axis=1), weights.shape[1])
        for told in (predicted, known.mean(axis=0, dtype=np.float64))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, 1 - errors / spread, np.nan)


def _measure_balanced_accuracy(
    true: np.ndarray, predicted: np.ndarray, known: np.ndarray, owners: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, float]:
    """Balanced accuracy [R]: mean over the labels among the drawn rows of the share named right; and that of the majority."""
    one_hot = (true[:, None] == np.unique(true)[None]).astype(np.float64)  # [n, C]

    def balanced(named: np.ndarray | str) -> np.ndarray:
        right, counts = np.zeros((2, weights.shape[1], one_hot.shape[1]))
        np.add.at(right, owners, one_hot * (true == named)[:, None])
        np.add.at(counts, owners, one_hot)
        counts = weights @ counts
        with np.errstate(invalid="ignore"):
            return np.nanmean(np.where(counts > 0, weights @ right / counts, np.nan), axis=1)

    names, counts = np.unique(known, return_counts=True)
    return balanced(predicted), float(balanced(names[counts.argmax()])[0])


def estimate(drawn: np.ndarray) -> tuple[float, float, float]:
    """The value of all episodes and the 95 % interval of the drawn ones; draws without a value (nothing varies) do not count."""
    low, high = np.nanpercentile(drawn[1:], [2.5, 97.5])
    return float(drawn[0]), float(low), float(high)


def run_probes(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Fit and score the probes that `evaluate.probes` names, without the predictor; write probes.csv.

    - inverse_dynamics: tokens of t and t+1 to the action between them.
    - state: tokens of t to the state at t, angles as sine and cosine.
    - anticipation: tokens of t to the action from t to t+1: what can be known of it beforehand.
    - classification: the steps of a training window to a label of it that the data have.

    Returns:
        Sections of metrics.json: `probe` (numbers), `probe_ci` (intervals) and `probe_notes` (why some are not there). Binary and one-hot columns
        of actions have their rows in probes.csv alone; means over targets and their intervals come from the same drawn episodes.
    """
    settings, dataset = evaluation.config.evaluate, evaluation.dataset
    actions = lambda sample: action_targets(sample, dataset.space.actions)  # noqa: E731
    kinds: dict[str, tuple[int, Callable, Callable[[Sample], Targets]]] = {
        # Steps of a window; what is read of its features [n, T, P], side by side; what it is to tell.
        INVERSE_DYNAMICS: (2, lambda x: (x[:, 0], x[:, 1] - x[:, 0]), actions),
        STATE: (2, lambda x: (x[:, 0],), lambda sample: state_targets(sample, dataset.space.states)),
        ANTICIPATION: (2, lambda x: (x[:, 0],), actions),
        CLASSIFICATION: (
            evaluation.window_steps,
            lambda x: (x.mean(axis=1), x.std(axis=1)),
            lambda sample: window_labels(dataset, sample),
        ),
    }
    segments = evaluation.training_segments(), evaluation.held_out_segments()
    read = functools.cache(lambda steps: [read_sample(evaluation, part, num_steps=steps) for part in segments])
    scores: list[Score] = []
    notes: dict[str, str] = {}
    for name, (num_steps, rows_of, targets_of) in kinds.items():
        if name not in settings.probes:
            continue
        targets = [targets_of(sample) for sample in read(num_steps)]
        shared = [target for target in targets[0] if target in targets[1]]
        sides = [
            Rows(np.hstack(rows_of(sample.features)), {target: known[target] for target in shared}, sample.episodes)
            for sample, known in zip(read(num_steps), targets, strict=True)
        ]
        found, reasons = measure_probe(name, *sides, settings)
        scores += found
        if name == CLASSIFICATION and "success" not in shared:
            reasons["success"] = "not every episode records how it ended"
        no = "no label here" if name == CLASSIFICATION else "not measured"
        notes |= {f"{name} {target}": f"{no}: {why}" for target, why in reasons.items()}
    if not dataset.manifest.comparable:
        notes["clip mode"] = (
            "early steps of a clip have seen its later frames: anticipation is no anticipation, and no figure is comparable"
        )
    drawn: dict[str, np.ndarray] = {}
    groups: dict[str, list[np.ndarray]] = {}
    for score in scores:
        if score.metric != BALANCED_ACCURACY or score.probe == CLASSIFICATION:
            drawn[f"{score.probe}_{score.target.lower().replace('.', '_')}_{score.metric}"] = score.drawn
        if score.probe != CLASSIFICATION:  # a mean over unlike labels says nothing
            groups.setdefault(f"{score.probe}_{score.metric}", []).append(score.drawn)
    sections: dict[str, dict[str, Any]] = {"probe": {}, "probe_ci": {}, "probe_notes": notes}
    for name, values in (drawn | {name: np.mean(parts, axis=0) for name, parts in groups.items()}).items():
        sections["probe"][name], *sections["probe_ci"][name] = estimate(values)
    rows = [
        dict(zip(PROBE_COLUMNS, (*score[:3], *estimate(score.drawn), score.baseline), strict=True)) for score in scores
    ]
    write_table(rows, out / MEASUREMENTS_FOLDER / PROBES_FILE, columns=PROBE_COLUMNS)
    return sections


PROBES = Measurement(
    name="probes",
    section="probe",
    run=run_probes,
    heading="Probes: do the tokens hold the action at all?",
    explanation=(
        "Simple heads fitted on training episodes and scored on held-out ones; a score at its baseline says that the tokens do not tell."
    ),
    tables=(PROBES_FILE,),
)
