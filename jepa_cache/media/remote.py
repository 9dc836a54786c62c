"""Recordings of other machines: files over HTTP, public Google Cloud Storage buckets, and data sets of the Hugging Face hub.

Whatever is fetched is a file of this machine before it is read; of files from buckets no more than 64 GiB are kept.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar
from urllib.parse import unquote

from jepa_cache.config.paths import state_folder
from jepa_cache.files import DiskFullError, atomic_file, held_file, make_folder

BUCKET_SCHEME = "gs://"
HUB_PREFIX = "hub:"
FOLDER_VARIABLE = "JEPA_DOWNLOADS"

MAX_FILE_BYTES = 8 << 30
"""Of one file over HTTP; a server cannot fill the disk with more. Five minutes of VPT video have some 100 MB."""
MAX_KEPT_BYTES = 64 << 30
SPARE_BYTES = 1 << 30  # of the disk, beside a download
MAX_FILES = 100_000  # below one folder of a bucket; DROID 1.0.1 has 2050

# Exponential backoff; an outage of three minutes is survived. A file may take hours on a slow line: `timeout` is of a whole file.
RETRIES: dict[str, Any] = {"max_retries": 10, "retry_timeout": timedelta(minutes=3)}
CLIENT: dict[str, Any] = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(hours=6), "allow_http": True}


class DownloadError(ValueError):
    """A file that cannot be fetched; the message names it, the reason and the way out."""


@dataclass(frozen=True, order=True)
class BucketFile:
    """One version of a file in a bucket; has of `pathlib.Path` what readers and digests use, and no open connection.

    Attributes:
        url: `gs://bucket/path`.
        size_bytes: Bytes.
        version: The server's tag of this content.
    """

    url: str
    size_bytes: int
    version: str
    parents: ClassVar[tuple[Path, ...]] = ()  # no folder of this machine holds it

    def __str__(self) -> str:
        return self.url

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket and parts of the path."""
        return tuple(self.url.removeprefix(BUCKET_SCHEME).split("/"))

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.parts[-1]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    def resolve(self) -> BucketFile:
        """The file itself: a bucket has no links."""
        return self

    def is_file(self) -> bool:
        """True: it was there when it was listed."""
        return True

    def stat(self) -> SimpleNamespace:
        """Size and version, without a request; the version takes the place of times and inode."""
        return SimpleNamespace(st_size=self.size_bytes, st_mtime_ns=0, st_ctime_ns=0, st_ino=self.version)

    def with_name(self, name: str) -> BucketFile:
        """The newest version of the file of this name beside it; a DownloadError where there is none."""
        return _find_file(f"{self.url.rpartition('/')[0]}/{name}")

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open a local copy, fetched first where it is not there.

        Raises:
            DownloadError: It cannot be fetched, or the disk has no room.
        """
        assert mode == "rb"
        version = hashlib.sha256(f"{self.url}#{self.version}".encode()).hexdigest()[:16]
        path = downloads_folder() / version / self.name
        while True:
            make_folder(path.parent)
            with held_file(path.parent / ".lock"):  # Two processes must not fetch it both.
                if not path.exists():
                    _make_room(self)
                    _download(self.url, path, size_bytes=self.size_bytes)
            try:
                os.utime(path)  # What was used longest ago is removed first.
                return path.open("rb")
            except FileNotFoundError:  # Another process made room just now.
                continue


def list_files(url: str) -> list[BucketFile]:
    """The files at or below `gs://bucket/path`, sorted by their paths.

    Raises:
        ValueError: No such address. DownloadError: Nothing is there, more than 100,000 files, or the bucket cannot be reached.
    """
    import obstore

    folder = url.rstrip("/")
    bucket, _, prefix = folder.removeprefix(BUCKET_SCHEME).partition("/")
    if not url.startswith(BUCKET_SCHEME) or not bucket or not prefix:
        raise ValueError(f"{url!r} names no folder of a bucket; write gs://bucket/folder")
    files: list[BucketFile] = []
    with _explained(url):
        for entries in obstore.list(*_open_url(folder)):
            files += [_describe(bucket, entry) for entry in entries if not entry["path"].endswith("/")]
            if len(files) > MAX_FILES:
                raise DownloadError(f"{url} holds more than {MAX_FILES} files; name the folder of one data set")
    return sorted(files) if files else [_find_file(folder)]


def _find_file(url: str) -> BucketFile:
    import obstore

    with _explained(url):
        return _describe(url.removeprefix(BUCKET_SCHEME).partition("/")[0], obstore.head(*_open_url(url)))


def _describe(bucket: str, entry: Any) -> BucketFile:
    version = entry["e_tag"] or entry["last_modified"].isoformat()
    return BucketFile(f"{BUCKET_SCHEME}{bucket}/{entry['path']}", int(entry["size"]), version)


def measure_url(url: str) -> int:
    """Bytes of a file by its address, without downloading it.

    Raises:
        DownloadError: The file is not there, or the server does not answer.
    """
    import obstore

    with _explained(url):
        return int(obstore.head(*_open_url(url))["size"])


def fetch_file(url: str, path: Path) -> int:
    """Download a file over http or https; it gets its name when it is whole. One that is there already is taken as it is.

    Returns:
        Bytes of the file.

    Raises:
        DownloadError: The file is not there, above 8 GiB, of a size other than announced, or the server does not answer.
    """
    if not path.exists():
        _download(url, path)
    return path.stat().st_size


def _download(url: str, path: Path, *, size_bytes: int | None = None) -> None:
    """Fetch a file, whose size may be known from a listing, so that it appears whole or not at all."""
    import obstore

    with _explained(url):
        answer = obstore.get(*_open_url(url))
        announced = int(answer.meta["size"])
        if size_bytes is not None and announced != size_bytes:
            raise DownloadError(f"{url} has other than the {size_bytes} bytes that the bucket lists")
        if size_bytes is None and announced > MAX_FILE_BYTES:
            raise DownloadError(f"{url} has {announced} bytes; at most {MAX_FILE_BYTES} are downloaded as one file")
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            for block in answer.stream(min_chunk_size=1 << 20):  # An error where fewer bytes arrive than announced.
                file.write(memoryview(block))


def fetch_hub_dataset(text: str, patterns: Sequence[str]) -> Path:
    """Fetch the files of `hub:owner/name` or `hub:owner/name@revision` that match `patterns`.

    Returns:
        The folder of the snapshot in the hub's cache; what is there already is not fetched again.

    Raises:
        DownloadError: No such data set, or it cannot be fetched; the message says how to fetch it elsewhere.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = text.removeprefix(HUB_PREFIX).partition("@")
    remedy = f"Does it need `hf auth login`? Elsewhere: hf download --repo-type dataset {name} --local-dir DIR; then give DIR"
    with _explained(f"the data set {name} of the hub", remedy):
        folder = snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns))
        return Path(folder)


