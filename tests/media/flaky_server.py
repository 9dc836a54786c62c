"""A local HTTP server that serves files as told: drops connections, ignores ranges, lies about sizes, fails."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FlakyServer:
    """Files by path, faults by path (used up one per GET), and every request that came."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.faults: dict[str, list[Any]] = {}
        """Of each: ("drop", bytes), ("status", code), ("redirect", location), ("no_ranges",), ("wrong_range",), ("no_length",)."""
        self.find: Callable[[str], bytes | None] = lambda path: None
        """Answers for paths that are not in `files`."""
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def gets(self, path: str) -> list[str | None]:
        """The Range header of each GET of a path."""
        return [given for method, requested, given in self.requests if (method, requested) == ("GET", path)]


@contextmanager
def serve() -> Iterator[FlakyServer]:
    """A server on 127.0.0.1 for the time of the block."""
    state = FlakyServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # A connection per request: dropping one is closing it.

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            state.requests.append((self.command, self.path, self.headers.get("Range")))
            faults = state.faults.get(self.path, [])
            fault = faults.pop(0) if faults and (body or faults[0][0] == "status") else ("none",)
            data = state.files.get(self.path, state.find(self.path))
            if fault[0] == "status" or data is None:
                self.send_error(fault[1] if fault[0] == "status" else 404)
                return
            if fault[0] == "redirect":
                self.send_response(302)
                self.send_header("Location", fault[1])
                self.end_headers()
                return
            etag, start = state.etags.get(self.path, '"1"'), 0
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and fault[0] != "no_ranges" and self.headers.get("If-Range", etag) == etag:
                start, size = int(asked[1]), len(data)
                if start >= len(data):
                    self.send_error(416)
                    return
                self.send_response(206)
                first = start + 7 if fault[0] == "wrong_range" else start
                data = data[: int(asked[2]) + 1] if asked[2] else data
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{size}")
            else:
                self.send_response(200)
            if fault[0] != "no_length":
                self.send_header("Content-Length", str(len(data) - start))
            if etag is not None:
                self.send_header("ETag", etag)
            for name, value in state.headers.get(self.path, {}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data[start : start + fault[1]] if fault[0] == "drop" else data[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
