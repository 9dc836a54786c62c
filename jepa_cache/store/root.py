"""The cache root: where stores of a recipe and a unit of input lie, and how files are published in it."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jepa_cache.store.locks import Claim, held_file, is_claimed, lock_file, try_claim
from jepa_cache.store.recipe import unit_id

TEMPORARY_PREFIX = ".tmp-"
LOCK_SUFFIX = ".lock"  # beside a temporary folder: its writer lives
CLAIM_SUFFIX = ".claim"  # of the file that says who makes a store


def resolve_cache_root(configured: str | None, base: Path) -> CacheRoot:
    """The root from params (`cache.root`), else $JEPA_CACHE_HOME, else ~/.cache/jepa-cache.

    Args:
        configured: Absolute, or relative to `base`.
        base: Folder that relative data paths are meant from.

    Raises:
        ValueError: For a URL that is not s3://bucket/prefix or gs://bucket/prefix.
    """
    chosen = configured or os.environ.get("JEPA_CACHE_HOME") or "~/.cache/jepa-cache"
    if re.match(r"\w+:/", chosen):  # also s3:/bucket, which would be a folder called "s3:"
        from jepa_cache.store.mirror import open_mirror

        return open_mirror(chosen)
    return CacheRoot((base / Path(chosen).expanduser()).resolve())


@dataclass(frozen=True)
class CacheRoot:
    """Paths below one cache root; holds no times, hosts or absolute paths itself."""

    path: Path

    @property
    def name(self) -> str:
        """What users call it: its folder or URL."""
        return str(self.path)

    def check_writable(self) -> None:
        """Make the root and try to write and lock a file in it, before hours of work.

        Raises:
            ValueError: It cannot be made, written or locked; says where and why.
        """
        try:
            make_folder(self.path)
            with tempfile.TemporaryFile(dir=self.path) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"the cache root {self.path} cannot be written ({error}); set cache.root or $JEPA_CACHE_HOME "
                "(a Lustre file system must be mounted with its option flock)"
            ) from error

    def tokens(self, fingerprint: str, unit_digest: str) -> Path:
        """Zarr group with the tokens, segments and step table of one unit under one recipe."""
        return self.path / f"tokens/{fingerprint}/{unit_id(unit_digest)}.zarr"

    def controls(self, source_fingerprint: str, unit_digest: str) -> Path:
        """Parquet file with the native-rate controls of one unit."""
        return self.path / f"controls/{source_fingerprint}/{unit_id(unit_digest)}.parquet"

    def actions(self, action_fingerprint: str, unit_digest: str) -> Path:
        """Zarr group with the actions and states at the steps of one unit in one action space."""
        return self.path / f"actions/{action_fingerprint}/{unit_id(unit_digest)}.zarr"

    def manifest(self, digest: str) -> Path:
        """The copy of a manifest that says which stores are still wanted."""
        return self.path / "manifests" / f"{digest}.json"

    def fetch(self, place: Path) -> bool:
        """Whether a store or file is published; what reading it needs is here afterwards."""
        return place.exists()

    def prefetch(self, places: Sequence[Path]) -> None:
        """Fetch many at the same time, so that `fetch` of each is quick afterwards; here there is nothing to do."""

    def publish(self, place: Path) -> None:
        """Make a finished store or file known to everyone; in a folder it is already."""

    def remove(self, place: Path) -> None:
        """Remove a store or file, so that at every moment it is whole or gone."""
        if place.is_dir():
            remove_folder(place)
        else:
            place.unlink(missing_ok=True)

    def refresh(self) -> list[str]:
        """Bring what is here up to date with what is published, for who looks at everything; says what is damaged there."""
        return []

    def find_abandoned(self) -> dict[str, int]:
        """Names and bytes of uploads that were never finished; a folder has none."""
        return {}

    def remove_abandoned(self, name: str) -> None:
        """Remove one of `find_abandoned`."""

    def claim(self, store: Path) -> Claim | None:
        """Claim the making of a store; None while another encoder, on this machine or another, holds it."""
        make_folder(store.parent)
        return try_claim(_claim_file(store))

    def is_claimed(self, store: Path) -> bool:
        """Whether a living encoder is making a store."""
        return is_claimed(_claim_file(store))

    @contextmanager
    def claimed(self, store: Path) -> Iterator[None]:
        """Claim the making of a store for the block, waiting for whoever holds it."""
        make_folder(store.parent)
        with held_file(_claim_file(store)):
            yield

    def remove_stale_temporaries(self) -> None:
        """Remove what dead writers left anywhere below the root; living ones hold a lock on theirs. Cost: lists every folder."""
        for folder in (self.path, *self.path.glob("*"), *self.path.glob("*/*")):
            remove_stale_temporaries(folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is synced and renamed to `path`.

    A crash at any moment leaves the old file or the new one, never a part.
    """
    make_folder(path.parent)
    temporary = _temporary_beside(path)
    descriptor = lock_file(temporary, create=True, wait=True)
    assert descriptor is not None
    try:
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Yield a private folder beside `final`, to be filled and published; removed when the block leaves it there."""
    make_folder(final.parent)
    temporary = _temporary_beside(final)
    with held_file(_lock_of(temporary)):  # there before the folder and gone after it, so the folder is never without
        temporary.mkdir()
        try:
            yield temporary
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each on the disk before anything is put into it."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


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
    # Sorted: a folder comes before its lock, by which it is removed in the same look.
    for path in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")) if folder.is_dir() else ():
        if path.is_dir():
            if not _lock_of(path).exists():  # a store that was being removed
                _remove_tree(path)
            continue
        descriptor = lock_file(path)
        if descriptor is None:  # a living writer's, or one that was published or removed just now
            continue
        try:
            if path.suffix == LOCK_SUFFIX:
                _remove_tree(path.with_suffix(""))
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a store so that it is whole or gone at every moment: renamed first, then deleted."""
    temporary = _temporary_beside(path)
    try:
        path.rename(temporary)
    except FileNotFoundError:
        return  # another process did it
    _remove_tree(temporary)


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_beside(path: Path) -> Path:
    return path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name}"


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(temporary.name + LOCK_SUFFIX)


def _claim_file(store: Path) -> Path:
    return store.parent / f"{TEMPORARY_PREFIX}{store.name}{CLAIM_SUFFIX}"


def _remove_tree(path: Path) -> None:
    while path.exists():
        with suppress(FileNotFoundError):  # two processes may remove the same left-over
            shutil.rmtree(path)


@contextmanager
def replaced_files(folder: Path, last: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a private folder; when the block ends well its files take the place of those of their names in `folder`.

    When the block fails, or the process is killed in it, `folder` stays as it was. All old files go before the first new one comes, so
    that whenever the process is killed old and new never lie side by side. What has another name and matches no pattern stays.

    Args:
        folder: Of the results; made where absent.
        last: Name of the file that goes first and comes last: while it is there, all are.
        stale: Patterns of what an earlier run may have left there that this one does not write.
    """
    remove_stale_temporaries(folder)
    with temporary_folder(folder / "new") as fresh:
        yield fresh
        for path in fresh.rglob("*"):
            sync(path)
        names = sorted((path.name for path in fresh.iterdir()), key=lambda name: name == last)
        old = [path for path in folder.iterdir() if path.name in names or any(map(path.match, stale))]
        for path in sorted(old, key=lambda path: path.name != last):
            if path.is_dir() and not path.is_symlink():
                _remove_tree(path)
            else:
                path.unlink()
        for name in names:
            (fresh / name).rename(folder / name)
        sync(folder)
