"""What lies in a cache root, what of it any manifest or unfinished encode needs, and the removal of the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from jepa_cache.files import is_abandoned, list_temporaries, measure_bytes
from jepa_cache.store.layout import STORE_FILE
from jepa_cache.store.manifest import Manifest, read_manifest
from jepa_cache.store.recipe import unit_id
from jepa_cache.store.root import FINGERPRINT, KINDS, LOCK_FILE, MARKER, CacheRoot
from jepa_cache.store.usage import (
    RefusedError,
    WantedPart,
    held_alone,
    list_unfinished,
    unfinished_path,
)

KNOWN = (
    LOCK_FILE,
    MARKER,
    "lost+found",
    "README.md",
    "provenance.json",
    "SHA256SUMS",
)  # the last three of an exported root
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
    kept: list[Path]  # temporaries of another user, which may not be removed
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


def list_root(root: CacheRoot, own: Manifest | None = None) -> Contents:
    """List a cache root. Cost: a stat of every file.

    Args:
        root: Cache root.
        own: The manifest of a checkout, whose stores are needed though the root may have lost its copy.

    Raises:
        ValueError: It is no cache root.
    """
    root.refresh()
    root.check_ours()
    contents = Contents(list_manifests(root) + _list_unfinished(root), {}, [], [], set(), [], root.find_abandoned())
    if own is not None and own.digest not in {listing.digest for listing in contents.listings}:
        contents.listings.append(_list_manifest(root.manifest(own.digest), own))
    ours = set(root.own_folders())
    for folder in root.own_folders():
        temporaries = list_temporaries(folder)
        contents.temporaries += [(path, measure_bytes(path)) for path in temporaries if is_abandoned(path)]
        ours |= set(temporaries)
    for kind in KINDS:
        for path in root.iter_stores(kind):
            # A folder without store.json may be anybody's: a writer of ours publishes none.
            if (path / STORE_FILE).is_file() if kind != "controls" else path.is_file():
                key = Key(kind, path.parent.name, path.stem)
                contents.stores[key] = (path, root.num_bytes(path))
                ours.add(path)
                if root.is_claimed(path):
                    contents.claimed.add(key)
    ours |= {listing.path for listing in contents.listings}
    for folder in [*root.own_folders(), *(root.path / kind for kind in KINDS)]:
        if not folder.is_symlink():
            contents.unknown += [path for path in _entries(folder) if path not in ours and not _is_known(root, path)]
    return contents


def list_manifests(root: CacheRoot) -> list[Listing]:
    """Every manifest of the root, by digest."""
    found = []
    for path in sorted((root.path / "manifests").glob("*.json")):
        if not FINGERPRINT.fullmatch(path.stem):
            continue
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            found.append(Listing(path.stem, path, None, "", frozenset(), _day(path), str(error)))
            continue
        found.append(_list_manifest(path, manifest))
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


def remove_unneeded(root: CacheRoot, forgotten: Collection[str] = (), own: Manifest | None = None) -> Contents:
    """Remove what no manifest and no unfinished encode needs, and the temporaries of dead writers.

    Args:
        root: Cache root.
        forgotten: Digests of manifests and unfinished encodes that are removed first.
        own: As in `list_root`.

    Returns:
        What the root held before.

    Raises:
        RootInUseError: An encode is running.
        RefusedError: A manifest that is not forgotten cannot be read, so it is not known what it needs.
    """
    with held_alone(root):
        contents = list_root(root, own)
        check_readable(contents, forgotten)
        for listing in contents.listings:
            if listing.digest in forgotten:
                root.remove(listing.path)
        for path, _ in contents.unneeded(forgotten).values():
            root.remove(path)
        root.remove_stale_temporaries()
        contents.kept = [path for path, _ in contents.temporaries if path.exists()]
        contents.temporaries = [(path, size) for path, size in contents.temporaries if path not in contents.kept]
        for name in root.find_abandoned():
            root.remove_abandoned(name)
        for kind in KINDS:
            for folder in root.recipe_folders(kind):
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


def _list_manifest(path: Path, manifest: Manifest) -> Listing:
    parts = [
        WantedPart(
            part.fingerprint,
            part.action_fingerprint,
            part.source_fingerprint,
            tuple(entry.unit_digest for entry in part.entries),
        )
        for part in manifest.parts
    ]
    return Listing(path.stem, path, manifest, manifest.dataset, _keys(parts), _day(path))


def _is_known(root: CacheRoot, path: Path) -> bool:
    return path.parent == root.path and (path.name in KNOWN or (path.name in KINDS and not path.is_symlink()))


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


def _day(path: Path) -> date:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
    except FileNotFoundError:
        return datetime.now(UTC).date()
