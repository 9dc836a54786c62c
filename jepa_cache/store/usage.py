"""Who is using a cache root, so that a clean-up never takes a store away from a running or an interrupted encode.

Running encodes share a lock on the file `in-use.lock`, which the kernel lets go when they die. What an encode is going to
make is written under `<root>/unfinished` until its manifest is there: the stores of an encode that was killed half-way are
wanted, though no manifest lists them yet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from jepa_cache.files import atomic_file, lock_file, remove_stale_temporaries
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.recipe import DIGEST_LENGTH, canonical_json
from jepa_cache.store.root import FINGERPRINT, LOCK_FILE, CacheRoot

FOLDER = "unfinished"


class RefusedError(ValueError):
    """Something that must not be done as things are; nothing was changed."""


class RootInUseError(RefusedError):
    """An encode, repair or export is running on this root, or a clean-up is."""


class WantedPart(NamedTuple):
    """The stores of one part that an encode is going to make: their three fingerprints and the sha256 of its units."""

    fingerprint: str
    action_fingerprint: str
    source_fingerprint: str
    units: tuple[str, ...]


class UnfinishedEncode(NamedTuple):
    """What an encode that has not written its manifest yet is going to make; `digest` names its file."""

    digest: str
    dataset: str
    parts: tuple[WantedPart, ...]


@contextmanager
def in_use(root: CacheRoot) -> Iterator[None]:
    """Hold the root together with any number of others, so that nothing is cleaned away meanwhile.

    Raises:
        RootInUseError: A clean-up is running.
        ValueError: The root cannot be made or written.
    """
    root.check_writable()
    with _held(root, "a `jepa-cache gc --delete` is running on it; wait until it has ended", shared=True):
        yield


@contextmanager
def held_alone(root: CacheRoot) -> Iterator[None]:
    """Hold the root alone, for a clean-up.

    Raises:
        RootInUseError: Somebody else holds it.
        ValueError: It is no cache root, or cannot be written.
    """
    root.check_writable()
    with _held(root, "an encode, repair, export or another clean-up is running on it; wait for its end"):
        yield


def announce(root: CacheRoot, dataset: str, parts: Sequence[WantedPart]) -> None:
    """Say what an encode is going to make, unless all of it is there already."""
    if all(root.fetch(root.tokens(part.fingerprint, unit)) for part in parts for unit in part.units):
        return
    content = canonical_json({"dataset": dataset, "parts": [part._asdict() for part in parts]})
    path = root.path / FOLDER / f"{hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]}.json"
    if root.fetch(path) and path.read_bytes() == content:
        return
    remove_stale_temporaries(path.parent)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    root.publish(path)


def settle(root: CacheRoot, manifest: Manifest, unreadable: Collection[tuple[str, str]] = ()) -> None:
    """Forget the unfinished encodes whose stores this manifest lists; call it when the manifest lies in the root.

    Args:
        root: Cache root.
        manifest: Lists what was encoded.
        unreadable: Token fingerprint and digest of units that cannot be read: nothing will come of them.
    """
    root.publish(root.manifest(manifest.digest))
    listed = {(part.fingerprint, entry.unit_digest) for part, entry in manifest.stores} | set(unreadable)
    for path in _record_paths(root):
        try:
            unfinished = _read_record(path)
        except ValueError as error:
            print(f"note: {error}")
            continue
        if unfinished and all((part.fingerprint, unit) in listed for part in unfinished.parts for unit in part.units):
            with suppress(PermissionError):  # another user's: until it goes it keeps what this manifest keeps anyway
                root.remove(path)


def list_unfinished(root: CacheRoot) -> list[UnfinishedEncode]:
    """The encodes that were begun on this root and have not written their manifest yet.

    Raises:
        ValueError: A record cannot be read; says which.
    """
    return [record for path in _record_paths(root) if (record := _read_record(path)) is not None]


def unfinished_path(root: CacheRoot, digest: str) -> Path:
    """The record of an unfinished encode."""
    return root.path / FOLDER / f"{digest}.json"


def _record_paths(root: CacheRoot) -> list[Path]:
    return [path for path in sorted((root.path / FOLDER).glob("*.json")) if FINGERPRINT.fullmatch(path.stem)]


def _read_record(path: Path) -> UnfinishedEncode | None:
    try:
        document = json.loads(path.read_bytes())
        parts = tuple(WantedPart(**{**part, "units": tuple(part["units"])}) for part in document["parts"])
        return UnfinishedEncode(path.stem, document["dataset"], parts)
    except FileNotFoundError:
        return None  # that encode has ended just now
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it says which stores an encode still wants, so `jepa-cache gc` removes nothing. "
            "Delete it if no encode is running"
        ) from error


@contextmanager
def _held(root: CacheRoot, reason: str, *, shared: bool = False) -> Iterator[None]:
    descriptor = lock_file(root.path / LOCK_FILE, create=True, shared=shared)
    if descriptor is None:
        raise RootInUseError(f"the cache root {root.path} is in use: {reason}")
    try:
        yield
    finally:
        os.close(descriptor)
