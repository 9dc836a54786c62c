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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from jepa_cache.files import (
    atomic_file,
    file_digest,
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
from jepa_cache.store.recipe import canonical_json, inner_path
from jepa_cache.store.root import KINDS, MANIFESTS, MARKER, CacheRoot

Result = TypeVar("Result")
Listing = dict[str, dict[str, Any]]  # what the bucket says of each object: size, e_tag and last_modified, by key

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL")
# Exponential backoff from 0.1 s to 15 s; an outage of three minutes is survived. Longer, and a request's signature may expire.
RETRIES: dict[str, Any] = {"max_retries": 20, "retry_timeout": timedelta(minutes=3)}
FIRST_RETRIES = 3
PAUSES_S = (0.1, 0.4, 1.6, 6.4)  # before asking again for an answer that ended in the middle
TIMEOUTS = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=2)}
PART_BYTES = 8 << 20  # of an object, in one request: on 1 MB/s four fit into the timeout
PARTS_AT_ONCE = 4
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles: `eval $(aws configure export-credentials --format env)`)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
}
NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist")
ADVICE = (
    (NO_BUCKET, "there is no bucket {bucket!r}; make it, or correct cache.root"),
    (re.compile(r"//169\.254\.|metadata\.google|Missing AccessKeyId"), "no credentials were found; {credentials}"),
    (re.compile(r"\b(401|403)\b|AccessDenied"), "not permitted; the credentials need list, get, put and delete there"),
    (re.compile(r"redirect|AuthorizationHeaderMalformed"), "the bucket is in another region; set AWS_REGION"),
    (re.compile(r"HTTP error"), "the server cannot be reached; check the network, AWS_ENDPOINT_URL and AWS_REGION"),
)

COMMIT_VERSION = 1
COMMIT_SUFFIX = ".commit.json"
ATTEMPT = ".attempt-"
OURS = re.compile(r".+?/[0-9a-f]{32}\.\w+\.attempt-[0-9a-f]{16}/")  # an upload, nobody else's
# Longer than any upload of one unit takes; what is younger and named by no commit may be another writer's at work.
ABANDONED_AFTER = timedelta(days=1)
STORES_AT_ONCE = 16  # a request waits for the network, not for this machine
DEFAULT_LOCAL_GB = 20.0


class ObjectStoreError(ValueError):
    """A bucket that cannot be used as requested; the message says why and what to change. Never damage of what is stored."""


