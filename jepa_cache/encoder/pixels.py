"""The kind of encoder that is none: the frame's own pixels, coarse. The honest baseline that every trained encoder has to beat.

A preset `resolution: 16, patch_size: 16` gives one token of 768 numbers a frame, and `patch_size: 4` a grid of 4 x 4 tokens of 48. One
token is the default, because predictors read layer-normed tokens: a layer norm over a small patch throws its brightness away (a
linear readout of the arm's position was off by 8.6 cm in place of 6.5 on ten real episodes), over the whole frame only that of the room.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from jepa_cache.config.schema import EncodeConfig, EncoderPreset

IDENTITY = "pixels:1"
"""In place of the hash of weights; the number is raised when the same frames would give other tokens."""


class PixelsKind:
    """Normalised pixels of the resized frame, patch by patch; it has no weights, and takes frames one by one."""

    def find(self, reference: str, *, base: Path, download: bool = True) -> Path | None:
        """Refused: a preset of this kind names no weights."""
        raise ValueError(f"encoders of kind pixels have no weights; got '{reference}'")

    def files(self, weights: Path) -> list[Path]:
        """None."""
        return []

    def identity(self, preset: EncoderPreset, weights: Path | None, digest: Callable[[Path], str]) -> str:
        """The same for all; sizes, crop, mean and deviation stand beside it in the recipe."""
        return IDENTITY

    def load(self, preset: EncoderPreset, weights: Path | None) -> nn.Module:
        """A module from frames [B, 3, 1, R, R] to patches [B, N, 3 * P * P], row by row; a patch is its red rows, green rows, blue rows."""
        from torch import Tensor, nn

        class Patches(nn.Module):
            def forward(self, clips: Tensor) -> Tensor:
                return nn.functional.unfold(clips.squeeze(2), preset.patch_size, stride=preset.patch_size).mT

        return Patches()

    def recipe_fields(self, preset: EncoderPreset, encode: EncodeConfig) -> Mapping[str, Any]:
        """The kind alone."""
        return {"kind": "pixels"}
