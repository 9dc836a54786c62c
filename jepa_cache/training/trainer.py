"""Stage two: the loop that trains the predictor from cached tokens. Read this file first.

batches      training windows and held-out windows, on the device
latents      the same, compressed once, for compressed predictors; ridge: the fit of the linear one
heads        small heads by which a plan measures how far its goal is
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from jepa_cache.config.paths import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import TRAIN, CachedDataset
from jepa_cache.data.scaler import Scaler, check_scaler
from jepa_cache.devices import describe_machine, name_device, repeatable, warn_of_bfloat16
from jepa_cache.files import atomic_file
from jepa_cache.predictor.compressed import LatentRidge
from jepa_cache.predictor.lora import count_trainable
from jepa_cache.store.recipe import recipe_changes
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.checkpoint import (
    BEST,
    CSV_FILE,
    FOLDER,
    BackgroundWriter,
    Best,
    Checkpoint,
    Uploader,
    describe_last,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    tidy,
)
from jepa_cache.training.distributed import agree, check_same, end_processes, start_processes
from jepa_cache.training.heads import fit_heads
from jepa_cache.training.logging import Recorder, columns_for, open_trackers
from jepa_cache.training.losses import Objective
from jepa_cache.training.optim import build_optimizer, rates_at, set_rates
from jepa_cache.training.ridge import Choice, choose, fit_step
from jepa_cache.training.run import Run, TrainableModel, describe_weights, open_run, resolve_epochs, write_outputs
from jepa_cache.training.signals import stop_request
from jepa_cache.training.step import Failure, FiniteChecks, StepStatistics, train_step, validate

FEW_EPISODES = 3


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

    `output` is the folder for the weights and the CSV, with DVCLive's files beside it; a relative `train.init` is meant
    from `base`; `fresh` forgets earlier checkpoints of this run.

    Raises:
        ValueError: When no window fits, the loss stops being finite, or the run cannot be opened (see `open_run`).
    """
    check_scaler(scaler, dataset, dataset.segments_of(TRAIN, config.split, config.filter), config.scaler)
    accelerator = start_processes(config.train)
    if config.predictor.kind != "transformer" and accelerator.num_processes > 1:
        raise ValueError(
            f"predictor {config.predictor.name!r} is trained by one process, in seconds to minutes; {accelerator.num_processes} were started. "
            "Start it without torchrun or accelerate launch"
        )
    data = TrainingData(config, dataset, scaler, accelerator)
    config = resolve_epochs(config, data.num_windows, accelerator.num_processes)
    settings = config.train
    with (
        repeatable(accelerator.device, settings.deterministic),
        open_run(config, dataset, scaler, accelerator, output, base=base, fresh=fresh) as run,
    ):
        state = TrainingState(run, accelerator)
        choice = _compress(state, data) if state.trained.compressed and not state.is_complete() else None
        first_step, stopped_by, weights = state.step, None, None
        with (
            stop_request() as stop,
            closing(data.batches(state.step, settings.num_steps)) as batches,
            closing(_Writer(state, data)) as writer,
        ):
            fits = isinstance(state.trained.module, LatentRidge)
            statistics = StepStatistics(data, settings, state.step, accelerator)
            checks = FiniteChecks(state.gradient_scaler)
            while not state.is_complete():
                step = state.step + 1
                set_rates(state.optimizer, *rates_at(step, settings))
                if fits:
                    writer.settle()
                    report = fit_step(state.trained.module, state.objective, data, choice)
                else:
                    report = train_step(
                        accelerator, state.model, state.optimizer, state.gradient_scaler, batches, settings, step
                    )
                state.step = step
                checks.add(step, report)
                statistics.add(report)

                row, improved = None, False
                validating = bool(data.validation) and state.is_due(settings.validate_every)
                logging, saving = state.is_due(settings.log_every), step % settings.checkpoint_every == 0
                stopping, failed = agree(accelerator, stop.name is not None, checks.failure is not None)
                if validating or logging or saving or stopping:  # Nothing is kept before all of it was checked.
                    checks.read()
                    (failed,) = agree(accelerator, checks.failure is not None)
                else:
                    checks.read(late=1)
                if failed:
                    raise ValueError(_describe_failure(checks.failure, state, data, writer))
                if validating or logging:
                    row = statistics.row(report, step, state.optimizer.param_groups[0]["lr"])
                    row |= {"epoch": 1.0, "lr": 0.0} if fits else {}
                if validating:
                    row |= validate(state.objective, data, accelerator)
                    improved = state.note(row[settings.metric])
                writer.log(row)

                complete = state.is_complete()
                if saving or improved or stopping or complete:
                    writer.save()
                if stopping and not complete:
                    stopped_by = stop.name or "a signal to another process"
                    break
        if accelerator.is_main_process and stopped_by is None:
            weights = write_outputs(state.trained, state.select_weights(), run, fit_heads(run, accelerator.device))
        end_processes(accelerator)
    return TrainResult(weights, run.folder, state.step, state.step - first_step, settings.num_steps, stopped_by)


