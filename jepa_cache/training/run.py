"""Which run a training command means, its folder and its locks; what it starts from, and what it leaves in outputs/.

A run's id is a hash of everything that decides it, so that the same command finds its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn

import jepa_cache
from jepa_cache.actions import CAMERA_STATES
from jepa_cache.config.parsing import ConfigError, nearest
from jepa_cache.config.paths import state_folder
from jepa_cache.config.schema import Config, check_schedule
from jepa_cache.data.dataset import TRAIN, CachedDataset
from jepa_cache.data.filters import ranges_path
from jepa_cache.data.recorded import describe_recorded
from jepa_cache.data.scaler import Scaler
from jepa_cache.files import (
    atomic_file,
    file_digest,
    remove_folder,
    remove_stale_temporaries,
    replaced_files,
    try_claim,
)
from jepa_cache.predictor.checkpoints import (
    CAMERAS_FIELD,
    ENCODER_FIELD,
    OFFICIAL_SUFFIXES,
    STEP_HZ_FIELD,
    EncoderMatch,
    build_predictor,
    check_encoder,
    find_card,
    load_start_weights,
    save_state,
)
from jepa_cache.predictor.compressed import CompressedPredictor
from jepa_cache.predictor.heads import head_path
from jepa_cache.predictor.lora import (
    CONFIG_FILE,
    adapter_state,
    add_lora,
    load_adapter_state,
    merged_state,
    save_adapter,
)
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.recipe import canonical_json, fingerprint, recipe_changes
from jepa_cache.training.checkpoint import CSV_FILE, FOLDER, LATEST, WEIGHTS_FILE, download_run
from jepa_cache.training.distributed import check_same, wait_for_first, watched_processes

# A run resumes under other values of these, on another machine too: they move no number.
RESUME_SAFE_SETTINGS = (
    "checkpoint_every",
    "costs",
    "init",  # its content counts, not its name
    "keep_every",
    "keep_last",
    "loggers",
    "num_loader_threads",
    "select",
    "upload_every_min",
    "upload_to",
)
# Whose code decides what a training computes; an edit there is another run, never a silent reuse of old weights.
CODE = ("actions.py", "data", "poses.py", "predictor", "store", "training")
OUTPUT_TAKEN = (
    "another training writes to {}, and the rows of two would mix. Wait for it or stop it; to train two at once use another "
    "checkout (git worktree add), or `dvc exp run --temp` or --queue, which make one"
)
RUN_TAKEN = (
    "run {} is being trained by another process; two would overwrite each other's checkpoints. Wait for it or stop it; to "
    "train twice, change a setting (train.seed) in another checkout"
)


class Run(NamedTuple):
    """One run: what decides it, and where it is."""

    config: Config  # with `num_steps` resolved
    dataset: CachedDataset
    scaler: Scaler
    init: Path | None  # file whose weights are the start
    description: dict[str, Any]
    folder: Path  # of checkpoints and CSV; its name is the run's id
    output: Path  # folder that the weights are written to


@contextmanager
def open_run(
    config: Config,
    dataset: CachedDataset,
    scaler: Scaler,
    accelerator: Accelerator,
    output: Path,
    *,
    base: Path,
    fresh: bool,
) -> Iterator[Run]:
    """Find the run that the settings mean; the first process holds it, with its folder of results, for the block.

    Raises:
        ValueError: The initial weights do not fit or would be overwritten, another process holds the run or the output,
            or another process of this training has died or would train another run.
    """
    init = resolve_init(config.train.init, base)
    description = describe_run(config, dataset, scaler, init, base, num_processes=accelerator.num_processes)
    if init is not None:
        description["origin"] = _check_init(init, config, dataset, output)._asdict()
    run = Run(config, dataset, scaler, init, description, run_folder(description), output)
    with ExitStack() as stack:
        stack.enter_context(watched_processes(accelerator, run.folder))
        check_same(accelerator, description)
        if accelerator.is_main_process:
            stack.enter_context(held(output, OUTPUT_TAKEN.format(output.parent)))
            stack.enter_context(held(run.folder, RUN_TAKEN.format(run.folder.name)))
            _prepare_folder(run, fresh=fresh)
        wait_for_first(accelerator)
        yield run


@contextmanager
def held(folder: Path, taken: str) -> Iterator[None]:
    """Keep other processes out of a folder for the block, by a lock beside it; `taken` is what the others are told."""
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        claim = try_claim(lock)
    except OSError as error:
        raise ValueError(
            f"{lock.parent} cannot be written or locked ({error}); it must be on a file system with locks. $JEPA_RUNS_HOME sets that of runs"
        ) from error
    if claim is None:
        raise ValueError(f"{taken} (it holds {lock})")
    try:
        yield
    finally:
        claim.release()


def _prepare_folder(run: Run, *, fresh: bool) -> None:
    """Make the run's folder; forget an earlier one if `fresh`, or fetch one that was uploaded."""
    remove_stale_temporaries(run.folder.parent)
    if fresh:
        remove_folder(run.folder)
    known = run.folder.exists()
    (run.folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with atomic_file(run.folder / "description.json") as temporary:
        temporary.write_bytes(canonical_json(run.description))
    remote = run.config.train.upload_to
    if remote is not None and not fresh and not known and (came_from := download_run(run.folder, remote)) is not None:
        print(f"fetched the run's checkpoint from {came_from}")
    if run.init is not None:
        # Fine-tuning on other actions and states is what starting weights are for, so it is said and not refused.
        here, there = json.loads(canonical_json(describe_weights(run))), find_card(run.init) or {}
        names = [name for name in ("action_space", "scaler") if name in there]
        names += [CAMERAS_FIELD] if there else []
        for change in recipe_changes(*({name: of.get(name) for name in names} for of in (there, here))):
            print(f"the starting weights were trained with other inputs: {change}")


def _check_init(init: Path, config: Config, dataset: CachedDataset, output: Path) -> EncoderMatch:
    """Refuse starting weights of another encoder, unless that is allowed, and those that this training overwrites."""
    if init.resolve() == (output / WEIGHTS_FILE).resolve():
        raise ValueError(
            f"train.init names {init}, which this training overwrites at its end: the same command would start from other weights "
            "each time. Copy the file elsewhere and name the copy, or name the run that made it by its id (`run` in the file's card; "
            "its checkpoints stay)"
        )
    weights = dataset.manifest.recipe["encoder"]["weights"]
    return check_encoder(init, weights, digest=DigestTable().digest, allow_other=config.train.allow_other_encoder)


def describe_run(
    config: Config, dataset: CachedDataset, scaler: Scaler, init: Path | None, base: Path, *, num_processes: int = 1
) -> dict[str, Any]:
    """Collect everything that decides a run, as plain JSON; of starting weights and kept ranges the content, not the name."""
    ranges = ranges_path(config.filter, base)
    # Under num_epochs the training steps follow from the windows; a linear predictor has one, whatever is set.
    counted = config.train.num_epochs or config.predictor.kind == "linear"
    passive = (*RESUME_SAFE_SETTINGS, "num_steps") if counted else RESUME_SAFE_SETTINGS
    return {
        "code": code_digest(),
        "init": DigestTable().digest(init) if init is not None else None,
        "manifest": dataset.manifest.digest,
        "num_processes": num_processes,
        "predictor": asdict(config.predictor),
        "scaler": scaler.to_json(),
        "filter": {**asdict(config.filter), "keep_ranges": file_digest(ranges) if ranges is not None else None},
        "split": dataset.describe_split(config.split),
        "train": {name: value for name, value in asdict(config.train).items() if name not in passive},
    }


def run_folder(description: dict[str, Any]) -> Path:
    """Return the folder of a run's checkpoints and log: in $JEPA_RUNS_HOME, else in the state folder of the machine."""
    home = os.environ.get("JEPA_RUNS_HOME")
    return (Path(home).expanduser() if home else state_folder() / "runs") / fingerprint(description)


def resolve_init(reference: str | None, base: Path) -> Path | None:
    """Find the weights file that `train.init` names: a file, a folder that holds predictor.safetensors, or a run's id."""
    if reference is None:
        return None
    path = (base / Path(reference).expanduser()).resolve()
    run = run_folder({}).parent / reference
    candidates = [path, path / WEIGHTS_FILE, path / "run" / WEIGHTS_FILE]
    candidates += [folder / FOLDER / LATEST / WEIGHTS_FILE for folder in (path, run)]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".safetensors", *OFFICIAL_SUFFIXES):
            return candidate
    tried = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    if (path / CONFIG_FILE).is_file():
        tried += f". It is a LoRA adapter, which is part of weights: take {path.parent / WEIGHTS_FILE}, in which it is merged"
    raise ValueError(f"train.init={reference!r} names no weights; tried {tried}")


