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
from jepa_cache.config.machine import state_folder
from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import Config, check_schedule
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.filters import ranges_path
from jepa_cache.data.scaler import Scaler
from jepa_cache.files import Claim, atomic_file, lock_file, replaced_files
from jepa_cache.predictor.checkpoints import (
    ENCODER_FIELD,
    OFFICIAL_SUFFIXES,
    EncoderMatch,
    check_encoder,
    find_card,
    load_start_weights,
    save_state,
)
from jepa_cache.predictor.lora import (
    LoraSettings,
    adapter_state,
    add_lora,
    load_adapter_state,
    merged_state,
    save_adapter,
)
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.recipe import canonical_json, file_digest, fingerprint, recipe_changes
from jepa_cache.training.checkpoint import CSV_FILE, FOLDER, LATEST, WEIGHTS_FILE, download_run, forget_checkpoints
from jepa_cache.training.distributed import check_same_run, watched_processes

# A run resumes under other values of these, on another machine too: they move no number.
RESUME_SAFE_SETTINGS = (
    "checkpoint_every",
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
CODE = ("actions.py", "data", "idle.py", "poses.py", "predictor", "store", "training")


class Run(NamedTuple):
    """One run: what the same command finds again."""

    folder: Path  # of checkpoints and CSV; its name is the run's id
    description: dict[str, Any]
    init: Path | None  # file whose weights are the start


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
    """Find the run that the settings mean and hold it, with its folder of results, for the block.

    Args:
        config: Resolved settings, `num_steps` included.
        dataset: The cached features.
        scaler: Fitted on the training episodes.
        accelerator: The processes; the first one holds the locks.
        output: Folder that the weights are written to.
        base: Folder that a relative `train.init` is meant from.
        fresh: Forget earlier checkpoints of this run.

    Raises:
        ValueError: The initial weights do not fit or would be overwritten, another process holds the run or the output,
            or another process of this training has died or would train another run.
    """
    init = resolve_init(config.train.init, base)
    if init is not None:
        check_init_stays(init, output)
    ranges = ranges_path(config.filter, base)
    description = describe_run(config, dataset.manifest, scaler, init, ranges, num_processes=accelerator.num_processes)
    origin = check_start(config, dataset, init)
    if origin is not None:
        description["origin"] = origin._asdict()
    run = Run(run_folder(description), description, init)
    with ExitStack() as stack:
        stack.enter_context(watched_processes(accelerator, run.folder))
        check_same_run(accelerator, description)
        if accelerator.is_main_process:
            stack.enter_context(held_output(output))
            stack.enter_context(held_run(run.folder))
            prepare_folder(run.folder, description, upload_to=config.train.upload_to, fresh=fresh)
            for change in compare_start(init, dataset, scaler) if init is not None else ():
                print(f"the starting weights were trained with other inputs: {change}")
        accelerator.wait_for_everyone()
        yield run


def describe_run(
    config: Config,
    manifest: Manifest,
    scaler: Scaler,
    init: Path | None,
    ranges: Path | None = None,
    *,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Collect everything that decides a run, as plain JSON.

    Args:
        config: Resolved settings; predictor, train and split count.
        manifest: The training set.
        scaler: Fitted on it.
        init: File whose weights are the start.
        ranges: File that `filter.keep_ranges` names; as with `init` its content counts, not its name.
        num_processes: That train together; their number decides the global batch.
    """
    # Under num_epochs the training steps follow from the windows.
    passive = (*RESUME_SAFE_SETTINGS, "num_steps") if config.train.num_epochs else RESUME_SAFE_SETTINGS
    return {
        "code": code_digest(),
        "init": DigestTable().digest(init) if init is not None else None,
        "manifest": manifest.digest,
        "num_processes": num_processes,
        "predictor": asdict(config.predictor),
        "scaler": scaler.to_json(),
        "filter": {**asdict(config.filter), "keep_ranges": file_digest(ranges) if ranges is not None else None},
        "split": asdict(config.split),
        "train": {name: value for name, value in asdict(config.train).items() if name not in passive},
    }


def run_folder(description: dict[str, Any]) -> Path:
    """Return the folder of a run's checkpoints and log: in $JEPA_RUNS_HOME, else in the state folder of the machine."""
    home = os.environ.get("JEPA_RUNS_HOME")
    return (Path(home).expanduser() if home else state_folder() / "runs") / fingerprint(description)


def resolve_init(reference: str | None, base: Path) -> Path | None:
    """Find the weights file that `train.init` names: a file, a folder that holds predictor.safetensors, or a run's id.

    Raises:
        ValueError: When there is no such file; says what was tried.
    """
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
    raise ValueError(f"train.init={reference!r} names no weights; tried {tried}")


def check_init_stays(init: Path, output: Path) -> None:
    """Raise a ValueError where the training would overwrite at its end, in the folder `output`, what it starts from."""
    if init.resolve() == (output / WEIGHTS_FILE).resolve():
        raise ValueError(
            f"train.init names {init}, which this training overwrites at its end: the same command would start from other weights "
            "each time. Copy the file elsewhere and name the copy, or name the run that made it by its id (`run` in the file's card; "
            "its checkpoints stay)"
        )


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """Keep other processes out of a run for the block, by a lock beside its folder that dies with its process."""
    lock = run.with_name(f"{run.name}.lock")
    with _held(
        lock,
        f"run {run.name} is being trained by another process, which holds {lock}; two would overwrite each other's checkpoints. Wait for "
        "it or stop it; to train twice, change a setting (train.seed) in another checkout",
        f"the folder of all runs, {run.parent}, cannot be written or locked ({{}}); set $JEPA_RUNS_HOME to another",
    ):
        yield


@contextmanager
def held_output(output: Path) -> Iterator[None]:
    """Keep other trainings out of the folder of results for the block: rows of two would mix in its `live` folder."""
    lock = output.with_name(f"{output.name}.lock")
    with _held(
        lock,
        f"another training writes to {output.parent}, and holds {lock}; the rows of two would mix. Wait for it or stop it; to train two at "
        "once use another checkout (git worktree add), or `dvc exp run --temp` or --queue, which make one",
        f"{output.parent} cannot be written or locked ({{}}); it must be a folder of a file system with locks",
    ):
        yield


@contextmanager
def _held(lock: Path, taken: str, unusable: str) -> Iterator[None]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock_file(lock, create=True)
    except OSError as error:
        raise ValueError(unusable.format(error)) from error
    if descriptor is None:
        raise ValueError(taken)
    try:
        yield
    finally:
        Claim(lock, descriptor).release()


def prepare_folder(run: Path, description: dict[str, Any], *, upload_to: str | None, fresh: bool) -> None:
    """Make the run's folder; forget an earlier one if `fresh`, or fetch one that was uploaded."""
    if fresh and run.exists():
        forget_checkpoints(run / FOLDER)
        shutil.rmtree(run)
    known = run.exists()
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    _check_description(run / "description.json", description)
    if upload_to is not None and not fresh and not known:
        came_from = download_run(run, upload_to)
        if came_from is not None:
            print(f"fetched the run's checkpoint from {came_from}")


def _check_description(path: Path, description: dict[str, Any]) -> None:
    """Write what decides the run beside its checkpoints; refuse a folder of another run under this run's id."""
    if path.is_file():
        changes = recipe_changes(json.loads(path.read_text()), json.loads(canonical_json(description)))
        if changes:
            raise ValueError(
                f"{path.parent} holds checkpoints of another training ({'; '.join(changes)}); move that folder away, or start over "
                "with --fresh"
            )
        return
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(description))


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
    """The predictor as it is trained: in full, or frozen under LoRA adapters.

    Attributes:
        module: Called like an `ACPredictor`; what the loss sees.
        new_layers: Conditioning encoders that the starting weights did not have in this width.
    """

    def __init__(self, config: Config, dataset: CachedDataset, init: Path | None) -> None:
        """Build it with its starting weights, those of the file `init` if there is one."""
        settings = config.train
        predictor = ACPredictor(**predictor_arguments(config, dataset))
        self.new_layers: tuple[str, ...] = load_start_weights(predictor, init) if init is not None else ()
        self.lora: LoraSettings | None = None
        self.module: nn.Module = predictor
        if settings.lora_rank:
            if init is None:
                raise ConfigError(
                    f"train.lora_rank is {settings.lora_rank}, but train.init names no weights: adapters change given weights a "
                    "little and teach fresh ones nothing. Set train.init, or train.lora_rank=0 to train in full"
                )
            self.lora = LoraSettings(
                settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_rslora
            )
            self.module = add_lora(predictor, self.lora, self.new_layers)

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: all weights, or the adapters and new layers alone; on the CPU."""
        state = adapter_state(self.module) if self.lora else self.module.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned."""
        if self.lora:
            load_adapter_state(self.module, state)
        else:
            self.module.load_state_dict(state)

    def predictor_state(self) -> dict[str, Tensor]:
        """Return the weights of a plain predictor that computes the same; adapters are merged in float32."""
        return merged_state(self.module) if self.lora else self.module.state_dict()


def check_start(config: Config, dataset: CachedDataset, init: Path | None) -> EncoderMatch | None:
    """Refuse starting weights of another encoder unless `train.allow_other_encoder`; None without such weights."""
    if init is None:
        return None
    weights = dataset.manifest.recipe["encoder"]["weights"]
    return check_encoder(init, weights, digest=DigestTable().digest, allow_other=config.train.allow_other_encoder)


def compare_start(init: Path, dataset: CachedDataset, scaler: Scaler) -> list[str]:
    """List how actions and states of the starting weights differ from this training's; empty where unknown or equal.

    Fine-tuning on another action space is what starting weights are for, so this is printed, not refused.
    """
    model_card = find_card(init) or {}
    here = json.loads(canonical_json({"action_space": dataset.space.name, "scaler": scaler.to_json()}))
    known = {name: model_card[name] for name in here if name in model_card}
    return recipe_changes(known, {name: here[name] for name in known})


def predictor_arguments(config: Config, dataset: CachedDataset) -> dict[str, Any]:
    """Return the arguments of an `ACPredictor` of the preset's size that fits the data set."""
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
        "residual": preset.residual,
    }


