"""Does the cache hold the action at all? Probes on tokens, fitted on training episodes and scored on held-out ones.

They tell what a predictor can be expected to use, and need none themselves. What a head does not find may still be there: a probe
shows that something is in the tokens, never that it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import Column
from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.evaluation.context import EvaluationContext, Measurement
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, Estimate, write_table
from jepa_cache.evaluation.probe_heads import (
    BALANCED_ACCURACY,
    QUADRATIC_R2,
    R2,
    LabelHead,
    LabelSums,
    RegressionHead,
    RegressionSums,
    Sample,
    draw_episodes,
    fit_label,
    fit_linear,
    fit_quadratic,
    read_sample,
    sum_labels,
    sum_regression,
    window_labels,
)

PROBES_FILE = "probes.csv"
PROBE_COLUMNS = ("probe", "target", "metric", "value", "low", "high", "baseline")
INVERSE_DYNAMICS, STATE, ANTICIPATION, CLASSIFICATION = "inverse_dynamics", "state", "anticipation", "classification"
REGRESSIONS = {R2: fit_linear, QUADRATIC_R2: fit_quadratic}


class Targets(NamedTuple):
    """What rows are to tell: target to [n, k] numbers, and target to [n] labels."""

    numbers: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


class Heads(NamedTuple):
    """Fitted heads of one probe: regressions of all numbers by metric (none where there are no numbers), and one head a label."""

    regressions: dict[str, RegressionHead]
    labels: dict[str, LabelHead]


class Score(NamedTuple):
    """One target of one probe on the held-out episodes."""

    probe: str
    target: str
    metric: str  # a key of REGRESSIONS, or BALANCED_ACCURACY
    sums: RegressionSums | LabelSums
    num_episodes: int


@dataclass(frozen=True)
class Probed:
    """What `measure_probes` found."""

    scores: list[Score] = field(default_factory=list)
    heads: dict[str, Heads] = field(default_factory=dict)
    notes: dict[str, str] = field(
        default_factory=dict
    )  # probe or "probe target" to why it is not measured, or what to mind


def measure_probes(evaluation: EvaluationContext) -> Probed:
    """Fit and score the probes that `evaluate.probes` names; the predictor is not used.

    - inverse_dynamics: tokens of t and t+1 to the action between them.
    - state: tokens of t to the state at t, angles as sine and cosine.
    - anticipation: tokens of t to the action from t to t+1: what can be known of it beforehand.
    - classification: the steps of a training window to a label of it that the data have.

    Raises:
        ValueError: Fewer than two training or two held-out episodes have a window.
    """
    settings, probed = evaluation.config.evaluate, Probed()
    chosen = settings.probes
    segments = evaluation.training_segments(), evaluation.held_out_segments()
    if set(chosen) & {INVERSE_DYNAMICS, STATE, ANTICIPATION}:
        train, held_out = (read_sample(evaluation, part, num_steps=2) for part in segments)
        space = evaluation.dataset.space
        for name, (rows_of, targets_of) in {
            INVERSE_DYNAMICS: (_pair_rows, lambda sample: action_targets(sample, space.actions)),
            STATE: (_first_rows, lambda sample: state_targets(sample, space.states)),
            ANTICIPATION: (_first_rows, lambda sample: action_targets(sample, space.actions)),
        }.items():
            if name in chosen:
                _probe(name, rows_of, train, targets_of(train), held_out, targets_of(held_out), probed)
    if CLASSIFICATION in chosen:
        train, held_out = (read_sample(evaluation, part, num_steps=evaluation.window_steps) for part in segments)
        labels = {}
        for part, sample in (("train", train), ("held out", held_out)):
            labels[part], reasons = window_labels(evaluation.dataset, sample)
            probed.notes.update({f"{CLASSIFICATION} {name}": f"no label here: {why}" for name, why in reasons.items()})
        shared = [name for name in labels["train"] if name in labels["held out"]]
        targets = [Targets({}, {name: labels[part][name] for name in shared}) for part in ("train", "held out")]
        _probe(CLASSIFICATION, _window_rows, train, targets[0], held_out, targets[1], probed)
    if not evaluation.dataset.manifest.comparable:
        probed.notes["clip mode"] = (
            "early steps of a clip have seen its later frames: anticipation is no anticipation, and no figure is comparable"
        )
    return probed


def action_targets(sample: Sample, columns: Sequence[Column]) -> Targets:
    """The action of each window's first step: continuous columns as numbers, binary ones and one-hot groups as labels."""
    actions, numbers, labels = sample.actions[:, 0], {}, {}
    groups: dict[str, list[int]] = {}
    for number, column in enumerate(columns):
        if column.kind == "continuous":
            numbers[column.name] = actions[:, number : number + 1]
        elif column.kind == "binary":
            labels[column.name] = (actions[:, number] > 0).astype(int).astype(str)
        else:
            groups.setdefault(column.name.partition(".")[0], []).append(number)
    for name, members in groups.items():
        labels[name] = np.array([columns[members[index]].name for index in actions[:, members].argmax(axis=1)])
    return Targets(numbers, labels)


def state_targets(sample: Sample, columns: Sequence[Column]) -> Targets:
    """The state of each window's first step: angles (in degrees or radians) as sine and cosine, else the number itself."""
    numbers = {}
    for number, column in enumerate(columns):
        values = sample.states[:, 0, number].astype(np.float64)
        if column.unit.startswith(("deg", "rad")):
            angles = np.radians(values) if column.unit.startswith("deg") else values
            numbers[column.name] = np.stack([np.sin(angles), np.cos(angles)], axis=1)
        else:
            numbers[column.name] = values[:, None]
    return Targets(numbers, {})


