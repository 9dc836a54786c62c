"""Runs side by side: which may be compared at all, what differs in their settings, and which differences chance does not explain."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.evaluation.context import OF_THE_MACHINE
from jepa_cache.evaluation.metrics import Estimate, bootstrap_mean

COMPARED = {"teacher_forcing_l1": "teacher forcing", "rollout_l1": "open loop"}
"""Columns of episodes.csv that are paired, lower is better."""

# Errors are of one kind only where all of these are equal: other tokens, windows or episodes give other numbers for the same predictor.
KIND = (
    *("dataset", "encoder", "tokens_fingerprint", "mode"),
    *("measured.split.val_share", "measured.split.seed"),
    *("measured.evaluate.horizon", "measured.evaluate.num_context_steps", "measured.evaluate.windows_per_episode"),
    *("measured.window_steps", "measured.normalize_reps"),
)
FILTERS = "measured.filter."
# Names of other things, or follow from them.
NO_SETTINGS = ("run", "encoder_trained", "tokens_fingerprint")
NUM_DIGITS = 4  # of a difference in words; one below the last digit is none: another batch size moves the eighth
UNTRAINED, CLIP = (
    "the encoder has random weights: figures are relative",
    "clip mode: early steps have seen later frames",
)


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, as it was read from files."""

    name: str  # as the user typed it
    metrics: Mapping[str, Any]  # metrics.json
    settings: Mapping[str, Any] | None  # settings.json, flat names; None where the evaluation is older than the file
    episodes: Mapping[str, Mapping[str, float]]  # episodes.csv: episode to column to value


class Difference(NamedTuple):
    """One run's error less that of the reference, on the episodes that both have."""

    estimate: Estimate | None  # None where fewer than two episodes are shared
    num_episodes: int

    @property
    def words(self) -> str:
        """What may be said."""
        if self.estimate is None:
            return "cannot be told: fewer than two shared episodes"
        low, high = (round(end, NUM_DIGITS) for end in (self.estimate.low, self.estimate.high))
        if high < 0:
            return "better"
        return "worse" if low > 0 else "not told apart"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def group_runs(runs: Sequence[Evaluated]) -> list[list[Evaluated]]:
    """Runs whose errors are of one kind together, in the order given; a run without settings stands alone."""
    groups: dict[Any, list[Evaluated]] = {}
    for position, run in enumerate(runs):
        kind = position if run.settings is None else repr(kind_of(run))
        groups.setdefault(kind, []).append(run)
    return list(groups.values())


def kind_of(run: Evaluated) -> dict[str, Any]:
    """What decides whether a run's errors may be compared with another's."""
    assert run.settings is not None
    return {name: value for name, value in run.settings.items() if name in KIND or name.startswith(FILTERS)}


def why_apart(one: Evaluated, other: Evaluated) -> str:
    """Why the errors of two runs are no comparison."""
    unknown = [run.name for run in (one, other) if run.settings is None]
    if unknown:
        return f"of {', '.join(unknown)} it is not known what was measured (no settings.json); run its evaluation again"
    kinds = kind_of(one), kind_of(other)
    names = sorted(kinds[0].keys() | kinds[1].keys())
    return "; ".join(
        f"{name}: {show_setting(kinds[0].get(name))} in {one.name}, {show_setting(kinds[1].get(name))} in {other.name}"
        for name in names
        if kinds[0].get(name) != kinds[1].get(name)
    )


def show_setting(value: Any) -> str:
    """A setting on one line as YAML takes it: null, true, [energy, distances], and words without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(show_setting(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def differing_settings(runs: Sequence[Evaluated]) -> dict[str, list[Any]]:
    """Settings that are not the same in all of some runs, with the value of each; what moves no number is left out."""
    known = [run.settings or {} for run in runs]
    names = sorted(set().union(*known))
    return {
        name: [settings.get(name) for settings in known]
        for name in names
        if name not in NO_SETTINGS
        and not name.startswith("measured.")  # equal where it decides these numbers
        and name.rpartition(".")[2] not in OF_THE_MACHINE
        and any(settings.get(name) != known[0].get(name) for settings in known)
    }


def paired_difference(
    run: Evaluated, reference: Evaluated, column: str, *, num_resamples: int, seed: int
) -> Difference:
    """Mean over shared episodes of the run's error less the reference's, with its 95 % interval: episodes are drawn again.

    Raises:
        ValueError: An episode has other numbers of windows in the two, so the pairs would not be pairs.
    """
    shared = sorted(run.episodes.keys() & reference.episodes.keys())
    for evaluated in (run, reference):
        if not evaluated.episodes:
            raise ValueError(
                f"{evaluated.name} has no episodes.csv, without which runs cannot be paired; run its evaluation again"
            )
    for episode in shared:
        counts = run.episodes[episode]["num_windows"], reference.episodes[episode]["num_windows"]
        if counts[0] != counts[1]:
            raise ValueError(
                f"episode {episode} has {counts[0]:.0f} windows in {run.name} and {counts[1]:.0f} in {reference.name}; evaluate both "
                "with the same data and settings"
            )
    values = np.array([run.episodes[episode][column] - reference.episodes[episode][column] for episode in shared])
    values = values[np.isfinite(values)]  # an empty cell: that episode has no such figure
    if len(values) < 2:
        return Difference(None, len(values))
    return Difference(bootstrap_mean(values, num_resamples=num_resamples, seed=seed), len(values))
