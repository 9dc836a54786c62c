"""Stage two: the loop that trains the predictor from cached tokens, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config, TrainConfig
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.loader import Batch
from jepa_cache.data.scaler import Scaler, check_scaler
from jepa_cache.data.splits import TRAIN
from jepa_cache.predictor.checkpoints import load_predictor_weights, save_predictor
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.training.checkpoint import WEIGHTS_FILE, Checkpoint, forget_checkpoints, load_latest, save_checkpoint
from jepa_cache.training.feed import Feed, Meter
from jepa_cache.training.identity import describe_run, resolve_init, run_folder
from jepa_cache.training.losses import Losses, world_model_loss
from jepa_cache.training.optimizer import build_optimizer, set_rates
from jepa_cache.training.recorder import Recorder
from jepa_cache.training.schedule import cosine_weight_decay, warmup_cosine, warmup_stable_decay


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
    check_scaler(scaler, dataset.segments_of(TRAIN, config.split, config.filter))
    init = resolve_init(settings.init, base)
    description = describe_run(config, dataset.manifest, scaler, init)
    run = run_folder(description)
    if fresh and run.exists():
        forget_checkpoints(run / "checkpoints")
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

    feed = Feed(config, dataset, scaler, accelerator)
    recorder = Recorder(run / "train.csv", output.parent / "live", resumed_step=first_step)
    _announce(run, first_step, settings, feed, predictor)
    bar = tqdm(total=settings.num_steps, initial=first_step, desc="training", unit="step", dynamic_ncols=True)
    meter = Meter(feed.loader, settings, first_step)
    micro_batches = feed.batches(first_step)
    for done in range(first_step + 1, settings.num_steps + 1):
        set_rates(optimizer, *rates_at(done, settings))
        report = train_step(accelerator, model, optimizer, micro_batches, settings)
        _check_finite(report, done, run)
        bar.update()
        last = done == settings.num_steps
        validating = bool(feed.validation and settings.validate_every) and (done % settings.validate_every == 0 or last)
        if done % settings.log_every == 0 or validating or last:
            row = meter.row(done, feed.sampler.epoch(done * settings.grad_accumulation))
            row |= {name: float(value) for name, value in report._asdict().items()}
            row["lr"] = optimizer.param_groups[0]["lr"]
            if validating:
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


class StepReport(NamedTuple):
    """What one train step says of itself: float32 scalars, left on the device until somebody reads them."""

    total: Tensor  # means over the micro-batches
    jloss: Tensor
    sloss: Tensor
    grad_norm: Tensor  # of all gradients together, before clipping


def train_step(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, batches: Iterator[Batch], settings: TrainConfig
) -> StepReport:
    """One optimiser update from the next `grad_accumulation` batches."""
    parts = []
    for _ in range(settings.grad_accumulation):
        with accelerator.accumulate(model):
            losses = window_losses(model, next(batches), settings)
            accelerator.backward(losses.total)
            parts.append(torch.stack([losses.total, losses.jloss, losses.sloss]).detach())
            if accelerator.sync_gradients:
                limit = settings.clip_norm if settings.clip_norm > 0 else float("inf")
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad()
    return StepReport(*torch.stack(parts).mean(dim=0), grad_norm)


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
def validate(model: torch.nn.Module, feed: Feed, settings: TrainConfig) -> dict[str, float]:
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


def _snapshot(step: int, predictor: ACPredictor, optimizer: Any) -> Checkpoint:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in predictor.state_dict().items()}
    return Checkpoint(step, weights, optimizer.state_dict(), torch.get_rng_state())


def _check_finite(report: StepReport, step: int, run: Path) -> None:
    """Stop before anything of a train step is kept whose loss or gradient is not finite: its update spoiled the weights.

    On a GPU this waits for the train step to end, once. Nothing is lost by that: the copy of the next batch out of a buffer
    that is filled again would wait as well.
    """
    if not torch.isfinite(report.total + report.grad_norm):
        raise ValueError(
            f"at train step {step} the loss is {float(report.total)} and the norm of its gradient {float(report.grad_norm)}; "
            f"nothing was overwritten, the last checkpoint is in {run / 'checkpoints'}. Lower train.lr, or set train.clip_norm"
        )


def _announce(run: Path, first_step: int, settings: TrainConfig, feed: Feed, predictor: ACPredictor) -> None:
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
    weights = output / WEIGHTS_FILE
    save_predictor(predictor, weights, card)
    shutil.copyfile(run / "train.csv", output / "train.csv")
    return weights
