"""The module of a preset with its weights, whatever kind of encoder it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from jepa_cache.encoder.checkpoints import build_encoder, load_encoder_state

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset


def load_module(preset: EncoderPreset, weights: Path | None) -> nn.Module:
    """Make a preset's encoder with its weights, in float32, evaluation mode and without gradients.

    Args:
        preset: the encoder.
        weights: from `weights.resolve_weights`; None only for a preset with random_seed.

    Returns:
        A module that takes clips [B, 3, T, R, R] and gives tokens [B, steps * N, D], with weights in memory: what becomes of the file
        afterwards changes nothing.

    Raises:
        ValueError: the file or folder does not hold the preset's encoder.
    """
    if preset.kind == "hf":
        from jepa_cache.encoder.image_encoder import load_image_encoder

        module = load_image_encoder(preset, weights)
    else:
        module = build_encoder(preset, load_encoder_state(preset, weights))
    # Loaded tensors are views of the mapped file, which would change with it while we encode.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module
