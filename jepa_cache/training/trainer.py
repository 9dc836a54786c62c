"""Stage two: the loop that trains the predictor from cached tokens, and nothing else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config, TrainConfig
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.loader import Batch, WindowLoader
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.splits import TRAIN, VAL
from jepa_cache.data.windows import WindowIndex, WindowSampler, spread_windows
from jepa_cache.predictor.checkpoints import load_predictor_weights, save_predictor
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.training.checkpoint import Checkpoint, load_latest, save_checkpoint
from jepa_cache.training.identity import describe_run, resolve_init, run_folder
from jepa_cache.training.losses import Losses, world_model_loss
from jepa_cache.training.optimizer import build_optimizer, set_rates
from jepa_cache.training.recorder import Recorder
from jepa_cache.training.schedule import cosine_weight_decay, warmup_cosine, warmup_stable_decay

VALIDATION_WINDOWS_PER_EPISODE = 4


class TrainResult(NamedTuple):
    """Where a training ended."""

    weights: Path  # predictor.safetensors with its card
    run: Path  # folder of checkpoints
    num_trained: int  # train steps done by this call
    num_steps: int


def train(
    config: Config, dataset: CachedDataset, scaler: Scaler, output: Path, *, base: Path, fresh: bool = False
) -> TrainResult:
    """Train the predictor, or go on where the same run stopped.

    Args:
        config: Resolved settings.
        dataset: The cached features.
        scaler: Fitted on the training episodes.
        output: Folder for the weights, the CSV and DVCLive's files.
        base: Folder that a relative `train.init` is meant from.
        fresh: Forget earlier checkpoints of this run.

    Raises:
        ValueError: When no window fits, the loss stops being finite, or the initial weights do not fit.
    """
    settings = config.train
    torch.set_num_threads(settings.num_threads or default_num_threads())
    init = resolve_init(settings.init, base)
    description = describe_run(config, dataset.manifest, scaler, init)
    run = run_folder(description)
    if fresh and run.exists():
        shutil.rmtree(run)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)

    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision="bf16" if settings.precision == "bfloat16" else "no",
        gradient_accumulation_steps=settings.grad_accumulation,
    )
    torch.manual_seed(settings.seed)
    predictor = ACPredictor(**predictor_arguments(config, dataset))
    if init is not None:
        load_predictor_weights(predictor, init)
    checkpoint = load_latest(run / "checkpoints")
    first_step = checkpoint.step if checkpoint else 0
    if checkpoint:
        predictor.load_state_dict(checkpoint.weights)
    model = accelerator.prepare_model(predictor)
    optimizer = accelerator.prepare_optimizer(
        build_optimizer(predictor, lr=settings.lr, weight_decay=settings.weight_decay)
    )
    if checkpoint:
        optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.random_state)

    feed = _Feed(config, dataset, scaler, accelerator)
    recorder = Recorder(run / "train.csv", output.parent / "live", resumed_step=first_step)
    _announce(run, first_step, settings, feed, predictor)
    bar = tqdm(total=settings.num_steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True)
    meter = _Meter(feed.loader, settings)
    micro_batches = feed.batches(first_step)
    for step in range(first_step, settings.num_steps):
        set_rates(optimizer, *rates_at(step + 1, settings))
        losses, grad_norm = train_step(accelerator, model, optimizer, micro_batches, settings)
        _check_finite(losses, step, run)
        bar.update()
        done = step + 1
        last = done == settings.num_steps
        if done % settings.log_every == 0 or last:
            row = meter.row(done, feed.sampler.epoch(done * settings.grad_accumulation), losses, grad_norm, optimizer)
            if settings.validate_every and (done % settings.validate_every == 0 or last) and feed.validation:
                row |= validate(model, feed, settings)
            recorder.log(row)
            bar.set_postfix_str(f"loss {row['total']:.4f}, loader wait {row['loader_wait_share']:.0%}")
        if done % settings.checkpoint_every == 0 or last:
            save_checkpoint(run / "checkpoints", _snapshot(done, predictor, optimizer))
    bar.close()
    micro_batches.close()
    recorder.close()
    weights = _write_outputs(predictor, run, output, config, dataset, scaler, description)
    return TrainResult(weights, run, settings.num_steps - first_step, settings.num_steps)


def train_step(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, batches: Iterator[Batch], settings: TrainConfig
) -> tuple[Losses, float]:
    """One optimiser update from `grad_accumulation` batches; returns the last batch's losses and the gradient norm."""
    grad_norm = float("nan")
    for _ in range(settings.grad_accumulation):
        batch = next(batches)
        with accelerator.accumulate(model):
            losses = window_losses(model, batch, settings)
            accelerator.backward(losses.total)
            if accelerator.sync_gradients:
                limit = settings.clip_norm if settings.clip_norm > 0 else float("inf")
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), limit))
            optimizer.step()
            optimizer.zero_grad()
    return losses, grad_norm


