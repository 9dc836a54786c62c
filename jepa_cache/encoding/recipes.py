"""What decides the numbers: the recipe of the tokens, and the smaller one of actions and states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepa_cache.actions import ActionSpace
from jepa_cache.config.schema import EncodeConfig, EncoderPreset

# Raised when the same settings would give other tokens or step tables than before.
ENCODE_VERSION = 1


def token_recipe(
    encode: EncodeConfig,
    encoder: EncoderPreset,
    source_recipe: Mapping[str, Any],
    weights_identity: str,
    *,
    phase: int = 0,
) -> dict[str, Any]:
    """Everything that decides the tokens of a store; its hash is the fingerprint.

    Not in it: device, library versions and batch shape (recorded beside the store), the action space, and all of stage two.
    """
    return {
        "encode_version": ENCODE_VERSION,
        "encoder": {
            "depth": encoder.depth,
            "embed_dim": encoder.embed_dim,
            "mlp_dim": encoder.mlp_dim,
            "num_heads": encoder.num_heads,
            "patch_size": encoder.patch_size,
            "rope": encoder.rope,
            "tubelet_size": encoder.tubelet_size,
            "weights": weights_identity,
            **_encoder_extras(encoder, encode),
        },
        "preprocess": {
            "crop": encoder.crop,
            "mean": list(encoder.mean),
            "resolution": encoder.resolution,
            "std": list(encoder.std),
            **({} if encoder.short_side is None else {"short_side": encoder.short_side}),
        },
        "sampling": sampling_recipe(encode, phase),
        "compute_dtype": encode.compute_dtype,
        "dtype": encode.dtype,
        "decoder": encode.decoder,
        "source": dict(source_recipe),
        **({} if encode.pool == 1 else {"pool": encode.pool}),  # absent where off, as in recipes from before it
    }


def _encoder_extras(encoder: EncoderPreset, encode: EncodeConfig) -> dict[str, Any]:
    """What tells kinds of encoders apart. V-JEPA 2 has none of it, so that its fingerprints stay what they were."""
    if encoder.kind == "vjepa2":
        return {}
    extras = {"kind": encoder.kind}
    if encoder.kind == "vjepa2_1":
        extras["positions"] = encoder.positions
        if encode.mode == "frame":  # in the other modes every input is a video
            extras["single_frame"] = encode.single_frame
    return extras


def sampling_recipe(encode: EncodeConfig, phase: int) -> dict[str, Any]:
    """Which moments of a recording become steps."""
    return {
        "fps": encode.fps,
        "frames_per_clip": encode.frames_per_clip if encode.mode == "clip" else None,
        "mode": encode.mode,
        "phase": phase,
        "view": "main",
    }


def action_recipe(
    encode: EncodeConfig,
    encoder: EncoderPreset,
    source_recipe: Mapping[str, Any],
    space: ActionSpace,
    *,
    phase: int = 0,
) -> dict[str, Any]:
    """Everything that decides actions and states: no weights, no pixels."""
    return {
        "action_space": space.name,
        "action_version": space.version,
        "sampling": {**sampling_recipe(encode, phase), "tubelet_size": encoder.tubelet_size},
        "source": dict(source_recipe),
    }