def downloads_folder() -> Path:
    """Folder of what was fetched from buckets: $JEPA_DOWNLOADS, else `downloads` beside the digest table."""
    return Path(os.environ.get(FOLDER_VARIABLE) or state_folder() / "downloads").expanduser()


@contextmanager
def _explained(what: str, remedy: str = "Or copy it where it can be reached, and name the copy") -> Iterator[None]:
    """One message for everything that keeps a file from being fetched; a full disk is no part of it."""
    try:
        yield
    except (DownloadError, DiskFullError):
        raise
    except Exception as error:  # Errors of networks, servers and authorisation share no base class.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, FileNotFoundError):
            raise DownloadError(f"{what}: there is nothing there") from error
        reason = re.sub(r"\s+", " ", str(error).split("\n\nDebug source:")[0]).strip()[:300]
        raise DownloadError(
            f"{what} cannot be fetched ({type(error).__name__}: {reason}). Is the network reachable (through a proxy: set "
            f"https_proxy)? {remedy}"
        ) from error


def _open_url(url: str) -> tuple[Any, str]:
    """A store of obstore, and the path in it. A bucket is public: no credentials. GOOGLE_BASE_URL points at another server."""
    from obstore.store import from_url

    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if scheme not in ("http", "https", "gs") or not host:
        raise DownloadError(f"only http, https and gs addresses are downloaded; got {url!r}")
    if scheme == "gs":
        return from_url(f"gs://{host}", skip_signature=True, client_options=CLIENT, retry_config=RETRIES), path
    return from_url(f"{scheme}://{host}", client_options=CLIENT, retry_config=RETRIES), unquote(path)


def _make_room(file: BucketFile) -> None:
    """Remove the downloads that were used longest ago until this one fits the bound and the disk."""
    folder = downloads_folder()
    kept = sorted((path for path in folder.glob("*/[!.]*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    total_bytes = file.size_bytes + sum(path.stat().st_size for path in kept)
    needed_bytes = file.size_bytes + SPARE_BYTES
    while kept and (total_bytes > MAX_KEPT_BYTES or shutil.disk_usage(folder).free < needed_bytes):
        total_bytes -= kept[0].stat().st_size
        kept.pop(0).unlink(missing_ok=True)
    if (free_bytes := shutil.disk_usage(folder).free) < needed_bytes:
        raise DownloadError(
            f"{file} has {file.size_bytes} bytes, but {free_bytes} are free in {folder}; set {FOLDER_VARIABLE} to a folder on "
            "another disk"
        )
