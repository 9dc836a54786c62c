"""Combinations of settings that cannot work, refused before anything is read or computed."""

from __future__ import annotations

from collections.abc import Sequence

from jepa_cache.config.parsing import ConfigError, nearest
from jepa_cache.config.schema import (
    COMPUTE_DTYPES,
    ENCODE_MODES,
    ENCODER_KINDS,
    INT4_GROUP,
    LEVEL_LAYERS,
    LOGGERS,
    MEASUREMENTS,
    METRICS,
    OPTIMIZERS,
    PLAN_SETTINGS,
    PRECISIONS,
    PROBES,
    ROTARY,
    SCALING_RULES,
    SINGLE_FRAMES,
    STORED_DTYPES,
    Config,
    EncodeConfig,
    EncoderPreset,
    EvaluateConfig,
    PlanConfig,
    TrainConfig,
)

LEAST_BOOTSTRAP = 100  # resamples: below 40 a 2.5 % quantile is the smallest value itself


def check_config(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is read or computed.

    Raises:
        ConfigError: With the rule, the values, and what to change.
    """
    encode, encoder, train, evaluate = config.encode, config.encoder, config.train, config.evaluate
    _check_choice("encode.mode", encode.mode, ENCODE_MODES)
    _check_choice("encode.compute_dtype", encode.compute_dtype, COMPUTE_DTYPES)
    _check_choice("encode.dtype", encode.dtype, STORED_DTYPES)
    _check_choice("encode.decoder", encode.decoder, ("auto", "decord", "pyav"))
    _check_choice("scaler.actions", config.scaler.actions, SCALING_RULES)
    _check_choice("scaler.states", config.scaler.states, SCALING_RULES)
    _check_choice("train.schedule", train.schedule, ("wsd", "cosine"))
    _check_choice("train.rollout", train.rollout, ("fixed", "legacy"))
    _check_choice("train.rollout_start", train.rollout_start, ("first", "random"))
    _check_choice("train.precision", train.precision, PRECISIONS)
    _check_choice("train.optimizer", train.optimizer, OPTIMIZERS)
    _check_choice("train.metric", train.metric, METRICS)
    _check_choice("train.select", train.select, ("last", "best"))
    for probe in evaluate.probes:
        _check_choice("evaluate.probes", probe, PROBES)
    for logger in train.loggers:
        _check_choice("train.loggers", logger, LOGGERS)
    for measurement in evaluate.measure:
        _check_choice("evaluate.measure", measurement, MEASUREMENTS)
    _check_choice(f"kind of encoder {encoder.name}", encoder.kind, ENCODER_KINDS)
    _check_choice("encode.single_frame", encode.single_frame, SINGLE_FRAMES)
    for key in ("fps", "num_decoders", "batch_size", "pool"):
        _check_positive(f"encode.{key}", getattr(encode, key))
    if encode.max_episodes is not None:
        _check_positive("encode.max_episodes", encode.max_episodes)
    for key in ("num_steps", "batch_size", "grad_accumulation", "auto_steps", "loss_exp", "lr"):
        _check_positive(f"train.{key}", getattr(train, key))
    for key in ("log_every", "checkpoint_every", "num_loader_threads", "keep_last", "lora_alpha"):
        _check_positive(f"train.{key}", getattr(train, key))
    for key in (
        "horizon",
        "num_context_steps",
        "windows_per_episode",
        "num_bootstrap",
        "batch_size",
        "probe_width",
        "probe_windows",
    ):
        _check_positive(f"evaluate.{key}", getattr(evaluate, key))
    check_energy(evaluate)
    filters = config.filter
    _check_positive("filter.min_steps", filters.min_steps)
    if filters.idle_cut_end < 0 or (filters.idle_cut_end and not filters.drop_idle):
        raise ConfigError(
            f"filter.idle_cut_end is at least 0, and above it only with filter.drop_idle; got {filters.idle_cut_end} with "
            f"drop_idle {str(filters.drop_idle).lower()}"
        )
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
    _check_plan(config.plan)
    _check_resampling(config)
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
    for key in ("num_epochs", "lora_rank", "lora_dropout", "patience", "keep_every", "upload_every_min", "clip_norm"):
        if getattr(train, key) < 0:
            raise ConfigError(f"train.{key} must not be below 0; got {getattr(train, key)}")
    if train.lora_dropout >= 1:
        raise ConfigError(f"train.lora_dropout is a probability below 1; got {train.lora_dropout}")
    if not train.validate_every and (train.patience or train.select == "best"):
        raise ConfigError(
            f"train.patience={train.patience} and train.select={train.select!r} need validations; set train.validate_every above 0"
        )
    if not train.num_epochs:
        check_schedule(train)


def check_schedule(train: TrainConfig) -> None:
    """Refuse a warm-up and a decay that do not fit into the train steps.

    Raises:
        ConfigError: They do not.
    """
    if train.num_warmup + (train.num_anneal if train.schedule == "wsd" else 0) > train.num_steps:
        raise ConfigError(
            f"train.num_warmup {train.num_warmup} + train.num_anneal {train.num_anneal} exceed train.num_steps {train.num_steps}; "
            "lower them together with num_steps"
        )


def _check_architecture(encoder: EncoderPreset) -> None:
    """Refuse a preset whose weights cannot have been trained so: they would load, and give wrong tokens."""
    if encoder.kind not in ROTARY:
        return
    rope, positions = ROTARY[encoder.kind]
    _check_choice(f"rope of encoder {encoder.name}, kind {encoder.kind},", encoder.rope, (rope,))
    _check_choice(f"positions of encoder {encoder.name}, kind {encoder.kind},", encoder.positions, positions)
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


def check_energy(evaluate: EvaluateConfig) -> None:
    """Refuse settings of energy and noise that cannot work.

    Raises:
        ConfigError: With the rule and the value.
    """
    for key in ("energy_samples", "energy_windows", "noise_windows"):
        _check_positive(f"evaluate.{key}", getattr(evaluate, key))
    if evaluate.energy_samples % 10:
        raise ConfigError(
            f"evaluate.energy_samples must be a multiple of 10, so that chance puts exactly a tenth of the true actions into "
            f"the best tenth; got {evaluate.energy_samples}"
        )
    axes = evaluate.energy_axes
    if axes is not None and (len(axes) != 2 or axes[0] == axes[1]):
        raise ConfigError(f"evaluate.energy_axes names two different action columns, or is null; got {list(axes)}")


def _check_resampling(config: Config) -> None:
    if config.evaluate.num_bootstrap < LEAST_BOOTSTRAP:
        raise ConfigError(
            f"evaluate.num_bootstrap is at least {LEAST_BOOTSTRAP}, for the ends of 95 % intervals; got {config.evaluate.num_bootstrap}"
        )
    for key, seed in (("evaluate.seed", config.evaluate.seed), ("plan.seed", config.plan.seed)):
        if seed < 0:
            raise ConfigError(f"{key} must not be below 0; got {seed}")


def _check_plan(plan: PlanConfig) -> None:
    _check_choice("plan.settings", plan.settings, PLAN_SETTINGS)
    for key in ("starts_per_episode", "num_context_steps", "max_turn_deg", "num_random"):
        _check_positive(f"plan.{key}", getattr(plan, key))
    for key, least in (("num_samples", 2), ("num_rounds", 1)):
        value = getattr(plan, key)
        if value is not None and value < least:
            raise ConfigError(f"plan.{key} is at least {least}, or null for that of plan.settings; got {value}")
    if plan.max_step_m is not None:
        _check_positive("plan.max_step_m", plan.max_step_m)
    if plan.max_rotation_rad < 0 or plan.num_timed < 0:
        raise ConfigError(
            f"plan.max_rotation_rad and plan.num_timed must not be below 0; got {plan.max_rotation_rad} and {plan.num_timed}"
        )
    if not plan.horizons or min(plan.horizons) < 1 or len(set(plan.horizons)) < len(plan.horizons):
        raise ConfigError(f"plan.horizons is a list of different numbers of steps from 1 on; got {list(plan.horizons)}")


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key} is {value!r}{nearest(value, known)}")


def _check_positive(key: str, value: float) -> None:
    if value <= 0:
        raise ConfigError(f"{key} must be above 0; got {value}")
