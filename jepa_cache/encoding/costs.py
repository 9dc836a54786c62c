"""Floating-point operations of encoder and predictor, by counting matrix products; a multiplication and addition count 2.

Norms, activations, rotary positions and the optimiser are left out: below 1 % at these widths. T steps of a window, N tokens per
step, D token width, L = N + 2 tokens of a step in the predictor (with its action and its state), P predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jepa_cache.config.schema import EncodeConfig, EncoderPreset, PredictorPreset, TrainConfig

CONDITIONING_TOKENS = 2  # action and state
BACKWARD = 2  # the backward pass costs two forward ones


@dataclass(frozen=True)
class BreakEven:
    """What one training run costs with the cache and without, in floating-point operations; decoding is not counted.

    Attributes:
        build: Encoding every frame once.
        online: Encoding the frames of every window of one run.
        predictor: Forward and backward passes of one run.
        num_frames: Frames in the data set.
        num_touched: Frames that the windows of one run hold, each counted as often as it is used.
    """

    build: float
    online: float
    predictor: float
    num_frames: int
    num_touched: int

    @property
    def runs(self) -> float | None:
        """Training runs after which building the cache and reading it cost as much as encoding online each time."""
        return self.build / self.online if self.online else None

    @property
    def gain_per_run(self) -> float | None:
        """How many times the operations of a run with the cache one without needs, once the cache is built."""
        return (self.online + self.predictor) / self.predictor if self.predictor else None


class InputCost(NamedTuple):
    """Operations of one encoder input, the sampled frames that it takes, and the steps that it gives."""

    operations: int
    num_frames: int
    num_steps: int


def count_encoder(encoder: EncoderPreset, encode: EncodeConfig) -> InputCost:
    """What one encoder input costs under these settings."""
    num_frames = {"frame": 1, "tubelet": encoder.tubelet_size, "clip": encode.frames_per_clip}[encode.mode]
    num_steps = max(1, num_frames // encoder.tubelet_size)
    tokens, width = num_steps * encoder.num_tokens, encoder.embed_dim
    as_image = encode.mode == "frame" and encode.single_frame == "image"
    patch = 3 * (1 if as_image else encoder.tubelet_size) * encoder.patch_size**2
    block = 2 * tokens * (4 * width**2 + 2 * width * encoder.mlp_dim) + 4 * tokens**2 * width
    return InputCost(2 * tokens * patch * width + encoder.depth * block, num_frames, num_steps)


def count_predictor(
    predictor: PredictorPreset, train: TrainConfig, *, num_tokens: int, width: int, num_actions: int, num_states: int
) -> int:
    """Operations of one window in training: the teacher-forced pass over T-1 steps, the rollout, and their backward passes."""
    dim, num_given = predictor.predictor_dim, train.window_steps - 1
    num_rolled = min(train.auto_steps, num_given) - 1  # the first step is shared with the teacher-forced pass
    length = num_tokens + CONDITIONING_TOKENS
    linear = 2 * length * (4 * dim**2 + 2 * dim * int(dim * predictor.mlp_ratio))
    # A step attends to itself and to all steps before it; the rollout to what was kept of step 0 and to itself.
    seen = num_given * (num_given + 1) // 2 + sum(range(2, num_rolled + 2))
    steps = num_given + num_rolled
    blocks = predictor.depth * (steps * linear + 4 * length**2 * dim * seen)
    ends = steps * 2 * dim * (2 * num_tokens * width + num_actions + num_states)
    total = (1 + BACKWARD) * (blocks + ends)
    total -= num_given * 2 * dim * (num_tokens * width + num_actions + num_states)  # true tokens need no gradient
    if predictor.activation_checkpointing:  # recomputes every block up to its last matrix product
        total += blocks - predictor.depth * steps * 2 * length * dim * int(dim * predictor.mlp_ratio)
    return total


def compare_runs(
    encoder: EncoderPreset,
    predictor: PredictorPreset,
    train: TrainConfig,
    encode: EncodeConfig,
    *,
    num_frames: int,
    num_actions: int,
    num_states: int,
) -> BreakEven:
    """What building the cache, encoding online and training the predictor cost.

    Args:
        encoder: Chosen encoder.
        predictor: Chosen predictor.
        train: Windows, batch and number of train steps.
        encode: Mode, and how tokens are pooled.
        num_frames: Sampled frames in the data set.
        num_actions: A.
        num_states: S.
    """
    cost = count_encoder(encoder, encode)
    num_windows = train.num_steps * train.batch_size * train.grad_accumulation
    touched_steps = num_windows * train.window_steps
    per_window = count_predictor(
        predictor,
        train,
        num_tokens=encode.num_tokens_of(encoder),
        width=encoder.embed_dim,
        num_actions=num_actions,
        num_states=num_states,
    )
    return BreakEven(
        build=num_frames / cost.num_frames * cost.operations,
        online=touched_steps / cost.num_steps * cost.operations,
        predictor=num_windows * per_window,
        num_frames=num_frames,
        num_touched=touched_steps * cost.num_frames // cost.num_steps,
    )
