"""The cache root: where stores of a recipe and a unit of input lie."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jepa_cache.files import (
    OURS,
    Claim,
    atomic_file,
    claim_path,
    held_file,
    is_claimed,
    lock_file,
    make_folder,
    measure_bytes,
    remove_folder,
    remove_stale_temporaries,
    temporary_beside,
    try_claim,
)
from jepa_cache.store.layout import REMEDY, STORE_FILE, StoreDamagedError, StoreFile, check_identity, check_store
from jepa_cache.store.recipe import DIGEST_LENGTH, StoreKey, unit_id

MARKER = "jepa-cache-root.txt"
MARKER_TEXT = "This folder is a cache root of jepa-cache; without this file nothing is ever deleted in it.\n"
LOCK_FILE = "in-use.lock"
KINDS = {"tokens": ".zarr", "actions": ".zarr", "controls": ".parquet"}
SYSTEM_FILES = frozenset(
    {"lost+found", ".DS_Store", "Thumbs.db", "desktop.ini", ".Trashes", ".Spotlight-V100", ".fseventsd"}
)
"""What operating systems and file managers put into folders by themselves; a folder with nothing else counts as empty."""
MANIFESTS = "manifests"
OLD_FOLDER = "unfinished"  # earlier versions wrote there what an encode was going to make; nothing reads it any more
FINGERPRINT = re.compile(rf"[0-9a-f]{{{DIGEST_LENGTH}}}")  # of a recipe, a unit or a manifest


class RefusedError(ValueError):
    """An operation is refused as things are; nothing was changed."""


class RootInUseError(RefusedError):
    """An encode, repair or export is running on this root, or a clean-up is."""


@dataclass(frozen=True)
class CacheRoot:
    """Paths below one cache root; holds no times, hosts or absolute paths itself."""

    path: Path

    @property
    def name(self) -> str:
        """What users call it: its folder or URL."""
        return str(self.path)

    def check_writable(self) -> None:
        """Make the root, mark it, and try to write and lock a file in it, before hours of work; ValueError where that fails."""
        try:
            make_folder(self.path)
            if self.check_ours():
                with atomic_file(self.path / MARKER) as temporary:
                    temporary.write_text(MARKER_TEXT)
            with held_file(temporary_beside(self.path / "check")):
                pass
        except OSError as error:
            raise ValueError(
                f"the cache root {self.path} cannot be written ({error}); set cache.root or $JEPA_CACHE_HOME "
                "(a Lustre file system must be mounted with its option flock)"
            ) from error

    def check_ours(self) -> bool:
        """Whether a root still has no marker; ValueError for a folder that is not empty, and no root of the first release."""
        names = {path.name for path in self.path.iterdir() if not OURS.fullmatch(path.name)} - SYSTEM_FILES
        if MARKER in names:
            return False
        is_old = LOCK_FILE in names and names <= {*KINDS, MANIFESTS, OLD_FOLDER, LOCK_FILE}
        stores = (store for kind in KINDS for store in self.iter_stores(kind))
        if not names or is_old or any((store / STORE_FILE).is_file() for store in stores):
            return True
        raise ValueError(
            f"{self.path} is no cache root: it holds {', '.join(sorted(names)[:3])}, but not the file {MARKER}. What nothing "
            "needs is deleted in a cache root, so it has to be a new or empty folder: set cache.root or $JEPA_CACHE_HOME to one. "
            f"If it is a root that lost this file: touch {self.path / MARKER}"
        )

    def recipe_folders(self, kind: str) -> list[Path]:
        """The folders of one of `KINDS` that are named by a fingerprint; links are not followed."""
        return [path for path in _real_folders(self.path / kind) if FINGERPRINT.fullmatch(path.name)]

    def iter_stores(self, kind: str) -> Iterator[Path]:
        """What lies where a store or file of one of `KINDS` would, whole or not."""
        for folder in self.recipe_folders(kind):
            for path in sorted(folder.iterdir()):
                if path.suffix == KINDS[kind] and FINGERPRINT.fullmatch(path.stem) and not path.is_symlink():
                    yield path

    def store(self, key: StoreKey) -> Path:
        """Where a store lies."""
        return self.path / f"{key.kind}/{key.fingerprint}/{key.unit}{KINDS[key.kind]}"

    def tokens(self, fingerprint: str, unit_digest: str) -> Path:
        """Zarr group with the tokens, segments and step table of one unit under one recipe."""
        return self.store(StoreKey("tokens", fingerprint, unit_id(unit_digest)))

    def controls(self, source_fingerprint: str, unit_digest: str) -> Path:
        """Parquet file with the native-rate controls of one unit."""
        return self.store(StoreKey("controls", source_fingerprint, unit_id(unit_digest)))

    def actions(self, action_fingerprint: str, unit_digest: str) -> Path:
        """Zarr group with the actions and states at the steps of one unit in one action space."""
        return self.store(StoreKey("actions", action_fingerprint, unit_id(unit_digest)))

    def manifest(self, digest: str) -> Path:
        """The copy of a manifest that says which stores are still wanted."""
        return self.path / MANIFESTS / f"{digest}.json"

    def fetch(self, path: Path) -> bool:
        """Whether a store or file is published; all of it but the chunks of tokens is here afterwards."""
        return path.exists()

    def prefetch(self, paths: Iterable[Path]) -> list[str]:
        """Fetch many at the same time, so that `fetch` of each is quick afterwards; here there is nothing to do."""
        return []

    def find_store(self, store: Path) -> StoreFile | None:
        """What store.json of a published store says, after a check that all of it lies here; None where there is no store.

        StoreDamagedError where files are missing or cut, or it is the store of another path.
        """
        return check_identity(store, check_store(store)) if self.fetch(store) else None

    @contextmanager
    def pulled(self, paths: Sequence[Path], *, again: bool = False) -> Iterator[None]:
        """Hold whole stores and files on this machine for the block; with `again` pull also what is here.

        StoreDamagedError where one is not published.
        """
        for path in paths:
            if not self.fetch(path):
                raise StoreDamagedError(f"{self.name}/{path.relative_to(self.path)} is missing; {REMEDY}")
        yield

    def publish(self, path: Path) -> None:
        """Make a finished store or file known to everyone; in a folder it is already."""

    def remove(self, path: Path) -> None:
        """Remove a store or file, so that at every moment it is whole or gone."""
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)

    def num_bytes(self, path: Path) -> int:
        """Bytes of a store or file; what vanishes meanwhile counts nothing."""
        return measure_bytes(path)

    def modified_s(self, path: Path) -> float:
        """When a store or file was published, in seconds since 1970."""
        return (path / STORE_FILE if path.is_dir() else path).stat().st_mtime

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
        return try_claim(claim_path(store))

    def is_claimed(self, store: Path) -> bool:
        """Whether a living encoder is making a store."""
        return is_claimed(claim_path(store))

    @contextmanager
    def claimed(self, store: Path) -> Iterator[None]:
        """Claim the making of a store for the block, waiting for whoever holds it."""
        make_folder(store.parent)
        with held_file(claim_path(store)):
            yield

    def shared_lock(self) -> AbstractContextManager[None]:
        """Hold the root together with others, so that nothing is cleaned away; RootInUseError where a clean-up is running."""
        return self._locked_root("a `jepa-cache gc --delete` is running on it; wait until it has ended", shared=True)

    def exclusive_lock(self) -> AbstractContextManager[None]:
        """Hold the root alone, for a clean-up; RootInUseError where somebody else holds it."""
        return self._locked_root("an encode, repair, export or another clean-up is running on it; wait for its end")

    @contextmanager
    def _locked_root(self, reason: str, *, shared: bool = False) -> Iterator[None]:
        self.check_writable()
        descriptor = lock_file(self.path / LOCK_FILE, create=True, shared=shared)  # the kernel unlocks it at our death
        if descriptor is None:
            raise RootInUseError(f"the cache root {self.path} is in use: {reason}")
        try:
            yield
        finally:
            os.close(descriptor)

    def own_folders(self) -> list[Path]:
        """The folders of the root in which our writers put files; links are not followed."""
        manifests = [path for path in _real_folders(self.path) if path.name == MANIFESTS]
        return [self.path, *manifests, *(folder for kind in KINDS for folder in self.recipe_folders(kind))]

    def remove_stale_temporaries(self) -> list[Path]:
        """Remove what dead writers left in the root; return what is another user's. Cost: lists every folder."""
        return [path for folder in self.own_folders() for path in remove_stale_temporaries(folder)]


def _real_folders(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
