"""Stage two: the loop that trains the predictor from cached tokens, and nothing else."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.filters import ranges_path
from jepa_cache.data.scaler import Scaler, check_scaler
from jepa_cache.data.splits import TRAIN
from jepa_cache.files import atomic_file
from jepa_cache.predictor.lora import count_trainable
from jepa_cache.training.checkpoint import (
    BEST,
    CSV_FILE,
    NO_BEST,
    Best,
    Checkpoint,
    Rotation,
    describe_last,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from jepa_cache.training.feed import Feed, Meter
from jepa_cache.training.identity import (
    check_init_stays,
    describe_run,
    held_output,
    held_run,
    prepare_folder,
    resolve_init,
    run_folder,
)
from jepa_cache.training.optimizer import build_optimizer, set_rates
from jepa_cache.training.outputs import describe_weights, write_outputs
from jepa_cache.training.processes import (
    agree_to_stop,
    check_same_run,
    check_same_step,
    end_processes,
    start_processes,
    watched_processes,
)
from jepa_cache.training.recorder import Recorder, columns_for
from jepa_cache.training.schedule import rates_at
from jepa_cache.training.signals import stop_request
from jepa_cache.training.sinks import open_sinks
from jepa_cache.training.start import Learner, check_start, compare_start, resolve_epochs
from jepa_cache.training.stepping import Objective, StepReport, check_finite, train_step
from jepa_cache.training.upload import Uploader
from jepa_cache.training.validation import validate


class TrainResult(NamedTuple):
    """Where a training ended."""

    weights: Path | None  # predictor.safetensors with its card; None where it was stopped before its end
    run: Path  # folder of checkpoints
    step: int  # train steps done in all
    num_trained: int  # train steps done by this call
    num_steps: int  # planned
    stopped_by: str | None = None  # signal that ended it before its end


def train(
    config: Config, dataset: CachedDataset, scaler: Scaler, output: Path, *, base: Path, fresh: bool = False
) -> TrainResult:
    """Train the predictor, or go on where the same run stopped.

    Args:
        config: Resolved settings.
        dataset: The cached features.
        scaler: Fitted on the training episodes.
        output: Folder for the weights and the CSV; DVCLive's files go beside it.
        base: Folder that a relative `train.init` is meant from.
        fresh: Forget earlier checkpoints of this run.

    Raises:
        ValueError: When no window fits, the loss stops being finite, the initial weights do not fit or are the output, another
            process trains this run or writes to this output, or another process of this training has died or would train another run.
    """
    check_scaler(scaler, dataset.segments_of(TRAIN, config.split, config.filter))
    accelerator = start_processes(config.train)
    feed = Feed(config, dataset, scaler, accelerator)
    config = resolve_epochs(config, feed.num_windows, accelerator.num_processes)
    init = resolve_init(config.train.init, base)
    if init is not None:
        check_init_stays(init, output)
    ranges = ranges_path(config.filter, base)
    description = describe_run(config, dataset.manifest, scaler, init, ranges, num_processes=accelerator.num_processes)
    origin = check_start(config, dataset, init)
    if origin is not None:
        description["origin"] = origin._asdict()
    run = run_folder(description)
    with watched_processes(accelerator, run):
        check_same_run(accelerator, description)
    main = accelerator.is_main_process
    with ExitStack() as stack:
        if main:
            stack.enter_context(held_output(output))
            stack.enter_context(held_run(run))
            prepare_folder(run, description, upload_to=config.train.upload_to, fresh=fresh)
            for change in compare_start(init, dataset, scaler) if init is not None else ():
                print(f"the starting weights were trained with other inputs: {change}")
        with watched_processes(accelerator, run):
            accelerator.wait_for_everyone()
            card = describe_weights(dataset, scaler)
            training = _Training(config, dataset, feed, accelerator, run, init, card)
            stopped_by = training.run_loop(output.parent / "live")
            weights = None
            if main and stopped_by is None:
                step = training.select_weights()
                weights = write_outputs(training.learner, step, run, output, config, dataset, scaler, description)
            end_processes(accelerator)
    num_trained = training.step - training.first_step
    return TrainResult(weights, run, training.step, num_trained, config.train.num_steps, stopped_by)


class _Training:
    """One run of the loop: the predictor, its optimiser, and how far they are."""

    def __init__(
        self,
        config: Config,
        dataset: CachedDataset,
        feed: Feed,
        accelerator: Accelerator,
        run: Path,
        init: Path | None,
        card: dict[str, Any],
    ) -> None:
        settings = config.train
        self.card = card
        self.settings, self.feed, self.accelerator, self.run = settings, feed, accelerator, run
        self.datasets = feed.datasets
        self.checkpoints = run / "checkpoints"
        self.rotation = Rotation(settings.keep_last, settings.keep_every)
        main = accelerator.is_main_process
        checkpoint = load_latest(self.checkpoints, self.rotation if main else None, run=run.name)
        self.num_threads = settings.num_threads or (checkpoint.num_threads if checkpoint else default_num_threads())
        torch.set_num_threads(self.num_threads)
        torch.manual_seed(settings.seed)
        self.learner = Learner(config, dataset, init)
        if checkpoint:
            self.learner.load_state(checkpoint.weights)
        self.objective = Objective(self.learner.module, settings, accelerator.device)
        if settings.compile:
            self.learner.module.compile()
        self.model = accelerator.prepare_model(self.objective)
        self.optimizer = build_optimizer(
            self.learner.module, lr=settings.lr, weight_decay=settings.weight_decay, kind=settings.optimizer
        )
        self.gradient_scaler = torch.amp.GradScaler(accelerator.device.type, enabled=settings.precision == "float16")
        self.best: Best = NO_BEST
        self.first_step = self.step = 0
        self.rows: str | None = None
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.gradient_scaler.load_state_dict(checkpoint.gradient_scaler)
            self.first_step = self.step = checkpoint.step
            self.best, self.rows = checkpoint.best, checkpoint.rows
        check_same_step(accelerator, self.step)

    def run_loop(self, live_folder: Path) -> str | None:
        """Train to the end; returns the signal that ended it before, if one did."""
        settings = self.settings
        main = self.accelerator.is_main_process
        columns = columns_for(
            min(settings.auto_steps, settings.window_steps - 1),
            self.datasets,
            on_gpu=self.accelerator.device.type == "cuda",
        )
        with ExitStack() as stack:
            stop = stack.enter_context(stop_request())
            batches = stack.enter_context(closing(self.feed.batches(self.step, settings.num_steps)))
            recorder = uploader = None
            if main:
                shown = asdict(settings)
                sinks = open_sinks(settings.loggers, live_folder=live_folder, run_folder=self.run, settings=shown)
                recorder = Recorder(self.run / CSV_FILE, columns, sinks, resumed_step=self.step, kept=self.rows)
                stack.callback(recorder.close)
                if settings.upload_to is not None:
                    uploader = Uploader(self.run, settings.upload_to, settings.upload_every_min * 60)
                    stack.callback(uploader.close)
            _announce(self, main)
            bar = stack.enter_context(
                tqdm(
                    total=settings.num_steps,
                    initial=self.step,
                    desc="training",
                    unit="step",
                    dynamic_ncols=True,
                    disable=not main,
                )
            )
            meter = Meter(self.feed, settings, self.step, self.accelerator)
            while self.step < settings.num_steps and not self._has_converged():
                step = self.step + 1
                set_rates(self.optimizer, *rates_at(step, settings))
                report = train_step(
                    self.accelerator, self.model, self.optimizer, self.gradient_scaler, batches, settings, step
                )
                self._check(report, step)
                self.step = step
                bar.update()
                meter.add(report)
                stopping = agree_to_stop(self.accelerator, stop)
                improved = self._log(report, meter, recorder, bar)
                ended = step == settings.num_steps or self._has_converged()
                if recorder is not None and (step % settings.checkpoint_every == 0 or improved or ended or stopping):
                    save_checkpoint(self.checkpoints, self._snapshot(recorder), self.rotation)
                    if uploader is not None:
                        uploader.poke()
                if stopping and not ended:
                    return stop.name or "a signal to another process"
        return None

    def select_weights(self) -> int:
        """Load the weights that are handed on into the predictor; returns their train step."""
        if self.settings.select == "last" or not (self.checkpoints / BEST).exists():
            return self.step
        checkpoint = load_checkpoint((self.checkpoints / BEST).resolve(), run=self.run.name)
        self.learner.load_state(checkpoint.weights)
        return checkpoint.step

    def _log(self, report: StepReport, meter: Meter, recorder: Recorder | None, bar: tqdm) -> bool:
        """Validate and record where this train step asks for it; returns whether the metric became better."""
        settings, step = self.settings, self.step
        last = step == settings.num_steps
        validating = bool(self.feed.validation and settings.validate_every) and (
            step % settings.validate_every == 0 or last
        )
        if not (step % settings.log_every == 0 or validating or last):
            return False
        row = meter.row(report, step, self.optimizer.param_groups[0]["lr"])
        improved = False
        if validating:
            row |= validate(self.objective, self.feed, self.accelerator)
            improved = row[settings.metric] < self.best.value
            if improved:
                self.best = Best(step, row[settings.metric])
        if recorder is not None:
            recorder.log(row)
        bar.set_postfix_str(f"loss {row['total']:.4f}, loader wait {row['loader_wait_share']:.0%}")
        return improved

    def _has_converged(self) -> bool:
        """Whether `patience` validations in a row brought no better metric."""
        patience, every = self.settings.patience, self.settings.validate_every
        return bool(patience and self.best.step and self.step - self.best.step >= patience * every)

    def _check(self, report: StepReport, step: int) -> None:
        """Stop before anything of a train step is kept that spoiled the weights."""
        reason = check_finite(report, self.gradient_scaler)
        if reason is None:
            return
        windows = self.run / f"failed-step-{step:08d}-process-{self.accelerator.process_index}.json"
        with atomic_file(windows) as temporary:
            temporary.write_text(json.dumps(self.feed.describe(report.windows), indent=2) + "\n")
        raise ValueError(
            f"at train step {step} {reason}; nothing was overwritten, {describe_last(self.checkpoints)}, and the "
            f"windows of this train step are named in {windows}. Look at them, lower train.lr, or set train.clip_norm"
        )

    def _snapshot(self, recorder: Recorder) -> Checkpoint:
        return Checkpoint(
            self.step,
            self.learner.state(),
            self.optimizer.state_dict(),
            self.gradient_scaler.state_dict(),
            self.num_threads,
            self.best,
            self.card,
            self.run.name,
            recorder.text,
        )


def _announce(training: _Training, main: bool) -> None:
    if not main:
        return
    settings, run, step = training.settings, training.run, training.step
    trainable = count_trainable(training.learner.module)
    for layer in training.learner.new_layers:
        print(f"{layer} is a new layer: the starting weights have it in another width")
    processes = training.accelerator.num_processes
    print(
        f"predictor with {trainable:,} trainable weights, {training.feed.num_windows} training windows of "
        f"{settings.window_steps} steps; {training.accelerator.device}, {training.num_threads} torch threads"
        + (f", {processes} processes" if processes > 1 else "")
    )
    if step >= settings.num_steps or training._has_converged():
        print(f"run {run.name} is complete; --fresh starts over")
    elif step:
        print(f"run {run.name} goes on at train step {step} of {settings.num_steps}; --fresh starts over")
