"""A disk that fails on purpose: it records every change below a folder, in order, and stops or refuses from a chosen one on.

The calls by which Python changes files are replaced: os.open, mkdir, rename, unlink, fsync, ..., `open` and what is written to
it. Parquet files, which Arrow writes by itself, go through such a file too. The process lives on after a stop, but nothing
that it then does reaches the disk, as after a kill; only its locks are let go, as the kernel would.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet.core as parquet
import pytest

WRITES = ("create", "write", "mkdir")  # what needs room


class Killed(Exception):  # noqa: N818
    """The process was killed here: nothing changes on the disk any more."""


class Change(NamedTuple):
    """One change: create, write, fsync, mkdir, rename, unlink, rmdir or truncate; `target` is where a rename leads."""

    kind: str
    path: Path
    target: Path | None = None


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A disk of its own size at `folder`: a tmpfs, so only where root may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        # Lazily: the traceback of a write that failed may still hold its file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class FaultyDisk:
    """Records what happens below `folder` while the block runs.

    Args:
        folder: Nothing else is touched.
        stop_at: Number of the change before which the fault comes; None lets all pass.
        how: "kill" stops everything, "half" does half of a write first, "full" refuses whatever needs room from then on,
            "readonly" refuses every change from then on.
    """

    def __init__(self, folder: Path, stop_at: int | None = None, how: str = "kill") -> None:
        self.changes: list[Change] = []
        self.stopped = False
        self._folder, self._stop_at, self._how = folder.resolve(), stop_at, how
        self._dead = False
        self._lock = threading.RLock()
        self._real: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> FaultyDisk:
        self._real_open = io.open
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "truncate", "ftruncate", "fsync"):
            self._replace(
                os, name, self._wrap(name.replace("replace", "rename").replace("remove", "unlink"), getattr(os, name))
            )
        self._replace(os, "open", self._wrap_os_open(os.open))
        self._replace(io, "open", self._open)
        self._replace(builtins, "open", self._open)
        self._replace(parquet, "ParquetWriter", self._wrap_parquet(parquet.ParquetWriter))
        import pyarrow.parquet as package

        self._replace(package, "ParquetWriter", parquet.ParquetWriter)
        return self

    def __exit__(self, *_: Any) -> None:
        for module, name, real in reversed(self._real):
            setattr(module, name, real)

    def _replace(self, module: Any, name: str, new: Any) -> None:
        self._real.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    def _find(self, where: Any, dir_fd: int | None = None) -> Path | None:
        """The absolute path of a file, its name or its descriptor; None outside the folder."""
        if isinstance(where, int):
            path = Path(f"/proc/self/fd/{where}").readlink()
        else:
            base = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
            path = base / where
        return path if path == self._folder or self._folder in path.parents else None

    def step(self, change: Change, perform: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Let one change happen, or the fault."""
        with self._lock:
            if self._dead:
                raise Killed(change)
            number = len(self.changes)
            self.changes.append(change)
            if number == self._stop_at:
                self.stopped = True
                if self._how == "half" and half is not None:
                    half()
                if self._how in ("kill", "half"):
                    self._dead = True
                    raise Killed(change)
            if self.stopped and self._how == "full" and change.kind in WRITES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(change.path))
            if self.stopped and self._how == "readonly":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(change.path))
            return perform()

    def _wrap(self, kind: str, real: Callable) -> Callable:
        kind = "truncate" if kind == "ftruncate" else kind

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            place = self._find(path, options.get("dir_fd"))
            if place is None:
                return real(path, *arguments, **options)
            target = Path.cwd() / arguments[0] if kind == "rename" else None
            return self.step(Change(kind, place, target), lambda: real(path, *arguments, **options))

        return call

    def _wrap_os_open(self, real: Callable) -> Callable:
        def call(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            unnamed = flags & os.O_TMPFILE == os.O_TMPFILE
            place = self._find(path, options.get("dir_fd")) if flags & os.O_CREAT or unnamed else None
            if place is None or (place.exists() and not unnamed):
                return real(path, flags, *arguments, **options)
            return self.step(Change("create", place), lambda: real(path, flags, *arguments, **options))

        return call

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        place = self._find(file) if isinstance(file, str | os.PathLike) and set(mode) & set("wxa+") else None
        if place is None or "opener" in options:
            return self._real_open(file, mode, buffering, *arguments, **options)
        raw_mode = mode.replace("t", "").replace("b", "") + "b"
        open_raw = lambda: self._real_open(file, raw_mode, 0)  # noqa: E731
        changes = "w" in mode or not place.exists()
        raw = _RecordedFile(self, place, self.step(Change("create", place), open_raw) if changes else open_raw())
        if "b" in mode:
            return raw if buffering == 0 else io.BufferedWriter(raw)
        return io.TextIOWrapper(io.BufferedWriter(raw), *arguments, **options)

    def _wrap_parquet(self, real: type) -> type:
        disk = self

        class ParquetWriter(real):
            def __init__(self, where: Any, *arguments: Any, **options: Any) -> None:
                self._file = disk._open(where, "wb") if isinstance(where, str | os.PathLike) else None
                super().__init__(self._file or where, *arguments, **options)

            def close(self) -> None:
                super().close()
                file, self._file = self._file, None
                if file is not None:
                    file.close()

        return ParquetWriter


class _RecordedFile(io.RawIOBase):
    """A raw file for writing whose writes are steps; after a kill they are dropped, as what a buffer held is."""

    def __init__(self, disk: FaultyDisk, path: Path, raw: Any) -> None:
        self._disk, self._path, self._raw = disk, path, raw

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, *arguments: Any) -> int:
        return self._raw.seek(*arguments)

    def tell(self) -> int:
        return self._raw.tell()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: Any) -> int:
        if self._disk._dead:
            return len(data)
        view = memoryview(data).cast("B")
        return self._disk.step(
            Change("write", self._path), lambda: self._raw.write(view), lambda: self._raw.write(view[: len(view) // 2])
        )

    def truncate(self, size: int | None = None) -> int:
        return self._disk.step(Change("truncate", self._path), lambda: self._raw.truncate(size))

    def close(self) -> None:
        super().close()
        self._raw.close()
