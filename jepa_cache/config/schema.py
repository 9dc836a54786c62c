"""The settings: dataclasses that params.yaml and the presets are parsed into, and the combinations that cannot work.

A rule of one value stands in its annotation; `check_config` holds the rules of several. Upper bounds are far above anything
useful: they stop a slip of the keyboard, which would hang or diverge hours later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

from pydantic import AfterValidator, ConfigDict, Field

from jepa_cache.config.parsing import ConfigError

# V-JEPA 2.1's depths, and the blocks (from 0) whose outputs are its four levels.
LEVEL_LAYERS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}


class EncoderRules(NamedTuple):
    """What presets of one kind of encoder may say: with other values its weights would load, and give wrong tokens."""

    rope: str
    fields: Mapping[str, tuple[Any, ...]]  # of the preset, with their possible values
    seeded: bool = False  # whether it may have seeded random weights
    image_path: bool = False  # whether a single frame may be given as an image
    videos: bool = True  # whether it takes several frames at once
    weightless: bool = False  # whether it is the pixels themselves


# By kind; `encoder.KINDS` loads them. hf: image encoders of the transformers library, which have positions of their own;
# pixels: the control, the resized frame itself.
ENCODER_RULES = {
    "vjepa2": EncoderRules("tiled", {"positions": ("grid",)}, seeded=True),
    "vjepa2_1": EncoderRules(
        "paired", {"positions": ("grid", "rescaled"), "depth": tuple(LEVEL_LAYERS)}, image_path=True
    ),
    "hf": EncoderRules("own", {"tubelet_size": (1,), "weights_entry": (None,)}, videos=False),
    "pixels": EncoderRules("none", {"tubelet_size": (1,)}, videos=False, weightless=True),
}
EncoderKind: TypeAlias = Literal[tuple(ENCODER_RULES)]  # type: ignore[valid-type]
# How frame mode gives a frame to the encoder: as a video of equal frames that fill a tubelet, or as an image.
SingleFrame: TypeAlias = Literal["doubled", "image"]
EncodeMode: TypeAlias = Literal["frame", "tubelet", "clip"]
FloatDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Decoder: TypeAlias = Literal["auto", "decord", "pyav"]
DECODERS = get_args(Decoder)
StoredDtype: TypeAlias = Literal["float16", "bfloat16", "int8", "float8_e4m3", "int4"]  # docs/store_format.md
STORED_DTYPES = get_args(StoredDtype)
INT4_GROUP = 64  # channels of a token that share an int4 scale; 32 would lower the error by a tenth for 6 % more bytes
Measurement: TypeAlias = Literal["energy", "distances", "noise", "probes"]  # `evaluation.run.MEASUREMENTS`
MEASUREMENTS = get_args(Measurement)
Probe: TypeAlias = Literal["inverse_dynamics", "state", "anticipation", "classification"]
Logger: TypeAlias = Literal["dvclive", "tensorboard", "wandb"]
ScalingRule: TypeAlias = Literal["standard", "none"]


def _name_once(values: Any) -> Any:
    if not isinstance(values, str) and len(set(values)) < len(values):
        raise ValueError(f"names {next(it for it in values if values.count(it) > 1)!r} more than once")
    return values


def _name_device(value: str) -> str:
    if value not in ("auto", "cpu", "cuda"):
        raise ValueError("must be auto, cpu or cuda (which of several GPUs: CUDA_VISIBLE_DEVICES=1 before the command)")
    return value


Device: TypeAlias = Annotated[str, AfterValidator(_name_device)]
Once = AfterValidator(_name_once)
Count: TypeAlias = Annotated[int, Field(gt=0, le=10**6)]
CountOrZero: TypeAlias = Annotated[int, Field(ge=0, le=10**6)]  # 0 has a meaning of its own
Steps: TypeAlias = Annotated[int, Field(gt=0, le=10**9)]  # of training
StepsOrZero: TypeAlias = Annotated[int, Field(ge=0, le=10**9)]
Rate: TypeAlias = Annotated[float, Field(gt=0, le=1000)]
FrameRate: TypeAlias = Annotated[float, Field(ge=1e-4, le=1000)]  # Hz
Deviation: TypeAlias = Annotated[float, Field(ge=1e-4, le=1)]
RateOrZero: TypeAlias = Annotated[float, Field(ge=0, le=1000)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator of numpy and torch takes
# A path or URL: no file's name holds a NUL.
Text: TypeAlias = Annotated[str, Field(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")]
# Of a phase that stands there twice every step would be stored, drawn and counted twice.
Phases: TypeAlias = Literal["all"] | Annotated[tuple[CountOrZero, ...], Field(min_length=1), Once]


class Settings:
    """What every group of settings shares: how pydantic reads it."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)


