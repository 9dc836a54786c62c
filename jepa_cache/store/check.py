"""Whether everything that a manifest lists is in the root, unchanged (sizes, digests, each chunk's checksum), and there only once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa_cache.store.controls import ACTIONS, STATES, iter_controls
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.layout import (
    REMEDY,
    SEGMENTS_FILE,
    STEPS_FILE,
    StoreDamagedError,
    check_content,
    check_identity,
    check_store,
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


def check_manifest(
    manifest: Manifest,
    root: CacheRoot,
    *,
    read_data: bool = False,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> list[Finding]:
    """Check everything that a manifest lists, and that the root has its own copy of it.

    With `read_data` whole shards are compared with their sha256, too, beside the checksum of every chunk. `on_bytes` is called with the bytes
    of shards that were checked since. ValueError where another version of the program wrote a store.
    """
    findings = check_units(manifest.stores, root, read_data=read_data, on_bytes=on_bytes)
    path = root.manifest(manifest.digest)
    if root.fetch(path) and path.read_bytes() == manifest.to_bytes():
        return findings
    problem = f"{path} is missing or damaged, so a clean-up would take the stores away; {REMEDY}"
    return [Finding(None, path, problem), *findings]


def check_units(
    units: Iterable[tuple[ManifestPart, ManifestEntry]],
    root: CacheRoot,
    *,
    read_data: bool = False,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> list[Finding]:
    """Check the token stores, actions and controls of some units, as `check_manifest` does; of each store the first damage is named."""

    def check_listed(store: Path, digest: str) -> None:
        found = check_identity(store, check_store(store), digest)
        arrays = {name.partition("/")[0] for name in found.files if "/" in name} - {ACTIONS, STATES}
        # Zarr shards, whose chunks carry checksums: nearly all bytes, and checked chunk by chunk.
        shards = [name for name in found.files if "/c/" in name and name.partition("/")[0] in arrays]
        for name in found.files.keys() - set(shards):
            check_content(store / name, found.files[name].sha256)
        for array in sorted(arrays):
            num_bytes = sum(found.files[name].num_bytes for name in shards if name.startswith(f"{array}/"))
            with ArrayReader(store, array) as reader:
                for _ in pool.map(reader.check_chunk, range(reader.num_chunks)):
                    on_bytes(num_bytes // reader.num_chunks)
        for name in shards if read_data else ():
            check_content(store / name, found.files[name].sha256)
            on_bytes(found.files[name].num_bytes)

    def check_unit(part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
        findings, episodes = list[Finding](), set[str]()
        for key, digest in part.listed(entry):
            path = root.store(key)
            try:
                # Of a store in a bucket everything is read there, so that a damaged copy here never speaks for it.
                with root.pulled([path], again=True):
                    if digest is None:
                        episodes.update(episode for episode, _ in iter_controls(path))
                    else:
                        check_listed(path, digest)
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


class Recording(NamedTuple):
    """One recording in store number `store` of a manifest: its key, and its runs of steps [start, stop)."""

    store: int
    key: str
    runs: tuple[tuple[int, int], ...]


def recall_copies(manifest: Manifest) -> str | None:
    """What `note_copies` was told of a manifest on this machine; None where nobody has looked."""
    name = f"copies:{manifest.digest}"
    return DigestTable().recall([name]).get(name)


def note_copies(manifest: Manifest, told: str) -> None:
    """Remember a sentence on the recordings of a manifest that are equal; an empty one where there are none."""
    DigestTable().note({f"copies:{manifest.digest}": told})


def find_equal(
    manifest: Manifest,
    root: CacheRoot,
    recordings: Iterable[Recording],
    read_rows: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> list[list[Recording]]:
    """The recordings of one part that are equal, in groups of two and more.

    Equal are those with the same actions, states and runs whose pictures have the same brightness at all steps. Tokens
    are not compared: the place in a batch may change their last bits.

    `read_rows` gives the actions [n, A] and states [n, S] of a store.

    Cost: actions and states of all stores, and the step tables of those that are alike in them.
    """
    alike: dict[bytes, list[Recording]] = {}
    for recording in recordings:
        hasher = hashlib.sha256(manifest.stores[recording.store][0].fingerprint.encode())
        _add_rows(hasher, recording, read_rows(recording.store))
        alike.setdefault(hasher.digest(), []).append(recording)

    @functools.lru_cache(maxsize=8)  # those that are alike often lie in one store
    def read_luma(store: int) -> list[np.ndarray]:
        part, entry = manifest.stores[store]
        steps = read_table(root.tokens(part.fingerprint, entry.unit_digest), STEPS_FILE)
        return [steps.column(name).to_numpy() for name in ("luma_mean", "luma_std")]

    equal: dict[tuple[bytes, bytes], list[Recording]] = {}
    for digest, some in alike.items():
        for recording in some if len(some) > 1 else ():
            hasher = hashlib.sha256()
            _add_rows(hasher, recording, read_luma(recording.store))
            equal.setdefault((digest, hasher.digest()), []).append(recording)
    return [some for some in equal.values() if len(some) > 1]


def _add_rows(hasher: hashlib._Hash, recording: Recording, columns: Iterable[np.ndarray]) -> None:
    for values in columns:
        for start, stop in recording.runs:
            hasher.update(f"{stop - start}\n".encode())
            hasher.update(np.ascontiguousarray(values[start:stop]))
