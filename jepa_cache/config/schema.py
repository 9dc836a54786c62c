"""The frozen dataclasses that params.yaml and the presets in configs/ are parsed into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Each another architecture; hf: an image encoder of the transformers library.
ENCODER_KINDS = ("vjepa2", "vjepa2_1", "hf")
# Rotary positions that the weights of a kind were trained with: how channels are paired, and where rows and columns lie.
ROTARY = {"vjepa2": ("tiled", ("grid",)), "vjepa2_1": ("paired", ("rescaled", "grid"))}
# V-JEPA 2.1's depths, and the blocks (from 0) whose outputs are its four levels.
LEVEL_LAYERS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}
# How frame mode gives a frame to the encoder: as a video of equal frames that fill a tubelet, or as an image.
SINGLE_FRAMES = ("doubled", "image")
ENCODE_MODES = ("frame", "tubelet", "clip")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
DECODERS = ("auto", "decord", "pyav")
STORED_DTYPES = ("float16", "bfloat16", "int8", "float8_e4m3", "int4")  # of tokens; docs/store_format.md
# Channels of a token that share an int4 scale; 32 would lower the error by a tenth and take 6 % more bytes.
INT4_GROUP = 64
OPTIMIZERS = ("adamw", "adamw8bit")
PRECISIONS = ("float32", "bfloat16", "float16")
TRAIN_DEVICES = ("auto", "cpu", "cuda")  # one of several GPUs: CUDA_VISIBLE_DEVICES
METRICS = ("val_total", "val_jloss", "val_sloss")
PLAN_SETTINGS = ("cem", "world_model", "notebook", "paper")  # published ones; values in control/planner.py
LOGGERS = ("dvclive", "tensorboard", "wandb")
MEASUREMENTS = ("energy", "distances", "noise", "probes")  # beyond errors; `evaluation.report.MEASUREMENTS` holds them
SCALING_RULES = ("standard", "none")
PROBES = ("inverse_dynamics", "state", "anticipation", "classification")


@dataclass(frozen=True)
class DatasetPreset:
    """configs/dataset/*.yaml: where recordings come from and how they are sampled by default."""

    name: str
    source: str  # module in jepa_cache/sources
    source_options: dict[str, Any]  # checked by that module
    inputs: tuple[str, ...]  # folders, files, globs, {000..123} ranges
    fps: float  # Hz of the sampled frames
    mode: str  # one of ENCODE_MODES
    frames_per_clip: int  # sampled frames encoded jointly in clip mode
    action_space: str  # name in jepa_cache/actions.py
    scale_actions: str  # one of SCALING_RULES
    scale_states: str
    sample: dict[str, Any] | None  # settings of the synthetic recordings; only the sample data set has them
    cameras: tuple[str, ...] = ()  # each its own stores; empty where a source has one
    phases: tuple[int, ...] | str = (0,)  # starting offsets in video frames, each its own stores; "all" for every one
    mixture: dict[str, float] = field(default_factory=dict)  # other presets and the rates at which windows are drawn


@dataclass(frozen=True)
class EncoderPreset:
    """configs/encoder/*.yaml: architecture, preprocessing and weights of one frozen encoder."""

    name: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int  # pixels
    tubelet_size: int  # frames
    resolution: int  # pixels, square
    rope: str  # "tiled" (V-JEPA 2), "paired" (V-JEPA 2.1) or "own" (hf: the model's business)
    crop: str  # key of encoder.preprocess.CROP_RULES
    mean: tuple[float, float, float]  # of pixels in [0, 1]
    std: tuple[float, float, float]
    compute_dtype: str  # one of COMPUTE_DTYPES
    batch_size: int  # encoder inputs per forward pass
    weights: str | None  # path, https:// URL or hf://owner/repo/file
    weights_entry: str | None  # top-level entry of an official .pt file
    weights_sha256: str | None  # null where unknown
    random_seed: int | None  # seeded random weights; exactly one of weights and random_seed is set
    kind: str = "vjepa2"  # one of ENCODER_KINDS
    positions: str = "grid"  # rows and columns by index, or "rescaled" to span 0 to 15 (V-JEPA 2.1)
    single_frame: str = "doubled"  # one of SINGLE_FRAMES; "image" in V-JEPA 2.1 only
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
    predictor_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    activation_checkpointing: bool
    residual: bool  # add each step's own tokens to its prediction; the official predictor does not


@dataclass(frozen=True)
class EncodeConfig:
    """What stage one does, after the presets were filled in."""

    fps: float  # Hz
    mode: str
    frames_per_clip: int
    action_space: str
    cameras: tuple[str, ...]
    phases: tuple[int, ...] | str
    weights: str | None  # overrides the encoder preset's
    single_frame: str  # one of SINGLE_FRAMES; frame mode only
    pool: int  # 1 stores every patch's token, 2 the mean of each 2 x 2 patches' tokens
    compute_dtype: str
    batch_size: int
    dtype: str  # stored dtype of the tokens
    device: str  # "auto", "cpu", "cuda", "cuda:1"
    decoder: str  # one of DECODERS
    num_decoders: int  # threads
    max_skipped_share: float  # of the recordings, in [0, 1]
    max_episodes: int | None  # only the first recordings of each data set; the rest is not read

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

    val_share: float
    seed: int


@dataclass(frozen=True)
class FilterConfig:
    """Which steps windows may hold; segments are cut by the step table, without video or encoder."""

    drop_gui: bool  # steps with a screen open
    drop_null: bool  # steps from which no control acts until the next one
    drop_loading: bool  # the start of an episode until somebody acts, and frames of one colour
    drop_idle: bool  # ticks in which the commanded joint velocities stand still, by openpi's rule
    idle_cut_end: int  # ticks that drop_idle takes from the end of each part that it keeps
    drop_skipped_actions: bool  # ticks whose action the recorder marked as skipped
    keep_ranges: str | None  # JSON file of the ticks to keep, by episode
    only_success: bool  # episodes that ended well, where the source knows
    min_steps: int  # shorter pieces are dropped


@dataclass(frozen=True)
class ScalerConfig:
    """How actions and states are scaled on read."""

    actions: str
    states: str


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, beside the predictor preset and the cache."""

    seed: int
    init: str | None  # run folder or checkpoint whose weights are the start
    allow_other_encoder: bool  # start from weights that belong to another encoder's tokens; recorded
    num_steps: int  # train steps
    num_epochs: float  # above 0: passes over the training windows, in place of num_steps
    window_steps: int  # T
    batch_size: int  # windows per forward pass and process
    optimizer: str  # one of OPTIMIZERS
    grad_accumulation: int  # forward passes per train step
    schedule: str  # "wsd" or "cosine"
    num_warmup: int  # train steps
    num_anneal: int  # train steps; wsd only
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    loss_exp: float
    auto_steps: int  # rollout steps in the loss
    normalize_reps: bool
    rollout: str  # "fixed", or "legacy" (the rule of the released weights)
    rollout_start: str  # "first" step of the window (the released recipe), or a "random" one in each batch
    lora_rank: int  # 0 trains all weights; above 0 low-rank adapters on qkv, proj, fc1 and fc2
    lora_alpha: float
    lora_dropout: float
    lora_rslora: bool  # scale alpha / sqrt(rank) instead of alpha / rank
    clip_norm: float  # 0 switches clipping off
    precision: str  # one of PRECISIONS
    compile: bool  # torch.compile
    metric: str  # one of METRICS, lower is better; names the best checkpoint
    patience: int  # validations without a better metric before training stops; 0 never stops
    select: str  # which weights are handed on: "last" or "best"
    device: str  # one of TRAIN_DEVICES
    num_threads: int  # torch threads; 0 means half the cores
    num_loader_threads: int
    log_every: int  # train steps
    validate_every: int  # train steps; 0 switches it off
    checkpoint_every: int  # train steps
    keep_last: int  # checkpoints
    keep_every: int  # train steps; checkpoints at its multiples stay too; 0 keeps none for that
    upload_to: str | None  # folder URL (s3://, gs://, file://) that gets copies of the checkpoints
    upload_every_min: float
    loggers: tuple[str, ...]  # of LOGGERS; the CSV is always written


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out episodes."""

    horizon: int  # K open-loop steps
    num_context_steps: int  # true steps before the first predicted one
    windows_per_episode: int
    num_bootstrap: int  # resamples of the episodes
    batch_size: int
    seed: int
    measure: tuple[str, ...]  # of MEASUREMENTS, beside the errors that are always measured
    probes: tuple[str, ...]  # of PROBES, where `measure` names probes
    probe_width: int  # numbers a step that the probes' heads read, at most
    probe_windows: int  # of the training and of the held-out episodes each, at most
    energy_samples: int  # actions that the true one is ranked among, itself included; a multiple of 10
    energy_windows: int  # per episode
    energy_axes: tuple[str, ...] | None  # two action columns of the energy maps; None: as suits the space
    noise_windows: int  # per episode


@dataclass(frozen=True)
class PlanConfig:
    """How plans to goal frames are searched for and scored on the held-out episodes."""

    settings: str  # one of PLAN_SETTINGS
    num_samples: int | None  # a round, in place of the settings'
    num_rounds: int | None
    horizons: tuple[int, ...]  # steps to the goal
    starts_per_episode: int
    num_context_steps: int  # true steps before a plan
    max_step_m: float | None  # largest translation of a step along each axis; null: the settings'
    max_rotation_rad: float  # largest rotation of a step about each axis; 0 leaves rotations out
    max_turn_deg: float  # largest turn of the view in a step
    num_random: int  # random plans that a plan is compared with
    seed: int


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