def _compress(state: TrainingState, data: TrainingData) -> Choice | None:
    """Turn the data into latents, and say what a new predictor's kept share is; return what a linear one is fitted with."""
    predictor, core = state.trained.predictor, state.trained.module
    new, apart = state.step == 0 and state.run.init is None, None
    preset, choice = state.run.config.predictor, None
    chooses = isinstance(core, LatentRidge) and preset.ridge is None
    if isinstance(core, LatentRidge) and not chooses:
        choice = Choice(preset.ridge, words=f"ridge {preset.ridge:g}")
    if new:
        apart = data.compress_half(predictor, read=chooses)
        said = f"kept share {float(predictor.kept_share):.2g}"
    else:
        data.compress(predictor, fit=False)
    if chooses:
        choice = choose(core, data, apart, state.run.dataset.space if preset.columns is None else None)
    if new:
        num_all = len(set(data.episodes_of(np.arange(data.num_windows))))
        how = f"{len(apart)} of {num_all} training episodes, to which the components were not fitted for this"
        if len(apart) == num_all:
            how = "the training episodes that the components are fitted to, for want of others: expect less of it on new ones"
        elif len(apart) < FEW_EPISODES:
            how += "; with so few it may be another one on new ones"
        print(f"{said}{f', {choice.words}' if choice else ''}: chosen on {how}")
        data.compress(predictor, fit=True)
    return choice


