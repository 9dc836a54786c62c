"""Copies of a run's checkpoints on a remote store (gs://, s3://, file://, ...), made in the background, to go on elsewhere.

The remote folder `<upload_to>/<run id>` mirrors the run: `checkpoints/step-XXXXXXXX/`, whose state.json is written last, and
`train.csv`. A checkpoint without its state.json is not there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cache.files import publish_folder, temporary_folder
from jepa_cache.training.checkpoint import CSV_FILE, STATE_FILE, published_checkpoints

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FOLDER = "checkpoints"


class UploadError(ValueError):
    """The remote store cannot be reached or written; names it, why, and what is safe."""


class Uploader:
    """Uploads what is new of a run, at most every `every_s` seconds and at the end; training goes on meanwhile.

    An upload that fails is said and tried again when the next one is due; the last one must succeed.
    """

    def __init__(self, run: Path, remote: str, every_s: float) -> None:
        """Reach the remote store.

        Args:
            run: Local folder of the run; its name is the run's id.
            remote: Folder URL, as `train.upload_to`.
            every_s: Seconds between uploads.

        Raises:
            UploadError: It cannot be reached, or its protocol is unknown or needs a package that is not installed.
        """
        self._run, self._every_s = run, every_s
        self._files, folder = _connect(remote)
        self._folder = f"{folder}/{run.name}"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._running: Future[None] | None = None
        self._last = time.monotonic()

    def poke(self) -> None:
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
        """Upload what is left, and wait for it.

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
    """Bring the remote copy of a run up to date: new checkpoints, the CSV, and removal of what was rotated away.

    Args:
        run: Local folder.
        files: The remote file system.
        folder: Of this run on it.
    """
    with tempfile.TemporaryDirectory(dir=run, prefix=".upload-") as name:
        snapshot = Path(name)
        kept = _link_checkpoints(run / FOLDER, snapshot)
        for step in kept:
            there = f"{folder}/{FOLDER}/{step.name}"
            if _is_there(files, f"{there}/{STATE_FILE}", (step / STATE_FILE).read_bytes()):
                continue
            files.makedirs(there, exist_ok=True)
            names = sorted((path.name for path in step.iterdir()), key=lambda name: name == STATE_FILE)
            for file in names:
                files.put_file(str(step / file), f"{there}/{file}")
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
    """Fetch the newest whole checkpoint and the CSV of a run that this machine knows nothing of.

    Args:
        run: Local folder of the run; its name is the run's id.
        remote: Folder URL, as `train.upload_to`.

    Returns:
        Where it came from, None when the remote store has no checkpoint of this run.

    Raises:
        UploadError: The remote store cannot be reached or read.
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
            f"the checkpoints in {folder} cannot be read ({error}); mend it or unset train.upload_to"
        ) from error
    return newest


def _connect(remote: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

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


def _is_there(files: AbstractFileSystem, path: str, content: bytes) -> bool:
    return bool(files.exists(path)) and files.cat_file(path) == content


def _remote_checkpoints(files: AbstractFileSystem, folder: str) -> list[str]:
    there: list[Any] = files.ls(f"{folder}/{FOLDER}", detail=False) if files.exists(f"{folder}/{FOLDER}") else []
    return sorted(path.rstrip("/") for path in there if path.rstrip("/").rsplit("/", 1)[-1].startswith("step-"))
