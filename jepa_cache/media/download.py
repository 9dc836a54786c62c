"""Files over HTTP, resumably: a download that was cut off goes on where it ended, and only a whole file gets its name."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.files import publish_file
from jepa_cache.media.http import BLOCK_BYTES, DownloadError, TemporaryError, open_url, read_block, repeat

PART_SUFFIXES = (".part", ".part.json")
MAX_BYTES = 8 << 30
"""Of one file; a server cannot fill the disk with more. Five minutes of VPT video have some 100 MB."""


class RemoteFile(NamedTuple):
    """What a server says of a file: bytes, and the validator that changes when the file does (None: it gives none)."""

    size_bytes: int
    validator: str | None
    md5: str | None
    crc32c: str | None = None


def probe_url(url: str, *, sleep: Callable[[float], None] = time.sleep) -> RemoteFile:
    """Ask for a file's size without downloading it (HEAD).

    Raises:
        DownloadError: The file is not there, the server gives no size, or it does not answer after several attempts.
    """
    return repeat(url, lambda: _probe_once(url), lambda: 0, sleep)


def download_file(url: str, path: Path, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Download a file to `path`, going on with an earlier part of it.

    The part lies at `<path>.part`, and beside it a note of the URL, size and validator (ETag, else Last-Modified) of the file
    that it is part of. It is continued only by a server that confirms the same validator, size and offset; else the
    download starts over. The file gets its name when its size, and its MD5 where the server gives one, are right.

    Args:
        url: http or https; redirects to another host are refused.
        path: Where the file goes; one that is there already is taken as it is.
        sleep: Waits between attempts, seconds.

    Returns:
        Bytes of the file.

    Raises:
        DownloadError: The file is not there, above 8 GiB, of a size or MD5 other than announced, or could not be had in
            6 attempts without progress.
    """
    if path.exists():
        return path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    repeat(url, lambda: _continue_part(url, part), lambda: part.stat().st_size if part.exists() else 0, sleep)
    size_bytes = part.stat().st_size
    publish_file(part, path)
    _note_of(part).unlink(missing_ok=True)
    return size_bytes


def _probe_once(url: str) -> RemoteFile:
    with open_url(url, method="HEAD") as response:
        return _describe(url, response)


def _continue_part(url: str, part: Path) -> None:
    known = _read_note(part, url)
    done = part.stat().st_size if part.exists() and known is not None else 0
    if known is not None and done == known.size_bytes:
        return _check_part(part, known)
    headers = {}
    if known is not None and known.validator is not None and 0 < done < known.size_bytes:
        headers = {"Range": f"bytes={done}-", "If-Range": known.validator}
    try:
        response = open_url(url, headers=headers)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # The file is shorter than the part: it changed.
            error.close()
            _drop(part)
            raise TemporaryError("the file is shorter than the part at hand; starting over") from error
        raise
    with response:
        if response.status == 206:
            known = _check_range(part, known, done, response)
        else:
            known, done = _describe(url, response), 0
            part.unlink(missing_ok=True)  # Before the note changes: no crash may leave old bytes under a new note.
            _note_of(part).write_text(json.dumps({"url": url, **known._asdict()}))
        with part.open("ab" if done else "wb") as file:
            while done <= known.size_bytes and (block := read_block(response)):
                file.write(block)
                done += len(block)
    size_bytes = part.stat().st_size
    if size_bytes < known.size_bytes:
        raise TemporaryError(f"the connection was cut off at byte {size_bytes} of {known.size_bytes}")
    return _check_part(part, known)


def _check_range(part: Path, known: RemoteFile | None, done: int, response: Any) -> RemoteFile:
    """Check that the server continues the file that the part is of, where the part ends."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)
    validator = _validator(response)
    fits = known is not None and match is not None and (int(match[1]), int(match[3])) == (done, known.size_bytes)
    if not fits or (validator is not None and validator != known.validator):
        _drop(part)
        raise TemporaryError(f"the server continues another file or place (Content-Range {text!r}); starting over")
    return known


def _check_part(part: Path, known: RemoteFile) -> None:
    size_bytes = part.stat().st_size
    if size_bytes != known.size_bytes:
        _drop(part)
        raise TemporaryError(f"{size_bytes} bytes arrived where {known.size_bytes} were announced; starting over")
    if known.md5 is not None:
        with part.open("rb") as file:
            digest = base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        if digest != known.md5:
            _drop(part)
            raise TemporaryError(f"its MD5 is {digest}, the server announced {known.md5}; starting over")
    elif known.crc32c is not None and (checksum := _find_crc32c(part)) != known.crc32c:
        _drop(part)
        raise TemporaryError(f"its crc32c is {checksum}, the server announced {known.crc32c}; starting over")


def _describe(url: str, response: Any) -> RemoteFile:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{url}: the server sends it compressed, although that was not asked for")
    text = response.headers.get("Content-Length")
    if text is None or not text.isdecimal():
        raise DownloadError(f"{url}: the server does not say how many bytes the file has, so its end cannot be checked")
    if int(text) > MAX_BYTES:
        raise DownloadError(f"{url} has {int(text)} bytes; at most {MAX_BYTES} are downloaded as one file")
    md5 = response.headers.get("x-ms-blob-content-md5") or response.headers.get("Content-MD5")
    # Google Cloud Storage; a file that was put together from parts has no MD5 there.
    hashes = dict(part.strip().split("=", 1) for part in _google_hashes(response).split(",") if "=" in part)
    return RemoteFile(int(text), _validator(response), md5 or hashes.get("md5"), hashes.get("crc32c"))


def _google_hashes(response: Any) -> str:
    return ",".join(response.headers.get_all("x-goog-hash") or ())


def _find_crc32c(path: Path) -> str:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum.update(block)
    return base64.b64encode(checksum.digest()).decode()


def _validator(response: Any) -> str | None:
    etag = response.headers.get("ETag")
    # A weak ETag promises the same meaning, not the same bytes.
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _note_of(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_note(part: Path, url: str) -> RemoteFile | None:
    """What the part is of; None where that is unknown or another URL's."""
    try:
        note = json.loads(_note_of(part).read_text())
        known = RemoteFile(int(note["size_bytes"]), note["validator"], note["md5"], note["crc32c"])
        return known if note["url"] == url else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # A crash may leave half a note.
        return None


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)
