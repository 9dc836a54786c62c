"""Frozen encoders: uint8 frames in, tokens out, under the official weights' names.

Reading order: `frozen` (pixels to tokens), `KINDS` below with their files (`vjepa2`, `image`, `pixels`) and modules (`vit`, `image_model`),
`checkpoints` (official files), `preprocess` (crop rules).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jepa_cache.encoder.image import ImageKind
from jepa_cache.encoder.pixels import PixelsKind
from jepa_cache.encoder.vjepa2 import VJepa2, VJepa21, random_state

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


def weights_identity(preset: EncoderPreset, path: Path | None, *, digest: Callable[[Path], str]) -> str:
    """Name the weights by their content, for the recipe: equal strings mean equal weights. Imports no torch.

    Covers weights only; what else decides the tokens (num_heads, rope, crop, dtype) belongs into the recipe beside it. `path` is
    from the kind's `find`, None for a preset without a file; `digest` gives a file's hex sha256, possibly remembered from an earlier run.

    Returns:
        `random:<sha256 over names, shapes and bytes>`, or `file:<sha256 of the file>` followed by `#<entry>` for
        checkpoints that have entries, or `hf:<sha256 over config and weights>` for an image encoder, or `pixels:1` where there are none.

    Raises:
        ValueError: the digest is not the one that the preset gives, or the preset names no seed and no file.
    """
    if path is None and preset.random_seed is not None:
        total = hashlib.sha256()
        for name, array in random_state(preset).items():
            total.update(f"{name} {list(array.shape)} {array.dtype.str}\n".encode())
            total.update(array.tobytes())
        return f"random:{total.hexdigest()}"
    identity = KINDS[preset.kind].identity(preset, path, digest)
    found = identity.partition(":")[2].partition("#")[0]
    if preset.weights_sha256 and found != preset.weights_sha256:
        raise ValueError(
            f"weights {path} have sha256 {found}, but encoder preset '{preset.name}' gives {preset.weights_sha256}: "
            f"they are other ones or were damaged. Download it again, or correct weights_sha256 in the preset"
        )
    return identity
