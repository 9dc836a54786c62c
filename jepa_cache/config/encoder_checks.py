"""What of an encoder preset cannot be, and which ways of encoding it has not."""

from __future__ import annotations

from jepa_cache.config.parsing import ConfigError, check_choice
from jepa_cache.config.schema import ENCODER_KINDS, INT4_GROUP, LEVEL_LAYERS, ROTARY, EncodeConfig, EncoderPreset


def check_encoder(encode: EncodeConfig, encoder: EncoderPreset) -> None:
    """Refuse a preset that contradicts itself, and settings of stage one that this encoder does not take.

    Raises:
        ConfigError: With the rule, the values, and what to change.
    """
    check_choice(f"kind of encoder {encoder.name}", encoder.kind, ENCODER_KINDS)
    if (encoder.weights is None) == (encoder.random_seed is None):
        raise ConfigError(
            f"encoder preset {encoder.name!r} must set exactly one of weights and random_seed; "
            f"got weights={encoder.weights!r}, random_seed={encoder.random_seed!r}"
        )
    if encoder.random_seed is not None and encode.weights is not None:
        raise ConfigError(
            f"encode.weights={encode.weights!r} is set, but encoder {encoder.name!r} has seeded random weights; "
            "choose a preset with weights (encoder=vitl) or set encode.weights to null"
        )
    if encoder.resolution % encoder.patch_size:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: resolution {encoder.resolution} is no multiple of patch_size {encoder.patch_size}"
        )
    _check_architecture(encoder)
    _check_image_encoder(encode, encoder)
    _check_tokens(encode, encoder)
    if encoder.embed_dim % encoder.num_heads:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: embed_dim {encoder.embed_dim} is no multiple of num_heads {encoder.num_heads}"
        )
    if encode.dtype == "int4" and encoder.embed_dim % INT4_GROUP:
        raise ConfigError(
            f"encode.dtype int4 has one scale for {INT4_GROUP} channels, but encoder preset {encoder.name!r} has embed_dim "
            f"{encoder.embed_dim}, no multiple of it; choose int8"
        )
    if encode.mode == "clip" and (encode.frames_per_clip < 2 or encode.frames_per_clip % encoder.tubelet_size):
        raise ConfigError(
            f"clip mode needs encode.frames_per_clip to be a multiple of the tubelet size {encoder.tubelet_size}; got {encode.frames_per_clip}"
        )


def _check_architecture(encoder: EncoderPreset) -> None:
    """Refuse a preset whose weights cannot have been trained so: they would load, and give wrong tokens."""
    if encoder.kind not in ROTARY:
        return
    rope, positions = ROTARY[encoder.kind]
    check_choice(f"rope of encoder {encoder.name}, kind {encoder.kind},", encoder.rope, (rope,))
    check_choice(f"positions of encoder {encoder.name}, kind {encoder.kind},", encoder.positions, positions)
    if encoder.positions == "rescaled" and encoder.patch_size != 16:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: rescaled positions are known for patch_size 16 only; got {encoder.patch_size}"
        )
    if encoder.kind == "vjepa2_1" and encoder.depth not in LEVEL_LAYERS:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: a V-JEPA 2.1 encoder has a depth of {', '.join(map(str, LEVEL_LAYERS))}, for which "
            f"the blocks of its four levels are known; got {encoder.depth}"
        )
    if encoder.kind == "vjepa2_1" and encoder.random_seed is not None:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: V-JEPA 2.1 encoders have no seeded random weights; set random_seed to null and name "
            "weights"
        )


def _check_image_encoder(encode: EncodeConfig, encoder: EncoderPreset) -> None:
    if encoder.short_side is not None and (
        not encoder.crop.startswith("pillow_") or encoder.short_side < encoder.resolution
    ):
        raise ConfigError(
            f"encoder preset {encoder.name!r}: short_side is for the pillow_* crop rules and at least the resolution "
            f"{encoder.resolution}; got {encoder.short_side} with crop {encoder.crop!r}"
        )
    if encoder.kind != "hf":
        return
    if encode.mode != "frame":
        raise ConfigError(
            f"encoder {encoder.name!r} is an image encoder and takes frames one by one; encode.mode must be frame, got {encode.mode!r}"
        )
    if (encoder.rope, encoder.tubelet_size, encoder.weights_entry) != ("own", 1, None):
        raise ConfigError(
            f"encoder preset {encoder.name!r}: an image encoder (kind hf) has rope own, tubelet_size 1 and weights_entry null; got "
            f"{encoder.rope!r}, {encoder.tubelet_size} and {encoder.weights_entry!r}"
        )
    if encoder.random_seed is not None:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: an image encoder (kind hf) has no seeded random weights; set random_seed to null and "
            "name weights"
        )


def _check_tokens(encode: EncodeConfig, encoder: EncoderPreset) -> None:
    side = encoder.resolution // encoder.patch_size
    if side % encode.pool:
        raise ConfigError(
            f"encode.pool {encode.pool} must divide the grid of encoder {encoder.name!r}, {side} x {side} patches; choose a divisor, "
            "or 1 to store every token"
        )
    if encode.single_frame == "image" and encoder.kind != "vjepa2_1":
        raise ConfigError(
            f"encode.single_frame is 'image', but encoder {encoder.name!r} is of kind {encoder.kind}, which has no image path; set "
            "encode.single_frame to doubled, or choose a V-JEPA 2.1 encoder (vitb384_v21, vitl384_v21, ...)"
        )
    if encode.single_frame == "image" and encode.mode != "frame":
        raise ConfigError(
            f"encode.single_frame is 'image', but in {encode.mode} mode no frame is encoded alone; set encode.mode to frame, or "
            "encode.single_frame to doubled"
        )
