"""Which run a training command means: a hash of everything that decides it, so the same command finds its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jepa_cache
from jepa_cache.config.machine import state_folder
from jepa_cache.config.schema import Config
from jepa_cache.data.scaler import Scaler
from jepa_cache.files import Claim, atomic_file, lock_file
from jepa_cache.predictor.checkpoints import OFFICIAL_SUFFIXES
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.recipe import canonical_json, file_digest, fingerprint, recipe_changes
from jepa_cache.training.checkpoint import LATEST, WEIGHTS_FILE, forget_checkpoints
from jepa_cache.training.upload import download_run

# What another machine may set otherwise without moving a number: a run goes on under other values.
COSMETIC = (
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
CODE = ("actions.py", "data", "idle.py", "poses.py", "predictor", "store", "training", "vpt_actions.py")


def describe_run(
    config: Config,
    manifest: Manifest,
    scaler: Scaler,
    init: Path | None,
    ranges: Path | None = None,
    *,
    num_processes: int = 1,
) -> dict[str, Any]:
    """Everything that decides a run, as plain JSON.

    Args:
        config: Resolved settings; predictor, train and split count.
        manifest: The training set.
        scaler: Fitted on it.
        init: File whose weights are the start.
        ranges: File that `filter.keep_ranges` names; as with `init` its content counts, not its name.
        num_processes: That train together; their number decides the global batch.
    """
    # Under num_epochs the train steps follow from the windows.
    passive = (*COSMETIC, "num_steps") if config.train.num_epochs else COSMETIC
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
    """Folder of the run's checkpoints and log: $JEPA_RUNS_HOME, else beside the digest table, outside any workspace."""
    home = os.environ.get("JEPA_RUNS_HOME")
    return (Path(home).expanduser() if home else state_folder() / "runs") / fingerprint(description)


def resolve_init(reference: str | None, base: Path) -> Path | None:
    """The weights file that `train.init` names: a file, a folder that holds predictor.safetensors, or a run's id.

    Raises:
        ValueError: When there is no such file; says what was tried.
    """
    if reference is None:
        return None
    path = (base / Path(reference).expanduser()).resolve()
    run = run_folder({}).parent / reference
    candidates = [path, path / WEIGHTS_FILE, path / "run" / WEIGHTS_FILE]
    candidates += [folder / "checkpoints" / LATEST / WEIGHTS_FILE for folder in (path, run)]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".safetensors", *OFFICIAL_SUFFIXES):
            return candidate
    tried = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise ValueError(f"train.init={reference!r} names no weights; tried {tried}")


def check_init_stays(init: Path, output: Path) -> None:
    """Refuse to start from the file that the training itself overwrites at its end.

    Args:
        init: From `resolve_init`.
        output: Folder that the training writes its weights to.

    Raises:
        ValueError: It is that file.
    """
    if init.resolve() == (output / WEIGHTS_FILE).resolve():
        raise ValueError(
            f"train.init names {init}, which this training overwrites at its end: the same command would start from other weights "
            "each time. Copy the file elsewhere and name the copy, or name the run that made it by its id (`run` in the file's card; "
            "its checkpoints stay)"
        )


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """Keep other processes out of a run for the block, by a lock beside its folder that dies with its process.

    Raises:
        ValueError: Another process trains it, or the folder of all runs cannot be written or locked.
    """
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
    """Keep other trainings out of the folder of results for the block: rows of two would mix in its `live` folder.

    Raises:
        ValueError: Another training writes there, or its folder cannot be written or locked.
    """
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
    """Make the run's folder; forget it first if asked, or fetch it from where it was uploaded to.

    Raises:
        ValueError: The folder holds another training, or the remote store cannot be read.
    """
    if fresh and run.exists():
        forget_checkpoints(run / "checkpoints")
        shutil.rmtree(run)
    known = run.exists()
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
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
