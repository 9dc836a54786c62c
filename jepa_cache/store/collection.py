"""What lies in a cache root, what of it any manifest or unfinished encode needs, and the removal of the rest."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from jepa_cache.files import TEMPORARY_PREFIX, is_abandoned
from jepa_cache.store.manifest import Manifest, read_manifest
from jepa_cache.store.recipe import unit_id
from jepa_cache.store.records import read_record
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.usage import (
    FOLDER,
    LOCK_FILE,
    RefusedError,
    WantedPart,
    held_alone,
    list_unfinished,
    unfinished_path,
)

SUFFIXES = {"tokens": ".zarr", "actions": ".zarr", "controls": ".parquet"}
CARD_FILES = ("README.md", "provenance.json", "SHA256SUMS")  # of an exported root
MIN_PREFIX = 6


class Key(NamedTuple):
    """Names a store: "tokens", "actions" or "controls", the fingerprint of its recipe, and the id of its unit."""

    kind: str
    fingerprint: str
    unit: str


class Listing(NamedTuple):
    """A manifest, or the record of an unfinished encode: what keeps stores from being removed.

    Attributes:
        digest: In its file name.
        path: Its file.
        manifest: None for an unfinished encode, and where it cannot be read.
        dataset: Preset name.
        needs: The stores that it lists.
        written: Day on which its file was last written, by the file system.
        problem: Why it cannot be read.
    """

    digest: str
    path: Path
    manifest: Manifest | None
    dataset: str
    needs: frozenset[Key]
    written: date
    problem: str = ""


@dataclass
class Contents:
    """Everything in a cache root: stores with their bytes, what lists them, and what is neither."""

    listings: list[Listing]
    stores: dict[Key, tuple[Path, int]]
    temporaries: list[tuple[Path, int]]  # of dead writers
    unknown: list[Path]  # never removed
    claimed: set[Key]  # being made just now
    abandoned: dict[str, int]  # uploads that were never finished, with their bytes

    def needed(self, forgotten: Collection[str] = ()) -> set[Key]:
        """What the listings need, without the forgotten ones."""
        return {key for listing in self.listings if listing.digest not in forgotten for key in listing.needs}

    def unneeded(self, forgotten: Collection[str] = ()) -> dict[Key, tuple[Path, int]]:
        """The stores that nothing lists and nobody is making."""
        needed = self.needed(forgotten) | self.claimed
        return {key: place for key, place in self.stores.items() if key not in needed}

    def num_bytes(self, keys: Iterable[Key]) -> int:
        """Bytes of those of the stores that are there."""
        return sum(self.stores[key][1] for key in keys if key in self.stores)


def list_root(root: CacheRoot) -> Contents:
    """List a cache root. Cost: a stat of every file."""
    root.refresh()
    contents = Contents(list_manifests(root) + _list_unfinished(root), {}, [], [], set(), root.find_abandoned())
    for entry in _entries(root.path):
        if entry.name.startswith(TEMPORARY_PREFIX):
            _add_temporary(entry, contents)
        elif entry.name in SUFFIXES:
            for folder in _entries(entry):
                _list_recipe(root, entry.name, folder, contents)
        elif entry.name in ("manifests", FOLDER):
            for path in _entries(entry):
                if path.name.startswith(TEMPORARY_PREFIX):
                    _add_temporary(path, contents)
                elif path.suffix != ".json":
                    contents.unknown.append(path)
        elif entry.name not in (LOCK_FILE, *CARD_FILES):
            contents.unknown.append(entry)
    return contents


def list_manifests(root: CacheRoot) -> list[Listing]:
    """Every manifest of the root, by digest."""
    found = []
    for path in sorted((root.path / "manifests").glob("*.json")):
        if path.name.startswith(TEMPORARY_PREFIX):
            continue
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            found.append(Listing(path.stem, path, None, "", frozenset(), _day(path), str(error)))
            continue
        parts = [
            WantedPart(
                part.fingerprint,
                part.action_fingerprint,
                part.source_fingerprint,
                tuple(entry.unit_digest for entry in part.entries),
            )
            for part in manifest.parts
        ]
        found.append(Listing(path.stem, path, manifest, manifest.dataset, _keys(parts), _day(path)))
    return found


def find_listings(contents: Contents, prefixes: Iterable[str]) -> list[Listing]:
    """The listings that a user names by the beginning of their digests.

    Raises:
        ValueError: A prefix is too short, or fits none or several.
    """
    chosen = []
    for prefix in prefixes:
        found = [listing for listing in contents.listings if listing.digest.startswith(prefix)]
        if len(prefix) < MIN_PREFIX or len(found) != 1:
            raise ValueError(
                f"a manifest is named by {MIN_PREFIX} or more digits of its digest, which fit one alone; {prefix!r} fits "
                f"{len(found)}. `jepa-cache gc` lists them"
            )
        chosen += found
    return chosen


def remove_unneeded(root: CacheRoot, forgotten: Collection[str] = ()) -> Contents:
    """Remove what no manifest and no unfinished encode needs, and the temporaries of dead writers.

    Args:
        root: Cache root.
        forgotten: Digests of manifests and unfinished encodes that are removed first.

    Returns:
        What the root held before.

    Raises:
        RootInUseError: An encode is running.
        RefusedError: A manifest that is not forgotten cannot be read, so it is not known what it needs.
    """
    with held_alone(root):
        contents = list_root(root)
        check_readable(contents, forgotten)
        for listing in contents.listings:
            if listing.digest in forgotten:
                root.remove(listing.path)
        for path, _ in contents.unneeded(forgotten).values():
            root.remove(path)
        root.remove_stale_temporaries()
        for name in root.find_abandoned():
            root.remove_abandoned(name)
        for kind in SUFFIXES:
            for folder in _entries(root.path / kind):
                with suppress(OSError):  # not empty
                    folder.rmdir()
    return contents


def check_readable(contents: Contents, forgotten: Collection[str] = ()) -> None:
    """Refuse to go on where it is not known what a manifest needs.

    Raises:
        RefusedError: Naming the manifest.
    """
    for listing in contents.listings:
        if listing.problem and listing.digest not in forgotten:
            raise RefusedError(
                f"what the manifest {listing.digest} needs is not known ({listing.problem}), so nothing is removed. Use the "
                f"version of the program that wrote it, or drop it with --forget {listing.digest}"
            )


def _list_recipe(root: CacheRoot, kind: str, folder: Path, contents: Contents) -> None:
    if not folder.is_dir():
        contents.unknown.append(folder)
        return
    for path in _entries(folder):
        if path.name.startswith(TEMPORARY_PREFIX):
            _add_temporary(path, contents)
        elif path.suffix == SUFFIXES[kind] and path.is_dir() == (kind != "controls"):
            key = Key(kind, folder.name, path.stem)
            contents.stores[key] = (path, _measure(path))
            if root.is_claimed(path):
                contents.claimed.add(key)
        else:
            contents.unknown.append(path)


def _list_unfinished(root: CacheRoot) -> list[Listing]:
    paths = {found: unfinished_path(root, found.digest) for found in list_unfinished(root)}
    return [
        Listing(found.digest, path, None, found.dataset, _keys(found.parts), _day(path))
        for found, path in paths.items()
    ]


def _keys(parts: Iterable[WantedPart]) -> frozenset[Key]:
    return frozenset(
        Key(kind, fingerprint, unit_id(unit))
        for part in parts
        for kind, fingerprint in (
            ("tokens", part.fingerprint),
            ("actions", part.action_fingerprint),
            ("controls", part.source_fingerprint),
        )
        for unit in part.units
    )


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _add_temporary(path: Path, contents: Contents) -> None:
    if is_abandoned(path):
        contents.temporaries.append((path, _measure(path)))


def _measure(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; what vanishes meanwhile counts nothing. Of what is published in a bucket, there."""
    record = read_record(path)
    if record is not None:
        return sum(file.num_bytes for file in record.files.values())
    files = (
        [path] if not path.is_dir() else [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    )
    num_bytes = 0
    for file in files:
        with suppress(FileNotFoundError):
            num_bytes += file.stat().st_size
    return num_bytes


def _day(path: Path) -> date:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
    except FileNotFoundError:
        return datetime.now(UTC).date()
