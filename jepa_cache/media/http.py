"""Requests to HTTP servers: repeated while they make progress, never redirected to another host, answers of a bounded size."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 30.0
NUM_ATTEMPTS = 6
"""In a row without a new byte; a connection that drops every few MB still ends."""
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
BLOCK_BYTES = 1 << 18
MAX_JSON_BYTES = 32 << 20


class DownloadError(ValueError):
    """A file that could not be had; the message holds its URL and the last reason."""


class TemporaryError(Exception):
    """This attempt failed, another may succeed."""


def read_json(url: str, *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """The JSON object that a server answers with; at most 32 MiB.

    Raises:
        DownloadError: It is not there, too large, no JSON object, or the server does not answer after several attempts.
    """
    data = repeat(url, lambda: _read_answer(url), lambda: 0, sleep)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DownloadError(f"{url}: the server's answer is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DownloadError(f"{url}: the server's answer is no JSON object; got {repr(value)[:60]}")
    return value


def read_range(
    url: str, start: int, stop: int, size_bytes: int, *, sleep: Callable[[float], None] = time.sleep
) -> bytes:
    """Bytes [start, stop) of a file of `size_bytes`.

    Raises:
        DownloadError: The server serves no parts, or of a file of another size, or does not answer after several attempts.
    """
    data = bytearray()

    def ask() -> None:
        headers = {"Range": f"bytes={start + len(data)}-{stop - 1}"}
        with open_url(url, headers=headers) as response:
            content_range = response.headers.get("Content-Range")
            if response.status != 206 or content_range != f"bytes {start + len(data)}-{stop - 1}/{size_bytes}":
                raise DownloadError(
                    f"{url}: asked for a part of its {size_bytes} bytes, the server answers {response.status} with "
                    f"{content_range!r}"
                )
            while len(data) < stop - start and (block := read_block(response)):
                data.extend(block[: stop - start - len(data)])
        if len(data) < stop - start:
            raise TemporaryError(f"the connection was cut off at byte {start + len(data)} of {stop}")

    repeat(url, ask, lambda: len(data), sleep)
    return bytes(data)


def _read_answer(url: str) -> bytes:
    data = bytearray()
    with open_url(url) as response:
        while block := read_block(response):
            data += block
            if len(data) > MAX_JSON_BYTES:
                raise DownloadError(f"{url}: the server's answer has more than {MAX_JSON_BYTES} bytes")
        stated = response.headers.get("Content-Length")
    if stated is not None and stated != str(len(data)):
        raise TemporaryError(f"{len(data)} bytes arrived where {stated} were announced")
    return bytes(data)


def repeat(url: str, attempt: Callable[[], Any], progress: Callable[[], int], sleep: Callable[[float], None]) -> Any:
    """What `attempt` returns, tried again after a growing pause while it raises TemporaryError or the server asks for patience.

    Args:
        url: For messages.
        attempt: One request.
        progress: Bytes that are there; where they grow, the attempts count anew.
        sleep: Waits between attempts, seconds.

    Raises:
        DownloadError: The server refuses, or 6 attempts in a row brought nothing.
    """
    pause_s, num_left, reached = FIRST_PAUSE_S, NUM_ATTEMPTS, progress()
    while True:
        try:
            return attempt()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except TemporaryError as error:
            reason = str(error)
        now = progress()
        num_left, pause_s = (NUM_ATTEMPTS, FIRST_PAUSE_S) if now > reached else (num_left - 1, pause_s)
        reached = max(reached, now)
        if num_left <= 0:
            raise DownloadError(
                f"{url}: given up after {NUM_ATTEMPTS} attempts without progress; the last one: {reason}"
            )
        sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_PAUSE_S)


def read_block(response: Any) -> bytes:
    """The next 256 KiB of an answer, less at its end. Raises a TemporaryError when the connection breaks."""
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise TemporaryError(f"{type(error).__name__}: {error}") from error


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the same host only, never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.netloc != old.netloc or new.scheme not in ("https", old.scheme):
            raise DownloadError(
                f"{req.full_url}: the server redirects to {newurl}, on another host; that is not followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    """Send a request; an answer to read from.

    Raises:
        DownloadError: Another scheme than http and https, or a redirect to another host. TemporaryError: No connection.
        urllib.error.HTTPError: The server refuses.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"only http and https are downloaded; got {url!r}")
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "jepa-cache", **(headers or {})})
    try:
        return urllib.request.build_opener(_SameHost).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError.
        raise TemporaryError(f"{type(error).__name__}: {getattr(error, 'reason', error)}") from error