def resolve_epochs(config: Config, num_windows: int, num_processes: int) -> Config:
    """Return the settings with `num_epochs` turned into training steps, rounded up; unchanged where it is 0.

    Raises:
        ConfigError: Warm-up and decay do not fit into them.
    """
    train = config.train
    if not train.num_epochs:
        return config
    per_step = train.batch_size * train.grad_accumulation * num_processes
    num_steps = math.ceil(train.num_epochs * num_windows / per_step)
    print(f"{train.num_epochs:g} epochs of {num_windows} windows are {num_steps} training steps of {per_step}")
    train = replace(train, num_steps=num_steps)
    check_schedule(train)
    return replace(config, train=train)


def describe_weights(dataset: CachedDataset, scaler: Scaler) -> dict[str, Any]:
    """Describe the weights to a training that starts from them."""
    return {
        "action_space": dataset.space.name,
        "scaler": scaler.to_json(),
        ENCODER_FIELD: dataset.manifest.recipe["encoder"]["weights"],
    }


def write_outputs(
    model: TrainableModel,
    step: int,
    run: Run,
    output: Path,
    config: Config,
    dataset: CachedDataset,
    scaler: Scaler,
) -> Path:
    """Write predictor.safetensors, with what evaluation must know in its model card, and a copy of train.csv.

    Args:
        model: With the selected weights. Under LoRA the adapter is written too; an earlier one is removed.
        step: Training steps that they have seen.
        run: Its description and its CSV.
        output: Where to write.
        config: Resolved settings.
        dataset: The cached features.
        scaler: Fitted on the training episodes.
    """
    manifest = dataset.manifest
    model_card = {
        "run": run.folder.name,
        "step": step,
        "description": run.description,
        "architecture": predictor_arguments(config, dataset),
        **describe_weights(dataset, scaler),
        "window_steps": config.train.window_steps,
        "normalize_reps": config.train.normalize_reps,
        "tokens_fingerprint": manifest.fingerprint,
        "tokens_recipe": manifest.recipe,  # of the first part; what decides the tokens of given frames is the same in all
        "manifest": manifest.digest,
        "encoder": manifest.encoder,
        "encoder_trained": manifest.encoder_trained,
        "mode": manifest.mode,
    }
    with replaced_files(output, WEIGHTS_FILE, ["adapter"]) as folder:
        save_state(model.predictor_state(), folder / WEIGHTS_FILE, model_card)
        if model.lora:
            save_adapter(model.module, folder / "adapter", model_card)
        shutil.copyfile(run.folder / CSV_FILE, folder / CSV_FILE)
    return output / WEIGHTS_FILE