def code_digest() -> str:
    """Hash of the source files that decide a training."""
    package = Path(jepa_cache.__file__).parent
    digest = hashlib.sha256()
    for name in CODE:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


class TrainableModel:
    """The predictor as it is trained: in full, frozen under LoRA adapters, or its core alone, on latents.

    Attributes:
        predictor: As it will be used.
        module: Called like an `ACPredictor`; what the loss sees.
        new_layers: Conditioning encoders that the starting weights did not have in this width.
    """

    def __init__(self, run: Run) -> None:
        """Build it with its starting weights, those of the run's `init` if there is one."""
        settings, init = run.config.train, run.init
        self.predictor = predictor = build_predictor(predictor_arguments(run.config, run.dataset))
        self.new_layers: tuple[str, ...] = load_start_weights(predictor, init) if init is not None else ()
        self.compressed = isinstance(predictor, CompressedPredictor)
        self.module: nn.Module = predictor.core if self.compressed else predictor
        self.lora = settings.lora_rank > 0
        if self.lora and init is None:
            raise ConfigError(
                f"train.lora_rank is {settings.lora_rank}, but train.init names no weights: adapters change given weights a "
                "little and teach fresh ones nothing. Set train.init, or train.lora_rank=0 to train in full"
            )
        if self.lora:
            self.module = add_lora(
                predictor,
                rank=settings.lora_rank,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
                rslora=settings.lora_rslora,
                full=self.new_layers,
            )

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: all weights, or the adapters and new layers alone, as they are trained, not copied."""
        return adapter_state(self.module) if self.lora else self.predictor.state_dict()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        if self.lora:
            load_adapter_state(self.module, state)
        else:
            self.predictor.load_state_dict(state)


def predictor_arguments(config: Config, dataset: CachedDataset) -> dict[str, Any]:
    """Return what `build_predictor` makes a predictor of the preset's kind and size from that fits the data set.

    Raises:
        ValueError: The preset names a column that the action space has not, or wants the camera's pose of one without.
    """
    preset = {
        name: value for name, value in asdict(config.predictor).items() if name not in ("name", "ridge", "columns")
    }
    if (chosen := getattr(config.predictor, "columns", None)) is not None:
        known = [[column.name for column in columns] for columns in (dataset.space.actions, dataset.space.states)]
        if unknown := [name for name in chosen if name not in known[0] + known[1]]:
            hint = nearest(unknown[0], known[0] + known[1])
            raise ValueError(
                f"columns of predictor {config.predictor.name!r}: action space {dataset.space.name} has none called {unknown[0]!r}{hint}"
            )
        preset["columns"] = [[names.index(name) for name in chosen if name in names] for names in known]
    if preset.get("use_extrinsics") and dataset.space.states[-1] != CAMERA_STATES[-1]:
        raise ValueError(
            f"predictor {config.predictor.name!r} has use_extrinsics, and states of action space {dataset.space.name} hold no pose of the "
            "camera; set encode.action_space=pose7_extrinsics and run `python stages/encode.py` with it (no encoder runs; recordings must hold "
            "the camera's pose), or use_extrinsics: false in the preset"
        )
    return {
        **preset,
        "embed_dim": dataset.manifest.width,
        "action_dim": len(dataset.space.actions),
        "state_dim": len(dataset.space.states),
        "grid": list(dataset.manifest.grid),
    }


def resolve_epochs(config: Config, num_windows: int, num_processes: int) -> Config:
    """Return the settings with `num_epochs` turned into training steps, rounded up; unchanged where it is 0.

    A linear predictor has one training step, its fit.
    """
    train = config.train
    if config.predictor.kind == "linear":
        return replace(config, train=replace(train, num_steps=1))
    if not train.num_epochs:
        return config
    per_step = train.batch_size * train.grad_accumulation * num_processes
    num_steps = math.ceil(train.num_epochs * num_windows / per_step)
    print(f"{train.num_epochs:g} epochs of {num_windows} windows are {num_steps} training steps of {per_step}")
    train = replace(train, num_steps=num_steps)
    check_schedule(train)
    return replace(config, train=train)


def describe_weights(run: Run) -> dict[str, Any]:
    """Describe the weights to a training that starts from them."""
    return {
        "action_space": run.dataset.space.name,
        "scaler": run.scaler.to_json(),
        ENCODER_FIELD: run.dataset.manifest.recipe["encoder"]["weights"],
        **({CAMERAS_FIELD: list(run.dataset.cameras)} if run.dataset.cameras else {}),
    }


def write_outputs(model: TrainableModel, step: int, run: Run, heads: Mapping[str, Path]) -> Path:
    """Write the selected weights, with what evaluation must know in their model card, the heads of costs, and a copy of train.csv.

    Under LoRA the adapter is written too; an earlier one is removed, and so are heads of earlier runs.
    """
    manifest, settings = run.dataset.manifest, run.config.train
    train_segments = run.dataset.segments_of(TRAIN, run.config.split, run.config.filter)
    model_card = {
        "run": run.folder.name,
        "step": step,
        "description": run.description,
        "architecture": predictor_arguments(run.config, run.dataset),
        **describe_weights(run),
        "recorded": describe_recorded(run.dataset, train_segments).to_json(),
        STEP_HZ_FIELD: list(run.dataset.step_rates(train_segments)),
        "window_steps": settings.window_steps,
        "normalize_reps": settings.normalize_reps,
        "tokens_fingerprint": manifest.fingerprint,
        "tokens_recipe": manifest.recipe,  # of the first part; what decides the tokens of given frames is the same in all
        "manifest": manifest.digest,
        "encoder": manifest.encoder,
        "encoder_trained": manifest.encoder_trained,
        "mode": manifest.mode,
    }
    with replaced_files(run.output, WEIGHTS_FILE, ["adapter", "predictor-*.safetensors"]) as folder:
        for name, path in heads.items():
            shutil.copyfile(path, head_path(folder / WEIGHTS_FILE, name))
        state = merged_state(model.module) if model.lora else model.predictor.state_dict()
        save_state(state, folder / WEIGHTS_FILE, model_card)
        if model.lora:
            save_adapter(model.module, folder / "adapter", model_card)
        shutil.copyfile(run.folder / CSV_FILE, folder / CSV_FILE)
    return run.output / WEIGHTS_FILE
