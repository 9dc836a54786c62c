"""A cache root in a bucket, s3:// or gs://: stores are pushed and pulled as files of a local folder, which alone is read.

    tokens/<fingerprint>/<unit>.zarr.attempt-<random>/...      the files, of one writer alone
    tokens/<fingerprint>/<unit>.zarr.commit.json               names the attempt; written last and only if there is none

A store exists when its commit object does, so nothing half-written is ever read and the files of two writers never mix.
The folder is laid out like any cache root. Tables and metadata are pulled when a store is requested, its chunks of tokens
when a command reads them; chunks beyond $JEPA_CACHE_LOCAL_GB go, of the least recently used stores first.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from jepa_cache.files import (
    atomic_file,
    held_file,
    list_temporaries,
    make_folder,
    measure_bytes,
    remove_stale_temporaries,
    temporary_beside,
)
from jepa_cache.store.layout import (
    REMEDY,
    STORE_FILE,
    FileRecord,
    StoreDamagedError,
    StoreFile,
    check_identity,
    check_store,
    read_store_file,
)
from jepa_cache.store.objects import Bucket, Listing, ObjectStoreError
from jepa_cache.store.recipe import canonical_json, file_digest, inner_path
from jepa_cache.store.root import KINDS, MANIFESTS, MARKER, CacheRoot

Result = TypeVar("Result")

COMMIT_VERSION = 1
COMMIT_SUFFIX = ".commit.json"
ATTEMPT = ".attempt-"
OURS = re.compile(r".+?/[0-9a-f]{32}\.\w+\.attempt-[0-9a-f]{16}/")  # an upload, nobody else's
# Longer than any upload of one unit takes; what is younger and named by no commit may be another writer's at work.
ABANDONED_AFTER = timedelta(days=1)
STORES_AT_ONCE = 16  # a request waits for the network, not for this machine
DEFAULT_LOCAL_GB = 20.0


class Commit(NamedTuple):
    """A published store: the prefix of its objects, its files by their names there, and the tag of the commit object."""

    attempt: str
    files: dict[str, FileRecord]
    tag: str | None = None

    def document(self) -> dict[str, Any]:
        """What a commit object holds."""
        files = {name: file._asdict() for name, file in self.files.items()}
        return {"attempt": self.attempt, "commit_version": COMMIT_VERSION, "files": files}

    def chunks(self) -> list[str]:
        """The files that hold chunks of the arrays of a token store, which are nearly all of its bytes."""
        return [name for name in self.files if "/c/" in name] if self.attempt.startswith("tokens/") else []


def resolve_cache_root(configured: str | None, base: Path) -> CacheRoot:
    """The root from params (`cache.root`), else $JEPA_CACHE_HOME, else ~/.cache/jepa-cache.

    A folder, absolute or relative to `base`, or a URL, whose local folder is $XDG_CACHE_HOME/jepa-cache-remote (default
    ~/.cache) / BUCKET-HASH / root. ObjectStoreError for a URL that is not s3://bucket/prefix or gs://bucket/prefix.
    """
    chosen = configured or os.environ.get("JEPA_CACHE_HOME") or "~/.cache/jepa-cache"
    if not re.match(r"\w+:/", chosen):  # also s3:/bucket, which would be a folder called "s3:"
        return CacheRoot((base / Path(chosen).expanduser()).resolve())
    bucket = Bucket(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa-cache-remote"
    identity = hashlib.sha256(f"{bucket.endpoint or ''} {bucket.url}".encode()).hexdigest()[:12]
    for name in ("root", "locks", "holds"):
        make_folder(home / f"{bucket.name}-{identity}" / name)
    return BucketRoot(home / f"{bucket.name}-{identity}/root", bucket)


@dataclass(frozen=True)
class BucketRoot(CacheRoot):
    """A cache root whose `path` holds what was pulled from a bucket, and stores that are not pushed yet.

    Beside it lie `records`, the commit of each store and file that was pulled or pushed; what has none was made here.
    """

    bucket: Bucket

    def __reduce__(self) -> tuple[Callable[[str, Path], CacheRoot], tuple[str, Path]]:
        return resolve_cache_root, (self.bucket.url, Path())  # in the folder of the machine that it goes to

    @property
    def name(self) -> str:
        """What users call it: its URL."""
        return self.bucket.url

    def check_writable(self) -> None:
        """Try to write here and in the bucket, before hours of work."""
        super().check_writable()
        local_bytes()
        key = f".check-{secrets.token_hex(6)}"
        self.bucket.put(key, b"jepa-cache checks that it can write here")
        self.bucket.get(key)
        self.bucket.delete([key])

    def check_ours(self) -> bool:
        """Whether the marker is missing here; the name of the folder is of this program alone."""
        return not (self.path / MARKER).is_file()

    def fetch(self, path: Path) -> bool:
        """Whether a store or file is published in the bucket; if so, all of it but the chunks of tokens is here afterwards.

        A store that was finished here and not pushed, because the machine stopped, is pushed now. Cost: one listing of the
        stores of a recipe, and what is not here yet.
        """
        with self._locked(path):
            try:
                return self._fetch(path)
            except StoreDamagedError:
                self._listings.pop(path.parent, None)  # another machine may have made it again since
                return self._fetch(path)

    def prefetch(self, paths: Iterable[Path]) -> None:
        """Fetch many at the same time; `fetch` of each then says what is damaged."""

        def fetch(path: Path) -> None:
            with suppress(StoreDamagedError):
                self.fetch(path)

        _each(fetch, paths)

    def find_store(self, store: Path) -> StoreFile | None:
        """What store.json of a published store says; the bucket lists all its files with their sizes."""
        return check_identity(store, read_store_file(store)) if self.fetch(store) else None

    @contextmanager
    def pulled(self, paths: Sequence[Path], *, again: bool = False) -> Iterator[None]:
        """Hold whole stores and files on this machine for the block; other stores make room for them before it begins.

        StoreDamagedError where one is not published, or objects are missing or changed. ObjectStoreError where they do not fit into
        $JEPA_CACHE_LOCAL_GB; nothing is pulled then.
        """

        def pull(path: Path) -> None:
            with self._locked(path):
                if (commit := self._read_record(path)) is None:
                    raise StoreDamagedError(f"{self.name}/{self._key(path)} was removed meanwhile; {REMEDY}")
                self._download(path, commit, commit.files, again=again)
                os.utime(path)  # by which the least recently used store is known

        for path, found in zip(paths, _each(self.fetch, paths), strict=True):
            if not found:
                raise StoreDamagedError(f"{self.name}/{self._key(path)} is missing; {REMEDY}")
        hold = temporary_beside(self._folder("holds") / "stores")
        with held_file(hold):  # by whose lock others know that this process lives
            self._make_room(paths, hold)
            _each(pull, paths)
            yield

    def publish(self, path: Path) -> None:
        """Push a finished store or file, unless another writer did: then that one's is here afterwards."""
        with self._locked(path):
            if (commit := self._read_commit(self._key(path))) is None:
                self._push(path)
            else:
                self._take_over(path, commit)

    def remove(self, path: Path) -> None:
        """Remove a store or file, in the bucket and here: first its commit, so that nobody finds half of it."""
        key, commit = self._key(path), None
        with self._locked(path):
            with suppress(StoreDamagedError):  # what a damaged commit named is abandoned, and removed as such
                commit = self._read_commit(key)
            self.bucket.delete([key + COMMIT_SUFFIX])
            if commit is not None:
                self.bucket.delete(self.bucket.list(commit.attempt))
            self._listings.pop(path.parent, None)
            self._forget(path)

    def modified_s(self, path: Path) -> float:
        """When a store or file was committed, by the bucket's clock; of what is not published, when it was made here."""
        found = self._listings.get(path.parent, {}).get(self._key(path) + COMMIT_SUFFIX)
        return super().modified_s(path) if found is None else found["last_modified"].timestamp()

    def num_bytes(self, path: Path) -> int:
        """Bytes of a store or file in the bucket; of what is not published, here."""
        record = self._read_record(path)
        return super().num_bytes(path) if record is None else sum(file.num_bytes for file in record.files.values())

    def refresh(self) -> list[str]:
        """Fetch all that is published, and remove here what no longer is; says what is damaged in the bucket."""

        def fetch(key: str) -> str:
            try:
                self.fetch(self.path / key)
            except StoreDamagedError as error:
                return str(error)
            return ""

        self._listings.clear()
        records = self._folder("records")
        names = [path.relative_to(records).as_posix() for path in records.rglob(f"*{COMMIT_SUFFIX}")]
        names += [key for key in self._list_all() if key.endswith(COMMIT_SUFFIX)]
        return [text for text in _each(fetch, sorted({name.removesuffix(COMMIT_SUFFIX) for name in names})) if text]

    def find_abandoned(self) -> dict[str, int]:
        """Uploads that no commit names, untouched for a day, with their sizes in bytes."""
        objects, named, uploads = self._list_all(), set(), {}
        for name, found in objects.items():
            if match := OURS.match(name):
                uploads.setdefault(match[0].rstrip("/"), []).append(found)
            elif name.endswith(COMMIT_SUFFIX):
                with suppress(StoreDamagedError):
                    commit = self._read_commit(name.removesuffix(COMMIT_SUFFIX), found["e_tag"])
                    named |= {commit.attempt} if commit else set()
        oldest = datetime.now(UTC) - ABANDONED_AFTER
        return {
            name: sum(part["size"] for part in parts)
            for name, parts in sorted(uploads.items())
            if name not in named and max(part["last_modified"] for part in parts) < oldest
        }

    def remove_abandoned(self, name: str) -> None:
        """Remove one of `find_abandoned`."""
        self.bucket.delete(self.bucket.list(name))

    @functools.cached_property
    def _listings(self) -> dict[Path, Listing]:
        # Of folders that were looked at; what is missing there is looked for again, what is there is relied on.
        return {}

    def _list_all(self) -> Listing:
        return {key: found for kind in (*KINDS, MANIFESTS) for key, found in self.bucket.list(kind).items()}

    def _key(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _folder(self, name: str) -> Path:
        return self.path.parent / name

    def _record_path(self, path: Path) -> Path:
        return self._folder("records") / f"{self._key(path)}{COMMIT_SUFFIX}"

    def _fetch(self, path: Path) -> bool:
        key = self._key(path)
        with self._locked(path.parent):
            if path.parent not in self._listings:
                self._listings[path.parent] = self.bucket.list(self._key(path.parent))
            objects = self._listings[path.parent]
        listed = objects.get(key + COMMIT_SUFFIX, {}).get("e_tag")
        commit = self._read_commit(key, listed)
        if commit is not None:
            known = listed is not None and commit.tag == listed
            self._check_arrived(commit, objects if known else self.bucket.list(commit.attempt))
            self._take_over(path, commit)
        elif path.exists() and self._read_record(path) is None:
            self._push(path)
        else:
            self._forget(path)
            return False
        return True

    def _read_commit(self, key: str, tag: str | None = None) -> Commit | None:
        """The commit of a store or file; without a request where the record has this tag."""
        record = self._read_record(self.path / key)
        if record is not None and tag is not None and record.tag == tag:
            return record
        found = self.bucket.get(key + COMMIT_SUFFIX)
        return None if found is None else _parse_commit(*found, f"{self.name}/{key}{COMMIT_SUFFIX}", key)

    def _read_record(self, path: Path) -> Commit | None:
        """The commit of which a store or file was pulled or pushed."""
        copy = self._record_path(path)
        with suppress(FileNotFoundError, KeyError, TypeError, ValueError):  # no truth but a copy of it: fetched again
            document = orjson.loads(copy.read_bytes())
            return _parse_commit(orjson.dumps(document["commit"]), document["tag"], str(copy), self._key(path))
        return None

    def _check_arrived(self, commit: Commit, objects: Listing) -> None:
        for name, file in commit.files.items():
            found, where = objects.get(f"{commit.attempt}/{name}"), f"{self.name}/{commit.attempt}/{name}"
            if found is None:
                raise StoreDamagedError(f"{where} is missing; {REMEDY}")
            if found["size"] != file.num_bytes:
                raise StoreDamagedError(f"{where} has {found['size']} bytes, not {file.num_bytes}; {REMEDY}")

    def _take_over(self, path: Path, commit: Commit) -> None:
        """Have all of a published store here but its chunks; what is here and not of this commit is removed."""
        name = STORE_FILE if STORE_FILE in commit.files else path.name  # store.json lists all other files
        copy, record = _path_in(path, commit, name), self._read_record(path)
        if not copy.is_file() or file_digest(copy) != commit.files[name].sha256:
            if record == commit:
                copy.unlink(missing_ok=True)
            else:
                self._forget(path)
        if record != commit:
            with atomic_file(self._record_path(path)) as temporary:  # first: what is here in part is not taken for new
                temporary.write_bytes(canonical_json({"commit": commit.document(), "tag": commit.tag}))
        small = commit.files.keys() - set(commit.chunks())
        self._download(path, commit, sorted(small, key=lambda other: other != name))

    def _download(self, path: Path, commit: Commit, names: Iterable[str], *, again: bool = False) -> None:
        for name in names:
            copy, file, key = _path_in(path, commit, name), commit.files[name], f"{commit.attempt}/{name}"
            if not again and copy.is_file() and copy.stat().st_size == file.num_bytes:
                continue
            try:
                with atomic_file(copy) as target:
                    if self.bucket.download(key, file.num_bytes, target) != file.sha256:
                        raise StoreDamagedError(f"{self.name}/{key} has changed (sha256 differs); {REMEDY}")
            except FileNotFoundError as error:
                raise StoreDamagedError(f"{self.name}/{key} is missing; {REMEDY}") from error

    def _push(self, path: Path) -> None:
        key = self._key(path)
        attempt = f"{key}{ATTEMPT}{secrets.token_hex(8)}"
        mine = Commit(attempt, _list_files(path))
        for name in mine.files:
            self.bucket.put(f"{attempt}/{name}", _path_in(path, mine, name))
        self._check_arrived(mine, self.bucket.list(attempt))
        self.bucket.put(key + COMMIT_SUFFIX, canonical_json(mine.document()), new=True)
        # Whoever won is read back: a request that was repeated after a dropped answer says "there is one" of our own.
        commit = self._read_commit(key)
        if commit is None:
            raise StoreDamagedError(f"{self.name}/{key}{COMMIT_SUFFIX} vanished after it was written; {REMEDY}")
        if commit.attempt != attempt:
            self.bucket.delete(self.bucket.list(attempt))
        self._take_over(path, commit)
        self._make_room()

    def _forget(self, path: Path) -> None:
        """Remove a store or file here; the record goes last, so that nothing that was pulled looks like something new."""
        super().remove(path)
        self._record_path(path).unlink(missing_ok=True)

    def _make_room(self, wanted: Sequence[Path] = (), hold: Path | None = None) -> None:
        """Remove chunks of the least recently used stores, until those that commands read and those kept are within the limit.

        `wanted` are stores that this process is going to read, which others read in the file `hold`.
        """
        with self._locked(self._folder("holds")):
            if hold is not None:
                hold.write_text("\n".join(map(self._key, wanted)))
            remove_stale_temporaries(self._folder("holds"))
            keys = set()
            for path in list_temporaries(self._folder("holds")):
                with suppress(FileNotFoundError):  # its command has ended just now
                    keys |= set(path.read_text().splitlines())
            held, limit = sum(self._chunk_bytes(self.path / key) for key in keys), local_bytes()
            if wanted and held > limit:
                raise ObjectStoreError(
                    f"this command, and others that run now, read {held / 1e9:.3g} GB of tokens from {self.name}, which must lie on this "
                    f"machine; $JEPA_CACHE_LOCAL_GB permits {limit / 1e9:.3g}. If the disk of {self.path} has the room, set "
                    f"JEPA_CACHE_LOCAL_GB={held / 1e9 + 1:.0f}; else use fewer recordings"
                )
            # What has no record is not pushed yet.
            stores = [path for path in self.iter_stores("tokens") if self._record_path(path).is_file()]
            kept = {path: sum(map(measure_bytes, path.glob("*/c"))) for path in stores if self._key(path) not in keys}
            excess = held + sum(kept.values()) - limit
            for store in sorted(kept, key=lambda path: path.stat().st_mtime):
                for chunks in store.glob("*/c") if excess > 0 else ():
                    shutil.rmtree(chunks)
                excess -= kept[store]

    def _chunk_bytes(self, path: Path) -> int:
        commit = self._read_record(path) or Commit("", {})
        return sum(commit.files[name].num_bytes for name in commit.chunks())

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """One thread of one process of this machine at a time."""
        with held_file(self._folder("locks") / hashlib.sha256(str(path).encode()).hexdigest()[:32]):
            yield


def local_bytes() -> int:
    """Limit of the token chunks kept on this machine: $JEPA_CACHE_LOCAL_GB, else 20 GB."""
    given = os.environ.get("JEPA_CACHE_LOCAL_GB") or DEFAULT_LOCAL_GB
    with suppress(ValueError):
        if 0 <= float(given) < 1e9:
            return int(float(given) * 1e9)
    raise ObjectStoreError(
        f"$JEPA_CACHE_LOCAL_GB must be gigabytes for token chunks kept here, such as 50; got {given!r}"
    )


def _parse_commit(content: bytes, tag: str | None, where: str, key: str) -> Commit:
    try:
        document = orjson.loads(content)
        if document["commit_version"] != COMMIT_VERSION:
            raise ValueError(f"version {document['commit_version']}, this program reads {COMMIT_VERSION}")
        files = {inner_path(name): FileRecord(**file) for name, file in document["files"].items()}
        commit = Commit(document["attempt"], files, tag)
        # Objects are deleted by this name, whoever wrote the commit.
        if not OURS.fullmatch(commit.attempt + "/") or not commit.attempt.startswith(key + ATTEMPT):
            raise ValueError(f"attempt {commit.attempt!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamagedError(f"{where} is no valid commit ({error!r}); delete it and {REMEDY}") from error
    return commit


def _list_files(path: Path) -> dict[str, FileRecord]:
    """Files of a finished store, each compared with what its store.json says of it; of a single file, itself."""
    files, own = ({}, path) if path.is_file() else (check_store(path, read_data=True).files, path / STORE_FILE)
    return {**files, own.name: FileRecord(own.stat().st_size, file_digest(own))}


def _path_in(path: Path, commit: Commit, name: str) -> Path:
    return path if list(commit.files) == [path.name] else path / name


def _each(work: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
    """Do the same with each, many at the same time."""
    with ThreadPoolExecutor(STORES_AT_ONCE, thread_name_prefix="bucket") as pool:
        return list(pool.map(work, items))
