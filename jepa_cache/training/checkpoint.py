"""Checkpoints of a training: written whole or not at all, checked when read, rotated, and copied to a remote store.

`latest` points to the newest, `best` to the one with the lowest validation metric. The remote folder
`<upload_to>/<run id>` mirrors the run: `checkpoints/step-XXXXXXXX/` and `train.csv`. A state.json is written last, and
without it there is no checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import fsspec
import torch
from fsspec import AbstractFileSystem
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_cache.devices import Copies
from jepa_cache.files import (
    file_digest,
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    replace_link,
    sync,
    temporary_folder,
)
from jepa_cache.store.recipe import canonical_json, fingerprint

WEIGHTS_FILE = "predictor.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
CSV_FILE = "train.csv"  # the rows up to the training step
LATEST = "latest"
BEST = "best"
FOLDER = "checkpoints"  # of a run, here and on the remote store


class Best(NamedTuple):
    """The best validation so far."""

    step: int = 0  # training step; 0 before the first validation
    value: float = math.inf  # of the metric; lower is better


class Checkpoint(NamedTuple):
    """Everything a training needs to resume as if it had never stopped.

    The order of windows, the rates and everything random are pure functions of `step`: they need no state of their own.
    """

    step: int  # training steps done
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    gradient_scaler: dict[str, Any]  # empty unless the precision is float16
    num_threads: int  # torch threads; other numbers of threads round otherwise
    best: Best = Best()
    model_card: Mapping[str, Any] = MappingProxyType({})  # for trainings that start from these weights
    run: str | None = None  # whose it is; None in those of the first release
    rows: str | None = None  # the CSV so far; None in those of the first release
    machine: Mapping[str, str] = MappingProxyType({})  # `devices.describe_machine`; empty in those of the first release


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep_last: int = 2, keep_every: int = 0) -> Path:
    """Publish a checkpoint as `folder/step-XXXXXXXX`, and `tidy` the folder.

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
        state = {
            "step": checkpoint.step,
            "run": checkpoint.run,
            "num_threads": checkpoint.num_threads,
            "machine": dict(checkpoint.machine),
            "best": checkpoint.best._asdict() if checkpoint.best.step else None,
            "sha256": {path.name: file_digest(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / STATE_FILE).write_bytes(canonical_json({**state, "digest": fingerprint(state)}))
        publish_folder(temporary, final)
    tidy(folder, keep_last, keep_every)
    return final


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time, from copies that training cannot change.

    Memory: one copy of weights and moments on the CPU, kept from checkpoint to checkpoint; page-locked where they are on a GPU.

    Attributes:
        copying: The copy that `settle` has to wait for; None between it and the next checkpoint, and always from a GPU.
        running: The write that was begun last and has not been joined; before the first one, the making of room for its copy.
    """

    def __init__(self, write: Callable[[Checkpoint], object]) -> None:
        self._write, self._copies, self._kept = write, Copies(), {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.copying: Future[Checkpoint] | None = None
        self.running: Future[object] | None = None

    def make_room(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Begin to make the memory for copies of these from a GPU in the thread: page-locking it would delay the first checkpoint."""
        device = next(iter(weights.values())).device

        def make() -> None:
            torch.cuda.set_device(device)  # of this thread: else another GPU would get a context, of half a GiB
            self._kept = self._each(self._copies.make_room, {"weights": weights, "optimizer": optimizer}, {})

        self.join()
        self.running = self._pool.submit(make)

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to copy a checkpoint, and then to write it; waits for the one before, and raises what went wrong there.

        From a CPU it is copied in the thread, and nothing of it may be changed before `settle` has returned. From a GPU the copies are
        begun here, in the order of its kernels.
        """
        self.join()
        if any(weight.device.type == "cuda" for weight in checkpoint.weights.values()):
            checkpoint = self._take(checkpoint)
        else:
            self.copying = self._pool.submit(self._take, checkpoint)
        self.running = self._pool.submit(self._wait_and_write, self.copying or checkpoint)

    def settle(self) -> None:
        """Wait until what was saved is copied: before anything of it is changed; raises what went wrong."""
        copying, self.copying = self.copying, None
        if copying is not None:
            copying.result()

    def _take(self, checkpoint: Checkpoint) -> Checkpoint:
        tensors = {"weights": checkpoint.weights, "optimizer": checkpoint.optimizer}
        self._kept = self._each(self._copies.take, tensors, self._kept)
        return checkpoint._replace(**self._kept)

    def _each(self, make: Callable[[Tensor, Tensor | None], Tensor], value: Any, kept: Any) -> Any:
        if isinstance(value, Tensor):
            return make(value, kept)
        if isinstance(value, dict):
            return {name: self._each(make, it, kept.get(name) if kept else None) for name, it in value.items()}
        return value

    def _wait_and_write(self, checkpoint: Checkpoint | Future[Checkpoint]) -> None:
        self._copies.wait()
        self._write(checkpoint.result() if isinstance(checkpoint, Future) else checkpoint)

    def join(self) -> None:
        """Wait until what was saved is written; raises what went wrong."""
        running, self.running, self.copying = self.running, None, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait until what was saved is written, and end the thread; raises what went wrong."""
        self._pool.shutdown()
        self.join()


def tidy(folder: Path, keep_last: int, keep_every: int) -> None:
    """Set `latest` and `best`, and remove what is not kept; also after a crash between publishing and this.

    Kept are the newest `keep_last`, those at whole multiples of `keep_every` (0: none for that), and the best one.
    """
    published = published_checkpoints(folder)
    newest = published[-1]
    best = json.loads((newest / STATE_FILE).read_text())["best"]
    replace_link(folder / LATEST, newest.name)
    if best and (folder / _folder_name(best["step"])).is_dir():
        replace_link(folder / BEST, _folder_name(best["step"]))
    sync(folder)
    for old in published[:-keep_last]:
        step = int(old.name.removeprefix("step-"))
        if not (keep_every and step % keep_every == 0) and not (best and step == best["step"]):
            remove_folder(old)
    remove_stale_temporaries(folder)


def load_latest(folder: Path, *, run: str | None = None) -> Checkpoint | None:
    """Read the newest checkpoint of a run, None when it has none; see `load_checkpoint`."""
    published = published_checkpoints(folder)
    return load_checkpoint(published[-1], run=run) if published else None


def load_checkpoint(path: Path, *, run: str | None = None) -> Checkpoint:
    """Read one published checkpoint; a ValueError where it is damaged, or says that it is of another run than `run`."""
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
        checkpoint = Checkpoint(
            step=state["step"],
            weights=load_file(path / WEIGHTS_FILE),
            optimizer=training["optimizer"],
            gradient_scaler=training["gradient_scaler"],
            num_threads=state["num_threads"],
            best=Best(**state["best"] or {}),
            run=state.get("run"),
            machine=state.get("machine", {}),
            rows=(path / CSV_FILE).read_bytes().decode() if CSV_FILE in state["sha256"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete this folder to resume from the one before it, if there is one, "
            "or start over with --fresh"
        ) from error
    if None not in (run, checkpoint.run) and run != checkpoint.run:
        raise ValueError(
            f"checkpoint {path} is of run {checkpoint.run}, not of {run}: it was copied here. Move it away, or start over with --fresh; "
            f"to start from its weights set train.init={path / WEIGHTS_FILE}"
        )
    return checkpoint


def published_checkpoints(folder: Path) -> list[Path]:
    """List the folders of the checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"))


def describe_last(folder: Path) -> str:
    """Say where the newest checkpoint of a run is, or that there is none, as part of a message."""
    published = published_checkpoints(folder)
    return f"the last checkpoint is {published[-1]}" if published else "there was no checkpoint yet"


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


class Uploader:
    """Uploads what is new of a run in the background, at most every `every_s` seconds, and at the end.

    An upload that fails is printed and tried again when the next one is due; the last one must succeed.
    """

    def __init__(self, run: Path, remote: str, every_s: float) -> None:
        """Reach the remote store, a folder URL, for the run in a local folder."""
        self._run, self._every_s = run, every_s
        self._files, self._folder = _connect(remote, run)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._running: Future[None] | None = None
        self._last = time.monotonic()

    def maybe_upload(self) -> None:
        """Begin an upload when one is due and none is running; called after each checkpoint."""
        if self._running is not None:
            if not self._running.done():
                return
            if (error := self._running.exception()) is not None:
                print(f"upload to {self._folder} failed ({error}); it is tried again with the next one")
            self._running = None
        if time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            self._running = self._pool.submit(self._upload)

    def close(self) -> None:
        """Upload the rest, and wait for it; a ValueError where that fails."""
        try:
            self._pool.submit(self._upload).result()
        except Exception as error:
            raise ValueError(
                f"the last upload to {self._folder} failed ({error}). The run is whole on this machine, in {self._run}; the "
                "same command tries the upload again"
            ) from error
        finally:
            self._pool.shutdown()

    def _upload(self) -> None:
        """Copy new checkpoints and the CSV; remove what was rotated away. A state.json comes last and goes first."""
        files, published = self._files, published_checkpoints(self._run / FOLDER)
        for step in published:
            remote = f"{self._folder}/{FOLDER}/{step.name}"
            try:
                state = (step / STATE_FILE).read_bytes()
                if files.exists(f"{remote}/{STATE_FILE}") and files.cat_file(f"{remote}/{STATE_FILE}") == state:
                    continue
                files.makedirs(remote, exist_ok=True)
                for path in sorted(step.iterdir(), key=lambda path: path.name == STATE_FILE):
                    files.put_file(str(path), f"{remote}/{path.name}")
            except FileNotFoundError:
                if step.is_dir():
                    raise
                continue  # the rotation took it away meanwhile
        if (self._run / CSV_FILE).is_file():
            files.makedirs(self._folder, exist_ok=True)
            files.pipe_file(f"{self._folder}/{CSV_FILE}", (self._run / CSV_FILE).read_bytes())
        names = {step.name for step in published}
        for old in _remote_checkpoints(files, self._folder) if names else ():
            if old.rsplit("/", 1)[-1] not in names:
                if files.exists(f"{old}/{STATE_FILE}"):
                    files.rm_file(f"{old}/{STATE_FILE}")
                files.rm(old, recursive=True)


def download_run(run: Path, remote: str) -> str | None:
    """Fetch the newest whole checkpoint of a run, and its CSV; returns where it came from, None when there is none."""
    files, folder = _connect(remote, run)
    try:
        whole = [path for path in _remote_checkpoints(files, folder) if files.exists(f"{path}/{STATE_FILE}")]
        if not whole:
            return None
        newest = max(whole)
        final = run / FOLDER / newest.rsplit("/", 1)[-1]
        with temporary_folder(final) as temporary:
            for path in files.ls(newest, detail=False):
                files.get_file(path, str(temporary / path.rsplit("/", 1)[-1]))
            publish_folder(temporary, final)
    except OSError as error:
        raise ValueError(
            f"the checkpoints in {folder} cannot be read ({error}); repair it or unset train.upload_to"
        ) from error
    (run / CSV_FILE).write_bytes((final / CSV_FILE).read_bytes())
    return newest


def _connect(remote: str, run: Path) -> tuple[AbstractFileSystem, str]:
    try:
        files, folder = fsspec.url_to_fs(remote)
        files.exists(folder)  # asks the store: no network, no bucket and no permission are known now
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"train.upload_to={remote!r} cannot be used: {error}") from error
    return files, f"{folder.rstrip('/')}/{run.name}"


def _remote_checkpoints(files: AbstractFileSystem, folder: str) -> list[str]:
    paths: list[Any] = files.ls(f"{folder}/{FOLDER}", detail=False) if files.exists(f"{folder}/{FOLDER}") else []
    return sorted(path.rstrip("/") for path in paths if path.rstrip("/").rsplit("/", 1)[-1].startswith("step-"))
