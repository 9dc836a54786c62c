"""Public Google Cloud Storage buckets over plain HTTP: listed and read without credentials or Google's libraries.

A file in a bucket is used like a path that can only be read. Opened, it is fetched as a whole into a folder of downloads, of which
no more than 64 GiB are kept; streamed, it is read from its start in parts, and what lies behind is never asked for.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, urlencode

from jepa_cache.config.machine import state_folder
from jepa_cache.files import held_file, make_folder
from jepa_cache.media.download import PART_SUFFIXES, download_file
from jepa_cache.media.http import DownloadError, read_json, read_range

SCHEME = "gs://"
ENDPOINT = "https://storage.googleapis.com"
ENDPOINT_VARIABLE = "STORAGE_EMULATOR_HOST"
"""The variable by which Google's own libraries, too, are pointed at another server."""

FOLDER_VARIABLE = "JEPA_DOWNLOADS"
MAX_KEPT_BYTES = 64 << 30
SPARE_BYTES = 1 << 30  # of the disk, beside a download
MAX_PAGES = 100  # of a listing, 1000 names each; DROID 1.0.1 has 2050 files
STREAM_BYTES = 8 << 20
"""Asked for at a time; an episode of DROID has some 20 MB."""


class BucketStat(NamedTuple):
    """What `BucketFile.stat` tells, named as in `os.stat_result`; the generation, which changes with the content, is the time."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class BucketFile:
    """One version of a file in a bucket; has of `pathlib.Path` what readers and digests use, and no open connection.

    Attributes:
        bucket: Name of the bucket.
        key: Path in the bucket.
        size_bytes: Bytes.
        generation: Number of the version.
    """

    bucket: str
    key: str
    size_bytes: int
    generation: int

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket and parts of the path."""
        return (self.bucket, *self.key.split("/"))

    @property
    def parents(self) -> tuple[Path, ...]:
        """No folder of this machine holds it."""
        return ()

    def resolve(self) -> BucketFile:
        """Itself."""
        return self

    def is_file(self) -> bool:
        """True: it was there when it was listed."""
        return True

    def stat(self) -> BucketStat:
        """Size and version, without a request."""
        return BucketStat(self.size_bytes, self.generation)

    def with_name(self, name: str) -> BucketFile:
        """The file of this name beside it.

        Raises:
            DownloadError: There is none, or the bucket cannot be reached.
        """
        return find_file(self.bucket, "/".join((*self.key.split("/")[:-1], name)))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open a local copy, fetched first where it is not there.

        Raises:
            DownloadError: It cannot be fetched, or the disk has no room.
        """
        assert mode == "rb"
        while True:
            try:
                return _fetch(self).open("rb")
            except FileNotFoundError:  # Another process made room just now.
                continue

    def stream(self) -> BinaryIO:
        """Open it for reading from its start on; nothing is kept, and only what is read (and up to 8 MiB more) is fetched.

        Raises:
            DownloadError: On reading, when the server cannot be reached or serves no parts.
        """
        return io.BufferedReader(_Stream(self), STREAM_BYTES)

    @property
    def media_url(self) -> str:
        """Where its bytes are served."""
        return f"{_object_url(self.bucket, self.key)}?{urlencode({'alt': 'media', 'generation': self.generation})}"


def list_files(url: str) -> list[BucketFile]:
    """The files at or below `gs://bucket/path`, sorted by their paths.

    Raises:
        ValueError: No such address, nothing there, or more than 100,000 files. DownloadError: The bucket cannot be reached.
    """
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    prefix = prefix.rstrip("/")
    if not url.startswith(SCHEME) or not bucket or not prefix:
        raise ValueError(f"{url!r} names no folder of a bucket; write gs://bucket/folder")
    files: list[BucketFile] = []
    query = {"prefix": prefix, "fields": "items(name,size,generation),nextPageToken", "maxResults": "1000"}
    for _ in range(MAX_PAGES):
        page = read_json(f"{_endpoint()}/storage/v1/b/{quote(bucket, safe='')}/o?{urlencode(query)}")
        for item in page.get("items", ()):
            file = _read_item(bucket, item)
            if file.key == prefix or (file.key.startswith(f"{prefix}/") and file.name):
                files.append(file)
        if "nextPageToken" not in page:
            break
        query["pageToken"] = str(page["nextPageToken"])
    else:
        raise ValueError(f"{url} holds more than {MAX_PAGES * 1000} files; name the folder of one data set")
    if not files:
        raise ValueError(f"{url}: there is nothing there")
    return sorted(files)


def find_file(bucket: str, key: str) -> BucketFile:
    """The newest version of a file.

    Raises:
        DownloadError: There is none, or the bucket cannot be reached.
    """
    return _read_item(bucket, read_json(f"{_object_url(bucket, key)}?{urlencode({'fields': 'name,size,generation'})}"))


def downloads_folder() -> Path:
    """Folder of what was fetched: $JEPA_DOWNLOADS, else `downloads` beside the digest table."""
    configured = os.environ.get(FOLDER_VARIABLE)
    return Path(configured).expanduser() if configured else state_folder() / "downloads"


def _endpoint() -> str:
    configured = os.environ.get(ENDPOINT_VARIABLE)
    if not configured:
        return ENDPOINT
    return (configured if "://" in configured else f"http://{configured}").rstrip("/")


def _object_url(bucket: str, key: str) -> str:
    return f"{_endpoint()}/storage/v1/b/{quote(bucket, safe='')}/o/{quote(key, safe='')}"


def _read_item(bucket: str, item: object) -> BucketFile:
    try:
        file = BucketFile(bucket, str(item["name"]), int(item["size"]), int(item["generation"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{SCHEME}{bucket}: the server describes a file by {repr(item)[:200]}") from error
    if file.size_bytes < 0 or not 0 <= file.generation < 1 << 63:
        raise DownloadError(f"{SCHEME}{bucket}: the server describes a file by {repr(item)[:200]}")
    return file


def _fetch(file: BucketFile) -> Path:
    version = hashlib.sha256(f"{file}#{file.generation}".encode()).hexdigest()[:16]
    path = downloads_folder() / version / file.name
    if not path.is_file():
        make_folder(path.parent)
        with held_file(path.parent / ".lock"):  # Two processes must not write one part.
            if not path.is_file():
                _make_room(file)
                if download_file(file.media_url, path) != file.size_bytes:
                    path.unlink()
                    raise DownloadError(f"{file} has other than the {file.size_bytes} bytes that the bucket lists")
    os.utime(path)  # so that it is not the next to go
    return path


def _make_room(file: BucketFile) -> None:
    """Remove the downloads that were used longest ago until this one fits the bound and the disk."""
    folder = downloads_folder()
    kept = [path for path in folder.glob("*/*") if path.name != ".lock" and not path.name.endswith(PART_SUFFIXES)]
    kept.sort(key=lambda path: path.stat().st_mtime_ns)
    total_bytes = sum(path.stat().st_size for path in kept)
    while (
        too_full := shutil.disk_usage(folder).free < file.size_bytes + SPARE_BYTES
    ) or total_bytes + file.size_bytes > MAX_KEPT_BYTES:
        if not kept:
            break
        total_bytes -= kept[0].stat().st_size
        kept.pop(0).unlink(missing_ok=True)
    if too_full:
        raise DownloadError(
            f"{file} has {file.size_bytes} bytes, but {shutil.disk_usage(folder).free} are free in {folder}; set "
            f"{FOLDER_VARIABLE} to a folder on another disk"
        )


class _Stream(io.RawIOBase):
    """The bytes of a file in a bucket by range requests."""

    def __init__(self, file: BucketFile) -> None:
        self._file, self._offset = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._file.size_bytes}[whence]
        return self._offset

    def readinto(self, buffer: memoryview) -> int:
        stop = min(self._offset + len(buffer), self._file.size_bytes)
        if stop <= self._offset:
            return 0
        data = read_range(self._file.media_url, self._offset, stop, self._file.size_bytes)
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)
