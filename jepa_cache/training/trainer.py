"""Stage two: the loop that trains the predictor from cached tokens. Read this file first.

batches      training windows and held-out windows, on the device
step         one training step, its statistics, and a validation
losses       the loss, as scalars that are logged under their names
optim        AdamW and the rates of each training step
logging      train.csv and its mirrors
checkpoint   saved states, their rotation, and copies on a remote store
run          the id, folder and locks of a run; what it starts from and what it leaves in outputs/
distributed  several processes; signals: a request to stop
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.scaler import Scaler, check_scaler
from jepa_cache.data.splits import TRAIN
from jepa_cache.files import atomic_file
from jepa_cache.predictor.lora import count_trainable
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.checkpoint import (
    BEST,
    CSV_FILE,
    FOLDER,
    NO_BEST,
    Best,
    Checkpoint,
    Rotation,
    Uploader,
    describe_last,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)
from jepa_cache.training.distributed import agree_to_stop, check_same_step, end_processes, start_processes
from jepa_cache.training.logging import Recorder, columns_for, open_trackers
from jepa_cache.training.losses import Objective
from jepa_cache.training.optim import build_optimizer, rates_at, set_rates
from jepa_cache.training.run import Run, TrainableModel, describe_weights, open_run, resolve_epochs, write_outputs
from jepa_cache.training.signals import stop_request
from jepa_cache.training.step import StepReport, StepStatistics, check_finite, train_step, validate


class TrainResult(NamedTuple):
    """Where a training ended."""

    weights: Path | None  # predictor.safetensors with its model card; None where it was stopped before its end
    run: Path  # folder of checkpoints
    step: int  # training steps done in all
    num_trained: int  # training steps done by this call
    num_steps: int  # planned
    stopped_by: str | None = None  # signal that ended it before its end


def train(
    config: Config, dataset: CachedDataset, scaler: Scaler, output: Path, *, base: Path, fresh: bool = False
) -> TrainResult:
    """Train the predictor, or resume where the same run stopped.

    Args:
        config: Resolved settings.
        dataset: The cached features.
        scaler: Fitted on the training episodes.
        output: Folder for the weights and the CSV; DVCLive's files lie beside it.
        base: Folder that a relative `train.init` is meant from.
        fresh: Forget earlier checkpoints of this run.

    Raises:
        ValueError: When no window fits, the loss stops being finite, or the run cannot be opened (see `open_run`).
    """
    check_scaler(scaler, dataset.segments_of(TRAIN, config.split, config.filter))
    accelerator = start_processes(config.train)
    data = TrainingData(config, dataset, scaler, accelerator)
    config = resolve_epochs(config, data.num_windows, accelerator.num_processes)
    with open_run(config, dataset, scaler, accelerator, output, base=base, fresh=fresh) as run:
        trainer = _Trainer(config, dataset, scaler, data, accelerator, run)
        stopped_by = trainer.run_loop(output.parent / "live")
        weights = None
        if accelerator.is_main_process and stopped_by is None:
            step = trainer.select_weights()
            weights = write_outputs(trainer.trained, step, run, output, config, dataset, scaler)
        end_processes(accelerator)
    num_trained = trainer.step - trainer.first_step
    return TrainResult(weights, run.folder, trainer.step, num_trained, config.train.num_steps, stopped_by)


class _Trainer:
    """The predictor and its optimiser in one run, and how far they are."""

    def __init__(
        self,
        config: Config,
        dataset: CachedDataset,
        scaler: Scaler,
        data: TrainingData,
        accelerator: Accelerator,
        run: Run,
    ) -> None:
        """Build everything as it is at the run's newest checkpoint, or at its start."""
        settings = config.train
        self.settings, self.data, self.accelerator, self.run = settings, data, accelerator, run.folder
        self.model_card = describe_weights(dataset, scaler)
        self.checkpoints = run.folder / FOLDER
        self.rotation = Rotation(settings.keep_last, settings.keep_every)
        main = accelerator.is_main_process
        checkpoint = load_latest(self.checkpoints, self.rotation if main else None, run=run.folder.name)
        self.num_threads = settings.num_threads or (checkpoint.num_threads if checkpoint else default_num_threads())
        torch.set_num_threads(self.num_threads)
        torch.manual_seed(settings.seed)
        self.trained = TrainableModel(config, dataset, run.init)
        if checkpoint:
            self.trained.load_state(checkpoint.weights)
        self.objective = Objective(self.trained.module, settings, accelerator.device)
        if settings.compile:
            self.trained.module.compile()
        self.model = accelerator.prepare_model(self.objective)
        self.optimizer = build_optimizer(
            self.trained.module, lr=settings.lr, weight_decay=settings.weight_decay, kind=settings.optimizer
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
        settings, main = self.settings, self.accelerator.is_main_process
        with ExitStack() as stack:
            stop = stack.enter_context(stop_request())
            batches = stack.enter_context(closing(self.data.batches(self.step, settings.num_steps)))
            recorder = self._open_recorder(stack, live_folder) if main else None
            uploader = self._open_uploader(stack) if main and settings.upload_to is not None else None
            if main:
                self._print_start()
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
            statistics = StepStatistics(self.data, settings, self.step, self.accelerator)
            while not self.is_complete():
                step = self.step + 1
                set_rates(self.optimizer, *rates_at(step, settings))
                report = train_step(
                    self.accelerator, self.model, self.optimizer, self.gradient_scaler, batches, settings, step
                )
                self._refuse_not_finite(report, step)
                self.step = step
                bar.update()
                statistics.add(report)

                improved, validating = False, self._is_due(settings.validate_every) and bool(self.data.validation)
                if validating or self._is_due(settings.log_every):
                    row = statistics.row(report, step, self.optimizer.param_groups[0]["lr"])
                    if validating:
                        row |= validate(self.objective, self.data, self.accelerator)
                        improved = row[settings.metric] < self.best.value
                        self.best = Best(step, row[settings.metric]) if improved else self.best
                    if recorder is not None:
                        recorder.log(row)
                    bar.set_postfix_str(f"loss {row['total']:.4f}, loader wait {row['loader_wait_share']:.0%}")

                stopping, complete = agree_to_stop(self.accelerator, stop), self.is_complete()
                if recorder is not None and (step % settings.checkpoint_every == 0 or improved or stopping or complete):
                    save_checkpoint(self.checkpoints, self._snapshot(recorder), self.rotation)
                    if uploader is not None:
                        uploader.maybe_upload()
                if stopping and not complete:
                    return stop.name or "a signal to another process"
        return None

    def is_complete(self) -> bool:
        """Return whether all training steps are done, or `patience` validations in a row brought no better metric."""
        settings = self.settings
        waited = settings.patience * settings.validate_every
        converged = settings.patience and self.best.step and self.step - self.best.step >= waited
        return self.step >= settings.num_steps or bool(converged)

    def select_weights(self) -> int:
        """Load the weights that `train.select` names into the predictor; returns their training step."""
        if self.settings.select == "last" or not (self.checkpoints / BEST).exists():
            return self.step
        checkpoint = load_checkpoint((self.checkpoints / BEST).resolve(), run=self.run.name)
        self.trained.load_state(checkpoint.weights)
        return checkpoint.step

    def _is_due(self, every: int) -> bool:
        """Return whether a multiple of `every` training steps, or the last one, is done; 0 means never."""
        return bool(every) and (self.step % every == 0 or self.step == self.settings.num_steps)

    def _refuse_not_finite(self, report: StepReport, step: int) -> None:
        """Stop before anything of a training step is kept that spoiled the weights."""
        reason = check_finite(report, self.gradient_scaler)
        if reason is None:
            return
        windows = self.run / f"failed-step-{step:08d}-process-{self.accelerator.process_index}.json"
        with atomic_file(windows) as temporary:
            temporary.write_text(json.dumps(self.data.describe(report.windows), indent=2) + "\n")
        raise ValueError(
            f"at training step {step} {reason}; nothing was overwritten, {describe_last(self.checkpoints)}, and the "
            f"windows of this training step are named in {windows}. Look at them, lower train.lr, or set train.clip_norm"
        )

    def _open_recorder(self, stack: ExitStack, live_folder: Path) -> Recorder:
        settings = self.settings
        num_rollout_steps = min(settings.auto_steps, settings.window_steps - 1)
        on_gpu = self.accelerator.device.type == "cuda"
        columns = columns_for(num_rollout_steps, self.data.datasets, on_gpu=on_gpu)
        trackers = open_trackers(
            settings.loggers, live_folder=live_folder, run_folder=self.run, settings=asdict(settings)
        )
        recorder = Recorder(self.run / CSV_FILE, columns, trackers, resumed_step=self.step, kept=self.rows)
        stack.callback(recorder.close)
        return recorder

    def _open_uploader(self, stack: ExitStack) -> Uploader:
        uploader = Uploader(self.run, self.settings.upload_to, self.settings.upload_every_min * 60)
        stack.callback(uploader.close)
        return uploader

    def _snapshot(self, recorder: Recorder) -> Checkpoint:
        return Checkpoint(
            self.step,
            self.trained.state(),
            self.optimizer.state_dict(),
            self.gradient_scaler.state_dict(),
            self.num_threads,
            self.best,
            self.model_card,
            self.run.name,
            recorder.text,
        )

    def _print_start(self) -> None:
        settings, processes = self.settings, self.accelerator.num_processes
        for layer in self.trained.new_layers:
            print(f"{layer} is a new layer: the starting weights have it in another width")
        print(
            f"predictor with {count_trainable(self.trained.module):,} trainable weights, {self.data.num_windows} training windows "
            f"of {settings.window_steps} steps; {self.accelerator.device}, {self.num_threads} torch threads"
            + (f", {processes} processes" if processes > 1 else "")
        )
        if self.is_complete():
            print(f"run {self.run.name} is complete; --fresh starts over")
        elif self.step:
            print(
                f"run {self.run.name} resumes at training step {self.step} of {settings.num_steps}; --fresh starts over"
            )
