"""Standardisation of actions and states, fitted on the training segments and applied on read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from jepa_cache.actions import ActionSpace, Column
from jepa_cache.config.schema import ScalerConfig
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.files import atomic_file
from jepa_cache.store.recipe import canonical_json, fingerprint

IGNORE, IGNORED = "ignore", 1e300
"""The rule, and the scale of a column, that the predictor is not shown: whatever float32 holds, divided by it, is 0 in float32."""
MAX_BLOCKS = 1000
"""Blocks of rows that are fitted one after the other: each costs scikit-learn a millisecond, however small it is."""


@dataclass(frozen=True)
class ColumnScaler:
    """(x - mean) / scale per column; mean 0 and scale 1 leave a column as it is."""

    names: tuple[str, ...]
    mean: tuple[FiniteFloat, ...]
    scale: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.mean) == len(self.scale):
            raise ValueError(f"{len(self.names)} names, {len(self.mean)} means and {len(self.scale)} scales")

    @property
    def ignores_all(self) -> bool:
        """Whether every column becomes 0 (`scaler.states=ignore`)."""
        return set(self.scale) == {IGNORED}

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

    def check_columns(self, space: ActionSpace) -> None:
        """Raise a ValueError, with both lists of names, where an action space has other columns than were fitted."""
        for what, fitted, columns in (("action", self.actions, space.actions), ("state", self.states, space.states)):
            names = tuple(column.name for column in columns)
            if fitted.names != names:
                raise ValueError(
                    f"the scaler has the {what} columns {', '.join(fitted.names)}, but those of action space {space.name} are "
                    f"{', '.join(names)}; run `python stages/fit_scaler.py` again"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the scaler as plain JSON."""
        return asdict(self)


def fit_scaler(dataset: CachedDataset, segments: Sequence[Segment], config: ScalerConfig) -> Scaler:
    """Fit means and deviations over the training segments with scikit-learn, reading the stores through dask.

    Only continuous columns are scaled; binary and one-hot columns keep their meaning. A column that never changes gets
    scale 1.

    Raises:
        ValueError: When there is no training segment, none of two steps or more, or one with a number that is not finite.
    """
    import dask
    from sklearn.preprocessing import StandardScaler

    if not segments:
        raise ValueError(
            "0 episodes for training: every one is held out, or filters left none; lower split.val_share or add recordings"
        )
    if all(segment.stop - segment.start < 2 for segment in segments):
        raise ValueError(
            f"none of the {len(segments)} training segments has two steps, so there is no action; raise encode.fps, "
            "encode.frames_per_clip in clip mode, or add longer recordings"
        )
    by_store: dict[int, list[Segment]] = {}
    for segment in segments:
        by_store.setdefault(segment.store, []).append(segment)
    stores = [runs for _, runs in sorted(by_store.items())]
    size = -(-len(stores) // MAX_BLOCKS)
    blocks = [[run for runs in stores[first : first + size] for run in runs] for first in range(0, len(stores), size)]
    parts = [dask.delayed(_read_rows)(dataset, runs) for runs in blocks]
    action_fit, state_fit = StandardScaler(), StandardScaler()
    num_steps = 0
    for start in range(0, len(parts), 32):  # bounded memory, and always in the same order: rounding depends on it
        for actions, states in dask.compute(*parts[start : start + 32], scheduler="threads"):
            if len(actions):
                action_fit.partial_fit(actions)
            state_fit.partial_fit(states)
            num_steps += len(states)
    space = dataset.space
    return Scaler(
        actions=_column_scaler(space.actions, action_fit, config.actions),
        states=_column_scaler(space.states, state_fit, config.states),
        num_train_steps=num_steps,
        segments_digest=digest_segments(segments),
        action_fingerprint=dataset.manifest.action_fingerprint,
    )


def digest_segments(segments: Sequence[Segment]) -> str:
    """Identity of a training split: the episodes and runs of steps that it is made of."""
    return fingerprint({"segments": sorted([s.episode, s.store, s.start, s.stop] for s in segments)})


def check_scaler(scaler: Scaler, dataset: CachedDataset, segments: Sequence[Segment], config: ScalerConfig) -> None:
    """Raise a ValueError where a scaler was fitted on other segments than those to be trained on, or by another rule."""
    if scaler.segments_digest != digest_segments(segments):
        raise ValueError(
            "the scaler was fitted on other segments (another split, filter or manifest), so it may have seen held-out "
            "episodes; run `python stages/fit_scaler.py` again with the same settings"
        )
    pairs = ((scaler.actions, dataset.space.actions), (scaler.states, dataset.space.states))
    for number, (name, (fitted, columns)) in enumerate(zip(("actions", "states"), pairs, strict=True)):
        rule, scales = getattr(config, name), set(fitted.mean) != {0.0} or set(fitted.scale) != {1.0}
        if rule == "standard" and not scales:  # so it should be where every scaled column is 0 all the time
            continuous = [column.kind == "continuous" for column in columns]
            scales = not any(dataset.controls_of(run)[number][:, continuous].any() for run in segments)
        if (rule == IGNORE) != fitted.ignores_all or (scales != (rule == "standard") and rule != IGNORE):
            raise ValueError(
                f"the scaler was not fitted with scaler.{name}={rule}; run `python stages/fit_scaler.py` again with the same settings"
            )


def write_scaler(scaler: Scaler, path: Path) -> None:
    """Save as JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(scaler.to_json()))


def read_scaler(path: Path) -> Scaler:
    """Load from JSON; a ValueError says what is wrong, and which command makes it."""
    try:
        return scaler_from_json(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; run `python stages/fit_scaler.py` first") from error
    except ValueError as error:
        raise ValueError(f"{path} is no scaler ({error}); run `python stages/fit_scaler.py` again") from error


def scaler_from_json(document: dict[str, Any]) -> Scaler:
    """Read what `Scaler.to_json` gave; a ValueError says which number cannot be one of a fit."""
    try:
        return TypeAdapter(Scaler).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{place}: {problem['msg']}, got {str(problem['input'])[:60]!r}") from error


def _read_rows(dataset: CachedDataset, runs: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Actions and states of some segments of one store."""
    actions, states = zip(*map(dataset.controls_of, runs), strict=True)
    return np.concatenate(actions).astype(np.float64), np.concatenate(states).astype(np.float64)


def _column_scaler(columns: Sequence[Column], fit: object, rule: str) -> ColumnScaler:
    if rule == IGNORE:
        return ColumnScaler(tuple(column.name for column in columns), (0.0,) * len(columns), (IGNORED,) * len(columns))
    scaled = [rule == "standard" and column.kind == "continuous" for column in columns]
    return ColumnScaler(
        names=tuple(column.name for column in columns),
        mean=tuple(float(m) if on else 0.0 for m, on in zip(fit.mean_, scaled, strict=True)),
        scale=tuple(float(s) if on else 1.0 for s, on in zip(fit.scale_, scaled, strict=True)),
    )
