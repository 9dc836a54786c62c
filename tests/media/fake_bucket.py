"""A bucket as Google Cloud Storage serves it over HTTP: listing in pages, description and bytes of a version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from jepa_cache.media import http
from tests.media.flaky_server import FlakyServer, serve

PAGE = 3


class FakeBucket:
    """Files of the bucket `data` by their keys; each has generation 7 unless `generations` says otherwise."""

    def __init__(self, server: FlakyServer) -> None:
        self.server = server
        self.files: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        """What the listing lies about."""
        server.find = self._answer

    def media(self, key: str) -> str:
        """The path at which a file's bytes are served."""
        return f"/storage/v1/b/data/o/{quote(key, safe='')}?alt=media&generation={self.generations.get(key, 7)}"

    def fetched(self, key: str) -> list[str | None]:
        """The Range header of each request for a file's bytes."""
        return self.server.gets(self.media(key))

    def _describe(self, key: str) -> dict[str, str]:
        size = self.sizes.get(key, len(self.files[key]))
        return {"name": key, "size": str(size), "generation": str(self.generations.get(key, 7))}

    def _answer(self, path: str) -> bytes | None:
        parts, base = urlsplit(path), "/storage/v1/b/data/o"
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == base:
            keys = sorted(key for key in self.files if key.startswith(query["prefix"]))
            first = int(query.get("pageToken", 0))
            page: dict[str, object] = {"items": [self._describe(key) for key in keys[first : first + PAGE]]}
            if first + PAGE < len(keys):
                page["nextPageToken"] = str(first + PAGE)
            return json.dumps(page if keys else {}).encode()
        key = unquote(parts.path.removeprefix(f"{base}/"))
        if key not in self.files:
            return None
        if query.get("alt") != "media":
            return json.dumps(self._describe(key)).encode()
        return self.files[key] if query["generation"] == str(self.generations.get(key, 7)) else None


@contextmanager
def serve_bucket() -> Iterator[FakeBucket]:
    """A bucket at the address that STORAGE_EMULATOR_HOST names for the time of the block; nothing waits between attempts."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setattr(http, "FIRST_PAUSE_S", 0.0)
        yield FakeBucket(server)
