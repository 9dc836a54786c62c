"""Whether everything that a manifest lists is in the root and unchanged: structure, digests, and every chunk's checksum."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jepa_cache.config.paths import state_folder
from jepa_cache.files import atomic_file
from jepa_cache.store.controls import ACTIONS, STATES, iter_controls
from jepa_cache.store.layout import (
    REMEDY,
    SEGMENTS_FILE,
    STORE_FILE,
    StoreDamagedError,
    check_content,
    check_identity,
    check_size,
    read_store_file,
)
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import StoreKey, file_digest
from jepa_cache.store.root import CacheRoot

NUM_THREADS = 4  # a checksum holds the interpreter, reading does not


class Finding(NamedTuple):
    """Something that is not as the manifest says."""

    key: StoreKey | None  # None for the root's copy of the manifest
    path: Path  # of the store or file
    problem: str  # names the path, the episode and what to type next


class Scope(NamedTuple):
    """How much is read: metadata and tables always."""

    share: float = 1.0  # of the chunks, chosen at random
    read_data: bool = (
        False  # compare shards with their sha256, too; always where store.json lists no checksums of chunks
    )
    seed: int = 0  # of the choice


def check_manifest(
    manifest: Manifest, root: CacheRoot, scope: Scope, on_bytes: Callable[[int], object] = lambda _: None
) -> list[Finding]:
    """Check everything that a manifest lists, and that the root has its own copy of it.

    `on_bytes` is called with the bytes of shards that were checked since. ValueError where another version of the program wrote a store.
    """
    findings = check_units(manifest.stores, root, scope, on_bytes)
    path = root.manifest(manifest.digest)
    if root.fetch(path) and path.read_bytes() == manifest.to_bytes():
        return findings
    problem = f"{path} is missing or damaged, so a clean-up would take the stores away; {REMEDY}"
    return [Finding(None, path, problem), *findings]


def check_units(
    units: Iterable[tuple[ManifestPart, ManifestEntry]],
    root: CacheRoot,
    scope: Scope,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> list[Finding]:
    """Check the token stores, actions and controls of some units, as `check_manifest` does; of each store the first damage is named."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify") as pool:
        check = _Check(root, scope, random.Random(scope.seed), on_bytes, pool)
        return [finding for part, entry in units for finding in check.unit(part, entry)]


class _Check(NamedTuple):
    """Checks units one after the other, and reads the shards of each in threads."""

    root: CacheRoot
    scope: Scope
    random: random.Random
    on_bytes: Callable[[int], object]
    pool: ThreadPoolExecutor

    def unit(self, part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
        findings, tokens_and_actions = find_stale(self.root, part, entry), (entry.tokens_digest, entry.actions_digest)
        episodes: set[str] = set()
        for key, digest in zip(part.keys(entry), (*tokens_and_actions, None), strict=True):
            path = self.root.store(key)
            try:
                # Of a store in a bucket everything is read there, so that a damaged copy here never speaks for it.
                with self.root.pulled([path], again=True):
                    if digest is None:
                        episodes.update(episode for episode, _ in iter_controls(path))
                    else:
                        self._check_store(path, digest)
            except StoreDamagedError as error:
                findings.append(Finding(key, path, str(error)))
        if not findings:  # of a store of the first release nothing else says of which unit it is
            key = part.keys(entry)[0]
            path = self.root.store(key)
            if others := set(read_table(path, SEGMENTS_FILE).column("episode").to_pylist()) - episodes:
                problem = f"{path} holds {min(others)!r}, which is no episode of its unit: it is another unit's store"
                findings.append(Finding(key, path, f"{problem}; {REMEDY}"))
        return findings

    def _check_store(self, store: Path, digest: str) -> None:
        found = check_identity(store, read_store_file(store))
        if found.digest != digest:
            raise StoreDamagedError(f"{store} is not the store that the manifest lists: its digest differs; {REMEDY}")
        arrays = {name.partition("/")[0] for name in found.files if "/" in name} - {ACTIONS, STATES}
        # Zarr shards, whose chunks carry checksums: nearly all bytes, and checked chunk by chunk.
        shards = [name for name in found.files if "/c/" in name and name.partition("/")[0] in arrays]
        for name, file in found.files.items():
            check_size(store / name, file.num_bytes)
        for name in found.files.keys() - set(shards):
            check_content(store / name, found.files[name].sha256)
        for array in sorted(arrays):
            num_bytes = sum(found.files[name].num_bytes for name in shards if name.startswith(f"{array}/"))
            with ArrayReader(store, array) as reader:
                for _ in self.pool.map(reader.check_chunk, self._choose(reader.num_chunks)):
                    self.on_bytes(num_bytes // reader.num_chunks)
        # A shard of another store is whole in itself; where chunks' checksums are not listed only its sha256 says so.
        if self.scope.read_data or not found.crc32c:
            for name in (shards[index] for index in self._choose(len(shards))):
                check_content(store / name, found.files[name].sha256)
                self.on_bytes(found.files[name].num_bytes)

    def _choose(self, count: int) -> Sequence[int]:
        """All of so many numbers, or a random share of them, one at least."""
        if self.scope.share >= 1 or count == 0:
            return range(count)
        return sorted(self.random.sample(range(count), max(1, round(count * self.scope.share))))


def note_stale(root: CacheRoot, store: Path, problem: str) -> None:
    """Remember that a token store does not hold what its encoder gives of its unit, though no byte of it has changed.

    Every check on this machine says so until there is another store, or `forget_stale`.
    """
    with atomic_file(_stale_file(root, store)) as temporary:
        temporary.write_text(f"{file_digest(store / STORE_FILE)}\n{problem}")


def find_stale(root: CacheRoot, part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
    """What `note_stale` remembered of the very token store of a unit; its actions and controls are of the same recording."""
    keys = part.keys(entry)
    store = root.store(keys[0])
    note = _stale_file(root, store)
    digest, _, problem = note.read_text().partition("\n") if note.is_file() else ("", "", "")
    if not digest or not (store / STORE_FILE).is_file() or digest != file_digest(store / STORE_FILE):
        return []
    # The tokens, by which it is known, come last: a repair removes the stores in this order.
    return [Finding(key, root.store(key), problem) for key in reversed(keys)]


def forget_stale(root: CacheRoot, store: Path) -> None:
    """Take back `note_stale`: the store is made again."""
    _stale_file(root, store).unlink(missing_ok=True)


def _stale_file(root: CacheRoot, store: Path) -> Path:
    name = hashlib.sha256(f"{root.name} {store.relative_to(root.path)}".encode()).hexdigest()[:32]
    return state_folder() / "verify" / f"stale-{name}.txt"
