"""A server on this machine for downloads: files by path, faults by path, and a bucket as Google Cloud Storage serves it."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

PAGE = 3


class FakeServer:
    """Serves `files` by their paths; the first part of a path is a bucket where it is listed.

    Attributes:
        files: Path without the leading slash, to content.
        faults: Path to faults, used up one per GET: ("drop", bytes), ("status", code).
        sizes: What listings lie about.
        requests: Method, path and Range header of every request for a file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[tuple]] = {}
        self.sizes: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def gets(self, path: str) -> list[str | None]:
        """The Range header of each GET of a file."""
        return [given for method, requested, given in self.requests if (method, requested) == ("GET", path)]

    def list_bucket(self, bucket: str, prefix: str, first: int) -> bytes:
        """A page of a bucket's keys, as XML."""
        keys = sorted(path.partition("/")[2] for path in self.files if path.startswith(f"{bucket}/{prefix}"))
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{tag(self.files[f'{bucket}/{key}'])}</ETag>"
            f"<Size>{self.sizes.get(key, len(self.files[f'{bucket}/{key}']))}</Size></Contents>"
            for key in keys[first : first + PAGE]
        )
        more = f"<NextContinuationToken>{first + PAGE}</NextContinuationToken>" if first + PAGE < len(keys) else ""
        return f"<ListBucketResult>{entries}{more}</ListBucketResult>".encode()


def tag(content: bytes) -> str:
    """The ETag of a content."""
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextmanager
def serve() -> Iterator[FakeServer]:
    """A server on 127.0.0.1 for the time of the block, which is also where public buckets are looked for."""
    state = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # A connection per request: dropping one is closing it.

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            parts = urlsplit(self.path)
            path, query = unquote(parts.path).lstrip("/"), {k: v[0] for k, v in parse_qs(parts.query).items()}
            if "list-type" in query:
                page = state.list_bucket(path, query.get("prefix", ""), int(query.get("continuation-token", 0)))
                self._send(200, page, {}, len(page) if body else 0)
                return
            state.requests.append((self.command, path, self.headers.get("Range")))
            fault = state.faults.get(path, []).pop(0) if body and state.faults.get(path) else ("none",)
            if fault[0] == "status" or path not in state.files:
                self.send_error(fault[1] if fault[0] == "status" else 404)
                return
            data, headers = state.files[path], {}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            whole = tag(data)
            if asked:
                stop = min(int(asked[2] or len(data)), len(data) - 1)
                headers = {"Content-Range": f"bytes {asked[1]}-{stop}/{len(data)}"}
                data = data[int(asked[1]) : stop + 1]
            headers |= {"ETag": whole, "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
            count = fault[1] if fault[0] == "drop" else len(data)
            self._send(206 if asked else 200, data, headers, count if body else 0)

        def _send(self, status: int, data: bytes, headers: dict[str, str], count: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(ConnectionError):  # A reader that has what it wants leaves.
                self.wfile.write(data[:count])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
                patch.delenv(name, raising=False)
            patch.setenv("GOOGLE_BASE_URL", state.url)
            yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
