"""Whether everything that a manifest lists is in the root and unchanged: structure, digests, and every chunk's checksum."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
    is_misread_version,
    read_store_file,
)
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import StoreKey, file_digest
from jepa_cache.store.root import CacheRoot

NUM_THREADS = 4  # a checksum holds the interpreter, reading does not
MAX_PROBLEMS = 10  # told of one store


class Finding(NamedTuple):
    """Something that is not as the manifest says.

    Attributes:
        key: Of the store; None for the root's copy of the manifest.
        path: Of the store or file.
        problem: Names the path, the episode and what to type next.
    """

    key: StoreKey | None
    path: Path
    problem: str


class Scope(NamedTuple):
    """How much is read.

    Attributes:
        share: Of the chunks, chosen at random; 1 reads all. Metadata and tables are always read.
        read_data: Compare every file with its sha256 as well, shards included; of stores whose store.json does not list the
            checksums of chunks that is done always.
        seed: Of the choice.
    """

    share: float = 1.0
    read_data: bool = False
    seed: int = 0


def check_manifest(
    manifest: Manifest, root: CacheRoot, scope: Scope, on_bytes: Callable[[int], object] = lambda _: None
) -> list[Finding]:
    """Check everything that a manifest lists, and that the root has its own copy of it.

    Args:
        manifest: What to check.
        root: Cache root.
        scope: How much is read.
        on_bytes: Is told how many more bytes of shards are checked.

    Raises:
        ValueError: When another version of the program wrote a store.
    """
    path = root.manifest(manifest.digest)
    findings = check_units(manifest.stores, root, scope, on_bytes)
    if root.fetch(path) and path.read_bytes() == manifest.to_bytes():
        return findings
    return [
        Finding(None, path, f"{path} is missing or damaged, so a clean-up would take the stores away; {REMEDY}"),
        *findings,
    ]


def check_units(
    units: Iterable[tuple[ManifestPart, ManifestEntry]],
    root: CacheRoot,
    scope: Scope,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> list[Finding]:
    """Check the token stores, actions and controls of some units of a manifest, as `check_manifest` does."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify") as pool:
        check = _Check(root, scope, on_bytes, pool)
        return [finding for part, entry in units for finding in check.unit(part, entry)]