@dataclass(frozen=True)
class DatasetPreset(Settings):
    """configs/dataset/*.yaml: where recordings come from and how they are sampled by default."""

    name: str
    source: str  # module in jepa_cache/sources, or the path of a file.py from the project
    source_options: dict[str, Any]  # checked by that module
    inputs: tuple[str, ...]  # folders, files, globs, {000..123} ranges
    fps: FrameRate  # Hz of the sampled frames
    mode: EncodeMode
    frames_per_clip: Count  # sampled frames encoded jointly in clip mode
    action_space: str  # name in jepa_cache/actions.py
    scale_actions: ScalingRule
    scale_states: ScalingRule
    sample: dict[str, Any] | None  # settings of the synthetic recordings; only the sample data set has them
    cameras: Annotated[tuple[str, ...], Once] = ()  # each its own stores; empty where a source has one
    phases: Phases = (0,)  # starting offsets in video frames, each its own stores; "all" for every one
    mixture: dict[str, Rate] = field(default_factory=dict)  # other presets and the rates at which windows are drawn

    @property
    def has_simulator(self) -> bool:
        """Whether its recordings were rendered in a world that can be acted in: the simulated robot, recorded as raw DROID."""
        return self.sample is not None and self.source == "droid_raw"


@dataclass(frozen=True)
class EncoderPreset(Settings):
    """configs/encoder/*.yaml: architecture, preprocessing and weights of one frozen encoder."""

    name: str
    embed_dim: Count
    depth: Count
    num_heads: Count
    mlp_dim: Count
    patch_size: Count  # pixels
    tubelet_size: Count  # frames
    resolution: Count  # pixels, square
    rope: str  # "tiled" (V-JEPA 2), "paired" (V-JEPA 2.1) or "own" (hf: the model's business), or "none" (pixels)
    crop: str  # key of encoder.preprocess.CROP_RULES
    mean: tuple[Share, Share, Share]  # of pixels in [0, 1]
    std: tuple[Deviation, Deviation, Deviation]
    compute_dtype: FloatDtype
    batch_size: Count  # encoder inputs per forward pass
    weights: Text | None  # path, https:// URL or hf://owner/repo/file
    weights_entry: str | None  # top-level entry of an official .pt file
    weights_sha256: str | None  # null where unknown
    random_seed: Seed | None  # seeded random weights; exactly one of weights and random_seed is set
    kind: EncoderKind = "vjepa2"
    positions: str = "grid"  # rows and columns by index, or "rescaled" to span 0 to 15 (V-JEPA 2.1)
    single_frame: SingleFrame = "doubled"  # "image" in V-JEPA 2.1 only
    # Pixels before the centre is cut out, by the pillow_* crop rules; null: the frame is squeezed.
    short_side: Count | None = None
    # Whose weights these are, under which licence; recorded with what is made of them, never hashed.
    origin: Text | None = None

    @property
    def num_tokens(self) -> int:
        """Patch tokens that the encoder gives for one step."""
        return (self.resolution // self.patch_size) ** 2

    @property
    def trained(self) -> bool:
        """Whether there are weights that were learned, as opposed to drawn at random."""
        return self.weights is not None


@dataclass(frozen=True)
class PredictorPreset(Settings):
    """configs/predictor/*.yaml: size of the action-conditioned transformer."""

    name: str
    predictor_dim: Count
    depth: Count
    num_heads: Count
    mlp_ratio: Rate
    activation_checkpointing: (
        bool | Literal["auto"]
    )  # auto: on a CPU, and on a GPU where a pass without it would not fit
    residual: bool  # add each step's own tokens to its prediction; the official predictor does not
    kind: Literal["transformer"] = "transformer"
    # Actions and states as tokens (official), or as shift, scale and gate of each block.
    conditioning: Literal["tokens", "adaln"] = "tokens"
    use_states: bool = True  # False where states are not to be relied on, or will not be known
    use_extrinsics: bool = False  # a conditioning token for the camera's pose, of encode.action_space pose7_extrinsics


@dataclass(frozen=True)
class CompressedPreset(Settings):
    """The same of kind compressed: an MLP on the principal components of a step's tokens."""

    name: str
    kind: Literal["compressed"]
    num_components: CountOrZero  # 0: all numbers of the tokens
    whitening: Share  # p: components are divided by sd^p
    use_states: bool
    predictor_dim: Count
    depth: Count


@dataclass(frozen=True)
class LinearPreset(Settings):
    """The same of kind linear: a ridge regression on the principal components."""

    name: str
    kind: Literal["linear"]
    num_components: Count
    whitening: Share
    use_states: bool
    num_products: CountOrZero  # components that are multiplied with the actions
    ridge: RateOrZero | None = None  # null: chosen, as are columns that are not named; see training.ridge
    # Of actions and states, by name, that are looked at; null: all, or those of positions. With few recordings the others only add noise.
    columns: Annotated[tuple[str, ...], Field(min_length=1), Once] | None = None


AnyPredictor: TypeAlias = PredictorPreset | CompressedPreset | LinearPreset
PREDICTOR_KINDS: Mapping[str, type[AnyPredictor]] = {
    "transformer": PredictorPreset,
    "compressed": CompressedPreset,
    "linear": LinearPreset,
}


@dataclass(frozen=True)
class CacheConfig(Settings):
    """Where the stores lie, and how they are read."""

    root: Text | None
    verify_checksums: bool  # of every chunk of the cache when a process first reads it
    join_cameras: bool  # the tokens of all `encode.cameras` of a recording are one step's


@dataclass(frozen=True)
class EncodeConfig(Settings):
    """What stage one does, after the presets were filled in."""

    fps: FrameRate  # Hz
    mode: EncodeMode
    frames_per_clip: Count
    action_space: str
    cameras: Annotated[tuple[str, ...], Once]
    phases: Phases
    weights: Text | None  # overrides the encoder preset's
    single_frame: SingleFrame  # frame mode only
    pool: Count  # 1 stores every patch's token, 2 the mean of each 2 x 2 patches' tokens
    compute_dtype: FloatDtype
    compile: bool  # torch.compile
    batch_size: Count
    fill_batches: bool  # with frames of several episodes of a unit
    dtype: StoredDtype
    device: Device
    decoder: Decoder
    num_decoders: CountOrZero  # threads; 0 means one for each core
    decode_ahead_mib: Count  # of recordings and decoded batches that wait for the encoder
    max_skipped_share: Share  # of the recordings
    episodes_per_unit: Count = 1  # about so many in a store, of sources that have files for each recording
    max_units: Count | None = None  # only the first units of each data set; the rest is not read

    def grid_of(self, encoder: EncoderPreset) -> tuple[int, int]:
        """Rows and columns of the stored tokens of a step."""
        side = encoder.resolution // encoder.patch_size // self.pool
        return side, side

    def num_tokens_of(self, encoder: EncoderPreset) -> int:
        """N: stored tokens of a step."""
        rows, columns = self.grid_of(encoder)
        return rows * columns


@dataclass(frozen=True)
class SplitConfig(Settings):
    """Which episodes are held out: a hash of the episode key and `seed` below `val_share`; or by name, or exactly so many of few.

    What files of earlier versions do not name is off.
    """

    val_share: Share
    seed: Seed
    held_out: tuple[Text, ...] = ()  # patterns of keys, such as val/*; then share and seed decide nothing
    # Of fewer episodes exactly round(share x number), at least 2, are held out: those of the lowest hashes. 0: never.
    exact_below: CountOrZero = 0


@dataclass(frozen=True)
class FilterConfig(Settings):
    """Which steps windows may hold; segments are cut by the step table, without video or encoder."""

    drop_gui: bool  # steps with a screen open
    drop_null: bool  # steps from which no control acts until the next one
    drop_loading: bool  # the start of an episode until somebody acts, and frames of one colour
    drop_idle: bool  # ticks in which the commanded joint velocities stand still, by openpi's rule
    idle_cut_end: CountOrZero  # ticks that drop_idle takes from the end of each part that it keeps
    drop_skipped_actions: bool  # ticks whose action the recorder marked as skipped
    keep_ranges: Text | None  # JSON file of the ticks to keep, by episode
    only_success: bool  # episodes that ended well, where the source knows
    min_steps: Count  # shorter pieces are dropped


@dataclass(frozen=True)
class ScalerConfig(Settings):
    """How actions and states are scaled on read."""

    actions: ScalingRule
    states: Literal["standard", "none", "ignore"]  # ignore: the predictor is shown zeros, and needs none when it plans


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Everything that decides a training run, beside the predictor preset and the cache."""

    seed: Seed
    init: Text | None  # run folder or checkpoint whose weights are the start
    allow_other_encoder: bool  # start from weights that belong to another encoder's tokens; recorded
    num_steps: Steps  # training steps
    num_epochs: RateOrZero  # above 0: passes over the training windows, in place of num_steps
    window_steps: Annotated[int, Field(ge=2, le=10**6)]  # T
    # Steps of the cache from one step of a window to the next; windows of every one of them are drawn.
    step_lengths: Annotated[tuple[Count, ...], Field(min_length=1), Once]
    time_reversal: bool  # every window a second time, backwards, with the inverse actions
    batch_size: Count  # windows per forward pass and process
    optimizer: Literal["adamw", "adamw8bit"]
    grad_accumulation: Count  # forward passes per training step
    schedule: Literal["wsd", "cosine"]
    num_warmup: StepsOrZero  # training steps
    num_anneal: StepsOrZero  # training steps; wsd only
    start_lr: RateOrZero
    lr: Rate
    final_lr: RateOrZero
    weight_decay: RateOrZero
    final_weight_decay: RateOrZero
    loss_exp: Rate
    auto_steps: Count  # rollout steps in the loss
    normalize_reps: bool
    rollout: Literal["fixed", "legacy"]  # legacy: the rule of the released weights
    rollout_start: Literal["first", "random"]  # step of the window; first: the released recipe
    lora_rank: CountOrZero  # 0 trains all weights; above 0 low-rank adapters on qkv, proj, fc1 and fc2
    lora_alpha: Rate
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    lora_rslora: bool  # scale alpha / sqrt(rank) instead of alpha / rank
    clip_norm: RateOrZero  # 0 switches clipping off
    precision: FloatDtype
    compile: bool | Literal["flex"]  # torch.compile; flex: with one attention call a pass, on a GPU
    metric: Literal["val_total", "val_jloss", "val_sloss"]  # lower is better; names the best checkpoint
    # Of the training episodes, put aside for the validations in place of the held-out ones.
    stop_share: Annotated[float, Field(ge=0, lt=1)]
    # Of plans, whose heads are fitted at the end; they move no weight.
    costs: Annotated[tuple[Literal["readout", "time"], ...], Once]
    patience: CountOrZero  # validations without a better metric before training stops; 0 never stops
    select: Literal["last", "best"]  # which weights evaluation gets
    device: Device  # of training, evaluation and plans
    # Equal bits each time; auto: on a GPU, where it costs time, while a CPU has no other kernels.
    deterministic: bool | Literal["auto"]
    num_threads: CountOrZero  # torch threads; 0 means half the cores
    num_loader_threads: Count
    log_every: Steps  # training steps
    validate_every: StepsOrZero  # training steps; 0 switches it off
    checkpoint_every: Steps  # training steps
    keep_last: Count  # checkpoints
    keep_every: StepsOrZero  # training steps; checkpoints at its multiples stay too; 0 keeps none for that
    upload_to: Text | None  # folder URL (s3://, gs://, file://) that gets copies of the checkpoints
    upload_every_min: RateOrZero
    loggers: Annotated[tuple[Logger, ...], Once]  # the CSV is always written


TRAIN_DEFAULTS: Mapping[str, Any] = {"step_lengths": [1], "time_reversal": False, "deterministic": "auto"}
"""What training presets and checkpoints mean that do not name a setting: it came after them."""


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """What is measured on the held-out episodes."""

    step_length: Count  # steps of the cache from one step of a window to the next
    horizon: Count  # K open-loop steps
    num_context_steps: Count  # true steps before the first predicted one
    windows_per_episode: Count
    # Resamples of the episodes, for the ends of 95 % intervals: below 40 a 2.5 % quantile is the smallest value itself. All are held in memory.
    num_bootstrap: Annotated[int, Field(ge=100, le=100_000)]
    batch_size: Count
    precision: FloatDtype  # of transformers, in evaluation and plans
    seed: Seed
    measure: Annotated[tuple[Measurement, ...], Once]  # beside the errors that are always measured
    probes: Annotated[tuple[Probe, ...], Once]  # where `measure` names probes
    probe_width: Count  # numbers a step that the probes' heads read, at most
    probe_windows: Count  # of the training and of the held-out episodes each, at most
    # A multiple of 10: chance puts exactly a tenth of the true actions into the best tenth.
    energy_samples: Annotated[int, Field(gt=0, le=10**6, multiple_of=10)]  # actions that the true one is ranked among
    energy_windows: Count  # per episode
    # Two action columns of the energy maps; null: as suits the space.
    energy_axes: Annotated[tuple[str, ...], Field(min_length=2, max_length=2), Once] | None
    noise_windows: Count  # per episode


@dataclass(frozen=True)
class SearchConfig(Settings):
    """How a planner searches, wherever it is asked to."""

    settings: Literal["cem", "world_model", "notebook", "paper", "jump"]  # values in control/planner.py
    num_samples: Annotated[int, Field(ge=2, le=10**6)] | None  # a round; null: the settings'
    num_rounds: Count | None  # null: the settings'
    max_step_m: Rate | None  # largest translation of a step along each axis; null: the settings'
    reach: Annotated[float, Field(ge=1, le=1000)] | None  # steps that one planned action may span; null: the settings'
    cost: Literal["tokens", "tokens_l2", "latents", "readout", "time"]


@dataclass(frozen=True)
class PlanConfig(SearchConfig):
    """How plans to goal frames are searched for and scored on the held-out episodes."""

    horizons: Annotated[tuple[Count, ...], Field(min_length=1), Once]  # steps to the goal
    starts_per_episode: Count
    num_context_steps: Count | None  # true steps before a plan; null: 3, of the settings jump 1
    cost_steps: Literal["last", "sum"]  # predicted steps that count
    # Largest rotations of a step: beyond half a circle a turn is one the other way; 0 rad searches no rotations.
    max_rotation_rad: Annotated[float, Field(ge=0, le=math.pi)]
    max_turn_deg: Annotated[float, Field(gt=0, le=180)]  # of the view
    num_random: Count  # random plans that a plan is compared with
    seed: Seed


CONTROLS = ("random_actions", "no_motion", "other_goal", "readout_servo", "oracle", "unseen_looks")
"""What acts beside the planner, or as it under other conditions."""


@dataclass(frozen=True)
class ActConfig(SearchConfig):
    """What is asked of a world model in the simulator."""

    task: Literal["reach", "push"]
    look: Literal["plain", "unseen"]  # unseen: of each start another one, that was never recorded
    goal_look: Literal["same", "other"]  # other: the goal picture is in an unseen look that is not the live one
    num_starts: Count  # of each training seed, which all have their own
    start_seed: Seed  # of the set of starts
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), Once]  # of trainings
    controls: Annotated[tuple[Literal[CONTROLS], ...], Once]  # type: ignore[valid-type]
    num_context_steps: Count  # the present one included
    replan_every: Count  # steps
    num_filmed: CountOrZero  # episodes in the film


@dataclass(frozen=True)
class Config:
    """The resolved settings of one run, and where each value came from."""

    dataset: DatasetPreset
    encoder: EncoderPreset
    predictor: AnyPredictor
    encode: EncodeConfig
    split: SplitConfig
    filter: FilterConfig
    scaler: ScalerConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    plan: PlanConfig
    act: ActConfig
    cache: CacheConfig
    outputs: str  # folder of what the stages leave, relative to the project
    members: tuple[tuple[DatasetPreset, float], ...]  # the data sets of a mixture with their weights, else the one
    origins: Mapping[str, str]  # "train.lr" -> "configs/train/demo.yaml"


def check_config(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is read or computed; a ConfigError names them all."""
    broken = [
        f"{what} {value} must be a multiple of {of} {divisor}"
        for what, value, of, divisor in _list_multiples(config)
        if value % divisor
    ]
    broken += [*_check_encoder(config.encode, config.encoder), *_check_windows(config)]
    if broken:
        raise ConfigError("\n  ".join(broken))
    if not config.train.num_epochs:
        check_schedule(config.train)


def check_schedule(train: TrainConfig) -> None:
    """Refuse a warm-up and a decay that do not fit into the training steps, by a ConfigError."""
    num_anneal = train.num_anneal if train.schedule == "wsd" else 0
    if train.num_warmup + num_anneal > train.num_steps:
        sizes = f"train.num_warmup {train.num_warmup} + train.num_anneal {num_anneal}"
        fitting = f"train.num_warmup={train.num_steps // 10} train.num_anneal={train.num_steps * 3 // 10}"
        raise ConfigError(f"{sizes} exceed train.num_steps {train.num_steps}; lower them with it, as by {fitting}")


def _list_multiples(config: Config) -> Iterator[tuple[str, int, str, int]]:
    """What must be a multiple of what."""
    encode, encoder, predictor = config.encode, config.encoder, config.predictor
    named, side = f"encoder {encoder.name!r}:", encoder.resolution // encoder.patch_size
    if isinstance(predictor, PredictorPreset):
        yield f"predictor {predictor.name!r}: predictor_dim", predictor.predictor_dim, "num_heads", predictor.num_heads
    yield f"{named} embed_dim", encoder.embed_dim, "num_heads", encoder.num_heads
    yield f"{named} resolution", encoder.resolution, "patch_size", encoder.patch_size
    yield f"{named} patches on a side,", side, "encode.pool", encode.pool
    if encode.dtype == "int4":
        yield f"{named} embed_dim", encoder.embed_dim, "the channels that share an int4 scale,", INT4_GROUP
    if encode.mode == "clip":
        yield "in clip mode encode.frames_per_clip", encode.frames_per_clip, "tubelet_size", encoder.tubelet_size


def _check_windows(config: Config) -> Iterator[str]:
    filters, train, evaluate = config.filter, config.train, config.evaluate
    if config.cache.join_cameras and len(config.encode.cameras) < 2:
        named = f"[{', '.join(config.encode.cameras)}]"
        yield f"cache.join_cameras needs two cameras or more, as in encode.cameras=[exterior_1, exterior_2]; got {named}"
    if config.cache.join_cameras and "noise" in evaluate.measure:
        yield "evaluate.measure: noise looks at single stores, not at joined cameras; leave it out, or set cache.join_cameras=false"
    if filters.idle_cut_end and not filters.drop_idle:
        yield f"filter.idle_cut_end may be above 0 only with filter.drop_idle true; got {filters.idle_cut_end} without"
    if train.auto_steps >= train.window_steps:
        yield f"train.auto_steps must be below train.window_steps {train.window_steps}; got {train.auto_steps}"
    if not train.validate_every and (train.patience or train.select == "best"):
        yield "train.patience and train.select=best need validations; set train.validate_every above 0"
    if train.time_reversal and config.encode.mode != "frame":
        yield f"train.time_reversal needs encode.mode=frame: what moves within a {config.encode.mode} cannot be reversed"
    if train.compile == "flex" and config.predictor.kind != "transformer":
        yield f"train.compile=flex is for transformers; predictor {config.predictor.name!r} is {config.predictor.kind}. Set it to false"
    if train.lora_rank and config.predictor.kind != "transformer":
        yield f"train.lora_rank is for transformers; predictor {config.predictor.name!r} is {config.predictor.kind}. Set it to 0"
    if config.encode.mode != "clip":
        return
    segment = config.encode.frames_per_clip // config.encoder.tubelet_size
    for key, steps, apart, step_length in (
        ("train.window_steps", train.window_steps, "train.step_lengths", max(train.step_lengths)),
        (
            "evaluate.num_context_steps + evaluate.horizon",
            evaluate.num_context_steps + evaluate.horizon,
            "evaluate.step_length",
            evaluate.step_length,
        ),
    ):
        if (steps - 1) * step_length >= segment:
            far = f" at {apart} {step_length}" if step_length > 1 else ""
            yield f"in clip mode a segment is one clip of {segment} steps, but {key} is {steps}{far}; lower it or raise encode.frames_per_clip"


def _check_encoder(encode: EncodeConfig, encoder: EncoderPreset) -> Iterator[str]:
    """Say where a preset contradicts itself or its weights, and which settings of stage one the encoder refuses."""
    named, seeded, kind = f"encoder {encoder.name!r}", encoder.random_seed is not None, encoder.kind
    rules = ENCODER_RULES[kind]
    if rules.weightless:
        if seeded or encoder.weights is not None or encode.weights is not None:
            yield f"{named}, kind {kind}, has no weights; set weights and random_seed to null, and encode.weights too"
        if encoder.embed_dim != (size := 3 * encoder.patch_size**2):
            yield f"{named}: embed_dim of kind {kind} is 3 * patch_size * patch_size, {size}; got {encoder.embed_dim}"
    elif (encoder.weights is not None) == seeded:
        yield f"{named} must set exactly one of weights and random_seed; got {encoder.weights!r}, {encoder.random_seed!r}"
    if seeded and not rules.seeded:
        yield f"{named}: kind {kind} has no seeded random weights; set random_seed to null and name weights"
    if seeded and encode.weights is not None:
        yield f"encode.weights is set, but {named} has seeded random weights; choose another (encoder=vitl) or set it to null"
    for name, known in {"rope": (rules.rope,), **rules.fields}.items():
        if (value := getattr(encoder, name)) not in known:
            yield f"{name} of {named}, kind {kind}, is {value!r}; known: {', '.join(map(str, known))}"
    if encoder.positions == "rescaled" and encoder.patch_size != 16:
        yield f"{named}: rescaled positions are known for patch_size 16 only; got {encoder.patch_size}"
    if encoder.short_side and (not encoder.crop.startswith("pillow_") or encoder.short_side < encoder.resolution):
        yield f"{named}: short_side is for pillow_* crops and at least the resolution; got {encoder.short_side}, {encoder.crop}"
    if encode.compile and not rules.videos:
        yield f"{named}: encode.compile is for V-JEPA's blocks, got kind {kind}; set it to false"
    if not rules.videos and encode.mode != "frame":
        yield f"{named} takes frames one by one; encode.mode must be frame, got {encode.mode!r}"
    if encode.single_frame == "image" and (not rules.image_path or encode.mode != "frame"):
        yield (
            f"encode.single_frame image needs a V-JEPA 2.1 encoder (vitb384_v21, ...) and frame mode; got {named} of kind {kind} and "
            f"encode.mode {encode.mode!r}"
        )
