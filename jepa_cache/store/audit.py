"""Whether everything that a manifest lists is in the root and unchanged: structure, digests, and every chunk's checksum."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jepa_cache.config.machine import state_folder
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.damage import WAY_OUT, StoreDamagedError
from jepa_cache.store.layout import SEGMENTS_FILE, STORE_FILE
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import file_digest
from jepa_cache.store.root import CacheRoot, atomic_file
from jepa_cache.store.verify import (
    StoreFile,
    check_content,
    check_place,
    check_size,
    is_misread_version,
    read_store_file,
)

NUM_THREADS = 4  # a checksum holds the interpreter, reading does not
MAX_PROBLEMS = 10  # told of one store


class Finding(NamedTuple):
    """Something that is not as the manifest says: `problem` names the place, the episode and what to type next."""

    kind: str  # "tokens", "actions", "controls" or "manifest"
    place: Path
    fingerprint: str  # of the part's token recipe
    unit: str  # sha256
    problem: str


class Scope(NamedTuple):
    """How much is read.

    Attributes:
        share: Of the chunks, chosen at random; 1 reads all. Metadata and tables are always read.
        read_data: Compare every file with its sha256 as well, shards included; of stores whose store.json does not list the checksums
            of chunks that is done always.
        seed: Of the choice.
    """

    share: float = 1.0
    read_data: bool = False
    seed: int = 0


class Audit:
    """Checks the stores of a manifest one unit after the other; reads shards in threads."""

    def __init__(self, root: CacheRoot, scope: Scope, on_bytes: Callable[[int], None]) -> None:
        """Start nothing yet; the threads live as long as the `with` block.

        Args:
            root: Cache root.
            scope: How much is read.
            on_bytes: Is told after every shard how many bytes are through.
        """
        self._root, self._scope, self._on_bytes = root, scope, on_bytes
        self._random = random.Random(scope.seed)

    def __enter__(self) -> Audit:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def check(self, part: ManifestPart, entry: ManifestEntry) -> list[Finding]:
        """Check the token store, actions and controls of one unit.

        Raises:
            ValueError: When another version of the program wrote a store.
        """
        places = (
            ("tokens", self._root.tokens(part.fingerprint, entry.unit_digest), entry.tokens_digest),
            ("actions", self._root.actions(part.action_fingerprint, entry.unit_digest), entry.actions_digest),
        )
        controls, episodes = self._root.controls(part.source_fingerprint, entry.unit_digest), set()
        (_, tokens, _), (_, actions, _) = places

        def finding(kind: str, place: Path, problem: str) -> Finding:
            return Finding(kind, place, part.fingerprint, entry.unit_digest, problem)

        findings = []
        if stale := find_stale(self._root, tokens):
            # Controls and actions are of the same recording; the tokens, which tell, come last, as `repair` removes them.
            findings = [
                finding(*it, stale) for it in (("controls", controls), ("actions", actions), ("tokens", tokens))
            ]
        for kind, place, digest in places:
            findings += [finding(kind, place, problem) for problem in self._check_store(place, digest)]
        findings += [finding("controls", controls, problem) for problem in self._check_controls(controls, episodes)]
        if not findings:
            findings += [finding("tokens", tokens, problem) for problem in _check_episodes(tokens, episodes)]
        return findings

    def _check_store(self, store: Path, digest: str) -> Iterator[str]:
        try:
            # Of a store in a bucket everything is read there, so that a damaged copy here never speaks for it.
            with self._root.pulled([store], again=True):
                found = check_place(store, self._read_store_file(store, digest))
                if found.digest != digest:
                    yield f"{store} is not the store that the manifest lists: its digest differs; {WAY_OUT}"
                    return
                problems = self._check_files(store, found)
                yield from problems or self._check_chunks(store, found)
        except StoreDamagedError as error:
            yield str(error)

    def _read_store_file(self, store: Path, digest: str) -> StoreFile:
        try:
            return read_store_file(store)
        except StoreDamagedError:
            raise
        except ValueError as error:
            if is_misread_version(store, digest):
                raise StoreDamagedError(
                    f"{store}: the format version in its store.json is damaged; {WAY_OUT}"
                ) from error
            raise

    def _check_files(self, store: Path, found: StoreFile) -> list[str]:
        """Sizes of all files, and the content of all but the shards, which only `read_data` compares as well."""
        problems = []
        for name, file in found.files.items():
            try:
                check_size(store / name, file.num_bytes)
                if not is_shard(name):
                    check_content(store / name, file.sha256)
            except StoreDamagedError as error:
                problems.append(str(error))
        return problems

    def _check_chunks(self, store: Path, found: StoreFile) -> list[str]:
        problems: list[str] = []
        names = sorted({name.partition("/")[0] for name in found.files if is_sharded(name)})
        for name in names:
            try:
                with ArrayReader(store, name) as reader:
                    chosen = self._choose(reader.num_chunks)
                    for problem in self._pool.map(lambda chunk, reader=reader: _check_chunk(reader, chunk), chosen):
                        problems += problem
                        self._on_bytes(_chunk_bytes(found, name, reader.num_chunks))
            except StoreDamagedError as error:
                problems.append(str(error))
        problems = list(dict.fromkeys(problems))  # a damaged index is told of once, not for each of its chunks
        # A shard of another store is whole in itself; in stores that do not list their chunks' checksums only its sha256 tells.
        if (self._scope.read_data or not found.crc32c) and not problems:
            shards = [name for name in found.files if is_shard(name)]
            for index in self._choose(len(shards)):
                try:
                    check_content(store / shards[index], found.files[shards[index]].sha256)
                except StoreDamagedError as error:
                    problems.append(str(error))
                self._on_bytes(found.files[shards[index]].num_bytes)
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"{store}: and {len(problems) - MAX_PROBLEMS} more damaged chunks; {WAY_OUT}"]
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


def check_listed(manifest: Manifest, root: CacheRoot) -> list[Finding]:
    """Whether the root has its own copy of a manifest, without which `gc` does not know that its stores are wanted."""
    path = root.manifest(manifest.digest)
    if root.fetch(path) and path.read_bytes() == manifest.to_bytes():
        return []
    problem = f"{path} is missing or damaged, so a clean-up would take the stores away; run `jepa-cache repair`"
    return [Finding("manifest", path, "", "", problem)]


def note_stale(root: CacheRoot, store: Path, problem: str) -> None:
    """Remember that a token store does not hold what its encoder gives of its unit, though no byte of it has changed.

    Every `Audit` on this machine tells of it until there is another store, or `forget_stale`.
    """
    path = _stale_file(root, store)
    with atomic_file(path) as temporary:
        temporary.write_text(f"{file_digest(store / STORE_FILE)}\n{problem}")


def find_stale(root: CacheRoot, store: Path) -> str | None:
    """What `note_stale` remembered of this very store."""
    path = _stale_file(root, store)
    if not path.is_file() or not (store / STORE_FILE).is_file():
        return None
    digest, _, problem = path.read_text().partition("\n")
    return problem if digest == file_digest(store / STORE_FILE) else None


def forget_stale(root: CacheRoot, store: Path) -> None:
    """Take back `note_stale`: the store is made again."""
    _stale_file(root, store).unlink(missing_ok=True)


def _stale_file(root: CacheRoot, store: Path) -> Path:
    name = hashlib.sha256(f"{root.name} {store.relative_to(root.path)}".encode()).hexdigest()[:32]
    return state_folder() / "verify" / f"stale-{name}.txt"


def sign(root: CacheRoot, part: ManifestPart, entry: ManifestEntry) -> str:
    """Hash of names, sizes and times of one unit's files: the same while nobody touches or notes them."""
    tokens, actions = (
        root.tokens(part.fingerprint, entry.unit_digest),
        root.actions(part.action_fingerprint, entry.unit_digest),
    )
    stale = _stale_file(root, tokens).is_file()
    hasher = hashlib.sha256(f"{entry.tokens_digest} {entry.actions_digest}{' stale' if stale else ''}\n".encode())
    for place in (tokens, actions, root.controls(part.source_fingerprint, entry.unit_digest)):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                found = path.stat()
                hasher.update(f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode())
    return hasher.hexdigest()


def is_shard(name: str) -> bool:
    """Whether a file of a store is a zarr shard whose chunks carry checksums: large, and checked chunk by chunk."""
    return "/c/" in name and is_sharded(name)


def is_sharded(name: str) -> bool:
    """Whether a file belongs to an array of a token store; those of actions are not sharded."""
    return name.partition("/")[0] not in ("actions", "states") and "/" in name


def _check_episodes(store: Path, episodes: set[str]) -> Iterator[str]:
    """Whether a token store is of the unit of its controls; of a store of the first release nothing else tells."""
    others = set(read_table(store, SEGMENTS_FILE).column("episode").to_pylist()) - episodes
    if others:
        yield f"{store} holds {sorted(others)[0]!r}, which is no episode of its unit: it is another unit's store; {WAY_OUT}"


def _check_chunk(reader: ArrayReader, chunk: int) -> list[str]:
    try:
        reader.check_chunk(chunk)
    except StoreDamagedError as error:
        return [str(error)]
    return []


def _chunk_bytes(found: StoreFile, array: str, num_chunks: int) -> int:
    shards = sum(file.num_bytes for name, file in found.files.items() if name.startswith(f"{array}/c/"))
    return shards // max(1, num_chunks)
