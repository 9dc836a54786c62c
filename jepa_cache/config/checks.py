"""Combinations of settings that cannot work, refused before anything is read or computed."""

from __future__ import annotations

from collections.abc import Sequence

from jepa_cache.config.parsing import ConfigError, nearest
from jepa_cache.config.schema import COMPUTE_DTYPES, ENCODE_MODES, SCALING_RULES, Config


def check_config(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is read or computed.

    Raises:
        ConfigError: With the rule, the values, and what to change.
    """
    encode, encoder, train, evaluate = config.encode, config.encoder, config.train, config.evaluate
    _check_choice("encode.mode", encode.mode, ENCODE_MODES)
    _check_choice("encode.compute_dtype", encode.compute_dtype, COMPUTE_DTYPES)
    _check_choice("encode.dtype", encode.dtype, ("float16",))
    _check_choice("encode.decoder", encode.decoder, ("auto", "decord", "pyav"))
    _check_choice("scaler.actions", config.scaler.actions, SCALING_RULES)
    _check_choice("scaler.states", config.scaler.states, SCALING_RULES)
    _check_choice("train.schedule", train.schedule, ("wsd", "cosine"))
    _check_choice("train.rollout", train.rollout, ("fixed", "legacy"))
    _check_choice("train.precision", train.precision, ("float32", "bfloat16"))
    _check_choice(f"rope of encoder {encoder.name}", encoder.rope, ("tiled",))
    for key in ("fps", "num_decoders", "batch_size"):
        _check_positive(f"encode.{key}", getattr(encode, key))
    for key in ("num_steps", "batch_size", "grad_accumulation", "auto_steps", "loss_exp", "lr"):
        _check_positive(f"train.{key}", getattr(train, key))
    for key in ("log_every", "checkpoint_every", "num_loader_threads"):
        _check_positive(f"train.{key}", getattr(train, key))
    for key in ("horizon", "num_context_steps", "windows_per_episode", "num_bootstrap", "batch_size"):
        _check_positive(f"evaluate.{key}", getattr(evaluate, key))
    for key, share in (
        ("split.val_share", config.split.val_share),
        ("encode.max_skipped_share", encode.max_skipped_share),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(f"{key} is a share and must lie in [0, 1]; got {share}")
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
    if encoder.embed_dim % encoder.num_heads:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: embed_dim {encoder.embed_dim} is no multiple of num_heads {encoder.num_heads}"
        )
    predictor = config.predictor
    if predictor.predictor_dim % predictor.num_heads:
        raise ConfigError(
            f"predictor preset {predictor.name!r}: predictor_dim {predictor.predictor_dim} is no multiple of num_heads {predictor.num_heads}"
        )
    if encode.mode == "clip" and (encode.frames_per_clip < 2 or encode.frames_per_clip % encoder.tubelet_size):
        raise ConfigError(
            f"clip mode needs encode.frames_per_clip to be a multiple of the tubelet size {encoder.tubelet_size}; got {encode.frames_per_clip}"
        )
    if train.window_steps < 2:
        raise ConfigError(
            f"train.window_steps must be at least 2 (one step to predict from, one to predict); got {train.window_steps}"
        )
    needed = evaluate.num_context_steps + evaluate.horizon
    if encode.mode == "clip":
        segment = encode.frames_per_clip // encoder.tubelet_size
        for key, steps in (
            ("train.window_steps", train.window_steps),
            ("evaluate.num_context_steps + evaluate.horizon", needed),
        ):
            if steps > segment:
                raise ConfigError(
                    f"in clip mode a segment is one clip of {segment} steps (encode.frames_per_clip {encode.frames_per_clip} / tubelet "
                    f"{encoder.tubelet_size}), but {key} is {steps}; lower it or raise encode.frames_per_clip"
                )
    if train.auto_steps > train.window_steps - 1:
        raise ConfigError(
            f"train.auto_steps {train.auto_steps} needs a window of {train.auto_steps + 1} steps; train.window_steps is {train.window_steps}"
        )
    if train.num_warmup + (train.num_anneal if train.schedule == "wsd" else 0) > train.num_steps:
        raise ConfigError(
            f"train.num_warmup {train.num_warmup} + train.num_anneal {train.num_anneal} exceed train.num_steps {train.num_steps}; "
            "lower them together with num_steps"
        )


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key} is {value!r}{nearest(value, known)}")


def _check_positive(key: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{key} must be above 0; got {value}")
