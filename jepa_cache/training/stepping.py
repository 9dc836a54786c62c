"""One train step: the loss as one module, its gradient over several batches, the update, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from jepa_cache.config.schema import TrainConfig
from jepa_cache.data.loader import Batch
from jepa_cache.predictor.model import PredictorOutput
from jepa_cache.predictor.rollout import as_reps, teacher_forcing
from jepa_cache.training.losses import Losses, world_model_loss

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROLLOUT_STREAM = 2  # counter of the Philox stream that draws rollout starts
SMALLEST_SCALE = 2.0**-24  # of the float16 gradients; below it every train step has overflowed for long


class Objective(nn.Module):
    """The predictor with its loss as one module, so that DDP sees one forward pass for each backward pass.

    Only the predictor runs in the low precision; norms and losses are float32.
    """

    def __init__(self, predictor: nn.Module, settings: TrainConfig, device: torch.device) -> None:
        """Wrap the predictor; it keeps its own names for its weights."""
        super().__init__()
        self.predictor = predictor
        self._settings, self._device = settings, device

    def forward(self, tokens: Tensor, actions: Tensor, states: Tensor, rollout_start: int = 0) -> Losses:
        """The world-model loss of one batch: tokens [B, T, N, D], actions [B, T-1, A], states [B, T, S]."""
        settings = self._settings
        return world_model_loss(
            self._predict,
            tokens,
            actions,
            states,
            loss_exp=settings.loss_exp,
            auto_steps=settings.auto_steps,
            normalize_reps=settings.normalize_reps,
            rollout=settings.rollout,
            rollout_start=rollout_start,
        )

    def as_reps(self, tokens: Tensor) -> Tensor:
        """What predictions are compared with: [B, T, N, D] tokens as float32, layer-normed where the training does so."""
        return as_reps(tokens, self._settings.normalize_reps)

    def predict(self, h: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Teacher-forced predictions [B, T-1, N, D] from h [B, T, N, D] as `as_reps` gives it."""
        return teacher_forcing(self._predict, h, actions, states, normalize_reps=self._settings.normalize_reps)

    def _predict(self, *arguments: Any) -> PredictorOutput:
        dtype = AUTOCAST[self._settings.precision]
        with torch.autocast(self._device.type, dtype) if dtype is not None else nullcontext():
            return self.predictor(*arguments)


class StepReport(NamedTuple):
    """What one train step says of itself; tensors are left on the device until somebody reads them."""

    losses: Tensor
    """[3 + R] float32: total, jloss, sloss, rollout loss of each horizon; means over the batches of this process."""
    grad_norm: Tensor
    """[] of all gradients together, before clipping, over all processes."""
    windows: np.ndarray
    """Numbers of the windows of this process."""
    jloss_by_window: Tensor
    """[windows] float32."""


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient_scaler: torch.amp.GradScaler,
    batches: Iterator[Batch],
    settings: TrainConfig,
    step: int,
) -> StepReport:
    """One optimiser update from the next `grad_accumulation` batches; the gradient is the mean over all processes.

    Args:
        accelerator: The processes.
        model: An `Objective`, inside DDP where there are several processes.
        optimizer: Its rates are set.
        gradient_scaler: Enabled for float16 only.
        batches: On the device.
        settings: The training's.
        step: k, from 1: with the seed it decides everything random in this step, so that a resumed training needs no
            state of a generator.
    """
    accumulation = settings.grad_accumulation
    torch.manual_seed(step_seed(settings.seed, step, accelerator.process_index))
    parts, windows, by_window = [], [], []
    for micro in range(accumulation):
        batch = next(batches)
        start = draw_rollout_start(settings, (step - 1) * accumulation + micro)
        with nullcontext() if micro == accumulation - 1 else accelerator.no_sync(model):
            losses = model(batch.tokens, batch.actions, batch.states, start)
            total = losses.total
            scalars = torch.stack([total, losses.jloss, losses.sloss]).detach()
            parts.append(torch.cat([scalars, losses.sloss_by_horizon]))
            by_window.append(losses.jloss_by_window)
            del (
                losses
            )  # its predictions would be held through the backward pass: 100 MiB at 8 windows of 8 x 256 x 1408
            gradient_scaler.scale(total / accumulation).backward()
        windows.append(batch.numbers)
    gradient_scaler.unscale_(optimizer)
    limit = settings.clip_norm if settings.clip_norm > 0 else float("inf")
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    gradient_scaler.step(optimizer)
    gradient_scaler.update()
    optimizer.zero_grad()
    return StepReport(torch.stack(parts).mean(dim=0), grad_norm, np.concatenate(windows), torch.cat(by_window))


def draw_rollout_start(settings: TrainConfig, turn: int) -> int:
    """The step at which the rollout of batch number `turn` starts; the same on every process."""
    if settings.rollout_start == "first":
        return 0
    latest = settings.window_steps - 1 - max(settings.auto_steps, 1 if settings.rollout == "fixed" else 2)
    generator = np.random.Generator(np.random.Philox(key=[settings.seed, turn], counter=ROLLOUT_STREAM))
    return int(generator.integers(0, max(latest, 0) + 1))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators in one train step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def check_finite(report: StepReport, gradient_scaler: torch.amp.GradScaler) -> str | None:
    """What is wrong with a train step that must not be kept, None when nothing is.

    On a GPU this waits for the train step to end, once. In float16 a gradient that overflowed is no failure: the scaler
    leaves the update out and tries a smaller scale.
    """
    if gradient_scaler.is_enabled():
        if gradient_scaler.get_scale() < SMALLEST_SCALE:
            return f"the gradient overflows float16 at every scale down to {SMALLEST_SCALE:g}"
        return None if torch.isfinite(report.losses[0]) else f"the loss is {float(report.losses[0])}"
    if torch.isfinite(report.losses[0] + report.grad_norm):
        return None
    return f"the loss is {float(report.losses[0])} and the norm of its gradient {float(report.grad_norm)}"
