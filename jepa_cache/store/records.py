"""What this machine knows of the stores of a bucket, and how the files that are not here are read.

A mirror is a folder with `root`, laid out as any cache root, and `records`: for every place that was fetched a copy of its
commit and the URL. So whoever has the path of a store, and nothing else, can read all of it.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from jepa_cache.files import atomic_file
from jepa_cache.store.blocks import BlockCache, RemoteFile
from jepa_cache.store.commits import COMMIT_SUFFIX, Commit, format_commit, parse_commit
from jepa_cache.store.objects import Bucket
from jepa_cache.store.recipe import canonical_json

ROOT_FOLDER = "root"  # of the mirror: laid out as any cache root, with nothing else in it
RECORDS_FOLDER = "records"  # beside it: what is known of each place, under the same relative path
BLOCKS_FOLDER = "blocks"

DEFAULT_LOCAL_GB = 20.0


def note_path(place: Path, suffix: str = COMMIT_SUFFIX) -> Path:
    """File with a note on a store or file of a mirror.

    Raises:
        ValueError: `place` is not in a mirror.
    """
    root = _find_root(place)
    if root is None:
        raise ValueError(f"{place} is not in the mirror of an object store")
    return root.parent / RECORDS_FOLDER / f"{place.relative_to(root)}{suffix}"


def read_record(place: Path) -> Commit | None:
    """The commit of which a place was fetched; None when it was not, or is in no mirror."""
    found = _read(place)
    return None if found is None else found[0]


def write_record(place: Path, commit: Commit, url: str) -> None:
    """Note what a place is of, before it is fetched."""
    document = {"commit": json.loads(format_commit(commit.attempt, commit.files)), "tag": commit.tag, "url": url}
    with atomic_file(note_path(place)) as path:
        path.write_bytes(canonical_json(document))


def open_remote(path: Path, *, use_kept: bool = True) -> RemoteFile | None:
    """The file of a fetched store that stays in the bucket; None when `path` is no such file.

    Args:
        path: Where the file would be if it was here.
        use_kept: Read what is kept here of it, and keep what is read; False asks the bucket each time.

    Raises:
        ValueError: When $JEPA_CACHE_LOCAL_GB is no number of gigabytes.
    """
    root = _find_root(path)
    if root is None:
        return None
    for place in path.relative_to(root).parents:
        found = _read(root / place)
        if found is not None:
            commit, url = found
            name = path.relative_to(root / place).as_posix()
            if name not in commit.files:
                return None
            cache = _open_cache(root.parent / BLOCKS_FOLDER, local_bytes()) if use_kept else None
            return RemoteFile(_open_bucket(url), f"{commit.attempt}/{name}", commit.files[name].num_bytes, cache)
    return None


def local_bytes() -> int:
    """Bound of the token chunks kept on this machine: $JEPA_CACHE_LOCAL_GB, else 20 GB.

    Raises:
        ValueError: When it is no number of gigabytes.
    """
    given = os.environ.get("JEPA_CACHE_LOCAL_GB") or DEFAULT_LOCAL_GB
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise ValueError(
            f"$JEPA_CACHE_LOCAL_GB must be gigabytes for token chunks kept here, such as 50; got {given!r}"
        )
    return int(gigabytes * 1e9)


def _find_root(path: Path) -> Path | None:
    """The mirror that a path lies in."""
    for parent in path.parents:
        if parent.name == ROOT_FOLDER and (parent.parent / RECORDS_FOLDER).is_dir():
            return parent
    return None


def _read(place: Path) -> tuple[Commit, str] | None:
    if _find_root(place) is None:
        return None
    path = note_path(place)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        document = json.loads(content)
        return parse_commit(canonical_json(document["commit"]), document["tag"], str(path)), document["url"]
    except (KeyError, TypeError, ValueError):
        return None  # not the truth but a copy of it: fetched again


# One of each in a process, whatever number of files is open: connections and the count of kept bytes are shared.
_open_bucket = functools.cache(Bucket)
_open_cache = functools.cache(BlockCache)
