"""Whether everything that a manifest lists is in the root and unchanged: structure, digests, and every chunk's checksum."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.config.machine import state_folder
from jepa_cache.files import atomic_file
from jepa_cache.store.controls import ACTIONS, STATES, iter_controls
from jepa_cache.store.layout import (
    REMEDY,
    SEGMENTS_FILE,
    STORE_FILE,
    StoreDamagedError,
    StoreFile,
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
MAX_PROBLEMS = 10  # named of one store


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
    """Check the token stores, actions and controls of some units of a manifest, as `check_manifest` does."""
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
        findings, episodes = find_stale(self.root, part, entry), set()
        tokens, actions, controls = ((key, self.root.store(key)) for key in part.keys(entry))
        for (key, path), digest in ((tokens, entry.tokens_digest), (actions, entry.actions_digest)):
            findings += [Finding(key, path, problem) for problem in self._check_store(path, digest)]
        findings += [Finding(*controls, problem) for problem in self._check_controls(controls[1], episodes)]
        if not findings:  # of a store of the first release nothing else says of which unit it is
            others = set(read_table(tokens[1], SEGMENTS_FILE).column("episode").to_pylist()) - episodes
            problem = f"{tokens[1]} holds {min(others, default='')!r}, which is no episode of its unit: it is another unit's store"
            findings += [Finding(*tokens, f"{problem}; {REMEDY}")] if others else []
        return findings

    def _check_store(self, store: Path, digest: str) -> Iterator[str]:
        try:
            # Of a store in a bucket everything is read there, so that a damaged copy here never speaks for it.
            with self.root.pulled([store], again=True):
                found = check_identity(store, read_store_file(store))
                if found.digest != digest:
                    yield f"{store} is not the store that the manifest lists: its digest differs; {REMEDY}"
                    return
                arrays = {name.partition("/")[0] for name in found.files if "/" in name} - {ACTIONS, STATES}
                # Zarr shards, whose chunks carry checksums: nearly all bytes, and checked chunk by chunk.
                shards = [name for name in found.files if "/c/" in name and name.partition("/")[0] in arrays]
                problems = _collect(lambda name, file: check_size(store / name, file.num_bytes), found.files.items())
                small = [(name, file) for name, file in found.files.items() if name not in shards]
                problems = problems or _collect(lambda name, file: check_content(store / name, file.sha256), small)
                problems = problems or self._check_chunks(store, found, sorted(arrays))
                # A shard of another store is whole in itself; where chunks' checksums are not listed only its sha256 says so.
                if (self.scope.read_data or not found.crc32c) and not problems:
                    chosen = [shards[index] for index in self._choose(len(shards))]
                    problems = _collect(lambda name: check_content(store / name, found.files[name].sha256), zip(chosen))
                    self.on_bytes(sum(found.files[name].num_bytes for name in chosen))
                yield from problems[:MAX_PROBLEMS]
                if len(problems) > MAX_PROBLEMS:
                    yield f"{store}: and {len(problems) - MAX_PROBLEMS} more damaged chunks; {REMEDY}"
        except StoreDamagedError as error:
            yield str(error)

    def _check_chunks(self, store: Path, found: StoreFile, arrays: Sequence[str]) -> list[str]:
        problems: list[str] = []
        for name in arrays:
            num_bytes = sum(file.num_bytes for path, file in found.files.items() if path.startswith(f"{name}/c/"))
            try:
                with ArrayReader(store, name) as reader:
                    chunks = [[(chunk,)] for chunk in self._choose(reader.num_chunks)]
                    for problem in self.pool.map(partial(_collect, reader.check_chunk), chunks):
                        problems += problem
                        self.on_bytes(num_bytes // reader.num_chunks)
            except StoreDamagedError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))  # a damaged index is named once, not for each of its chunks

    def _choose(self, count: int) -> Sequence[int]:
        """All of so many numbers, or a random share of them, one at least."""
        if self.scope.share >= 1 or count == 0:
            return range(count)
        return sorted(self.random.sample(range(count), max(1, round(count * self.scope.share))))

    def _check_controls(self, path: Path, episodes: set[str]) -> Iterator[str]:
        try:
            with self.root.pulled([path], again=True):
                episodes.update(episode for episode, _ in iter_controls(path))
        except StoreDamagedError as error:
            yield str(error)


def _collect(check: Callable[..., object], items: Iterable[tuple[Any, ...]]) -> list[str]:
    """What a check says of each damaged item."""
    problems = []
    for item in items:
        try:
            check(*item)
        except StoreDamagedError as error:
            problems.append(str(error))
    return problems


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