def fit_heads(features: np.ndarray, targets: Targets, episodes: Sequence[str]) -> tuple[Heads, dict[str, str]]:
    """Fit the heads of one probe on training rows, and say which targets cannot be fitted and why."""
    reasons = {
        name: "it never changes in the training windows" for name, v in targets.numbers.items() if not _varies(v)
    }
    numbers = {name: values for name, values in targets.numbers.items() if name not in reasons}
    heads = {}
    for name, labels in targets.labels.items():
        head = fit_label(features, labels, episodes)
        if isinstance(head, str):
            reasons[name] = head
        else:
            heads[name] = head
    regressions = {metric: fit(features, numbers, episodes) for metric, fit in REGRESSIONS.items() if numbers}
    return Heads(regressions, heads), reasons


def score_heads(
    heads: Heads, features: np.ndarray, targets: Targets, episodes: Sequence[str], *, probe: str
) -> tuple[list[Score], dict[str, str]]:
    """Score fitted heads on held-out rows, and say which targets cannot be scored and why."""
    scores, reasons, num_episodes = [], {}, len(set(episodes))
    for metric, regressions in heads.regressions.items():
        predicted = regressions.predict(features)
        for name, span in regressions.columns.items():
            if _varies(targets.numbers[name]):
                sums = sum_regression(targets.numbers[name], predicted[:, span], regressions.means[span], episodes)
                scores.append(Score(probe, name, metric, sums, num_episodes))
            else:
                reasons[name] = "it never changes in the held-out windows"
    for name, head in heads.labels.items():
        true = targets.labels[name]
        if len(set(true)) > 1:
            sums = sum_labels(true, head.pipeline.predict(features), head.majority, episodes)
            scores.append(Score(probe, name, BALANCED_ACCURACY, sums, num_episodes))
        else:
            reasons[name] = f"it is always {str(true[0])!r} in the held-out windows"
    return scores, reasons


def summarize_probes(probed: Probed, settings: EvaluateConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of probes.csv, and the sections of metrics.json: `probe` (numbers), `probe_ci` (intervals), `probe_notes` (words).

    Binary and one-hot columns of actions have their rows; in metrics.json only their mean stands. Means over targets and their
    intervals come from the same drawn episodes.
    """
    rows: list[dict[str, Any]] = []
    estimates: dict[str, Estimate] = {}
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    for score in probed.scores:
        weights = draw_episodes(score.num_episodes, num_resamples=settings.num_bootstrap, seed=settings.seed)
        drawn = score.sums.score(weights)
        value = _estimate(drawn)
        rows.append(
            {"probe": score.probe, "target": score.target, "metric": score.metric}
            | {"value": value.mean, "low": value.low, "high": value.high, "baseline": score.sums.baseline()}
        )
        groups.setdefault((score.probe, score.metric), []).append(drawn)
        if score.metric in REGRESSIONS or score.probe == CLASSIFICATION:
            estimates[f"{score.probe}_{score.target.lower().replace('.', '_')}_{score.metric}"] = value
    for (probe, metric), drawn in groups.items():
        if probe != CLASSIFICATION:  # a mean over unlike labels says nothing
            estimates[f"{probe}_{metric}"] = _estimate(np.mean(drawn, axis=0))
    return rows, {
        "probe": {name: value.mean for name, value in estimates.items()},
        "probe_ci": {name: [value.low, value.high] for name, value in estimates.items()},
        "probe_notes": probed.notes,
    }


def run_probes(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Measure the probes, write probes.csv and return their sections of metrics.json."""
    rows, sections = summarize_probes(measure_probes(evaluation), evaluation.config.evaluate)
    write_table(rows, out / MEASUREMENTS_FOLDER / PROBES_FILE, columns=PROBE_COLUMNS)
    return sections


def _probe(
    name: str,
    rows_of: Callable[[Sample], np.ndarray],
    train: Sample,
    train_targets: Targets,
    held_out: Sample,
    held_out_targets: Targets,
    probed: Probed,
) -> None:
    heads, unfitted = fit_heads(rows_of(train), train_targets, train.episodes)
    scores, unscored = score_heads(heads, rows_of(held_out), held_out_targets, held_out.episodes, probe=name)
    probed.heads[name] = heads
    probed.scores.extend(scores)
    no = "no label here: " if name == CLASSIFICATION else "not measured: "
    probed.notes.update({f"{name} {target}": no + why for target, why in (unfitted | unscored).items()})


def _pair_rows(sample: Sample) -> np.ndarray:
    """Both steps, the second as its difference from the first: [n, 2 P]."""
    first, second = sample.features[:, 0], sample.features[:, 1]
    return np.concatenate([first, second - first], axis=1)


def _first_rows(sample: Sample) -> np.ndarray:
    return sample.features[:, 0]


def _window_rows(sample: Sample) -> np.ndarray:
    """Mean and deviation of the steps: [n, 2 P]."""
    return np.concatenate([sample.features.mean(axis=1), sample.features.std(axis=1)], axis=1)


def _varies(values: np.ndarray) -> bool:
    return bool(np.ptp(values, axis=0).max() > 0)


def _estimate(drawn: np.ndarray) -> Estimate:
    """The value of all episodes and the 95 % interval of the drawn ones; draws without a value (nothing varies) do not count."""
    low, high = np.nanpercentile(drawn[1:], [2.5, 97.5])
    return Estimate(float(drawn[0]), float(low), float(high))


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
