"""The few requests that a cache root in S3 or Google Cloud Storage needs, through obstore, with errors that say what to do."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Result = TypeVar("Result")

SCHEMES = ("s3", "gs")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL")
# Exponential backoff from 0.1 s to 15 s; an outage of three minutes is survived. Longer, and a request's signature may expire.
RETRIES: dict[str, Any] = {"max_retries": 20, "retry_timeout": timedelta(minutes=3)}
FIRST_RETRIES = 3
PAUSES_S = (0.1, 0.4, 1.6, 6.4)  # of `_repeat`
TIMEOUTS = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=2)}
PART_BYTES = 8 << 20  # of a multipart upload, and of a read of a whole object: on 1 MB/s four fit into the timeout
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
    (
        re.compile(r"HTTP error"),
        "the server cannot be reached; check the network, and AWS_ENDPOINT_URL and AWS_REGION where they are set",
    ),
)


class ObjectStoreError(ValueError):
    """A bucket that cannot be used as asked; the message says why and what to change. Never damage of what is stored."""


class _AnswerLostError(ObjectStoreError):
    """An answer that ended in the middle."""


class StoredObject(NamedTuple):
    """What a listing says of one object; another `tag` means other content."""

    num_bytes: int
    tag: str | None
    modified: datetime


class Bucket:
    """One prefix of a bucket; keys are relative to it. Requests that fail are repeated, with growing pauses.

    Safe to use from several threads and processes; connects at the first request. Credentials come from the environment.
    """

    def __init__(self, url: str) -> None:
        """Check the URL.

        Args:
            url: Such as s3://bucket/prefix.

        Raises:
            ObjectStoreError: When it is no such URL.
        """
        match = re.fullmatch(r"(\w+)://([^/@?#\s]+)(/[^?#\s]*)?", url)
        if match is None or match[1] not in SCHEMES:
            raise ObjectStoreError(f"an object store is named s3://bucket/prefix or gs://bucket/prefix; got {url!r}")
        self._scheme, self._name = match[1], match[2]
        self.url = f"{match[1]}://{match[2]}{(match[3] or '').rstrip('/')}"
        self._store: ObjectStore | None = None

    def __reduce__(self) -> tuple[Callable[[str], Bucket], tuple[str]]:
        return Bucket, (self.url,)

    @property
    def endpoint(self) -> str | None:
        """Address of the server, where it is not the provider's own."""
        return next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)

    def check_writable(self) -> None:
        """Write, read and delete an object, before hours of work.

        Raises:
            ObjectStoreError: When one of them is not possible.
        """
        key = f".check-{os.urandom(6).hex()}"
        self.put(key, b"jepa-cache looks whether it can write here")
        self.get(key)
        self.delete([key])

    def list(self, folder: str) -> dict[str, StoredObject]:
        """Every object below a folder, by key. Cost: one request per thousand objects."""

        def ask() -> dict[str, StoredObject]:
            with self._explained("list"):
                return {
                    entry["path"]: StoredObject(entry["size"], entry["e_tag"], entry["last_modified"])
                    for entries in obstore().list(self._open(), folder, chunk_size=1000)
                    for entry in entries
                }

        return _repeat(ask)

    def get(self, key: str) -> tuple[bytes, str | None] | None:
        """Content and tag of an object; None when there is no such object."""
        try:
            with self._explained("read"):
                result = obstore().get(self._open(), key)
                return bytes(result.bytes()), result.meta["e_tag"]
        except FileNotFoundError:
            return None

    def get_ranges(self, key: str, starts: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        """The bytes of several ranges, fetched at the same time.

        Raises:
            FileNotFoundError: When there is no such object.
            EOFError: When it ends before.
        """
        with self._explained("read"):
            parts = obstore().get_ranges(self._open(), key, starts=starts, lengths=lengths, coalesce=0)
        for part, start, length in zip(parts, starts, lengths, strict=True):
            if len(part) != length:
                raise EOFError(f"it ends after {start + len(part)} bytes; {start + length} were expected")
        return [memoryview(part) for part in parts]

    def iter_parts(self, key: str, num_bytes: int) -> Iterator[memoryview]:
        """A whole object in order, in bounded memory.

        Raises:
            FileNotFoundError: When there is no such object.
            EOFError: When it is shorter than `num_bytes`.
        """
        for start in range(0, num_bytes, PART_BYTES):
            yield self.get_ranges(key, [start], [min(PART_BYTES, num_bytes - start)])[0]

    def put(self, key: str, data: bytes) -> None:
        """Write an object; it appears whole or not at all."""
        with self._explained("write"):
            obstore().put(self._open(), key, data)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; False when there is (even if it is ours, of a request that was repeated)."""
        try:
            with self._explained("write"):
                obstore().put(self._open(), key, data, mode="create")
        except FileExistsError:
            return False
        return True

    def upload(self, key: str, path: Path) -> None:
        """Write a file of any size as an object; it appears whole or not at all."""
        if path.stat().st_size == 0:  # an empty multipart upload is refused
            self.put(key, b"")
            return
        with self._explained("write"):
            obstore().put(self._open(), key, path, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no error."""

        def ask(key: str) -> None:
            with suppress(FileNotFoundError), self._explained("delete"):
                obstore().delete(self._open(), key)

        for key in keys:
            _repeat(functools.partial(ask, key))

    def _open(self) -> ObjectStore:
        if self._store is None:
            from_url = obstore().store.from_url

            options: Any = {**TIMEOUTS, "allow_http": (self.endpoint or "").startswith("http://")}
            # A wrong address or key is told at once, not after the minutes for which an outage is waited out.
            asked = from_url(self.url, client_options=options, retry_config={**RETRIES, "max_retries": FIRST_RETRIES})
            next(iter(obstore().list(asked, ".check", chunk_size=1)), None)
            self._store = from_url(self.url, client_options=options, retry_config=RETRIES)
        return self._store

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn what obstore raises into FileNotFoundError, FileExistsError or an ObjectStoreError that says what to do."""
        exceptions = obstore().exceptions
        try:
            yield
        except exceptions.AlreadyExistsError as error:
            raise FileExistsError(str(error)) from error
        except (exceptions.BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) and action != "write" and not NO_BUCKET.search(str(error)):
                raise
            kind = _AnswerLostError if "response body" in str(error) else ObjectStoreError
            raise kind(self._explain(action, str(error))) from error

    def _explain(self, action: str, message: str) -> str:
        """What went wrong in one line: obstore's message without its debugging part and the server's XML."""
        code = re.search(r"<Code>(.*?)</Code>", message)
        reason = re.sub(r":?\s*<\?xml.*", "", message.split("\n\nDebug source:")[0], flags=re.DOTALL).strip()
        reason = f"{code[1]}: {reason}" if code else reason
        what = f"cannot {action} in {self.url}"
        for pattern, advice in ADVICE:
            if pattern.search(message):
                return f"{what}: {advice.format(bucket=self._name, credentials=CREDENTIALS[self._scheme])} ({reason})"
        return f"{what}: {reason}"


def obstore() -> ModuleType:
    """The library, imported when it is needed.

    Raises:
        ObjectStoreError: It is not installed; says how.
    """
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise ObjectStoreError(
            "a cache root in an object store needs the library obstore; install it with `pip install 'jepa-cache[objects]'`"
        ) from error
    return obstore


def _repeat(ask: Callable[[], Result]) -> Result:
    """Ask again when the answer ended in the middle: obstore 0.12 does so for content, not for listings and deletions."""
    for pause_s in PAUSES_S:
        try:
            return ask()
        except _AnswerLostError:
            time.sleep(pause_s)
    return ask()
