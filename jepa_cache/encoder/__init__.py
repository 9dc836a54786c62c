"""Frozen encoders: uint8 frames in, tokens out, under the official weights' names.

Reading order: `frozen` (pixels to tokens), `KINDS` below with their files (`vjepa2`, `image`, `pixels`) and modules (`vit`, `image_model`),
`checkpoints` (official files), `weights` (what identifies them), `preprocess` (crop rules).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jepa_cache.encoder.image import ImageKind
from jepa_cache.encoder.pixels import PixelsKind
from jepa_cache.encoder.vjepa2 import VJepa2, VJepa21

if TYPE_CHECKING:
    from torch import nn

    from jepa_cache.config.schema import EncodeConfig, EncoderPreset


class EncoderKind(Protocol):
    """An architecture with its weights files. Only `load` imports torch: `status` and an encode with nothing to do need the rest."""

    def find(self, reference: str, *, base: Path, download: bool = True) -> Path | None:
        """The local file or folder of weights that a preset names; None where it would have to be downloaded and must not be."""
        ...

    def files(self, weights: Path) -> list[Path]:
        """The files that the encoder is loaded from and that its identity covers."""
        ...

    def identity(self, preset: EncoderPreset, weights: Path | None, digest: Callable[[Path], str]) -> str:
        """`form:sha256` of the content, with `#entry` where files have entries; `digest` gives a file's hex sha256."""
        ...

    def load(self, preset: EncoderPreset, weights: Path | None) -> nn.Module:
        """A module from clips [B, 3, F, R, R] to tokens [B, T*N, D] with exactly these weights, in float32, without gradients."""
        ...

    def recipe_fields(self, preset: EncoderPreset, encode: EncodeConfig) -> Mapping[str, Any]:
        """What decides the tokens beside the sizes and weights that every recipe has; its names and values are hashed for ever."""
        ...


KINDS: Mapping[str, EncoderKind] = {
    "vjepa2": VJepa2(),
    "vjepa2_1": VJepa21(),
    "hf": ImageKind(),
    "pixels": PixelsKind(),
}
"""By the preset's `kind`; `config.schema.ENCODER_RULES` says what presets of a kind may hold."""