class Bucket:
    """One prefix of a bucket; keys are relative to it. Requests that fail are repeated, with growing pauses.

    Safe to use from several threads and processes; connects at the first request. Credentials come from the environment.
    """

    def __init__(self, url: str) -> None:
        match = re.fullmatch(r"(\w+)://([^/@?#\s]+)(/[^?#\s]*)?", url)
        if match is None or match[1] not in CREDENTIALS:
            raise ObjectStoreError(f"an object store is named s3://bucket/prefix or gs://bucket/prefix; got {url!r}")
        self.scheme, self.name = match[1], match[2]
        self.url = f"{match[1]}://{match[2]}{(match[3] or '').rstrip('/')}"
        # Address of the server, where it is not the provider's own.
        self.endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
        self._store: ObjectStore | None = None

    def list(self, folder: str) -> Listing:
        """Every object below a folder. Cost: one request per thousand objects."""
        parts = self._ask("list", lambda store: list(store.list(folder, chunk_size=1000)))
        return {entry["path"]: entry for part in parts for entry in part}

    def get(self, key: str) -> tuple[bytes, str | None] | None:
        """Content and tag of an object; None when there is no such object."""

        def read(store: ObjectStore) -> tuple[bytes, str | None]:
            result = store.get(key)
            return bytes(result.bytes()), result.meta["e_tag"]

        try:
            return self._ask("read", read)
        except FileNotFoundError:
            return None

    def download(self, key: str, num_bytes: int, path: Path) -> str:
        """Write an object to a file, in bounded memory; its sha256 as it came. FileNotFoundError where there is no such object."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for begin in range(0, num_bytes, PARTS_AT_ONCE * PART_BYTES):
                starts = list(range(begin, min(begin + PARTS_AT_ONCE * PART_BYTES, num_bytes), PART_BYTES))
                ends = [min(start + PART_BYTES, num_bytes) for start in starts]
                ranges = {"starts": starts, "ends": ends, "coalesce": 0}
                for part in self._ask("read", lambda store, ranges=ranges: store.get_ranges(key, **ranges)):
                    digest.update(part)
                    file.write(part)
        return digest.hexdigest()

    def put(self, key: str, content: bytes | Path, *, new: bool = False) -> bool:
        """Write bytes or a file of any size as an object, which appears whole or not at all.

        With `new` only unless there is one; False is returned where there is, even if it is ours, of a request that was repeated.
        """
        if isinstance(content, Path) and content.stat().st_size == 0:
            content = b""  # an empty multipart upload is refused
        size = {} if isinstance(content, bytes) else {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
        mode = "create" if new else "overwrite"
        try:
            self._ask("write", lambda store: store.put(key, content, mode=mode, **size))
        except FileExistsError:
            return False
        return True

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no error."""
        for key in keys:
            with suppress(FileNotFoundError):
                self._ask("delete", lambda store, key=key: store.delete(key))

    def _ask(self, action: str, request: Callable[[ObjectStore], Result]) -> Result:
        """Do a request, also again; FileNotFoundError, FileExistsError or an ObjectStoreError says in a line what to do."""
        for pause_s in (*PAUSES_S, None):
            try:
                if self._store is None:
                    # A wrong address or key is named at once, not after the minutes for which an outage is waited out.
                    list(self._connect({**RETRIES, "max_retries": FIRST_RETRIES}).list(".check"))
                    self._store = self._connect(RETRIES)
                return request(self._store)
            except AlreadyExistsError as error:
                raise FileExistsError(str(error)) from error
            except (BaseError, OSError) as error:
                if isinstance(error, FileNotFoundError) and action != "write" and not NO_BUCKET.search(str(error)):
                    raise
                # obstore 0.12 asks again by itself, but not where the answer to a listing or deletion ends in the middle.
                if pause_s is None or "response body" not in str(error):
                    raise ObjectStoreError(self._explain(action, str(error))) from error
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _connect(self, retries: Any) -> ObjectStore:
        options: Any = {**TIMEOUTS, "allow_http": self.endpoint.startswith("http://")}
        return from_url(self.url, client_options=options, retry_config=retries)

    def _explain(self, action: str, message: str) -> str:
        """The error in one line: obstore's message without its debugging part and the server's XML."""
        code = re.search(r"<Code>(.*?)</Code>", message)
        reason = re.sub(r":?\s*<\?xml.*", "", message.split("\n\nDebug source:")[0], flags=re.DOTALL).strip()
        reason = f"{code[1]}: {reason}" if code else reason
        what = f"cannot {action} in {self.url}"
        for pattern, advice in ADVICE:
            if pattern.search(message):
                return f"{what}: {advice.format(bucket=self.name, credentials=CREDENTIALS[self.scheme])} ({reason})"
        return f"{what}: {reason}"


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
    ~/.cache) / BUCKET-HASH / root.
    """
    chosen = configured or os.environ.get("JEPA_CACHE_HOME") or "~/.cache/jepa-cache"
    if not re.match(r"\w+:/", chosen):  # also s3:/bucket, which would be a folder called "s3:"
        return CacheRoot((base / Path(chosen).expanduser()).resolve())
    bucket = Bucket(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa-cache-remote"
    identity = hashlib.sha256(f"{bucket.endpoint} {bucket.url}".encode()).hexdigest()[:12]
    for name in ("root", "locks", "holds"):
        make_folder(home / f"{bucket.name}-{identity}" / name)
    root = BucketRoot(home / f"{bucket.name}-{identity}/root", bucket)
    (root.path / MARKER).touch()  # no folder of this name is another program's
    return root


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

    def prefetch(self, paths: Iterable[Path]) -> list[str]:
        """Fetch many at the same time, so that `fetch` of each is quick afterwards; says what is damaged."""
        damaged: list[str] = []

        def fetch(path: Path) -> None:
            try:
                self.fetch(path)
            except StoreDamagedError as error:
                damaged.append(str(error))

        _each(fetch, paths)
        return damaged

    def find_store(self, store: Path) -> StoreFile | None:
        """What store.json of a published store says; the bucket lists all its files with their sizes."""
        return check_identity(store, read_store_file(store)) if self.fetch(store) else None

    @contextmanager
    def pulled(self, paths: Sequence[Path], *, again: bool = False) -> Iterator[None]:
        """Hold whole stores and files on this machine for the block; other stores make room for them before it begins.

        Raises:
            StoreDamagedError: One is not published, or objects are missing or changed.
            ObjectStoreError: They do not fit into $JEPA_CACHE_LOCAL_GB; nothing is pulled then.
        """

        def pull(path: Path) -> None:
            with self._locked(path):
                if (commit := self._read_record(path)) is None:
                    raise StoreDamagedError(f"{self.name}/{self._key(path)} was removed meanwhile; {REMEDY}")
                self._download(path, commit, commit.files, again=again)
                os.utime(path)  # by which the least recently used store is known

        self.prefetch(paths)
        hold = temporary_beside(self._folder("holds") / "stores")
        with super().pulled(paths), held_file(hold):  # by whose lock others know that this process lives
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
        self._listings.clear()
        records = self._folder("records")
        names = {path.relative_to(records).as_posix() for path in records.rglob(f"*{COMMIT_SUFFIX}")}
        names |= {key for key in self._list_all() if key.endswith(COMMIT_SUFFIX)}
        return self.prefetch(self.path / name.removesuffix(COMMIT_SUFFIX) for name in sorted(names))

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
            if found is None or found["size"] != file.num_bytes:
                raise StoreDamagedError(f"{where} is missing, or has not {file.num_bytes} bytes; {REMEDY}")

    def _take_over(self, path: Path, commit: Commit) -> None:
        """Have all of a published store here but its chunks; what is here and not of this commit is removed."""
        name = STORE_FILE if STORE_FILE in commit.files else path.name  # store.json lists all other files
        copy, record = _path_in(path, commit, name), self._read_record(path)
        if not copy.is_file() or file_digest(copy) != commit.files[name].sha256:
            copy.unlink(missing_ok=True) if record == commit else self._forget(path)
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
                    f"this command, and others that run now, read {held / 1e9:.3g} GB of tokens from {self.name}; here may lie "
                    f"{limit / 1e9:.3g} ($JEPA_CACHE_LOCAL_GB). If the disk of {self.path} has the room, set "
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
    raise ObjectStoreError(f"$JEPA_CACHE_LOCAL_GB is gigabytes for token chunks kept here, such as 50; got {given!r}")


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
