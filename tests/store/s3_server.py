"""A real S3 server on loopback (moto's), and a proxy before it that loses requests and answers as told.

A plugin of all tests: the fixtures `server`, `proxied` and `machines`.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import pytest

from jepa_cache.store import remote
from jepa_cache.store.remote import BucketRoot, resolve_cache_root

BUCKET = "bucket"


class Fault(NamedTuple):
    """What happens to the next `times` requests whose "METHOD /path?query" the pattern is found in.

    `kind` is "refuse" (closed before the server sees it), "deaf" (carried out, but the answer is lost), "cut" (the answer
    ends after `number` bytes of its body) or "status" (answered with this code and `text`).
    """

    pattern: str
    kind: str
    number: int = 0
    text: str = ""
    times: int = 1


class S3Server:
    """Its address, the proxy's, the faults that wait and the requests that the proxy saw."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.direct_url = f"http://127.0.0.1:{port}"
        self.url = ""  # through the proxy
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self._taking = threading.Lock()

    def take_fault(self, request: str) -> Fault | None:
        """The first fault that this request meets; it is used up by one, also when several requests come at the same time."""
        with self._taking:
            for number, fault in enumerate(self.faults):
                if re.search(fault.pattern, request):
                    if fault.times > 1:
                        self.faults[number] = fault._replace(times=fault.times - 1)
                    else:
                        del self.faults[number]
                    return fault
        return None


@contextmanager
def _proxy(server: S3Server) -> Iterator[None]:
    # moto looks whether there is an object and writes it in two steps; S3 does it in one, hence one write at a time.
    writing = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a connection per request: losing one is closing it

        def log_message(self, *_: object) -> None:
            pass

        def _forward(self) -> None:
            request = f"{self.command} {self.path}"
            server.requests.append(request)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = server.take_fault(request)
            kind = fault.kind if fault else ""
            if kind == "refuse":
                return
            if kind == "status":
                self.send_response(fault.number)
                self.send_header("Content-Length", str(len(fault.text)))
                self.end_headers()
                self.wfile.write(fault.text.encode())
                return
            with (
                writing if "If-None-Match" in self.headers else nullcontext(),
                closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection,
            ):
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
            if kind == "deaf":
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: fault.number] if kind == "cut" else data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """One server with one bucket, and its proxy, for the tests of a file."""
    moto = pytest.importorskip("moto.server", reason="the S3 server of the tests is moto's, with flask (extra `dev`)")
    backend = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    backend.start()
    server = S3Server(backend.get_host_and_port()[1])
    with _proxy(server), urlopen(Request(f"{server.direct_url}/{BUCKET}", method="PUT")):
        yield server
    backend.stop()


@pytest.fixture
def proxied(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, to which all requests go through the proxy, with short pauses between repeated ones; every fault must be met."""
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setattr(remote, "RETRIES", {**remote.RETRIES, "backoff": quick})
    monkeypatch.setattr(remote, "PAUSES_S", (0.001,) * 4)
    yield server
    assert not server.faults, "the test is not about what it says"


@pytest.fixture
def machines(proxied: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], BucketRoot]:
    """`machines("a")` is the root in the bucket as machine a sees it: machines share nothing but the bucket."""

    def open_on(name: str) -> BucketRoot:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return resolve_cache_root(f"s3://{BUCKET}/{tmp_path.name}", tmp_path)

    return open_on