def window_losses(model: torch.nn.Module, batch: Batch, settings: TrainConfig) -> Losses:
    """The world-model loss of one batch under these settings."""
    return world_model_loss(
        model,
        batch.tokens,
        batch.actions,
        batch.states,
        loss_exp=settings.loss_exp,
        auto_steps=settings.auto_steps,
        normalize_reps=settings.normalize_reps,
        rollout=settings.rollout,
    )


@torch.no_grad()
def validate(model: torch.nn.Module, feed: _Feed, settings: TrainConfig) -> dict[str, float]:
    """Mean losses over a few windows of every held-out episode."""
    model.eval()
    jloss = sloss = 0.0
    for batch in feed.validation_batches():
        losses = window_losses(model, batch, settings)
        jloss += float(losses.jloss) * len(batch.tokens)
        sloss += float(losses.sloss) * len(batch.tokens)
    model.train()
    return {"val_jloss": jloss / len(feed.validation), "val_sloss": sloss / len(feed.validation)}


def rates_at(k: int, settings: TrainConfig) -> tuple[float, float]:
    """Learning rate and weight decay of train step k, counted from 1."""
    decay = cosine_weight_decay(
        k,
        num_steps=settings.num_steps,
        start_weight_decay=settings.weight_decay,
        final_weight_decay=settings.final_weight_decay,
    )
    common = {
        "num_steps": settings.num_steps,
        "num_warmup": settings.num_warmup,
        "start_lr": settings.start_lr,
        "peak_lr": settings.lr,
        "final_lr": settings.final_lr,
    }
    if settings.schedule == "wsd":
        return warmup_stable_decay(k, num_anneal=settings.num_anneal, **common), decay
    return warmup_cosine(k, **common), decay


def predictor_arguments(config: Config, dataset: CachedDataset) -> dict[str, Any]:
    """Constructor arguments of a predictor of the preset's size that fits the data set's tokens, actions and states."""
    manifest, preset = dataset.manifest, config.predictor
    return {
        "embed_dim": manifest.width,
        "predictor_dim": preset.predictor_dim,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_ratio": preset.mlp_ratio,
        "action_dim": len(dataset.space.actions),
        "state_dim": len(dataset.space.states),
        "grid": list(manifest.grid),
        "activation_checkpointing": preset.activation_checkpointing,
    }