class TrainingState:
    """The predictor and its optimiser, and how far they are: as at the run's newest checkpoint, or at its start."""

    def __init__(self, run: Run, accelerator: Accelerator) -> None:
        """Build everything in the order in which random numbers are drawn, then load the checkpoint."""
        self.run, self.accelerator, self.settings = run, accelerator, run.config.train
        settings, self.checkpoints = self.settings, run.folder / FOLDER
        checkpoint = load_latest(self.checkpoints, run=run.folder.name)
        if checkpoint and accelerator.is_main_process:
            tidy(self.checkpoints, settings.keep_last, settings.keep_every)
        self.num_threads = settings.num_threads or (checkpoint.num_threads if checkpoint else default_num_threads())
        torch.set_num_threads(self.num_threads)
        torch.manual_seed(settings.seed)
        self.trained = TrainableModel(run)
        if checkpoint:
            self.trained.load_state(checkpoint.weights)
        self.trained.predictor.to(accelerator.device)  # whole: the objective of a compressed one holds the core alone
        # Latents are of normed tokens; of their own they have no norm.
        norm = settings.normalize_reps and not self.trained.compressed
        self.objective = Objective(self.trained.module, replace(settings, normalize_reps=norm), accelerator.device)
        if settings.compile:
            import torch._inductor.config as inductor

            # Else it measures which kernels and paddings are quicker, and another process may take others, which round otherwise.
            # Versions without this switch do so for torch.use_deterministic_algorithms alone.
            if hasattr(inductor, "deterministic"):
                inductor.deterministic = torch.are_deterministic_algorithms_enabled()
            # Blocks are compiled one by one already. DDP would split their graphs once more, at its buckets of 25 MB, which older torch
            # refuses where they hold an autograd.Function or FlexAttention (pytorch issues 104674, 137481).
            torch._dynamo.config.optimize_ddp = False
            flex = {"flex": True} if settings.compile == "flex" else {}
            (self.trained.module if self.trained.compressed else self.trained.predictor).compile(**flex)
        self.model = accelerator.prepare_model(self.objective)
        self.optimizer = build_optimizer(
            self.trained.module, lr=settings.lr, weight_decay=settings.weight_decay, kind=settings.optimizer
        )
        self.gradient_scaler = torch.amp.GradScaler(accelerator.device.type, enabled=settings.precision == "float16")
        self.step, self.best, self.rows, self.moved = 0, Best(), None, []
        if checkpoint:
            here = describe_machine(accelerator.device)
            self.moved = recipe_changes(checkpoint.machine, here) if checkpoint.machine else []
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.gradient_scaler.load_state_dict(checkpoint.gradient_scaler)
            self.step, self.best, self.rows = checkpoint.step, checkpoint.best, checkpoint.rows
        check_same(accelerator, {"training step": self.step})

    def is_complete(self) -> bool:
        """Return whether all training steps are done, or `patience` validations in a row brought no better metric."""
        settings = self.settings
        waited = settings.patience * settings.validate_every
        converged = settings.patience and self.best.step and self.step - self.best.step >= waited
        return self.step >= settings.num_steps or bool(converged)

    def is_due(self, every: int) -> bool:
        """Return whether a multiple of `every` training steps, or the last one, is done; 0 means never."""
        return bool(every) and (self.step % every == 0 or self.step == self.settings.num_steps)

    def note(self, metric: float) -> bool:
        """Remember a validation if it is the best so far, and say whether it is."""
        improved = metric < self.best.value
        self.best = Best(self.step, metric) if improved else self.best
        return improved

    def select_weights(self) -> int:
        """Load the weights that `train.select` names into the predictor; returns their training step."""
        if self.settings.select == "last" or not (self.checkpoints / BEST).exists():
            return self.step
        checkpoint = load_checkpoint((self.checkpoints / BEST).resolve(), run=self.run.folder.name)
        self.trained.load_state(checkpoint.weights)
        return checkpoint.step


