"""The parts of a run: every data set of a mixture, seen by each camera from each starting offset, with its recipes."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.actions import ActionSpace
from jepa_cache.config.schema import Config, DatasetPreset, EncoderPreset
from jepa_cache.encoder.weights import resolve_weights, weights_identity
from jepa_cache.encoding.modes import sampling_stride
from jepa_cache.encoding.reading import find_readings, name_reading
from jepa_cache.encoding.recipes import action_recipe, token_recipe
from jepa_cache.encoding.subset import take_recordings
from jepa_cache.encoding.units import Digested, digest_units, list_units
from jepa_cache.episode import Episode, Skipped
from jepa_cache.sources import Source, Unit, build_source, iter_recordings
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.recipe import fingerprint

NUM_LOOKED_AT = 8
"""Recordings that may hold other columns than an action space's before the space is taken to be the wrong one: at most 0.5^8 by chance."""
MAX_EXPECTED_SHARE = 0.5


@dataclass(frozen=True)
class Part:
    """One data set from one camera at one starting offset, read in one way, with everything that names its stores."""

    preset: DatasetPreset
    weight: float
    camera: str | None
    phase: int
    units: Sequence[tuple[Unit, str]]
    recipe: dict[str, Any]
    action_recipe: dict[str, Any]
    notes: tuple[str, ...] = ()  # on what was left out before any recording was read
    copies: Sequence[tuple[Unit, str]] = ()  # further units with the content of one in `units`
    unreadable: Sequence[Skipped] = ()  # units of which not every file can be read

    @property
    def source(self) -> Source:
        """Reader of its recordings."""
        return open_source(self.preset, self.camera)

    @property
    def reading(self) -> int:
        """The way in which its recordings are read; see `encoding.reading`."""
        return self.recipe["source"].get("reading", 1)

    @property
    def view(self) -> str:
        """Camera and phase in words."""
        words = [self.camera] if self.camera else []
        return ", ".join([*words, *([f"phase {self.phase}"] if self.phase else [])]) or "main"

    @cached_property
    def tokens(self) -> str:
        """Fingerprint of its token stores."""
        return fingerprint(self.recipe)

    @cached_property
    def actions(self) -> str:
        """Fingerprint of its action stores."""
        return fingerprint(self.action_recipe)

    @cached_property
    def controls(self) -> str:
        """Fingerprint of its controls: of the source alone."""
        return fingerprint(self.recipe["source"])


def open_source(preset: DatasetPreset, camera: str | None) -> Source:
    """The source of a data set, as one of its cameras sees it; one object for each, since some remember a listing."""
    options = preset.source_options | ({"camera": camera} if camera else {})
    return _open_source(preset.source, json.dumps(options, sort_keys=True))


@functools.lru_cache(maxsize=8)
def _open_source(name: str, options: str) -> Source:
    return build_source(name, json.loads(options))


def used_encoder(config: Config) -> EncoderPreset:
    """The encoder preset with the weights that `encode.weights` names in place of its own."""
    if config.encode.weights == config.encoder.weights:
        return config.encoder
    return replace(config.encoder, weights=config.encode.weights, weights_sha256=None)


class OpenedEncoder(NamedTuple):
    """An encoder preset, the local file or folder of its weights (None for seeded ones), and what identifies them."""

    preset: EncoderPreset
    weights: Path | None
    identity: str


def open_encoder(config: Config, base: Path) -> OpenedEncoder:
    """The encoder that the settings name, with weights that are on this machine afterwards.

    Args:
        config: Resolved settings.
        base: Folder that relative paths are meant from.

    Raises:
        ValueError: Weights that cannot be had, or are not those of the preset.

    Cost: a download where they are not here, and a digest of a file that is new; minutes for several GB.
    """
    preset, weights = used_encoder(config), None
    if preset.weights is not None:
        weights = resolve_weights(preset.weights, base=base, kind=preset.kind)
    return OpenedEncoder(preset, weights, weights_identity(preset, weights, digest=DigestTable().digest))


def check_inputs(config: Config, inputs: Sequence[str]) -> None:
    """Refuse inputs in place of the presets' lists where there are several presets.

    Raises:
        ValueError: The data set is a mixture.
    """
    if inputs and len(config.members) > 1:
        raise ValueError(
            f"{config.dataset.name} is a mixture: its members name their own recordings; leave out {inputs[0]!r}"
        )


