"""The kind of encoder that V-JEPA 2.1 released: files as V-JEPA 2's, another transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jepa_cache.encoder.vjepa2 import VJepa2, sizes_of

if TYPE_CHECKING:
    from torch import nn

    from jepa_cache.config.schema import EncodeConfig, EncoderPreset


class VJepa21(VJepa2):
    """V-JEPA 2.1's transformer, which takes single frames as images too."""

    def make(self, preset: EncoderPreset) -> nn.Module:
        """The module, with weights that mean nothing."""
        from jepa_cache.encoder.vit21 import VisionTransformer21

        return VisionTransformer21(**sizes_of(preset), positions=preset.positions)

    def recipe_fields(self, preset: EncoderPreset, encode: EncodeConfig) -> Mapping[str, Any]:
        """Where rows and columns lie, and in frame mode the way of a frame; in the other modes every input is a video."""
        fields = {"kind": "vjepa2_1", "positions": preset.positions}
        return fields | ({"single_frame": encode.single_frame} if encode.mode == "frame" else {})
