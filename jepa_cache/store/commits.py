"""How a store is published in a bucket: its files under a private prefix, then one commit object that names the prefix.

    tokens/<fingerprint>/<unit>.zarr.attempt-<random>/...      the files, of one writer alone
    tokens/<fingerprint>/<unit>.zarr.commit.json               written last and only if there is none: the first writer wins

Readers know the commit object only, so nothing half-written is ever read and the files of two writers never mix.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.store import layout
from jepa_cache.store.damage import StoreDamagedError
from jepa_cache.store.objects import Bucket, StoredObject
from jepa_cache.store.recipe import canonical_json, file_digest, inner_path

COMMIT_VERSION = 1
COMMIT_SUFFIX = ".commit.json"
ATTEMPT = ".attempt-"
OURS = re.compile(rf"(.+?/[0-9a-f]{{32}}\.\w+{re.escape(ATTEMPT)}[0-9a-f]{{16}})/")  # an object of an attempt
# Longer than any upload of one unit takes; what is younger and named by no commit may be another writer's at work.
ABANDONED_AFTER = timedelta(days=1)
WAY_OUT = "run `python stages/encode.py`, which makes just this unit again"


class CommittedFile(NamedTuple):
    """Size and sha256 of a file."""

    num_bytes: int
    sha256: str


class Commit(NamedTuple):
    """A published store.

    Attributes:
        attempt: Prefix of its objects.
        files: By name, relative to the prefix.
        tag: Of the commit object, as a listing shows it.
    """

    attempt: str
    files: dict[str, CommittedFile]
    tag: str | None

    def check_listing(self, objects: Mapping[str, StoredObject], where: str) -> None:
        """Check that every file is there with its size.

        Raises:
            StoreDamagedError: Naming the first that is not.
        """
        for name, file in self.files.items():
            found = objects.get(f"{self.attempt}/{name}")
            if found is None:
                raise StoreDamagedError(f"{where}/{self.attempt}/{name} is missing; {WAY_OUT}")
            if found.num_bytes != file.num_bytes:
                raise StoreDamagedError(
                    f"{where}/{self.attempt}/{name} has {found.num_bytes} bytes, not {file.num_bytes}; {WAY_OUT}"
                )


def read_commit(bucket: Bucket, key: str) -> Commit | None:
    """The commit of a store; None when it is not published.

    Raises:
        StoreDamagedError: When the commit object is no such.
    """
    found = bucket.get(key + COMMIT_SUFFIX)
    return None if found is None else parse_commit(found[0], found[1], f"{bucket.url}/{key}{COMMIT_SUFFIX}")


def parse_commit(content: bytes, tag: str | None, where: str) -> Commit:
    """Read the bytes of a commit object.

    Raises:
        StoreDamagedError: When they are damaged.
        ValueError: When another version of the program wrote them.
    """
    try:
        document = json.loads(content)
        version = document["commit_version"]
        files = {inner_path(name): CommittedFile(**file) for name, file in document["files"].items()}
        commit = Commit(document["attempt"], files, tag)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreDamagedError(f"{where} is no valid commit ({error!r}); delete it and {WAY_OUT}") from error
    if version != COMMIT_VERSION:
        raise ValueError(f"{where} has version {version}, this program reads {COMMIT_VERSION}; set another cache.root")
    return commit


def format_commit(attempt: str, files: Mapping[str, CommittedFile]) -> bytes:
    """The one spelling of a commit object."""
    listing: dict[str, Any] = {name: file._asdict() for name, file in files.items()}
    return canonical_json({"attempt": attempt, "commit_version": COMMIT_VERSION, "files": listing})


def new_attempt(key: str) -> str:
    """A prefix that no other writer has."""
    return f"{key}{ATTEMPT}{secrets.token_hex(8)}"


def list_files(place: Path) -> dict[str, CommittedFile]:
    """Files of a finished store with their digests as its store.json has them; of a single file, itself."""
    if place.is_file():
        return {place.name: _describe(place)}
    written = json.loads((place / layout.STORE_FILE).read_bytes())["content"]["files"]
    files = {name: CommittedFile(entry["num_bytes"], entry["sha256"]) for name, entry in written.items()}
    return files | {layout.STORE_FILE: _describe(place / layout.STORE_FILE)}


def upload_store(bucket: Bucket, key: str, place: Path, attempt: str) -> Commit:
    """Upload a finished store and commit it; the commit that holds afterwards, which is another writer's if that was first.

    Raises:
        StoreDamagedError: When what arrived is not what was sent.
        ObjectStoreError: When the bucket cannot be written.
    """
    files = list_files(place)
    for name in files:
        bucket.upload(f"{attempt}/{name}", place if place.is_file() else place / name)
    Commit(attempt, files, None).check_listing(bucket.list(attempt), bucket.url)
    content = format_commit(attempt, files)
    bucket.put_new(key + COMMIT_SUFFIX, content)
    # Whoever won is read back: a request that was repeated after a dropped answer says "there is one" of our own.
    commit = read_commit(bucket, key)
    if commit is None:
        raise StoreDamagedError(f"{bucket.url}/{key}{COMMIT_SUFFIX} vanished after it was written; {WAY_OUT}")
    if commit.attempt != attempt:
        delete_attempt(bucket, attempt)
    return commit


def delete_attempt(bucket: Bucket, attempt: str) -> None:
    """Delete what was uploaded under a prefix."""
    bucket.delete(bucket.list(attempt))


def find_abandoned(objects: Mapping[str, StoredObject], named: Iterable[str]) -> dict[str, int]:
    """Attempts that no commit names and that nobody has written to for a day, with their sizes in bytes.

    Args:
        objects: A listing.
        named: The attempts that commits name.
    """
    newest: dict[str, datetime] = {}
    sizes: dict[str, int] = {}
    for key, found in objects.items():
        if match := OURS.match(key):
            attempt = match[1]
            newest[attempt] = max(newest.get(attempt, found.modified), found.modified)
            sizes[attempt] = sizes.get(attempt, 0) + found.num_bytes
    oldest = datetime.now(UTC) - ABANDONED_AFTER
    return {name: sizes[name] for name in sorted(sizes.keys() - set(named)) if newest[name] < oldest}


def _describe(path: Path) -> CommittedFile:
    return CommittedFile(path.stat().st_size, file_digest(path))
