"""The few requests that a cache root in S3 or Google Cloud Storage needs, through obstore, with errors that say what to do."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

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
    (
        re.compile(r"HTTP error"),
        "the server cannot be reached; check the network, and AWS_ENDPOINT_URL and AWS_REGION where they are set",
    ),
)


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
        self._store: ObjectStore | None = None

    @property
    def endpoint(self) -> str | None:
        """Address of the server, where it is not the provider's own."""
        return next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)

    def list(self, folder: str) -> Listing:
        """Every object below a folder. Cost: one request per thousand objects."""
        listed = self._ask(
            "list", lambda store: [entry for part in store.list(folder, chunk_size=1000) for entry in part]
        )
        return {entry["path"]: entry for entry in listed}

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
                parts = self._ask(
                    "read",
                    lambda store, starts=starts, ends=ends: store.get_ranges(key, starts=starts, ends=ends, coalesce=0),
                )
                for part in parts:
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
                    next(
                        iter(self._connect({**RETRIES, "max_retries": FIRST_RETRIES}).list(".check", chunk_size=1)),
                        None,
                    )
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
        options: Any = {**TIMEOUTS, "allow_http": (self.endpoint or "").startswith("http://")}
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