class _Feed:
    """Batches on the device: training ones in the sampler's order, validation ones from every held-out episode."""

    def __init__(self, config: Config, dataset: CachedDataset, scaler: Scaler, accelerator: Accelerator) -> None:
        self._settings, self._device = config.train, accelerator.device
        pin = accelerator.device.type == "cuda"
        index = WindowIndex(dataset.segments_of(TRAIN, config.split), self._settings.window_steps)
        self.num_windows = len(index)
        self.loader = WindowLoader(
            dataset, index, scaler, num_threads=self._settings.num_loader_threads, pin_memory=pin
        )
        self.sampler = WindowSampler(
            len(index),
            self._settings.batch_size,
            seed=self._settings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.validation: list[int] = []
        held_out = dataset.segments_of(VAL, config.split)
        if any(segment.stop - segment.start >= self._settings.window_steps for segment in held_out):
            val_index = WindowIndex(held_out, self._settings.window_steps)
            self.validation = spread_windows(val_index, VALIDATION_WINDOWS_PER_EPISODE)
            self._val_loader = WindowLoader(dataset, val_index, scaler)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Training batches from train step `first_step` on, without end."""
        steps = range(
            first_step * self._settings.grad_accumulation, self._settings.num_steps * self._settings.grad_accumulation
        )
        for batch in self.loader.iterate(self.sampler.numbers(step) for step in steps):
            yield self._to_device(batch)

    def validation_batches(self) -> Iterator[Batch]:
        """Each validation window once."""
        size = self._settings.batch_size
        chunks = [self.validation[start : start + size] for start in range(0, len(self.validation), size)]
        for batch in self._val_loader.iterate(chunks):
            yield self._to_device(batch)

    def _to_device(self, batch: Batch) -> Batch:
        return batch._replace(
            tokens=batch.tokens.to(self._device),
            actions=batch.actions.to(self._device),
            states=batch.states.to(self._device),
        )


class _Meter:
    """Rates since the last row: samples per second and the share of time spent waiting for the loader."""

    def __init__(self, loader: WindowLoader, settings: TrainConfig) -> None:
        self._loader, self._settings = loader, settings
        self._time, self._wait, self._step = time.perf_counter(), loader.wait_s, None

    def row(self, step: int, epoch: float, losses: Losses, grad_norm: float, optimizer: Any) -> dict[str, float]:
        now, wait = time.perf_counter(), self._loader.wait_s
        elapsed = now - self._time
        num_steps = step - self._step if self._step is not None else self._settings.log_every
        samples = num_steps * self._settings.batch_size * self._settings.grad_accumulation
        row = {
            "step": step,
            "epoch": epoch,
            "total": float(losses.total),
            "jloss": float(losses.jloss),
            "sloss": float(losses.sloss),
            "lr": optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "samples_per_s": samples / elapsed,
            "loader_wait_share": (wait - self._wait) / elapsed,
        }
        self._time, self._wait, self._step = now, wait, step
        return row


def _snapshot(step: int, predictor: ACPredictor, optimizer: Any) -> Checkpoint:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in predictor.state_dict().items()}
    return Checkpoint(step, weights, optimizer.state_dict(), torch.get_rng_state())


def _check_finite(losses: Losses, step: int, run: Path) -> None:
    if not torch.isfinite(losses.total):
        raise ValueError(
            f"the loss is {float(losses.total)} at train step {step}; nothing was overwritten, the last checkpoint is in "
            f"{run / 'checkpoints'}. Lower train.lr, or set train.clip_norm"
        )


def _announce(run: Path, first_step: int, settings: TrainConfig, feed: _Feed, predictor: ACPredictor) -> None:
    trainable = sum(parameter.numel() for parameter in predictor.parameters() if parameter.requires_grad)
    print(
        f"predictor with {trainable:,} trainable weights, {feed.num_windows} training windows of {settings.window_steps} steps"
    )
    if first_step >= settings.num_steps:
        print(f"run {run.name} is complete; --fresh starts over")
    elif first_step:
        print(f"run {run.name} goes on at train step {first_step} of {settings.num_steps}; --fresh starts over")


def _write_outputs(
    predictor: ACPredictor,
    run: Path,
    output: Path,
    config: Config,
    dataset: CachedDataset,
    scaler: Scaler,
    description: dict,
) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    manifest = dataset.manifest
    card = {
        "run": run.name,
        "description": description,
        "architecture": predictor_arguments(config, dataset),
        "action_space": dataset.space.name,
        "window_steps": config.train.window_steps,
        "normalize_reps": config.train.normalize_reps,
        "scaler": scaler.to_json(),
        "tokens_fingerprint": manifest.fingerprint,
        "manifest": manifest.digest,
        "encoder": manifest.encoder,
        "encoder_trained": manifest.encoder_trained,
        "mode": manifest.mode,
    }
    weights = output / "predictor.safetensors"
    save_predictor(predictor, weights, card)
    shutil.copyfile(run / "train.csv", output / "train.csv")
    return weights
