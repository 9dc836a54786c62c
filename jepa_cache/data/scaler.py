"""Standardisation of actions and states, fitted on the training segments and applied on read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jepa_cache.actions import Column
from jepa_cache.config.schema import ScalerConfig
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.store.recipe import canonical_json, fingerprint
from jepa_cache.store.root import atomic_file


@dataclass(frozen=True)
class ColumnScaler:
    """(x - mean) / scale per column; mean 0 and scale 1 leave a column as it is."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Scale [..., columns] float32 values; the arithmetic is float64."""
        return ((values - np.array(self.mean)) / np.array(self.scale)).astype(np.float32)


@dataclass(frozen=True)
class Scaler:
    """How one data set's actions and states are scaled; travels with every checkpoint."""

    actions: ColumnScaler
    states: ColumnScaler
    num_train_steps: int  # steps it was fitted on
    segments_digest: str  # of the segments it was fitted on: another split or filter is another scaler
    action_fingerprint: str

    def to_json(self) -> dict:
        """As plain JSON."""
        return {
            "actions": vars(self.actions),
            "states": vars(self.states),
            "num_train_steps": self.num_train_steps,
            "segments_digest": self.segments_digest,
            "action_fingerprint": self.action_fingerprint,
        }


def fit_scaler(dataset: CachedDataset, segments: Sequence[Segment], config: ScalerConfig) -> Scaler:
    """Fit means and deviations over the training segments, store by store.

    Only continuous columns are scaled; binary and one-hot columns keep their meaning. A column that never changes gets
    scale 1.

    Args:
        dataset: The cached data set.
        segments: Those of the training split.
        config: "standard" or "none" for actions and for states.

    Raises:
        ValueError: When there is no training segment, or none of two steps or more.
    """
    if not segments:
        raise ValueError("no training segments: every episode is held out; lower split.val_share or add recordings")
    if all(segment.stop - segment.start < 2 for segment in segments):
        raise ValueError(
            f"none of the {len(segments)} training segments has two steps, so there is no action; raise encode.fps, "
            "encode.frames_per_clip in clip mode, or add longer recordings"
        )
    by_store: dict[int, list[Segment]] = {}
    for segment in segments:
        by_store.setdefault(segment.store, []).append(segment)
    action_fit, state_fit = _Moments(), _Moments()
    for store, runs in sorted(by_store.items()):  # always in the same order: rounding depends on it
        actions, states = _read_rows(dataset, store, runs)
        if len(actions):
            action_fit.add(actions)
        state_fit.add(states)
    space = dataset.space
    return Scaler(
        actions=_column_scaler(space.actions, action_fit, config.actions),
        states=_column_scaler(space.states, state_fit, config.states),
        num_train_steps=state_fit.count,
        segments_digest=digest_segments(segments),
        action_fingerprint=dataset.manifest.action_fingerprint,
    )


def digest_segments(segments: Sequence[Segment]) -> str:
    """Identity of a training split: the episodes and runs of steps that it is made of."""
    return fingerprint({"segments": sorted([s.episode, s.store, s.start, s.stop] for s in segments)})


def check_scaler(scaler: Scaler, segments: Sequence[Segment]) -> None:
    """Refuse a scaler that was fitted on other segments than those to be trained on.

    Raises:
        ValueError: With the command that fits it again.
    """
    if scaler.segments_digest != digest_segments(segments):
        raise ValueError(
            "the scaler was fitted on other segments (another split, filter or manifest), so it may have seen held-out "
            "episodes; run `python stages/fit_scaler.py` again with the same settings"
        )


def write_scaler(scaler: Scaler, path: Path) -> None:
    """Save as JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(scaler.to_json()))


def read_scaler(path: Path) -> Scaler:
    """Load from JSON.

    Raises:
        ValueError: When the file is missing or no scaler; says which command makes it.
    """
    try:
        return scaler_from_json(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; run `python stages/fit_scaler.py` first") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no scaler ({error}); run `python stages/fit_scaler.py` again") from error


def scaler_from_json(document: dict) -> Scaler:
    """The inverse of `Scaler.to_json`."""
    actions, states = (
        ColumnScaler(**{key: tuple(value) for key, value in document[name].items()}) for name in ("actions", "states")
    )
    kept = ("num_train_steps", "segments_digest", "action_fingerprint")
    return Scaler(actions, states, **{key: document[key] for key in kept})


def _read_rows(dataset: CachedDataset, store: int, runs: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Actions and states of some segments; the last action row of a segment leads nowhere and is left out."""
    actions, states = dataset.controls(store)
    return (
        np.concatenate([actions[run.start : run.stop - 1] for run in runs]).astype(np.float64),
        np.concatenate([states[run.start : run.stop] for run in runs]).astype(np.float64),
    )


class _Moments:
    """Mean and variance of columns, from rows that come block by block.

    To the last bit those of scikit-learn's `StandardScaler.partial_fit`, which spends a millisecond on each block however small, and there
    may be ten thousand.

    Source: Chan, Golub and LeVeque 1979, as in scikit-learn's `_incremental_mean_and_var`.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, np.float64(0.0), np.float64(0.0)

    def add(self, rows: np.ndarray) -> None:
        """Add rows [n, columns] float64, n above 0."""
        old, new, both = self.count, len(rows), self.count + len(rows)
        old_total, total = self.mean * old, rows.sum(axis=0)
        deviations = rows - total / new
        correction = deviations.sum(axis=0)
        squares = (deviations**2).sum(axis=0) - correction**2 / new
        if old:
            ratio = old / new
            squares = self.variance * old + squares + ratio / both * (old_total / ratio - total) ** 2
        self.count, self.mean, self.variance = both, (old_total + total) / both, squares / both

    @property
    def scale(self) -> np.ndarray:
        """Deviations; 1 where a column differs from its mean by no more than rounding."""
        rounding = np.finfo(np.float64).eps * self.count
        is_constant = self.variance <= rounding * self.variance + (rounding * self.mean) ** 2
        return np.where(is_constant, 1.0, np.sqrt(self.variance))


def _column_scaler(columns: Sequence[Column], fit: _Moments, rule: str) -> ColumnScaler:
    scaled = [rule == "standard" and column.kind == "continuous" for column in columns]
    return ColumnScaler(
        names=tuple(column.name for column in columns),
        mean=tuple(float(m) if on else 0.0 for m, on in zip(fit.mean, scaled, strict=True)),
        scale=tuple(float(s) if on else 1.0 for s, on in zip(fit.scale, scaled, strict=True)),
    )
