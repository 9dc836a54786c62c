"""What a cache root holds, what of it a manifest reaches, and the removal of the rest, in the way of `git gc`.

A store is kept while a manifest in the root or the one of this checkout lists it, while somebody is making it, and, since an
encode that was interrupted has written no manifest yet, while its recipe made a store within the days of grace.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jepa_cache.files import is_abandoned, list_temporaries, measure_bytes
from jepa_cache.store.layout import STORE_FILE
from jepa_cache.store.manifest import Manifest, read_manifest
from jepa_cache.store.recipe import StoreKey
from jepa_cache.store.root import (
    FINGERPRINT,
    KINDS,
    LOCK_FILE,
    MARKER,
    OLD_FOLDER,
    SYSTEM_FILES,
    CacheRoot,
    RefusedError,
)

GRACE_DAYS = 14.0  # as git keeps what nothing reaches
EXPORT_FILES = ("README.md", "configs", "provenance.json", "SHA256SUMS")
KNOWN = (LOCK_FILE, MARKER, OLD_FOLDER, *SYSTEM_FILES, *EXPORT_FILES)
MIN_PREFIX = 6


@dataclass
class Contents:
    """Everything in a cache root."""

    temporaries: dict[str, int]  # of dead writers, with their bytes; also uploads that were never finished
    manifests: dict[str, Manifest | str]  # by digest; of one that cannot be read, why
    needs: dict[str, set[StoreKey]]  # stores that each manifest lists, by its digest
    stores: dict[StoreKey, int] = field(default_factory=dict)  # with their bytes
    claimed: set[StoreKey] = field(default_factory=set)  # those that are being made just now
    recent: set[StoreKey] = field(default_factory=set)  # those whose recipe made a store within the days of grace
    unknown: list[Path] = field(default_factory=list)  # files of others, which are never removed
    kept: list[Path] = field(default_factory=list)  # temporaries of another user, which may not be removed

    def needed(self, without: Collection[str] = ()) -> set[StoreKey]:
        """What the manifests list, without those of some digests."""
        return {key for digest, keys in self.needs.items() if digest not in without for key in keys}

    def unneeded(self, forgotten: Collection[str] = ()) -> dict[StoreKey, int]:
        """The stores that may be removed; what a forgotten manifest alone listed has no days of grace."""
        dropped = {key for digest in forgotten for key in self.needs.get(digest, ())}
        kept = self.needed(forgotten) | self.claimed | (self.recent - dropped)
        return {key: size for key, size in self.stores.items() if key not in kept}

    def num_bytes(self, keys: Iterable[StoreKey]) -> int:
        """Bytes of those of the stores that are there."""
        return sum(self.stores.get(key, 0) for key in keys)

    def unreadable(self, forgotten: Collection[str] = ()) -> list[tuple[str, str]]:
        """Digest and reason of every manifest of which it is not known what it needs, but those forgotten."""
        return [(key, it) for key, it in self.manifests.items() if isinstance(it, str) and key not in forgotten]


def list_root(root: CacheRoot, own: Manifest | None = None, *, grace_days: float = GRACE_DAYS) -> Contents:
    """List a cache root, ValueError where it is none. Cost: a stat of every file.

    `own` is the manifest of a checkout, whose stores are needed though the root may have lost its copy.
    """
    root.refresh()
    root.check_ours()
    kinds = [root.path / kind for kind in KINDS if not (root.path / kind).is_symlink()]
    manifests = list_manifests(root)
    ours = {root.path, *kinds, *map(root.manifest, manifests)}
    manifests |= {own.digest: own} if own is not None else {}
    listed = {digest: it.stores if isinstance(it, Manifest) else () for digest, it in manifests.items()}
    needs = {digest: {key for part, entry in it for key in part.keys(entry)} for digest, it in listed.items()}
    contents = Contents(dict(root.find_abandoned()), manifests, needs)
    for folder in root.own_folders():
        temporaries = list_temporaries(folder)
        ours |= {folder, *temporaries}
        contents.temporaries |= {str(path): measure_bytes(path) for path in filter(is_abandoned, temporaries)}
    newest: dict[Path, float] = {}
    for kind in KINDS:
        for path in root.iter_stores(kind):
            # A folder without store.json may be anybody's: a writer of ours publishes none.
            if not (path if kind == "controls" else path / STORE_FILE).is_file():
                continue
            key = StoreKey(kind, path.parent.name, path.stem)
            ours.add(path)
            contents.stores[key] = root.num_bytes(path)
            contents.claimed |= {key} if root.is_claimed(path) else set()
            with suppress(FileNotFoundError):  # removed just now
                newest[path.parent] = max(newest.get(path.parent, 0.0), root.modified_s(path))
    since = time.time() - grace_days * 86400
    contents.recent = {key for key in contents.stores if newest.get(root.store(key).parent, since) > since}
    for folder in sorted({*root.own_folders(), *kinds}):
        if folder.is_dir():
            known = {folder / name for name in KNOWN} if folder == root.path else set()
            contents.unknown += sorted(set(folder.iterdir()) - ours - known)
    return contents


def list_manifests(root: CacheRoot) -> dict[str, Manifest | str]:
    """Every manifest of the root by its digest; why it cannot be read in place of one that cannot."""
    found: dict[str, Manifest | str] = {}
    for path in sorted((root.path / "manifests").glob("*.json")):
        if FINGERPRINT.fullmatch(path.stem):
            try:
                found[path.stem] = read_manifest(path)
            except ValueError as error:
                found[path.stem] = str(error)
    return found


def find_listings(contents: Contents, prefixes: Iterable[str]) -> set[str]:
    """Digests of the manifests that a user names by their beginning; ValueError for one that is too short, or fits none or several."""
    chosen = set()
    for prefix in prefixes:
        found = [digest for digest in contents.needs if digest.startswith(prefix)]
        if len(prefix) < MIN_PREFIX or len(found) != 1:
            raise ValueError(
                f"a manifest is named by {MIN_PREFIX} or more digits of its digest, which fit one alone; {prefix!r} fits "
                f"{len(found)}. `jepa-cache gc` lists them"
            )
        chosen |= set(found)
    return chosen


def remove_unneeded(
    root: CacheRoot, forgotten: Collection[str] = (), own: Manifest | None = None, *, grace_days: float = GRACE_DAYS
) -> Contents:
    """Remove what no manifest needs, the manifests `forgotten` and dead writers' temporaries; return what the root held before.

    RefusedError while an encode is running, or where a manifest cannot be read, so that it is not known what it needs.
    """
    with root.exclusive_lock():
        contents = list_root(root, own, grace_days=grace_days)
        for digest, problem in contents.unreadable(forgotten):
            raise RefusedError(
                f"what the manifest {digest} needs is not known ({problem}), so nothing is removed. Use the "
                f"version of the program that wrote it, or drop it with --forget {digest}"
            )
        for key in contents.unneeded(forgotten):
            root.remove(root.store(key))
        for digest in forgotten:  # last: after a kill the same command finds what is left
            root.remove(root.manifest(digest))
        contents.kept = root.remove_stale_temporaries()
        for path in contents.kept:
            contents.temporaries.pop(str(path), None)
        for name in root.find_abandoned():
            root.remove_abandoned(name)
        for folder in (folder for kind in KINDS for folder in root.recipe_folders(kind)):
            with suppress(OSError):  # not empty
                folder.rmdir()
    return contents
