"""One training step, its report and its statistics, and one validation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from jepa_cache.config.schema import TrainConfig
from jepa_cache.data.loader import Batch
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
    limit = settings.clip_norm if settings.clip_norm > 0 else float("inf")
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
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


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of torch's generators in one training step of one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def check_finite(report: StepReport, gradient_scaler: torch.amp.GradScaler) -> str | None:
    """Say what is wrong with a training step that must not be kept, None when nothing is.

    On a GPU this waits for the training step to end, once. In float16 a gradient that overflowed is no failure: the
    scaler skips the update and tries a smaller scale.
    """
    total = report.losses["total"]
    if gradient_scaler.is_enabled():
        if gradient_scaler.get_scale() < SMALLEST_SCALE:
            return f"the gradient overflows float16 at every scale down to {SMALLEST_SCALE:g}"
        return None if torch.isfinite(total) else f"the loss is {float(total)}"
    if torch.isfinite(total + report.grad_norm):
        return None
    return f"the loss is {float(total)} and the norm of its gradient {float(report.grad_norm)}"


class StepStatistics:
    """Rates, memory, and the loss of each data set of a mixture, over the training steps since the last row."""

    def __init__(self, data: TrainingData, settings: TrainConfig, first_step: int, accelerator: Accelerator) -> None:
        self._data, self._step, self._accelerator = data, first_step, accelerator
        self._batches_per_step = settings.grad_accumulation
        self._windows_per_step = settings.batch_size * settings.grad_accumulation * accelerator.num_processes
        self._time, self._wait = time.perf_counter(), data.loader.wait_s
        self._by_dataset = torch.zeros(2, len(data.datasets), device=accelerator.device)

    def add(self, report: StepReport) -> None:
        """Add the windows of a training step to their data sets."""
        if len(self._data.datasets) > 1:
            _add_windows(self._by_dataset, self._data.datasets_of(report.windows), report.jloss_by_window)

    def row(self, report: StepReport, step: int, lr: float) -> dict[str, float]:
        """Return the row of training step `step`, the same on every process, and begin to count anew."""
        now, wait = time.perf_counter(), self._data.loader.wait_s
        elapsed = now - self._time
        losses = self._accelerator.reduce(torch.stack(list(report.losses.values())), reduction="mean")
        row = {
            "step": step,
            "epoch": self._data.sampler.epoch(step * self._batches_per_step),
            **dict(zip(report.losses, losses.tolist(), strict=True)),
            "lr": lr,
            "grad_norm": float(report.grad_norm),
            "samples_per_s": (step - self._step) * self._windows_per_step / elapsed,
            "loader_wait_share": (wait - self._wait) / elapsed,
        }
        if len(self._data.datasets) > 1:
            row |= _dataset_means("jloss", self._data, self._accelerator.reduce(self._by_dataset, reduction="sum"))
        if self._accelerator.device.type == "cuda":
            row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._accelerator.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self._accelerator.device)
        self._time, self._wait, self._step = now, wait, step
        self._by_dataset.zero_()
        return row


@torch.no_grad()
def validate(objective: Objective, data: TrainingData, accelerator: Accelerator) -> dict[str, float]:
    """Average the losses over a few windows of every held-out episode, which the processes share.

    Returns:
        `val_` and each of the loss's `TERMS`, and of a mixture `val_jloss.<data set>`. With two held-out episodes or
        more also the gaps of the evaluation, teacher-forced, but as means over windows: `val_gap_copy_last` and
        `val_gap_shuffled_actions`, L1 of these less L1 of the predictor.
    """
    objective.eval()
    names = (*TERMS, *(GAPS if data.compares else ()))
    sums = torch.zeros(len(names), dtype=torch.float64)
    by_dataset = torch.zeros(2, len(data.datasets), dtype=torch.float64)
    for batch in data.validation_batches():
        losses = objective(batch.tokens, batch.actions, batch.states)
        means = [losses.scalars[name] for name in TERMS]
        if data.compares:
            means += _gaps(objective, batch, losses, data.shuffled_actions(batch.numbers))
        sums += torch.stack(means).double().cpu() * len(batch.tokens)
        if len(data.datasets) > 1:
            _add_windows(by_dataset, data.datasets_of(batch.numbers, held_out=True), losses.jloss_by_window)
    objective.train()
    flat = torch.cat([sums, by_dataset.flatten()])
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(flat.to(accelerator.device, torch.float32), reduction="sum").double().cpu()
    means = (flat[: len(names)] / len(data.validation)).tolist()
    row = {f"val_{name}": mean for name, mean in zip(names, means, strict=True)}
    if len(data.datasets) > 1:
        row |= _dataset_means("val_jloss", data, flat[len(names) :].view(2, -1))
    return row


def _gaps(objective: Objective, batch: Batch, losses: Losses, shuffled: Tensor) -> list[Tensor]:
    """L1 of copying, and of the predictor with `shuffled` actions [B, T-1, A], less its own: `GAPS`."""
    model = objective.latent
    h = model.as_reps(batch.tokens)
    own = l1_error(losses.z_tf, h[:, 1:])
    others = l1_error(h[:, :-1], h[:, 1:]), l1_error(model.teacher_forcing(h, shuffled, batch.states), h[:, 1:])
    return [(other - own).mean() for other in others]


def _add_windows(by_dataset: Tensor, owners: np.ndarray, losses: Tensor) -> None:
    """Add the losses [B] of windows to the sums and counts [2, data sets] of the data sets that own them."""
    positions = torch.from_numpy(owners).to(by_dataset.device)
    losses = losses.to(by_dataset)
    by_dataset[0].index_add_(0, positions, losses)
    by_dataset[1].index_add_(0, positions, torch.ones_like(losses))


def _dataset_means(name: str, data: TrainingData, by_dataset: Tensor) -> dict[str, float]:
    """Mean loss of each data set that had a window, from sums and counts [2, data sets]."""
    shares = zip(data.datasets, *by_dataset.tolist(), strict=True)
    return {f"{name}.{dataset}": total / count for dataset, total, count in shares if count}
