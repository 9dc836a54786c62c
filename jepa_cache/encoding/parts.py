"""The parts of a run: every data set of a mixture, seen by each camera from each starting offset, with its recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_cache.actions import ActionSpace
from jepa_cache.config.schema import Config, DatasetPreset, EncoderPreset
from jepa_cache.encoding.modes import sampling_stride
from jepa_cache.encoding.recipes import action_recipe, token_recipe
from jepa_cache.encoding.units import digest_units, list_units
from jepa_cache.episode import Episode
from jepa_cache.sources import Source, Unit, build_source
from jepa_cache.store.recipe import fingerprint


@dataclass(frozen=True)
class Part:
    """One data set from one camera at one starting offset, with everything that names its stores."""

    preset: DatasetPreset
    weight: float
    camera: str | None
    source: Source
    phase: int
    units: Sequence[tuple[Unit, str]]
    recipe: dict[str, Any]
    action_recipe: dict[str, Any]

    @property
    def view(self) -> str:
        """Camera and phase in words."""
        words = [self.camera] if self.camera else []
        return ", ".join([*words, *([f"phase {self.phase}"] if self.phase else [])]) or "main"

    @property
    def tokens(self) -> str:
        """Fingerprint of its token stores."""
        return fingerprint(self.recipe)

    @property
    def actions(self) -> str:
        """Fingerprint of its action stores."""
        return fingerprint(self.action_recipe)

    @property
    def controls(self) -> str:
        """Fingerprint of its controls: of the source alone."""
        return fingerprint(dict(self.source.recipe))


def plan_parts(
    config: Config, encoder: EncoderPreset, identity: str, space: ActionSpace, inputs: Sequence[str], base: Path
) -> list[Part]:
    """One part for every data set of a mixture, camera and phase.

    Raises:
        ValueError: Positional inputs for a mixture, a camera or option that the source does not know, or no recording.
    """
    if inputs and len(config.members) > 1:
        raise ValueError(
            f"{config.dataset.name} is a mixture: its members name their own recordings; leave out {inputs[0]!r}"
        )
    parts = []
    for preset, weight in config.members:
        for camera in config.encode.cameras or (None,):
            options = preset.source_options | ({"camera": camera} if camera else {})
            source = build_source(preset.source, options)
            units = digest_units(list_units(source, preset, inputs, base))
            for phase in _phases(config, source, units):
                parts.append(
                    Part(
                        preset=preset,
                        weight=weight,
                        camera=camera,
                        source=source,
                        phase=phase,
                        units=units,
                        recipe=token_recipe(config.encode, encoder, source.recipe, identity, phase=phase),
                        action_recipe=action_recipe(config.encode, encoder, source.recipe, space, phase=phase),
                    )
                )
    return parts


def _phases(config: Config, source: Source, units: Sequence[tuple[Unit, str]]) -> tuple[int, ...]:
    """The starting offsets; "all" are those below the stride of the first usable recording."""
    phases = config.encode.phases
    if not isinstance(phases, str):
        return phases
    for unit, _ in units:
        for recording in source.iter_episodes(unit):
            if isinstance(recording, Episode):
                return tuple(range(sampling_stride(recording.fps, config.encode.fps)))
    raise ValueError(
        "encode.phases is 'all', but no usable recording says at what rate; see the skipped ones with phases: [0]"
    )
