"""Locks that die with their process: `flock` on small files.

Never on folders, whose locks network file systems do not share between machines, and never through descriptors that cannot
write, for which NFS refuses exclusive ones. The kernel lets a lock go when its process ends, however it ends, so no lock is
ever left behind; at most its empty file is, which the next writer removes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Claim:
    """One process's right to make one store, until it is released or the process dies."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Let others have it, and remove its file."""
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


def try_claim(path: Path) -> Claim | None:
    """Make and lock the file `path`; None when another process, or another call in this one, holds it."""
    descriptor = lock_file(path, create=True)
    return None if descriptor is None else Claim(path, descriptor)


def is_claimed(path: Path) -> bool:
    """Whether a living process holds the file `path`."""
    descriptor = lock_file(path)
    if descriptor is None:
        return path.exists()
    os.close(descriptor)
    return False


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Make and lock the file `path` for the block, waiting for whoever holds it; it is removed at the end."""
    descriptor = lock_file(path, create=True, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        Claim(path, descriptor).release()


def lock_file(path: Path, *, create: bool = False, wait: bool = False) -> int | None:
    """Open and lock a file.

    Args:
        path: The file.
        create: Make it where it is missing.
        wait: For whoever holds it.

    Returns:
        The descriptor, to be closed; None when the file is held by another, or missing and not to be made.

    Raises:
        OSError: The folder cannot be written, or its file system knows no locks.
    """
    while True:
        try:
            descriptor = _open(path, os.O_CREAT if create else 0)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file while we opened it: the lock is on nothing


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:  # another user's file: a local file system locks it all the same
        return os.open(path, os.O_RDONLY)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