def plan_parts(
    config: Config,
    encoder: EncoderPreset,
    identity: str,
    space: ActionSpace,
    inputs: Sequence[str],
    base: Path,
    *,
    digest: Callable[[Sequence[Unit]], Digested] = digest_units,
    read: Callable[[Source, Sequence[tuple[Unit, str]], str], list[int]] = find_readings,
) -> list[Part]:
    """One part for every data set of a mixture, camera and phase; two where some recordings are read otherwise.

    Args:
        config: Resolved settings.
        encoder: Preset, with the weights that are used.
        identity: Of these weights.
        space: Action space.
        inputs: Replace the presets' lists when not empty.
        base: Folder that relative paths are meant from.
        digest: Names the content of units; another one may look it up where `digest_units` would read terabytes.
        read: Tells which units are read otherwise than by the first release.

    Raises:
        ValueError: Positional inputs for a mixture, a camera or option that the source does not know, or no recording.
    """
    check_inputs(config, inputs)
    parts = []
    for preset, weight in config.members:
        for camera in config.encode.cameras or (None,):
            source = open_source(preset, camera)
            found, notes = list_units(source, preset, inputs, base), ()
            if config.encode.max_episodes is not None:
                found, notes = take_recordings(source, found, config.encode.max_episodes)
            digested = digest(found)
            readings = read(source, digested.units, config.encode.decoder)
            ways = sorted(set(readings)) or [1]
            for phase, reading in itertools.product(_phases(config, source, digested.units), ways):
                recipe = name_reading(source.recipe, reading)
                units = [unit for unit, one in zip(digested.units, readings, strict=True) if one == reading]
                digests = {digest for _, digest in units}
                parts.append(
                    Part(
                        preset=preset,
                        weight=weight,
                        camera=camera,
                        phase=phase,
                        units=units,
                        recipe=token_recipe(config.encode, encoder, recipe, identity, phase=phase),
                        action_recipe=action_recipe(config.encode, encoder, recipe, space, phase=phase),
                        notes=notes,
                        copies=[copy for copy in digested.copies if copy[1] in digests],
                        # Counted once, whatever the number of ways in which the others are read.
                        unreadable=digested.unreadable if reading == ways[0] else [],
                    )
                )
    return parts


def check_controls(config: Config, part: Part, space: ActionSpace) -> None:
    """Refuse, before anything is encoded, an action space that no recording of a sample allows.

    Looks at the first usable recording and, where that one holds other columns, at some more. Does not look where
    `encode.max_skipped_share` expects most recordings to be skipped.

    Raises:
        ValueError: All those recordings lack columns or hold surplus ones; the spaces that they do allow are named.
    """
    if config.encode.max_skipped_share > MAX_EXPECTED_SHARE:
        return
    misfits = []
    for recording in itertools.islice(_iter_recordings(part), NUM_LOOKED_AT):
        if isinstance(recording, Episode):
            misfit = space.find_misfit(recording.controls)
            if misfit is None:
                return
            misfits.append(misfit)
    if misfits:
        reason, way_out = misfits[0]
        raise ValueError(
            f"action space {space.name!r} fits none of the first {len(misfits)} recordings of {part.preset.name}: {reason}; {way_out}. "
            "Where a few recordings do fit, encode.max_skipped_share=1 skips the others"
        )


def _iter_recordings(part: Part) -> Iterator[Episode | Skipped]:
    for unit, _ in part.units:
        yield from iter_recordings(part.source, unit)


def _phases(config: Config, source: Source, units: Sequence[tuple[Unit, str]]) -> tuple[int, ...]:
    """The starting offsets; "all" are those below the stride of the first usable recording."""
    phases = config.encode.phases
    if not isinstance(phases, str):
        return phases
    for unit, _ in units:
        for recording in iter_recordings(source, unit):
            if isinstance(recording, Episode):
                return tuple(range(sampling_stride(recording.fps, config.encode.fps)))
    raise ValueError(
        "encode.phases is 'all', but no usable recording says at what rate; see the skipped ones with phases: [0]"
    )
