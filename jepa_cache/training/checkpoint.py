"""Checkpoints of a training: written whole or not at all, checked when read, rotated, and copied to a remote store.

`latest` points to the newest, `best` to the one with the lowest validation metric. The remote folder
`<upload_to>/<run id>` mirrors the run: `checkpoints/step-XXXXXXXX/` and `train.csv`. A state.json is written last, and
without it there is no checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import fsspec
import torch
from fsspec import AbstractFileSystem
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_cache.files import (
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    replace_link,
    sync,
    temporary_folder,
)
from jepa_cache.store.recipe import canonical_json, file_digest, fingerprint

WEIGHTS_FILE = "predictor.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
CSV_FILE = "train.csv"  # the rows up to the training step
LATEST = "latest"
BEST = "best"
FOLDER = "checkpoints"  # of a run, here and on the remote store


class Best(NamedTuple):
    """The best validation so far."""

    step: int  # training step; 0 before the first validation
    value: float  # of the metric; lower is better


NO_BEST = Best(0, math.inf)


class Checkpoint(NamedTuple):
    """Everything a training needs to resume as if it had never stopped.

    The order of windows, the rates and everything random are pure functions of `step`: they need no state of their own.
    """

    step: int  # training steps done
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    gradient_scaler: dict[str, Any]  # empty unless the precision is float16
    num_threads: int  # torch threads; other numbers of threads round otherwise
    best: Best = NO_BEST
    model_card: Mapping[str, Any] = MappingProxyType({})  # for trainings that start from these weights
    run: str | None = None  # whose it is; None in those of the first release
    rows: str | None = None  # the CSV so far; None in those of the first release


class Rotation(NamedTuple):
    """Which checkpoints stay: the newest, those at whole multiples of a spacing, and the best one."""

    keep_last: int = 2
    keep_every: int = 0  # training steps; 0: none for their spacing


def save_checkpoint(folder: Path, checkpoint: Checkpoint, rotation: Rotation) -> Path:
    """Publish a checkpoint as `folder/step-XXXXXXXX`, set `latest` and `best`, and remove what the rotation drops.

    A crash at any moment leaves every `step-*` folder whole, and the links on whole ones.
    """
    final = folder / _folder_name(checkpoint.step)
    with temporary_folder(final) as temporary:
        metadata = {"card": json.dumps(dict(checkpoint.model_card), sort_keys=True)} if checkpoint.model_card else None
        save_file(checkpoint.weights, temporary / WEIGHTS_FILE, metadata=metadata)
        training = {"optimizer": checkpoint.optimizer, "gradient_scaler": checkpoint.gradient_scaler}
        with (temporary / OPTIMIZER_FILE).open("wb") as file:  # torch's own writer does not say that the disk is full
            torch.save(training, file)
        if checkpoint.rows is not None:
            (temporary / CSV_FILE).write_bytes(checkpoint.rows.encode())
        digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        state = {
            "step": checkpoint.step,
            "run": checkpoint.run,
            "num_threads": checkpoint.num_threads,
            "best": checkpoint.best._asdict() if checkpoint.best.step else None,
            "sha256": digests,
        }
        (temporary / STATE_FILE).write_bytes(canonical_json({**state, "digest": fingerprint(state)}))
        publish_folder(temporary, final)
    _tidy(folder, rotation)
    return final


def load_latest(folder: Path, rotation: Rotation | None = None, *, run: str | None = None) -> Checkpoint | None:
    """Read the newest checkpoint of a run, None when it has none.

    With a rotation, what a crash right after publishing left undone (links one behind, old checkpoints) is done here.

    Raises:
        ValueError: As `load_checkpoint`.
    """
    published = published_checkpoints(folder)
    if not published:
        return None
    checkpoint = load_checkpoint(published[-1], run=run)
    if rotation is not None:
        _tidy(folder, rotation)
    return checkpoint


def load_checkpoint(path: Path, *, run: str | None = None) -> Checkpoint:
    """Read one published checkpoint.

    Args:
        path: Its folder.
        run: That it must be of; any where None, and where it does not say.

    Raises:
        ValueError: When it is damaged or of another run; names the file and the ways out.
    """
    checkpoint = _read_checkpoint(path)
    if None not in (run, checkpoint.run) and run != checkpoint.run:
        raise ValueError(
            f"checkpoint {path} is of run {checkpoint.run}, not of {run}: it was copied here. Move it away, or start over with --fresh; "
            f"to start from its weights set train.init={path / WEIGHTS_FILE}"
        )
    return checkpoint


def describe_last(folder: Path) -> str:
    """Say where the newest checkpoint of a run is, or that there is none, as part of a message."""
    published = published_checkpoints(folder)
    return f"the last checkpoint is {published[-1]}" if published else "there was no checkpoint yet"


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if state.pop("digest") != fingerprint(state):
            raise ValueError(f"{STATE_FILE} has changed since it was written, its digest differs")
        if path.name != _folder_name(state["step"]):
            raise ValueError(f"{STATE_FILE} says training step {state['step']}")
        for name, digest in state["sha256"].items():
            if file_digest(path / name) != digest:
                raise ValueError(f"{name} has changed since it was written, its sha256 differs")
        training = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        return Checkpoint(
            step=state["step"],
            weights=load_file(path / WEIGHTS_FILE),
            optimizer=training["optimizer"],
            gradient_scaler=training["gradient_scaler"],
            num_threads=state["num_threads"],
            best=Best(**state["best"]) if state["best"] else NO_BEST,
            run=state.get("run"),
            rows=(path / CSV_FILE).read_bytes().decode() if CSV_FILE in state["sha256"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete this folder to resume from the one before it, if there is one, "
            "or start over with --fresh"
        ) from error


def forget_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a run, the newest last; a crash leaves those that are not removed yet whole."""
    for path in published_checkpoints(folder):
        remove_folder(path)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def published_checkpoints(folder: Path) -> list[Path]:
    """List the folders of the checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"))


def _tidy(folder: Path, rotation: Rotation) -> None:
    published = published_checkpoints(folder)
    newest = published[-1]
    best = json.loads((newest / STATE_FILE).read_text())["best"]
    replace_link(folder / LATEST, newest.name)
    if best and (folder / _folder_name(best["step"])).is_dir():
        replace_link(folder / BEST, _folder_name(best["step"]))
    sync(folder)
    for old in published[: -max(1, rotation.keep_last)]:
        step = int(old.name.removeprefix("step-"))
        wanted = (rotation.keep_every and step % rotation.keep_every == 0) or (best and step == best["step"])
        if not wanted:
            remove_folder(old)
    remove_stale_temporaries(folder)


class UploadError(ValueError):
    """The remote store cannot be reached or written; the message names it, why, and what is safe."""


class Uploader:
    """Uploads what is new of a run in the background, at most every `every_s` seconds, and at the end.

    An upload that fails is printed and tried again when the next one is due; the last one must succeed.
    """

    def __init__(self, run: Path, remote: str, every_s: float) -> None:
        """Reach the remote store, a folder URL, for the run in a local folder."""
        self._run, self._every_s = run, every_s
        self._files, folder = _connect(remote)
        self._folder = f"{folder}/{run.name}"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._running: Future[None] | None = None
        self._last = time.monotonic()

    def maybe_upload(self) -> None:
        """Begin an upload when one is due and none is running; called after each checkpoint."""
        if self._running is not None:
            if not self._running.done():
                return
            error, self._running = self._running.exception(), None
            if error is not None:
                print(f"upload to {self._folder} failed ({error}); it is tried again with the next one")
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._running = self._pool.submit(upload_run, self._run, self._files, self._folder)

    def close(self) -> None:
        """Upload the rest, and wait for it.

        Raises:
            UploadError: It failed.
        """
        try:
            self._pool.submit(upload_run, self._run, self._files, self._folder).result()
        except Exception as error:
            raise UploadError(
                f"the last upload to {self._folder} failed ({error}). The run is whole on this machine, in {self._run}; the "
                "same command tries the upload again"
            ) from error
        finally:
            self._pool.shutdown()


def upload_run(run: Path, files: AbstractFileSystem, folder: str) -> None:
    """Bring the remote copy of a run up to date: new checkpoints, the CSV, and removal of what was rotated away."""
    with tempfile.TemporaryDirectory(dir=run, prefix=".upload-") as name:
        snapshot = Path(name)
        kept = _link_checkpoints(run / FOLDER, snapshot)
        for step in kept:
            remote = f"{folder}/{FOLDER}/{step.name}"
            if _is_complete(files, f"{remote}/{STATE_FILE}", (step / STATE_FILE).read_bytes()):
                continue
            files.makedirs(remote, exist_ok=True)
            names = sorted((path.name for path in step.iterdir()), key=lambda name: name == STATE_FILE)
            for file in names:
                files.put_file(str(step / file), f"{remote}/{file}")
        if (run / CSV_FILE).is_file():
            shutil.copyfile(run / CSV_FILE, snapshot / CSV_FILE)  # rows may be added meanwhile
            files.makedirs(folder, exist_ok=True)
            files.put_file(str(snapshot / CSV_FILE), f"{folder}/{CSV_FILE}")
        if kept:
            for old in _remote_checkpoints(files, folder):
                if old.rsplit("/", 1)[-1] not in {step.name for step in kept}:
                    if files.exists(f"{old}/{STATE_FILE}"):
                        files.rm_file(f"{old}/{STATE_FILE}")
                    files.rm(old, recursive=True)


def download_run(run: Path, remote: str) -> str | None:
    """Fetch the newest whole checkpoint and the CSV of a run that this machine has not.

    Returns where it came from, None when the remote store has no checkpoint of this run.
    """
    files, base = _connect(remote)
    folder = f"{base}/{run.name}"
    try:
        whole = [path for path in _remote_checkpoints(files, folder) if files.exists(f"{path}/{STATE_FILE}")]
        if not whole:
            return None
        newest = max(whole)
        final = run / FOLDER / newest.rsplit("/", 1)[-1]
        with temporary_folder(final) as temporary:
            for path in files.ls(newest, detail=False):
                files.get_file(path, str(temporary / path.rsplit("/", 1)[-1]))
            if files.exists(f"{folder}/{CSV_FILE}"):
                files.get_file(f"{folder}/{CSV_FILE}", str(run / CSV_FILE))
            publish_folder(temporary, final)
    except OSError as error:
        raise UploadError(
            f"the checkpoints in {folder} cannot be read ({error}); repair it or unset train.upload_to"
        ) from error
    return newest


def _connect(remote: str) -> tuple[AbstractFileSystem, str]:
    try:
        files, folder = fsspec.url_to_fs(remote)
        files.exists(folder)  # asks the store: no network, no bucket and no permission are known now
    except (ImportError, OSError, ValueError) as error:
        raise UploadError(f"train.upload_to={remote!r} cannot be used: {error}") from error
    return files, folder.rstrip("/")


def _link_checkpoints(folder: Path, snapshot: Path) -> list[Path]:
    """Hard links to the published checkpoints, so that a rotation cannot take them away from under an upload."""
    linked = []
    for step in published_checkpoints(folder):
        copy = snapshot / step.name
        copy.mkdir()
        try:
            for path in step.iterdir():
                os.link(path, copy / path.name)
        except FileNotFoundError:  # rotated away just now
            shutil.rmtree(copy)
            continue
        if (copy / STATE_FILE).is_file():
            linked.append(copy)
    return linked


def _is_complete(files: AbstractFileSystem, path: str, content: bytes) -> bool:
    return bool(files.exists(path)) and files.cat_file(path) == content


def _remote_checkpoints(files: AbstractFileSystem, folder: str) -> list[str]:
    paths: list[Any] = files.ls(f"{folder}/{FOLDER}", detail=False) if files.exists(f"{folder}/{FOLDER}") else []
    return sorted(path.rstrip("/") for path in paths if path.rstrip("/").rsplit("/", 1)[-1].startswith("step-"))