class _Writer:
    """What a training writes: rows of the record, checkpoints, uploads, and a progress bar; by the first process alone."""

    def __init__(self, state: TrainingState, data: TrainingData) -> None:
        self._state, settings, run = state, state.settings, state.run
        self._opened = ExitStack()
        self._silent = not state.accelerator.is_main_process
        if self._silent:
            return
        _print_start(state, data)
        num_rollout_steps = min(settings.auto_steps, settings.window_steps - 1)
        columns = columns_for(num_rollout_steps, data.datasets, on_gpu=state.accelerator.device.type == "cuda")
        live = run.output.parent / "live"
        trackers = open_trackers(settings.loggers, live_folder=live, run_folder=run.folder, settings=asdict(settings))
        self._recorder = self._opened.enter_context(
            closing(Recorder(run.folder / CSV_FILE, columns, trackers, state.rows))
        )
        self._uploader = None
        if settings.upload_to is not None:
            uploader = Uploader(run.folder, settings.upload_to, settings.upload_every_min * 60)
            self._uploader = self._opened.enter_context(closing(uploader))
        self._checkpoints = self._opened.enter_context(closing(BackgroundWriter(self._publish)))
        hook = state.optimizer.register_step_pre_hook(lambda *_: self.settle())
        self._opened.callback(hook.remove)
        if state.accelerator.device.type == "cuda":
            self._first_step = state.optimizer.register_step_post_hook(lambda *_: self._make_room())
            self._opened.callback(self._first_step.remove)
        self._bar = self._opened.enter_context(
            tqdm(total=settings.num_steps, initial=state.step, desc="training", unit="step", dynamic_ncols=True)
        )

    def close(self) -> None:
        """Finish the last checkpoint, upload the rest, and let the trackers write what is pending."""
        self._opened.close()

    def log(self, row: dict[str, float] | None) -> None:
        """Move the bar on, and record the row of a training step that has one; raises what went wrong with a checkpoint."""
        if self._silent:
            return
        if (running := self._checkpoints.running) is not None and running.done():
            self._checkpoints.join()
        self._bar.update()
        if row is not None:
            self._recorder.log(row)
            self._bar.set_postfix_str(f"loss {row['total']:.4f}, loader wait {row['loader_wait_share']:.0%}")

    def save(self) -> None:
        """Copy the present state, and write it in the background as a checkpoint."""
        if self._silent:
            return
        state = self._state
        checkpoint = Checkpoint(
            state.step,
            state.trained.state(),
            state.optimizer.state_dict(),
            state.gradient_scaler.state_dict(),
            state.num_threads,
            state.best,
            describe_weights(state.run),
            state.run.folder.name,
            self._recorder.text,
            describe_machine(state.accelerator.device),
        )
        self._checkpoints.save(checkpoint)

    def _make_room(self) -> None:
        """For the first checkpoint, once the optimiser's first step has made all that will be copied."""
        self._first_step.remove()
        self._checkpoints.make_room(self._state.trained.state(), self._state.optimizer.state_dict())

    def settle(self) -> None:
        """Wait until weights and moments may be changed again; the optimiser's steps do by themselves."""
        if not self._silent and self._checkpoints.copying is not None:  # its file is entered in no other step
            self._checkpoints.settle()

    def join(self) -> None:
        """Wait until the last checkpoint is written."""
        if not self._silent:
            self._checkpoints.join()

    def _publish(self, checkpoint: Checkpoint) -> None:
        settings = self._state.settings
        save_checkpoint(
            self._state.checkpoints, checkpoint, keep_last=settings.keep_last, keep_every=settings.keep_every
        )
        if self._uploader is not None:
            self._uploader.maybe_upload()


def _describe_failure(failure: Failure | None, state: TrainingState, data: TrainingData, writer: _Writer) -> str:
    """Name the windows of a training step that spoiled the weights, in a file, and say all that is known of it."""
    writer.join()
    kept = f"nothing was overwritten, {describe_last(state.checkpoints)}"
    if failure is None:
        return f"a training step of another process was not finite, see its message; {kept}"
    windows = state.run.folder / f"failed-step-{failure.step:08d}-process-{state.accelerator.process_index}.json"
    with atomic_file(windows) as temporary:
        temporary.write_text(json.dumps(data.describe(failure.windows), indent=2) + "\n")
    return (
        f"at training step {failure.step} {failure.reason}; {kept}, and the windows of this training step are named in {windows}. Look at "
        "them, lower train.lr, or set train.clip_norm"
    )


def _print_start(state: TrainingState, data: TrainingData) -> None:
    settings, processes = state.settings, state.accelerator.num_processes
    device = state.accelerator.device
    warn_of_bfloat16("train.precision", settings.precision, device.type)
    gpu = f" ({name_device(device.type)})" if device.type == "cuda" else ""
    for layer in state.trained.new_layers:
        print(f"{layer} is a new layer: the starting weights have it in another width")
    print(
        f"predictor with {count_trainable(state.trained.module):,} trainable weights, {data.num_windows} training windows "
        f"of {settings.window_steps} steps; {device}{gpu}, {state.num_threads} torch threads"
        + (f", {processes} processes" if processes > 1 else "")
    )
    if state.is_complete():
        print(f"run {state.run.folder.name} is complete; --fresh starts over")
    elif state.step:
        elsewhere = f" on another machine ({'; '.join(state.moved)}), so not bit for bit" if state.moved else ""
        print(
            f"run {state.run.folder.name} resumes at training step {state.step} of {settings.num_steps}{elsewhere}; --fresh starts over"
        )
