"""Whether everything that a manifest lists is in the root and unchanged: structure, digests, and every chunk's checksum."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jepa_cache.store.controls import ACTIONS, STATES, iter_controls
from jepa_cache.store.layout import (
    REMEDY,
    SEGMENTS_FILE,
    StoreDamagedError,
    check_content,
    check_identity,
    check_size,
    read_store_file,
)
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import StoreKey
from jepa_cache.store.root import CacheRoot

NUM_THREADS = 4  # a checksum holds the interpreter, reading does not


class Finding(NamedTuple):
    """Something that is not as the manifest says."""

    key: StoreKey | None  # None for the root's copy of the manifest
    path: Path  # of the store or file
    problem: str  # names the path, the episode and what to type next
    stale: bool = False  # no byte has changed since it was written, but it is not what its encoder gives of its unit


class Scope(NamedTuple):
    """How much is read: metadata and tables always."""

    share: float = 1.0  # of the chunks, chosen at random
    read_data: bool = False  # compare shards with their sha256, too
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
    rng = random.Random(scope.seed)

    def choose(count: int) -> Sequence[int]:
        """All of so many numbers, or a random share of them, one at least."""
        if scope.share >= 1 or count == 0:
            return range(count)
        return sorted(rng.sample(range(count), max(1, round(count * scope.share))))

    def check_store(store: Path, digest: str) -> None:
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
                for _ in pool.map(reader.check_chunk, choose(reader.num_chunks)):
                    on_bytes(num_bytes // reader.num_chunks)
        for name in (shards[index] for index in choose(len(shards))) if scope.read_data else ():
            check_content(store / name, found.files[name].sha256)
            on_bytes(found.files[name].num_bytes)

    def check_unit(part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
        findings, episodes = list[Finding](), set[str]()
        for key, digest in zip(part.keys(entry), (entry.tokens_digest, entry.actions_digest, None), strict=True):
            path = root.store(key)
            try:
                # Of a store in a bucket everything is read there, so that a damaged copy here never speaks for it.
                with root.pulled([path], again=True):
                    if digest is None:
                        episodes.update(episode for episode, _ in iter_controls(path))
                    else:
                        check_store(path, digest)
            except StoreDamagedError as error:
                findings.append(Finding(key, path, str(error)))
        if not findings:  # of a store of the first release nothing else says of which unit it is
            key = part.keys(entry)[0]
            path = root.store(key)
            if others := set(read_table(path, SEGMENTS_FILE).column("episode").to_pylist()) - episodes:
                problem = f"{path} holds {min(others)!r}, which is no episode of its unit: it is another unit's store"
                findings.append(Finding(key, path, f"{problem}; {REMEDY}"))
        return findings

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify") as pool:
        return [finding for part, entry in units for finding in check_unit(part, entry)]
