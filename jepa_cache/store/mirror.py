"""A cache root in a bucket: a folder on this machine that is laid out like any root and holds what reading needs.

Writers fill stores in the folder as always; publishing uploads them and drops the token chunks here. Readers find a store
through its commit object: tables, metadata, actions and controls are fetched once and checked, token chunks on demand.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jepa_cache.files import Claim, atomic_file, held_file, make_folder, remove_folder
from jepa_cache.store import commits
from jepa_cache.store.commits import COMMIT_SUFFIX, Commit
from jepa_cache.store.damage import StoreDamagedError
from jepa_cache.store.objects import Bucket, StoredObject
from jepa_cache.store.records import RECORDS_FOLDER, ROOT_FOLDER, note_path, read_record, write_record
from jepa_cache.store.root import MARKER, CacheRoot
from jepa_cache.store.transfers import download_store, drop_chunks, is_here
from jepa_cache.store.verify import check_store

KINDS = ("tokens", "controls", "actions", "manifests", "unfinished")
FETCHES_AT_ONCE = 16  # a request waits for the network, not for this machine
HINT_SUFFIX = ".hint"  # of an object beside the commit: somebody is at it
UPLOAD_SUFFIX = ".upload"  # of a note: the attempt under way

_hints_seen: set[str] = set()  # by this process, which passes over them from then on


def open_mirror(url: str) -> MirroredRoot:
    """The cache root at an s3:// or gs:// URL.

    Its folder lies in $XDG_CACHE_HOME/jepa-cache-remote (default ~/.cache), one for each URL and server.

    Raises:
        ObjectStoreError: When it is no such URL.
    """
    bucket = Bucket(url)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa-cache-remote"
    identity = hashlib.sha256(f"{bucket.endpoint or ''} {bucket.url}".encode()).hexdigest()[:12]
    folder = home / f"{bucket.url.split('/')[2]}-{identity}"
    for name in (RECORDS_FOLDER, ROOT_FOLDER):
        make_folder(folder / name)
    return MirroredRoot(folder / ROOT_FOLDER, bucket)


@dataclass(frozen=True)
class MirroredRoot(CacheRoot):
    """A cache root whose `path` holds parts of what the bucket has; `fetch` first, then use the path."""

    bucket: Bucket

    def __reduce__(self) -> tuple[Callable[[str], MirroredRoot], tuple[str]]:
        return open_mirror, (self.bucket.url,)  # in the folder of the machine that it goes to

    @property
    def name(self) -> str:
        """What users call it."""
        return self.bucket.url

    def check_writable(self) -> None:
        """Try to write here and in the bucket, before hours of work.

        Raises:
            ValueError: Naming what cannot be written and why.
        """
        super().check_writable()
        self.bucket.check_writable()

    def check_ours(self) -> bool:
        """Whether the folder here lacks its marker; its name is of this program alone, so whatever lies in it is ours."""
        return not (self.path / MARKER).is_file()

    def fetch(self, place: Path) -> bool:
        """Whether a store or file is published in the bucket; if so, what reading it needs is here afterwards.

        A store that was finished here but not uploaded, because the machine stopped, is published now. Cost: one listing
        of all stores of a recipe, and what is not here yet.

        Raises:
            StoreDamagedError: When it is published but files are missing or changed.
            ObjectStoreError: When the bucket cannot be read.
        """
        with self._locked(place):
            self._forget_upload(place)
            record, commit = read_record(place), self._read_commit(place)
            if commit is None:
                if record is not None:
                    self._forget(place)
                elif place.exists():
                    if place.is_dir():
                        check_store(place)
                    self._upload(place)
                    return True
                return False
            if record != commit or not is_here(place, commit):
                self._download(place, commit)
            drop_chunks(place)
            return True

    def prefetch(self, places: Sequence[Path]) -> None:
        """Fetch many at the same time, so that `fetch` of each is quick afterwards; that also tells what is damaged.

        Raises:
            ObjectStoreError: When the bucket cannot be read.
        """

        def fetch(place: Path) -> None:
            with suppress(StoreDamagedError):
                self.fetch(place)

        with ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="fetch") as pool:
            for _ in pool.map(fetch, places):
                pass

    def publish(self, place: Path) -> None:
        """Upload a finished store or file and commit it, unless another writer did; its token chunks are dropped here.

        Raises:
            ObjectStoreError: When the bucket cannot be written; `fetch` tries again.
        """
        with self._locked(place):
            self._forget_upload(place)
            record, commit = read_record(place), commits.read_commit(self.bucket, self._key(place))
            if commit is not None and (record != commit or not is_here(place, commit)):
                self._download(place, commit)
            elif commit is None and (record is None or place.is_file()):
                self._upload(place)

    def remove(self, place: Path) -> None:
        """Remove a store or file, in the bucket and here: first its commit, so that nobody finds half of it."""
        with self._locked(place):
            self._remove(place)
            self._forget(place)

    def drop_copy(self, place: Path) -> bool:
        """Forget a store here that is in the bucket."""
        with self._locked(place):
            if read_record(place) is None:
                return False
            self._forget(place)
            return True

    def claim(self, store: Path) -> Claim | None:
        """Claim the making of a store; None while another encoder on this machine holds it, and once for other machines'.

        What other machines are at is told by an object that is a hint, no lock: it only makes encoders begin with other
        units. At the second time of asking it is passed over, so a machine that died keeps nobody waiting.
        """
        claim = super().claim(store)
        hint = self._key(store) + HINT_SUFFIX
        if claim is None or f"{self.name}/{hint}" in _hints_seen:
            return claim
        if not self.bucket.put_new(hint, b"an encoder is at work on this unit\n"):
            _hints_seen.add(f"{self.name}/{hint}")
            claim.release()
            return None
        return _HintedClaim(claim, self, store)

    def drop_hint(self, store: Path) -> None:
        """Take back the hint that a store is being made."""
        self.bucket.delete([self._key(store) + HINT_SUFFIX])

    def refresh(self) -> list[str]:
        """Bring the folder in line with the bucket: fetch all that is published, forget what is not any more.

        Returns:
            What is damaged in the bucket, in words; it is not here afterwards.

        Raises:
            ObjectStoreError: When the bucket cannot be read.
        """
        damaged = []
        for kind in KINDS:
            published = {
                key.removesuffix(COMMIT_SUFFIX) for key in self.bucket.list(kind) if key.endswith(COMMIT_SUFFIX)
            }
            records = self.path.parent / RECORDS_FOLDER
            recorded = {
                path.relative_to(records).as_posix().removesuffix(COMMIT_SUFFIX)
                for path in (records / kind).rglob(f"*{COMMIT_SUFFIX}")
            }
            self.prefetch([self.path / key for key in published - recorded])
            for key in sorted(published | recorded):
                try:
                    self.fetch(self.path / key)
                except StoreDamagedError as error:
                    damaged.append(str(error))
                    self._forget(self.path / key)
        return damaged

    def find_abandoned(self) -> dict[str, int]:
        """Uploads in the bucket that were never finished, untouched for a day, with their sizes in bytes."""
        objects = {key: found for kind in KINDS for key, found in self.bucket.list(kind).items()}
        named = set()
        for key in [key.removesuffix(COMMIT_SUFFIX) for key in objects if key.endswith(COMMIT_SUFFIX)]:
            commit = read_record(self.path / key)
            if commit is None or commit.tag != objects[key + COMMIT_SUFFIX].tag:
                commit = commits.read_commit(self.bucket, key)
            named |= {commit.attempt} if commit is not None else set()
        return commits.find_abandoned(objects, named)

    def remove_abandoned(self, name: str) -> None:
        """Remove one of `find_abandoned`."""
        commits.delete_attempt(self.bucket, name)

    @functools.cached_property
    def _listings(self) -> dict[Path, dict[str, StoredObject]]:
        """Of folders that were asked for; what is missing there is asked for again, what is there is relied on."""
        return {}

    @functools.cached_property
    def _listing(self) -> threading.Lock:
        return threading.Lock()

    def _key(self, place: Path) -> str:
        return place.relative_to(self.path).as_posix()

    def _read_commit(self, place: Path) -> Commit | None:
        """The commit of a place, after a check that its files are there."""
        key, record = self._key(place), read_record(place)
        with self._listing:
            if place.parent not in self._listings:
                self._listings[place.parent] = self.bucket.list(self._key(place.parent))
            objects = self._listings[place.parent]
        listed = objects.get(key + COMMIT_SUFFIX)
        if listed is not None and record is not None and record.tag == listed.tag:
            commit = record
        else:
            commit = commits.read_commit(self.bucket, key)
            if commit is None:
                return None
            if listed is None or listed.tag != commit.tag:
                objects = self.bucket.list(commit.attempt)
        commit.check_listing(objects, self.bucket.url)
        return commit

    def _remove(self, place: Path) -> None:
        try:
            commit = commits.read_commit(self.bucket, self._key(place))
        except StoreDamagedError:
            commit = None  # what it named is abandoned, and removed as such
        self.bucket.delete([self._key(place) + COMMIT_SUFFIX])
        if commit is not None:
            commits.delete_attempt(self.bucket, commit.attempt)
        with self._listing:
            self._listings.pop(place.parent, None)

    def _upload(self, place: Path) -> None:
        key = self._key(place)
        attempt = commits.new_attempt(key)
        with atomic_file(note_path(place, UPLOAD_SUFFIX)) as path:
            path.write_text(attempt)
        commit = commits.upload_store(self.bucket, key, place, attempt)
        if commit.attempt == attempt:
            write_record(place, commit, self.bucket.url)
            drop_chunks(place)
        else:
            self._download(place, commit)
        note_path(place, UPLOAD_SUFFIX).unlink()
        self.drop_hint(place)

    def _download(self, place: Path, commit: Commit) -> None:
        self._forget(place)
        write_record(place, commit, self.bucket.url)
        download_store(self.bucket, commit, place)

    def _forget_upload(self, place: Path) -> None:
        """Remove what an upload from here left behind when it was killed."""
        note = note_path(place, UPLOAD_SUFFIX)
        if note.is_file():
            commit = commits.read_commit(self.bucket, self._key(place))
            attempt = note.read_text()
            if commit is None or commit.attempt != attempt:
                commits.delete_attempt(self.bucket, attempt)
            note.unlink()

    def _forget(self, place: Path) -> None:
        """Remove a place here; the record goes last, so that nothing that was fetched looks like something new."""
        if place.is_dir():
            remove_folder(place)
        place.unlink(missing_ok=True)
        note_path(place).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, place: Path) -> Iterator[None]:
        """One process of this machine at a time."""
        folder = self.path.parent / "locks"
        make_folder(folder)
        with held_file(folder / hashlib.sha256(self._key(place).encode()).hexdigest()[:32]):
            yield


class _HintedClaim(Claim):
    """A claim on this machine with a hint for others, which stays while the store is finished but not uploaded."""

    def __init__(self, claim: Claim, root: MirroredRoot, store: Path) -> None:
        self._claim, self._root, self._store = claim, root, store

    def release(self) -> None:
        try:
            if read_record(self._store) is not None or not self._store.exists():
                self._root.drop_hint(self._store)
        finally:
            self._claim.release()
