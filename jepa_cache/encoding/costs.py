"""Floating-point operations of encoder and predictor, by counting matrix products; a multiplication and addition count 2.

Norms, activations, rotary positions and the optimiser are left out: below 1 % at these widths. T steps of a window, N tokens per
step, D token width, L = N + 2 tokens of a step in the predictor (with its action and its state), P predictor width.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        frames: Frames in the data set.
        touches: Frames that the windows of one run hold, each counted as often as it is used.
    """

    build: float
    online: float
    predictor: float
    frames: int
    touches: int

    @property
    def runs(self) -> float | None:
        """Training runs after which building the cache and reading it cost as much as encoding online each time."""
        return self.build / self.online if self.online else None

    @property
    def gain_per_run(self) -> float | None:
        """How many times the operations of a run with the cache one without needs, once the cache is built."""
        return (self.online + self.predictor) / self.predictor if self.predictor else None


def count_encoder(encoder: EncoderPreset, encode: EncodeConfig) -> tuple[int, int, int]:
    """Operations of one encoder input, the sampled frames that it takes, and the steps that it gives."""
    frames = {"frame": 1, "tubelet": encoder.tubelet_size, "clip": encode.frames_per_clip}[encode.mode]
    steps = max(1, frames // encoder.tubelet_size)
    tokens, width = steps * encoder.num_tokens, encoder.embed_dim
    as_image = encode.mode == "frame" and encode.single_frame == "image"
    patch = 3 * (1 if as_image else encoder.tubelet_size) * encoder.patch_size**2
    block = 2 * tokens * (4 * width**2 + 2 * width * encoder.mlp_dim) + 4 * tokens**2 * width
    return 2 * tokens * patch * width + encoder.depth * block, frames, steps


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
    per_input, frames, steps = count_encoder(encoder, encode)
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
        build=num_frames / frames * per_input,
        online=touched_steps / steps * per_input,
        predictor=num_windows * per_window,
        frames=num_frames,
        touches=touched_steps * frames // steps,
    )