class _Check:
    """Checks units one after the other, and reads the shards of each in threads."""

    def __init__(
        self, root: CacheRoot, scope: Scope, on_bytes: Callable[[int], object], pool: ThreadPoolExecutor
    ) -> None:
        self._root, self._scope, self._on_bytes, self._pool = root, scope, on_bytes, pool
        self._random = random.Random(scope.seed)

    def unit(self, part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
        tokens, actions, controls = part.keys(entry)
        findings, episodes = find_stale(self._root, part, entry), set()
        for key, digest in ((tokens, entry.tokens_digest), (actions, entry.actions_digest)):
            path = self._root.store(key)
            findings += [Finding(key, path, problem) for problem in self._check_store(path, digest)]
        path = self._root.store(controls)
        findings += [Finding(controls, path, problem) for problem in self._check_controls(path, episodes)]
        if not findings:
            path = self._root.store(tokens)
            findings += [Finding(tokens, path, problem) for problem in _check_episodes(path, episodes)]
        return findings

    def _check_store(self, store: Path, digest: str) -> Iterator[str]:
        try:
            # Of a store in a bucket everything is read there, so that a damaged copy here never speaks for it.
            with self._root.pulled([store], again=True):
                found = check_identity(store, _read_store_file(store, digest))
                if found.digest != digest:
                    yield f"{store} is not the store that the manifest lists: its digest differs; {REMEDY}"
                    return
                arrays = {name.partition("/")[0] for name in found.files if "/" in name} - {ACTIONS, STATES}
                # Zarr shards, whose chunks carry checksums: nearly all bytes, and checked chunk by chunk.
                shards = [name for name in found.files if "/c/" in name and name.partition("/")[0] in arrays]
                problems = _check_files(store, found, without=set(shards)) or self._check_chunks(store, found, arrays)
                # A shard of another store is whole in itself; where chunks' checksums are not listed only its sha256 tells.
                if (self._scope.read_data or not found.crc32c) and not problems:
                    problems = self._check_shards(store, found, shards)
                yield from problems[:MAX_PROBLEMS]
                if len(problems) > MAX_PROBLEMS:
                    yield f"{store}: and {len(problems) - MAX_PROBLEMS} more damaged chunks; {REMEDY}"
        except StoreDamagedError as error:
            yield str(error)

    def _check_chunks(self, store: Path, found: StoreFile, arrays: Iterable[str]) -> list[str]:
        problems: list[str] = []
        for name in sorted(arrays):
            num_bytes = sum(file.num_bytes for path, file in found.files.items() if path.startswith(f"{name}/c/"))
            try:
                with ArrayReader(store, name) as reader:
                    chosen = self._choose(reader.num_chunks)
                    for problem in self._pool.map(lambda chunk, reader=reader: _check_chunk(reader, chunk), chosen):
                        problems += problem
                        self._on_bytes(num_bytes // reader.num_chunks)
            except StoreDamagedError as error:
                problems.append(str(error))
        return list(dict.fromkeys(problems))  # a damaged index is told of once, not for each of its chunks

    def _check_shards(self, store: Path, found: StoreFile, shards: Sequence[str]) -> list[str]:
        problems = []
        for name in (shards[index] for index in self._choose(len(shards))):
            try:
                check_content(store / name, found.files[name].sha256)
            except StoreDamagedError as error:
                problems.append(str(error))
            self._on_bytes(found.files[name].num_bytes)
        return problems

    def _choose(self, count: int) -> Sequence[int]:
        """All of so many numbers, or a random share of them, one at least."""
        if self._scope.share >= 1 or count == 0:
            return range(count)
        return sorted(self._random.sample(range(count), max(1, round(count * self._scope.share))))

    def _check_controls(self, path: Path, episodes: set[str]) -> Iterator[str]:
        try:
            with self._root.pulled([path], again=True):
                episodes.update(episode for episode, _ in iter_controls(path))
        except StoreDamagedError as error:
            yield str(error)


def note_stale(root: CacheRoot, store: Path, problem: str) -> None:
    """Remember that a token store does not hold what its encoder gives of its unit, though no byte of it has changed.

    Every check on this machine tells of it until there is another store, or `forget_stale`.
    """
    with atomic_file(_stale_file(root, store)) as temporary:
        temporary.write_text(f"{file_digest(store / STORE_FILE)}\n{problem}")


def find_stale(root: CacheRoot, part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
    """What `note_stale` remembered of the very token store of a unit; its actions and controls are of the same recording."""
    keys = part.keys(entry)
    store = root.store(keys[0])
    note = _stale_file(root, store)
    if not note.is_file() or not (store / STORE_FILE).is_file():
        return []
    digest, _, problem = note.read_text().partition("\n")
    if digest != file_digest(store / STORE_FILE):
        return []
    # The tokens, which tell, come last: a repair removes the stores in this order.
    return [Finding(key, root.store(key), problem) for key in reversed(keys)]


def forget_stale(root: CacheRoot, store: Path) -> None:
    """Take back `note_stale`: the store is made again."""
    _stale_file(root, store).unlink(missing_ok=True)


def _stale_file(root: CacheRoot, store: Path) -> Path:
    name = hashlib.sha256(f"{root.name} {store.relative_to(root.path)}".encode()).hexdigest()[:32]
    return state_folder() / "verify" / f"stale-{name}.txt"


def _read_store_file(store: Path, digest: str) -> StoreFile:
    try:
        return read_store_file(store)
    except StoreDamagedError:
        raise
    except ValueError as error:
        if is_misread_version(store, digest):
            raise StoreDamagedError(f"{store}: the format version in its store.json is damaged; {REMEDY}") from error
        raise


def _check_files(store: Path, found: StoreFile, without: set[str]) -> list[str]:
    """Sizes of all files, and the content of all but some."""
    problems = []
    for name, file in found.files.items():
        try:
            check_size(store / name, file.num_bytes)
            if name not in without:
                check_content(store / name, file.sha256)
        except StoreDamagedError as error:
            problems.append(str(error))
    return problems


def _check_episodes(store: Path, episodes: set[str]) -> Iterator[str]:
    """Whether a token store is of the unit of its controls; of a store of the first release nothing else tells."""
    others = set(read_table(store, SEGMENTS_FILE).column("episode").to_pylist()) - episodes
    if others:
        yield f"{store} holds {sorted(others)[0]!r}, which is no episode of its unit: it is another unit's store; {REMEDY}"


def _check_chunk(reader: ArrayReader, chunk: int) -> list[str]:
    try:
        reader.check_chunk(chunk)
    except StoreDamagedError as error:
        return [str(error)]
    return []
