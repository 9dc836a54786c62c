"""The cache root: where stores of a recipe and a unit of input lie, and how files are published in it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jepa_cache.store.recipe import unit_id

TEMPORARY_PREFIX = ".tmp-"


def resolve_cache_root(configured: str | None, base: Path) -> CacheRoot:
    """The root from params (`cache.root`), else $JEPA_CACHE_HOME, else ~/.cache/jepa-cache.

    Args:
        configured: Absolute, or relative to `base`.
        base: Folder that relative data paths are meant from.

    Raises:
        ValueError: For an object-store URL, which this version cannot write.
    """
    chosen = configured or os.environ.get("JEPA_CACHE_HOME") or "~/.cache/jepa-cache"
    if "://" in chosen:
        raise ValueError(f"cache.root must be a folder; object stores are not supported yet, got {chosen!r}")
    return CacheRoot((base / Path(chosen).expanduser()).resolve())


@dataclass(frozen=True)
class CacheRoot:
    """Paths below one cache root; holds no times, hosts or absolute paths itself."""

    path: Path

    def check_writable(self) -> None:
        """Make the root and try to write in it, before hours of work.

        Raises:
            ValueError: It cannot be made or written; says where and why.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ValueError(
                f"the cache root {self.path} cannot be written ({error}); set cache.root or $JEPA_CACHE_HOME"
            ) from error

    def tokens(self, fingerprint: str, unit_digest: str) -> Path:
        """Zarr group with the tokens, segments and step table of one unit under one recipe."""
        return self.path / "tokens" / fingerprint / f"{unit_id(unit_digest)}.zarr"

    def controls(self, source_fingerprint: str, unit_digest: str) -> Path:
        """Parquet file with the native-rate controls of one unit."""
        return self.path / "controls" / source_fingerprint / f"{unit_id(unit_digest)}.parquet"

    def actions(self, action_fingerprint: str, unit_digest: str) -> Path:
        """Zarr group with the actions and states at the steps of one unit in one action space."""
        return self.path / "actions" / action_fingerprint / f"{unit_id(unit_digest)}.zarr"

    def manifest(self, digest: str) -> Path:
        """The copy of a manifest that says which stores are still wanted."""
        return self.path / "manifests" / f"{digest}.json"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is synced and renamed to `path`.

    A crash at any moment leaves the old file or the new one, never a part.
    """
    with _claimed_temporary(path, os.mknod, Path.unlink) as temporary:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Yield a private folder beside `final`, to be filled and published; removed when the block leaves it there."""
    with _claimed_temporary(final, os.mkdir, shutil.rmtree) as temporary:
        yield temporary


def publish_folder(temporary: Path, final: Path) -> bool:
    """Sync a finished folder and rename it to its final place; False when another writer was there first.

    The loser leaves its own folder alone: both hold the same content by construction.
    """
    for folder, _, files in os.walk(temporary, topdown=False):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        return False
    sync(final.parent)
    return True


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what writers left behind when they were killed; living writers hold a lock on theirs."""
    if not folder.is_dir():
        return
    with _locked(folder):
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            try:
                with _locked(path, blocking=False):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            except (BlockingIOError, FileNotFoundError):
                continue  # a living writer's, or one that was published or removed just now


def remove_folder(path: Path) -> None:
    """Remove a store so that it is whole or gone at every moment: renamed first, then deleted."""
    temporary = _temporary_beside(path)
    path.rename(temporary)
    shutil.rmtree(temporary)


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _claimed_temporary(final: Path, create: Callable[[Path], None], remove: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary file or folder that carries a lock of this process, which the kernel releases when it dies."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(final)
    with ExitStack() as stack:
        with _locked(final.parent):  # so that nobody sees it before it is locked
            create(temporary)
            stack.enter_context(_locked(temporary))
        try:
            yield temporary
        finally:
            if temporary.exists():
                remove(temporary)


def _temporary_beside(path: Path) -> Path:
    return path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name}"


@contextmanager
def _locked(path: Path, *, blocking: bool = True) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if blocking else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
