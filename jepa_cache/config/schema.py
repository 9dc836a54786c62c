"""The settings: dataclasses that params.yaml and the presets are parsed into, and the combinations that cannot work.

A rule of one value stands in its annotation; `check_config` holds the rules of several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jepa_cache.config.parsing import ConfigError

# V-JEPA 2.1's depths, and the blocks (from 0) whose outputs are its four levels.
LEVEL_LAYERS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}


class EncoderRules(NamedTuple):
    """What presets of one kind of encoder may say: with other values its weights would load, and give wrong tokens."""

    fields: Mapping[str, tuple[Any, ...]]  # of the preset, with their possible values
    image_path: bool = False  # whether a single frame may be given as an image
    modes: tuple[str, ...] = ("frame", "tubelet", "clip")


# By kind; `encoder.KINDS` loads them. hf: image encoders of the transformers library, which have positions of their own.
ENCODER_RULES = {
    "vjepa2": EncoderRules({"rope": ("tiled",), "positions": ("grid",)}),
    "vjepa2_1": EncoderRules(
        {
            "rope": ("paired",),
            "positions": ("rescaled", "grid"),
            "depth": tuple(LEVEL_LAYERS),
            "random_seed": (None,),
        },
        image_path=True,
    ),
    "hf": EncoderRules(
        {"rope": ("own",), "tubelet_size": (1,), "weights_entry": (None,), "random_seed": (None,)}, modes=("frame",)
    ),
}
EncoderKind: TypeAlias = Literal[tuple(ENCODER_RULES)]  # type: ignore[valid-type]
# How frame mode gives a frame to the encoder: as a video of equal frames that fill a tubelet, or as an image.
SingleFrame: TypeAlias = Literal["doubled", "image"]
SINGLE_FRAMES = get_args(SingleFrame)
EncodeMode: TypeAlias = Literal["frame", "tubelet", "clip"]
FloatDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Decoder: TypeAlias = Literal["auto", "decord", "pyav"]
DECODERS = get_args(Decoder)
StoredDtype: TypeAlias = Literal[
    "float16", "bfloat16", "int8", "float8_e4m3", "int4"
]  # of tokens; docs/store_format.md
STORED_DTYPES = get_args(StoredDtype)
# Channels of a token that share an int4 scale; 32 would lower the error by a tenth and take 6 % more bytes.
INT4_GROUP = 64
Measurement: TypeAlias = Literal[
    "energy", "distances", "noise", "probes"
]  # beyond errors; `evaluation.run.MEASUREMENTS`
MEASUREMENTS = get_args(Measurement)
Probe: TypeAlias = Literal["inverse_dynamics", "state", "anticipation", "classification"]
Logger: TypeAlias = Literal["dvclive", "tensorboard", "wandb"]
ScalingRule: TypeAlias = Literal["standard", "none"]


def _rule(passes: Callable[[Any], object], rule: str) -> AfterValidator:
    """A check whose message is the rest of a sentence that begins with the key."""

    def check(value: Any) -> Any:
        if not passes(value):
            raise ValueError(f"{rule}; got {list(value) if isinstance(value, tuple) else value!r}")
        return value

    return AfterValidator(check)


def _name_once(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"names {value!r} {values.count(value)} times; name it once")
    return values


Once = AfterValidator(_name_once)
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, description="a share")]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32, description="what every generator of numpy and torch takes")]
Phases: TypeAlias = Annotated[
    tuple[int, ...] | str,
    # Of a phase that stands there twice every step would be stored, drawn and counted twice.
    _rule(
        lambda it: it == "all" or (not isinstance(it, str) and it and min(it) >= 0 and len(set(it)) == len(it)),
        "is 'all' or a list of different first frames, from 0 to below the stride",
    ),
]
Horizons: TypeAlias = Annotated[
    tuple[int, ...],
    _rule(
        lambda it: it and min(it) >= 1 and len(set(it)) == len(it), "is a list of different numbers of steps from 1 on"
    ),
]
EncodeDevice: TypeAlias = Annotated[
    str, _rule(re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch, "is auto, cpu, cuda or cuda:<number of the GPU>")
]
TwoColumns: TypeAlias = Annotated[
    tuple[str, ...], _rule(lambda it: len(it) == 2 and it[0] != it[1], "names two different action columns, or is null")
]
HALF_CIRCLE = "half a circle, beyond which a turn is one the other way"


@dataclass(frozen=True)
class DatasetPreset:
    """configs/dataset/*.yaml: where recordings come from and how they are sampled by default."""

    name: str
    source: str  # module in jepa_cache/sources
    source_options: dict[str, Any]  # checked by that module
    inputs: tuple[str, ...]  # folders, files, globs, {000..123} ranges
    fps: PositiveFloat  # Hz of the sampled frames
    mode: EncodeMode
    frames_per_clip: int  # sampled frames encoded jointly in clip mode
    action_space: str  # name in jepa_cache/actions.py
    scale_actions: ScalingRule
    scale_states: ScalingRule
    sample: dict[str, Any] | None  # settings of the synthetic recordings; only the sample data set has them
    cameras: Annotated[tuple[str, ...], Once] = ()  # each its own stores; empty where a source has one
    phases: Phases = (0,)  # starting offsets in video frames, each its own stores; "all" for every one
    mixture: dict[str, int | float] = field(
        default_factory=dict
    )  # other presets and the rates at which windows are drawn


@dataclass(frozen=True)
class EncoderPreset:
    """configs/encoder/*.yaml: architecture, preprocessing and weights of one frozen encoder."""

    name: str
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_dim: PositiveInt
    patch_size: PositiveInt  # pixels
    tubelet_size: PositiveInt  # frames
    resolution: PositiveInt  # pixels, square
    rope: str  # "tiled" (V-JEPA 2), "paired" (V-JEPA 2.1) or "own" (hf: the model's business)
    crop: str  # key of encoder.preprocess.CROP_RULES
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    compute_dtype: FloatDtype
    batch_size: PositiveInt  # encoder inputs per forward pass
    weights: str | None  # path, https:// URL or hf://owner/repo/file
    weights_entry: str | None  # top-level entry of an official .pt file
    weights_sha256: str | None  # null where unknown
    random_seed: int | None  # seeded random weights; exactly one of weights and random_seed is set
    kind: EncoderKind = "vjepa2"
    positions: str = "grid"  # rows and columns by index, or "rescaled" to span 0 to 15 (V-JEPA 2.1)
    single_frame: SingleFrame = "doubled"  # "image" in V-JEPA 2.1 only
    # Pixels before the centre is cut out, by the pillow_* crop rules; null: the frame is squeezed.
    short_side: int | None = None

    @property
    def num_tokens(self) -> int:
        """Patch tokens that the encoder gives for one step."""
        return (self.resolution // self.patch_size) ** 2

    @property
    def trained(self) -> bool:
        """Whether the weights were learned, as opposed to drawn at random."""
        return self.random_seed is None


@dataclass(frozen=True)
class PredictorPreset:
    """configs/predictor/*.yaml: size of the action-conditioned predictor."""

    name: str
    predictor_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: PositiveFloat
    activation_checkpointing: bool
    residual: bool  # add each step's own tokens to its prediction; the official predictor does not


@dataclass(frozen=True)
class CacheConfig:
    """Where the stores lie, and how they are read."""

    root: Annotated[
        Any, _rule(lambda it: it is None or (isinstance(it, str) and it.strip()), "must be a path, a URL or null")
    ]
    verify_checksums: bool  # of every chunk of the cache when a process first reads it


@dataclass(frozen=True)
class EncodeConfig:
    """What stage one does, after the presets were filled in."""

    fps: PositiveFloat  # Hz
    mode: EncodeMode
    frames_per_clip: int
    action_space: str
    cameras: Annotated[tuple[str, ...], Once]
    phases: Phases
    weights: str | None  # overrides the encoder preset's
    single_frame: SingleFrame  # frame mode only
    pool: PositiveInt  # 1 stores every patch's token, 2 the mean of each 2 x 2 patches' tokens
    compute_dtype: FloatDtype
    batch_size: PositiveInt
    dtype: StoredDtype
    device: EncodeDevice  # "auto", "cpu", "cuda", "cuda:1"
    decoder: Decoder
    num_decoders: PositiveInt  # threads
    max_skipped_share: Share  # of the recordings
    max_units: PositiveInt | None  # only the first units of each data set; the rest is not read

    def grid_of(self, encoder: EncoderPreset) -> tuple[int, int]:
        """Rows and columns of the stored tokens of a step."""
        side = encoder.resolution // encoder.patch_size // self.pool
        return side, side

    def num_tokens_of(self, encoder: EncoderPreset) -> int:
        """N: stored tokens of a step."""
        rows, columns = self.grid_of(encoder)
        return rows * columns


@dataclass(frozen=True)
class SplitConfig:
    """Which episodes are held out: a hash of the episode key and `seed` below `val_share`."""

    val_share: Share
    seed: Seed


@dataclass(frozen=True)
class FilterConfig:
    """Which steps windows may hold; segments are cut by the step table, without video or encoder."""

    drop_gui: bool  # steps with a screen open
    drop_null: bool  # steps from which no control acts until the next one
    drop_loading: bool  # the start of an episode until somebody acts, and frames of one colour
    drop_idle: bool  # ticks in which the commanded joint velocities stand still, by openpi's rule
    idle_cut_end: NonNegativeInt  # ticks that drop_idle takes from the end of each part that it keeps
    drop_skipped_actions: bool  # ticks whose action the recorder marked as skipped
    keep_ranges: str | None  # JSON file of the ticks to keep, by episode
    only_success: bool  # episodes that ended well, where the source knows
    min_steps: PositiveInt  # shorter pieces are dropped


@dataclass(frozen=True)
class ScalerConfig:
    """How actions and states are scaled on read."""

    actions: ScalingRule
    states: ScalingRule


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, beside the predictor preset and the cache."""

    seed: Seed
    init: str | None  # run folder or checkpoint whose weights are the start
    allow_other_encoder: bool  # start from weights that belong to another encoder's tokens; recorded
    num_steps: PositiveInt  # training steps
    num_epochs: NonNegativeFloat  # above 0: passes over the training windows, in place of num_steps
    window_steps: Annotated[int, Field(ge=2, description="one step to predict from, one to predict")]  # T
    batch_size: PositiveInt  # windows per forward pass and process
    optimizer: Literal["adamw", "adamw8bit"]
    grad_accumulation: PositiveInt  # forward passes per training step
    schedule: Literal["wsd", "cosine"]
    num_warmup: NonNegativeInt  # training steps
    num_anneal: NonNegativeInt  # training steps; wsd only
    start_lr: NonNegativeFloat
    lr: PositiveFloat
    final_lr: NonNegativeFloat
    weight_decay: NonNegativeFloat
    final_weight_decay: NonNegativeFloat
    loss_exp: PositiveFloat
    auto_steps: PositiveInt  # rollout steps in the loss
    normalize_reps: bool
    rollout: Literal["fixed", "legacy"]  # legacy: the rule of the released weights
    rollout_start: Literal[
        "first", "random"
    ]  # step of the window: the first (the released recipe), or anew in each batch
    lora_rank: NonNegativeInt  # 0 trains all weights; above 0 low-rank adapters on qkv, proj, fc1 and fc2
    lora_alpha: PositiveFloat
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="a probability")]
    lora_rslora: bool  # scale alpha / sqrt(rank) instead of alpha / rank
    clip_norm: NonNegativeFloat  # 0 switches clipping off
    precision: FloatDtype
    compile: bool  # torch.compile
    metric: Literal["val_total", "val_jloss", "val_sloss"]  # lower is better; names the best checkpoint
    patience: NonNegativeInt  # validations without a better metric before training stops; 0 never stops
    select: Literal["last", "best"]  # which weights evaluation gets
    device: Literal["auto", "cpu", "cuda"]  # one of several GPUs: CUDA_VISIBLE_DEVICES
    num_threads: NonNegativeInt  # torch threads; 0 means half the cores
    num_loader_threads: PositiveInt
    log_every: PositiveInt  # training steps
    validate_every: NonNegativeInt  # training steps; 0 switches it off
    checkpoint_every: PositiveInt  # training steps
    keep_last: PositiveInt  # checkpoints
    keep_every: NonNegativeInt  # training steps; checkpoints at its multiples stay too; 0 keeps none for that
    upload_to: str | None  # folder URL (s3://, gs://, file://) that gets copies of the checkpoints
    upload_every_min: NonNegativeFloat
    loggers: Annotated[tuple[Logger, ...], Once]  # the CSV is always written


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out episodes."""

    horizon: PositiveInt  # K open-loop steps
    num_context_steps: PositiveInt  # true steps before the first predicted one
    windows_per_episode: PositiveInt
    # Below 40 a 2.5 % quantile is the smallest value itself.
    num_bootstrap: Annotated[
        int, Field(ge=100, description="for the ends of 95 % intervals")
    ]  # resamples of the episodes
    batch_size: PositiveInt
    seed: Seed
    measure: Annotated[tuple[Measurement, ...], Once]  # beside the errors that are always measured
    probes: Annotated[tuple[Probe, ...], Once]  # where `measure` names probes
    probe_width: PositiveInt  # numbers a step that the probes' heads read, at most
    probe_windows: PositiveInt  # of the training and of the held-out episodes each, at most
    # A multiple of 10: chance puts exactly a tenth of the true actions into the best tenth.
    energy_samples: Annotated[
        int, Field(gt=0, multiple_of=10)
    ]  # actions that the true one is ranked among, itself included
    energy_windows: PositiveInt  # per episode
    energy_axes: TwoColumns | None  # two action columns of the energy maps; None: as suits the space
    noise_windows: PositiveInt  # per episode


@dataclass(frozen=True)
class PlanConfig:
    """How plans to goal frames are searched for and scored on the held-out episodes."""

    settings: Literal["cem", "world_model", "notebook", "paper"]  # published ones; values in control/planner.py
    num_samples: Annotated[int, Field(ge=2)] | None  # a round; null: the settings'
    num_rounds: PositiveInt | None  # null: the settings'
    horizons: Horizons  # steps to the goal
    starts_per_episode: PositiveInt
    num_context_steps: PositiveInt  # true steps before a plan
    max_step_m: PositiveFloat | None  # largest translation of a step along each axis; null: the settings'
    # Largest rotation of a step about each axis; 0 searches no rotations.
    max_rotation_rad: Annotated[float, Field(ge=0, le=math.pi, description=HALF_CIRCLE)]
    max_turn_deg: Annotated[float, Field(gt=0, le=180, description=HALF_CIRCLE)]  # largest turn of the view in a step
    num_random: PositiveInt  # random plans that a plan is compared with
    seed: Seed


@dataclass(frozen=True)
class Config:
    """The resolved settings of one run, and where each value came from."""

    dataset: DatasetPreset
    encoder: EncoderPreset
    predictor: PredictorPreset
    encode: EncodeConfig
    split: SplitConfig
    filter: FilterConfig
    scaler: ScalerConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    plan: PlanConfig
    cache_root: str | None
    verify_checksums: bool  # of every chunk of the cache when a process first reads it
    members: tuple[tuple[DatasetPreset, float], ...]  # the data sets of a mixture with their weights, else the one
    origins: Mapping[str, str]  # "train.lr" -> "configs/train/demo.yaml"

    @property
    def step_hz(self) -> float:
        """Nominal rate of steps; the true one follows from the video's own rate."""
        return self.encode.fps / {"frame": 1, "tubelet": 2, "clip": 2}[self.encode.mode]


def check_config(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is read or computed.

    Raises:
        ConfigError: With the rule, the values, and what to change.
    """
    filters, predictor = config.filter, config.predictor
    _check_encoder(config.encode, config.encoder)
    if filters.idle_cut_end and not filters.drop_idle:
        raise ConfigError(
            f"filter.idle_cut_end may be above 0 only with filter.drop_idle; got {filters.idle_cut_end} with drop_idle false"
        )
    if predictor.predictor_dim % predictor.num_heads:
        raise ConfigError(
            f"predictor preset {predictor.name!r}: predictor_dim {predictor.predictor_dim} is no multiple of num_heads {predictor.num_heads}"
        )
    _check_train(config.train)
    if config.encode.mode == "clip":
        _check_clip(config)


def _check_train(train: TrainConfig) -> None:
    if train.auto_steps > train.window_steps - 1:
        raise ConfigError(
            f"train.auto_steps {train.auto_steps} needs a window of {train.auto_steps + 1} steps; train.window_steps is {train.window_steps}"
        )
    if not train.validate_every and (train.patience or train.select == "best"):
        raise ConfigError(
            f"train.patience={train.patience} and train.select={train.select!r} need validations; set train.validate_every above 0"
        )
    if not train.num_epochs:
        check_schedule(train)


def check_schedule(train: TrainConfig) -> None:
    """Refuse a warm-up and a decay that do not fit into the training steps.

    Raises:
        ConfigError: They do not.
    """
    if train.num_warmup + (train.num_anneal if train.schedule == "wsd" else 0) > train.num_steps:
        raise ConfigError(
            f"train.num_warmup {train.num_warmup} + train.num_anneal {train.num_anneal} exceed train.num_steps {train.num_steps}; "
            "lower them together with num_steps"
        )


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


def _check_encoder(encode: EncodeConfig, encoder: EncoderPreset) -> None:
    """Refuse a preset that contradicts itself, and settings of stage one that this encoder does not take."""
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
    _check_kind(encode, encoder)
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


def _check_kind(encode: EncodeConfig, encoder: EncoderPreset) -> None:
    rules = ENCODER_RULES[encoder.kind]
    for name, known in rules.fields.items():
        if (value := getattr(encoder, name)) not in known:
            allowed = ", ".join("null" if one is None else str(one) for one in known)
            raise ConfigError(
                f"{name} of encoder {encoder.name}, kind {encoder.kind}, is {value!r}; its weights are known with {allowed} only"
            )
    if encoder.positions == "rescaled" and encoder.patch_size != 16:
        raise ConfigError(
            f"encoder preset {encoder.name!r}: rescaled positions are known for patch_size 16 only; got {encoder.patch_size}"
        )
    if encode.mode not in rules.modes:
        raise ConfigError(
            f"encoder {encoder.name!r} is an image encoder and takes frames one by one; encode.mode must be "
            f"{' or '.join(rules.modes)}, got {encode.mode!r}"
        )
    if encode.single_frame == "image" and not rules.image_path:
        raise ConfigError(
            f"encode.single_frame is 'image', but encoder {encoder.name!r} is of kind {encoder.kind}, which has no image path; set "
            "encode.single_frame to doubled, or choose a V-JEPA 2.1 encoder (vitb384_v21, vitl384_v21, ...)"
        )
    if encoder.short_side is not None and (
        not encoder.crop.startswith("pillow_") or encoder.short_side < encoder.resolution
    ):
        raise ConfigError(
            f"encoder preset {encoder.name!r}: short_side is for the pillow_* crop rules and at least the resolution "
            f"{encoder.resolution}; got {encoder.short_side} with crop {encoder.crop!r}"
        )


def _check_tokens(encode: EncodeConfig, encoder: EncoderPreset) -> None:
    side = encoder.resolution // encoder.patch_size
    if side % encode.pool:
        raise ConfigError(
            f"encode.pool {encode.pool} must divide the grid of encoder {encoder.name!r}, {side} x {side} patches; choose a divisor, "
            "or 1 to store every token"
        )
    if encode.single_frame == "image" and encode.mode != "frame":
        raise ConfigError(
            f"encode.single_frame is 'image', but in {encode.mode} mode no frame is encoded alone; set encode.mode to frame, or "
            "encode.single_frame to doubled"
        )
