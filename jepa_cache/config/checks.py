"""Combinations of settings that cannot work, refused before anything is read or computed."""

from __future__ import annotations

import math
import re

from jepa_cache.config.encoder_checks import check_encoder
from jepa_cache.config.parsing import ConfigError, check_choice, check_choices, check_once, check_positive
from jepa_cache.config.schema import (
    COMPUTE_DTYPES,
    DECODERS,
    ENCODE_MODES,
    LOGGERS,
    MEASUREMENTS,
    METRICS,
    OPTIMIZERS,
    PLAN_SETTINGS,
    PRECISIONS,
    PROBES,
    SCALING_RULES,
    SINGLE_FRAMES,
    STORED_DTYPES,
    TRAIN_DEVICES,
    Config,
    EncodeConfig,
    EvaluateConfig,
    FilterConfig,
    PlanConfig,
    PredictorPreset,
    TrainConfig,
)

MAX_SEED = 2**32  # what every generator of numpy and torch takes
LEAST_BOOTSTRAP = 100  # resamples: below 40 a 2.5 % quantile is the smallest value itself


def check_config(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is read or computed.

    Raises:
        ConfigError: With the rule, the values, and what to change.
    """
    _check_encode(config.encode)
    check_encoder(config.encode, config.encoder)
    _check_share("split.val_share", config.split.val_share)
    for section in ("split", "train", "evaluate", "plan"):
        _check_seed(f"{section}.seed", getattr(config, section).seed)
    _check_filter(config.filter)
    check_choice("scaler.actions", config.scaler.actions, SCALING_RULES)
    check_choice("scaler.states", config.scaler.states, SCALING_RULES)
    _check_predictor(config.predictor)
    _check_train(config.train)
    _check_evaluate(config.evaluate)
    _check_plan(config.plan)
    if config.encode.mode == "clip":
        _check_clip(config)


def _check_encode(encode: EncodeConfig) -> None:
    check_choice("encode.mode", encode.mode, ENCODE_MODES)
    check_choice("encode.compute_dtype", encode.compute_dtype, COMPUTE_DTYPES)
    check_choice("encode.dtype", encode.dtype, STORED_DTYPES)
    check_choice("encode.decoder", encode.decoder, DECODERS)
    check_choice("encode.single_frame", encode.single_frame, SINGLE_FRAMES)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", encode.device):
        raise ConfigError(f"encode.device is auto, cpu, cuda or cuda:<number of the GPU>; got {encode.device!r}")
    for key in ("fps", "num_decoders", "batch_size", "pool"):
        check_positive(f"encode.{key}", getattr(encode, key))
    check_once("encode.cameras", encode.cameras)
    phases = encode.phases
    if phases != "all" and (isinstance(phases, str) or not phases or min(phases) < 0 or len(set(phases)) < len(phases)):
        # Of a phase that stands there twice every step would be stored, drawn and counted twice.
        raise ConfigError(
            "encode.phases is 'all' or a list of different first frames, from 0 to below the stride; got "
            f"{phases if isinstance(phases, str) else list(phases)!r}"
        )
    if encode.max_episodes is not None:
        check_positive("encode.max_episodes", encode.max_episodes)
    _check_share("encode.max_skipped_share", encode.max_skipped_share)


def _check_filter(filters: FilterConfig) -> None:
    check_positive("filter.min_steps", filters.min_steps)
    if filters.idle_cut_end < 0 or (filters.idle_cut_end and not filters.drop_idle):
        raise ConfigError(
            f"filter.idle_cut_end is at least 0, and above it only with filter.drop_idle; got {filters.idle_cut_end} with "
            f"drop_idle {str(filters.drop_idle).lower()}"
        )


def _check_predictor(predictor: PredictorPreset) -> None:
    if predictor.predictor_dim % predictor.num_heads:
        raise ConfigError(
            f"predictor preset {predictor.name!r}: predictor_dim {predictor.predictor_dim} is no multiple of num_heads {predictor.num_heads}"
        )


def _check_train(train: TrainConfig) -> None:
    check_choice("train.schedule", train.schedule, ("wsd", "cosine"))
    check_choice("train.rollout", train.rollout, ("fixed", "legacy"))
    check_choice("train.rollout_start", train.rollout_start, ("first", "random"))
    check_choice("train.precision", train.precision, PRECISIONS)
    check_choice("train.optimizer", train.optimizer, OPTIMIZERS)
    check_choice("train.metric", train.metric, METRICS)
    check_choice("train.select", train.select, ("last", "best"))
    check_choices("train.loggers", train.loggers, LOGGERS)
    for key in ("num_steps", "batch_size", "grad_accumulation", "auto_steps", "loss_exp", "lr"):
        check_positive(f"train.{key}", getattr(train, key))
    for key in ("log_every", "checkpoint_every", "num_loader_threads", "keep_last", "lora_alpha"):
        check_positive(f"train.{key}", getattr(train, key))
    if train.window_steps < 2:
        raise ConfigError(
            f"train.window_steps must be at least 2 (one step to predict from, one to predict); got {train.window_steps}"
        )
    if train.auto_steps > train.window_steps - 1:
        raise ConfigError(
            f"train.auto_steps {train.auto_steps} needs a window of {train.auto_steps + 1} steps; train.window_steps is {train.window_steps}"
        )
    check_choice("train.device", train.device, TRAIN_DEVICES)
    for key in (
        *(
            "start_lr",
            "final_lr",
            "weight_decay",
            "final_weight_decay",
            "clip_norm",
            "num_warmup",
            "num_anneal",
            "num_epochs",
        ),
        *("validate_every", "patience", "keep_every", "upload_every_min", "num_threads", "lora_rank", "lora_dropout"),
    ):
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


def _check_evaluate(evaluate: EvaluateConfig) -> None:
    check_choices("evaluate.probes", evaluate.probes, PROBES)
    check_choices("evaluate.measure", evaluate.measure, MEASUREMENTS)
    for key in ("horizon", "num_context_steps", "windows_per_episode", "num_bootstrap", "batch_size"):
        check_positive(f"evaluate.{key}", getattr(evaluate, key))
    for key in ("probe_width", "probe_windows", "energy_samples", "energy_windows", "noise_windows"):
        check_positive(f"evaluate.{key}", getattr(evaluate, key))
    if evaluate.num_bootstrap < LEAST_BOOTSTRAP:
        raise ConfigError(
            f"evaluate.num_bootstrap is at least {LEAST_BOOTSTRAP}, for the ends of 95 % intervals; got {evaluate.num_bootstrap}"
        )
    if evaluate.energy_samples % 10:
        raise ConfigError(
            f"evaluate.energy_samples must be a multiple of 10, so that chance puts exactly a tenth of the true actions into "
            f"the best tenth; got {evaluate.energy_samples}"
        )
    axes = evaluate.energy_axes
    if axes is not None and (len(axes) != 2 or axes[0] == axes[1]):
        raise ConfigError(f"evaluate.energy_axes names two different action columns, or is null; got {list(axes)}")


def _check_plan(plan: PlanConfig) -> None:
    check_choice("plan.settings", plan.settings, PLAN_SETTINGS)
    for key in ("starts_per_episode", "num_context_steps", "max_turn_deg", "num_random"):
        check_positive(f"plan.{key}", getattr(plan, key))
    for key, least in (("num_samples", 2), ("num_rounds", 1)):
        value = getattr(plan, key)
        if value is not None and value < least:
            raise ConfigError(f"plan.{key} is at least {least}, or null for that of plan.settings; got {value}")
    if plan.max_step_m is not None:
        check_positive("plan.max_step_m", plan.max_step_m)
    if plan.max_rotation_rad < 0:
        raise ConfigError(f"plan.max_rotation_rad must not be below 0; got {plan.max_rotation_rad}")
    if plan.max_turn_deg > 180 or plan.max_rotation_rad > math.pi:
        raise ConfigError(
            "plan.max_turn_deg is at most 180 and plan.max_rotation_rad at most pi (3.14159): half a circle, beyond which a turn is one the "
            f"other way; got {plan.max_turn_deg} and {plan.max_rotation_rad}"
        )
    if not plan.horizons or min(plan.horizons) < 1 or len(set(plan.horizons)) < len(plan.horizons):
        raise ConfigError(f"plan.horizons is a list of different numbers of steps from 1 on; got {list(plan.horizons)}")


def _check_clip(config: Config) -> None:
    """A segment is one clip: windows must fit into it."""
    encode, encoder, evaluate = config.encode, config.encoder, config.evaluate
    segment = encode.frames_per_clip // encoder.tubelet_size
    for key, steps in (
        ("train.window_steps", config.train.window_steps),
        ("evaluate.num_context_steps + evaluate.horizon", evaluate.num_context_steps + evaluate.horizon),
    ):
        if steps > segment:
            raise ConfigError(
                f"in clip mode a segment is one clip of {segment} steps (encode.frames_per_clip {encode.frames_per_clip} / tubelet "
                f"{encoder.tubelet_size}), but {key} is {steps}; lower it or raise encode.frames_per_clip"
            )


def _check_share(key: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"{key} is a share and must lie in [0, 1]; got {share}")


def _check_seed(key: str, seed: int) -> None:
    if not 0 <= seed < MAX_SEED:
        raise ConfigError(f"{key} must not be below 0, and below {MAX_SEED}; got {seed}")
