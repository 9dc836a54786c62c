"""Fetching a committed store: everything but its token chunks, which are read in ranges when they are needed."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from jepa_cache.files import atomic_file, publish_folder, remove_stale_temporaries, temporary_folder
from jepa_cache.store import layout
from jepa_cache.store.commits import WAY_OUT, Commit
from jepa_cache.store.damage import StoreDamagedError
from jepa_cache.store.objects import Bucket

TOKEN_CHUNKS = f"{layout.TOKENS}/c"  # the bulk of a store


def download_store(bucket: Bucket, commit: Commit, place: Path) -> None:
    """Fetch a store or file to where nothing is, checked by sha256; it is there whole or not at all.

    Raises:
        StoreDamagedError: Naming the object that is missing or changed.
        ObjectStoreError: When the bucket cannot be read.
    """
    remove_stale_temporaries(place.parent)
    if list(commit.files) == [place.name]:
        with atomic_file(place) as path:
            _download_file(bucket, commit, place.name, path)
        return
    with temporary_folder(place) as folder:
        for name in commit.files:
            if not _stays_remote(name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _download_file(bucket, commit, name, folder / name)
        publish_folder(folder, place)


def is_here(place: Path, commit: Commit) -> bool:
    """Whether all that is fetched of a store is here, with its size."""
    for name, file in commit.files.items():
        path = place if place.is_file() else place / name
        if not _stays_remote(name) and not (path.is_file() and path.stat().st_size == file.num_bytes):
            return False
    return True


def drop_chunks(place: Path) -> None:
    """Remove token chunks that are in the bucket by now."""
    if (place / TOKEN_CHUNKS).is_dir():
        shutil.rmtree(place / TOKEN_CHUNKS)


def _stays_remote(name: str) -> bool:
    return name.startswith(f"{TOKEN_CHUNKS}/")


def _download_file(bucket: Bucket, commit: Commit, name: str, path: Path) -> None:
    file, key = commit.files[name], f"{commit.attempt}/{name}"
    digest = hashlib.sha256()
    try:
        with path.open("wb") as out:
            for part in bucket.iter_parts(key, file.num_bytes):
                digest.update(part)
                out.write(part)
    except (FileNotFoundError, EOFError) as error:
        raise StoreDamagedError(f"{bucket.url}/{key} is missing or cut ({error}); {WAY_OUT}") from error
    if digest.hexdigest() != file.sha256:
        raise StoreDamagedError(f"{bucket.url}/{key} has changed (sha256 differs); {WAY_OUT}")
