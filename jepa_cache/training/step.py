"""One training step, its report and its statistics, and one validation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from jepa_cache.config.schema import TrainConfig
from jepa_cache.data.loader import Batch
from jepa_cache.devices import Copies
from jepa_cache.predictor.rollout import l1_error
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.losses import TERMS, Losses, Objective

ROLLOUT_STREAM = 2  # counter of the Philox stream that draws rollout starts
SMALLEST_SCALE = 2.0**-24  # of the float16 gradients; below it every training step has overflowed for long
GAPS = ("gap_copy_last", "gap_shuffled_actions")


class StepReport(NamedTuple):
    """Losses, gradient and windows of one training step; tensors stay on the device until somebody reads them."""

    losses: dict[str, Tensor]
    """[] float32 each: the loss's scalars, as means over the batches of this process."""
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

    `model` is an `Objective`, inside DDP where there are several processes. `step` counts from 1: with the seed it decides
    everything random here, so that a resume needs no generator's state.
    """
    accumulation = settings.grad_accumulation
    seed = np.random.SeedSequence([settings.seed, step, accelerator.process_index])
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
    scalars, windows, by_window = [], [], []
    for micro in range(accumulation):
        batch = next(batches)
        start = draw_rollout_start(settings, (step - 1) * accumulation + micro)
        with nullcontext() if micro == accumulation - 1 else accelerator.no_sync(model):
            losses = model(batch.tokens, batch.actions, batch.states, start)
            names, total = list(losses.scalars), losses.total
            scalars.append(torch.stack(list(losses.scalars.values())).detach())
            by_window.append(losses.jloss_by_window)
            # Its predictions would be held through the backward pass: 100 MiB at 8 windows of 8 x 256 x 1408.
            del losses
            gradient_scaler.scale(total / accumulation).backward()
        windows.append(batch.numbers)
    gradient_scaler.unscale_(optimizer)
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    grad_norm = nn.utils.get_total_norm([weight.grad for weight in weights])
    if settings.clip_norm > 0:
        nn.utils.clip_grads_with_norm_(weights, settings.clip_norm, grad_norm)
    gradient_scaler.step(optimizer)
    gradient_scaler.update()
    optimizer.zero_grad()
    means = dict(zip(names, torch.stack(scalars).mean(dim=0).unbind(), strict=True))
    return StepReport(means, grad_norm, np.concatenate(windows), torch.cat(by_window))


def draw_rollout_start(settings: TrainConfig, turn: int) -> int:
    """Draw the step at which the rollout of batch number `turn` starts; the same on every process."""
    if settings.rollout_start == "first":
        return 0
    latest = settings.window_steps - 1 - max(settings.auto_steps, 1 if settings.rollout == "fixed" else 2)
    generator = np.random.Generator(np.random.Philox(key=[settings.seed, turn], counter=ROLLOUT_STREAM))
    return int(generator.integers(0, max(latest, 0) + 1))


class Failure(NamedTuple):
    """A training step that must not be kept."""

    step: int
    reason: str
    windows: np.ndarray  # numbers of the windows of this process


class FiniteChecks:
    """Whether training steps may be kept; read while later ones run, so that a GPU never waits for the CPU.

    In float16 a gradient that overflowed is no failure: the scaler skips the update and tries a smaller scale.

    Attributes:
        failure: The first training step of this process that must not be kept, of those that were read.
    """

    def __init__(self, gradient_scaler: torch.amp.GradScaler) -> None:
        self.failure: Failure | None = None
        self._scaler = gradient_scaler
        self._unread: list[tuple[int, np.ndarray, Tensor, Copies | None]] = []

    def add(self, step: int, report: StepReport) -> None:
        """Begin to copy what decides over a training step."""
        total = report.losses["total"]
        values = torch.stack([total, report.grad_norm, self._scaler.scale(torch.ones_like(total))])
        copies = Copies() if total.device.type == "cuda" else None
        self._unread.append((step, report.windows, copies.take(values) if copies else values, copies))

    def read(self, *, late: int = 0) -> None:
        """Read all but the newest `late` training steps; on a GPU this waits for these to end."""
        while len(self._unread) > late:
            step, windows, values, copies = self._unread.pop(0)
            if copies is not None:
                copies.wait()
            reason = self._judge(*values.tolist())
            if reason is not None and self.failure is None:
                self.failure = Failure(step, reason, windows)

    def _judge(self, total: float, grad_norm: float, scale: float) -> str | None:
        if self._scaler.is_enabled():
            if scale < SMALLEST_SCALE:
                return f"the gradient overflows float16 at every scale down to {SMALLEST_SCALE:g}"
            return None if math.isfinite(total) else f"the loss is {total}"
        if math.isfinite(total) and math.isfinite(grad_norm):
            return None
        return f"the loss is {total} and the norm of its gradient {grad_norm}"


class StepStatistics:
    """Rates, memory, and the loss of each data set of a mixture, over the training steps since the last row."""

    def __init__(self, data: TrainingData, settings: TrainConfig, first_step: int, accelerator: Accelerator) -> None:
        self._data, self._settings, self._accelerator = data, settings, accelerator
        self._start(first_step)

    def _start(self, step: int) -> None:
        self._step, self._begun, self._waited = step, time.perf_counter(), self._data.loader.wait_s
        self._num_windows = 0
        self._windows: list[np.ndarray] = []
        self._losses: list[Tensor] = []

    def add(self, report: StepReport) -> None:
        """Count the windows of a training step; keep them with their losses, on the device, where data sets are reported apart."""
        self._num_windows += len(report.windows)
        if len(self._data.datasets) > 1:
            self._windows.append(report.windows)
            self._losses.append(report.jloss_by_window)

    def row(self, report: StepReport, step: int, lr: float) -> dict[str, float]:
        """Return the row of training step `step`, the same on every process, and begin to count anew."""
        data, settings, accelerator = self._data, self._settings, self._accelerator
        elapsed = time.perf_counter() - self._begun
        losses = accelerator.reduce(torch.stack(list(report.losses.values())), reduction="mean")
        row = {
            "step": step,
            "epoch": data.sampler.epoch(step * settings.grad_accumulation),
            **dict(zip(report.losses, losses.tolist(), strict=True)),
            "lr": lr,
            "grad_norm": float(report.grad_norm),
            "samples_per_s": self._num_windows * accelerator.num_processes / elapsed,
            "loader_wait_share": (data.loader.wait_s - self._waited) / elapsed,
            **_dataset_means("jloss", data, accelerator, self._windows, self._losses),
        }
        if accelerator.device.type == "cuda":
            row["copy_wait_share"] = data.loader.take_copy_wait_s() / elapsed
            row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(accelerator.device) / 2**20
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        self._start(step)
        return row


@torch.no_grad()
def validate(objective: Objective, data: TrainingData, accelerator: Accelerator) -> dict[str, float]:
    """Average the losses over a few windows of every held-out episode, which the processes share.

    With two held-out episodes or more also the gaps of the evaluation, teacher-forced, but as means over windows: L1 of
    copying the last step, and of the predictor with another episode's actions, less its own L1.
    """
    objective.eval()
    names = (*TERMS, *(GAPS if data.compares else ()))
    sums = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
    windows, by_window = [], []
    for batch in data.validation_batches():
        losses = objective(batch.tokens, batch.actions, batch.states)
        means = [losses.scalars[name] for name in TERMS]
        if data.compares:
            means += _gaps(objective, batch, losses, data.shuffled_actions(batch.numbers))
        sums += torch.stack(means).double() * len(batch.tokens)
        windows.append(batch.numbers)
        by_window.append(losses.jloss_by_window)
    objective.train()
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.float(), reduction="sum")
    row = {f"val_{name}": total / len(data.validation) for name, total in zip(names, sums.tolist(), strict=True)}
    return row | _dataset_means("val_jloss", data, accelerator, windows, by_window, held_out=True)


def _gaps(objective: Objective, batch: Batch, losses: Losses, shuffled: Tensor) -> list[Tensor]:
    """L1 of copying, and of the predictor with `shuffled` actions [B, T-1, A], less its own: `GAPS`."""
    model = objective.latent
    h = model.as_reps(batch.tokens)
    own = l1_error(losses.z_tf, h[:, 1:])
    others = l1_error(h[:, :-1], h[:, 1:]), l1_error(model.teacher_forcing(h, shuffled, batch.states), h[:, 1:])
    return [(other - own).mean() for other in others]


def _dataset_means(
    name: str,
    data: TrainingData,
    accelerator: Accelerator,
    windows: Sequence[np.ndarray],
    losses: Sequence[Tensor],
    *,
    held_out: bool = False,
) -> dict[str, float]:
    """Mean of the losses [B] of windows for each data set of a mixture that had one, over all processes."""
    if len(data.datasets) < 2:
        return {}
    sums = torch.zeros(2, len(data.datasets), device=accelerator.device)
    for numbers, values in zip(windows, losses, strict=True):
        owners = torch.from_numpy(data.datasets_of(numbers, held_out=held_out)).to(accelerator.device)
        sums[0].index_add_(0, owners, values)
        sums[1].index_add_(0, owners, torch.ones_like(values))
    shares = zip(data.datasets, *accelerator.reduce(sums, reduction="sum").tolist(), strict=True)
    return {f"{name}.{dataset}": total / count for dataset, total, count in shares if count}
