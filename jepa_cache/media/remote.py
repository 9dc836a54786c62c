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
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit

from jepa_cache.config.paths import state_folder
from jepa_cache.files import DiskFullError, atomic_file, held_file, make_folder

if TYPE_CHECKING:
    from obstore.store import GCSStore, HTTPStore

BUCKET_SCHEME = "gs://"
HUB_PREFIX = "hub:"
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
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


class FileStat(NamedTuple):
    """What `BucketFile.stat` tells, named as in `os.stat_result`; the version takes the place of times and inode."""

    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_ino: str


@dataclass(frozen=True, order=True)
class BucketFile:
    """One version of a file in a bucket; has of `pathlib.Path` what readers and digests use, and no open connection.

    Attributes:
        bucket: Name of the bucket.
        key: Path in the bucket.
        size_bytes: Bytes.
        version: The server's tag of this content.
    """

    bucket: str
    key: str
    size_bytes: int
    version: str

    def __str__(self) -> str:
        return f"{BUCKET_SCHEME}{self.bucket}/{self.key}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket and parts of the path."""
        return (self.bucket, *self.key.split("/"))

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.parts[-1]

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parents(self) -> tuple[Path, ...]:
        """No folder of this machine holds it."""
        return ()

    def resolve(self) -> BucketFile:
        """The file itself: a bucket has no links."""
        return self

    def is_file(self) -> bool:
        """True: it was there when it was listed."""
        return True

    def stat(self) -> FileStat:
        """Size and version, without a request."""
        return FileStat(self.size_bytes, 0, 0, self.version)

    def with_name(self, name: str) -> BucketFile:
        """The newest version of the file of this name beside it; a DownloadError where there is none."""
        return _find_file(self.bucket, "/".join((*self.parts[1:-1], name)))

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


def list_files(url: str) -> list[BucketFile]:
    """The files at or below `gs://bucket/path`, sorted by their paths.

    Raises:
        ValueError: No such address. DownloadError: Nothing is there, more than 100,000 files, or the bucket cannot be reached.
    """
    import obstore

    bucket, _, prefix = url.removeprefix(BUCKET_SCHEME).partition("/")
    prefix = prefix.rstrip("/")
    if not url.startswith(BUCKET_SCHEME) or not bucket or not prefix:
        raise ValueError(f"{url!r} names no folder of a bucket; write gs://bucket/folder")
    files: list[BucketFile] = []
    with _explained(url):
        for entries in obstore.list(_open_bucket(bucket), prefix):
            files += [_describe(bucket, entry) for entry in entries if not entry["path"].endswith("/")]
            if len(files) > MAX_FILES:
                raise DownloadError(f"{url} holds more than {MAX_FILES} files; name the folder of one data set")
    return sorted(files) if files else [_find_file(bucket, prefix)]


def _find_file(bucket: str, key: str) -> BucketFile:
    import obstore

    with _explained(f"{BUCKET_SCHEME}{bucket}/{key}"):
        return _describe(bucket, obstore.head(_open_bucket(bucket), key))


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
    import obstore

    if not path.exists():
        with _explained(url):
            store, key = _open_url(url)
            _save(obstore.get(store, key), path, most_bytes=MAX_FILE_BYTES)
    return path.stat().st_size


def fetch_hub_dataset(text: str, patterns: Sequence[str]) -> Path:
    """Fetch the files of `hub:owner/name` or `hub:owner/name@revision` that match `patterns`.

    Returns:
        The folder of the snapshot in the hub's cache; what is there already is not fetched again.

    Raises:
        ValueError: No such form. DownloadError: The data set cannot be fetched; the message says how to fetch it elsewhere.
    """
    from huggingface_hub import snapshot_download

    match = HUB_ID.fullmatch(text.removeprefix(HUB_PREFIX))
    if match is None:
        raise ValueError(f"{text!r} names no data set of the hub; write hub:owner/name or hub:owner/name@revision")
    name, revision = match["id"], match["revision"]
    remedy = f"Does it need `hf auth login`? Elsewhere: hf download --repo-type dataset {name} --local-dir DIR; then give DIR"
    with _explained(f"the data set {name} of the hub", remedy):
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))


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


def _open_bucket(name: str) -> GCSStore:
    """A public bucket, without credentials; GOOGLE_BASE_URL points at another server."""
    from obstore.store import GCSStore

    return GCSStore(name, skip_signature=True, client_options=CLIENT, retry_config=RETRIES)


def _open_url(url: str) -> tuple[HTTPStore, str]:
    from obstore.store import HTTPStore

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise DownloadError(f"only http and https are downloaded; got {url!r}")
    host = f"{parts.scheme}://{parts.netloc}"
    return HTTPStore(host, client_options=CLIENT, retry_config=RETRIES), unquote(parts.path.lstrip("/"))


def _describe(bucket: str, entry: Any) -> BucketFile:
    version = entry["e_tag"] or entry["last_modified"].isoformat()
    return BucketFile(bucket, entry["path"], int(entry["size"]), version)


def _save(answer: Any, path: Path, *, most_bytes: int) -> None:
    """Write what a server sends to a file that appears whole or not at all."""
    size_bytes, got_bytes = int(answer.meta["size"]), 0
    if size_bytes > most_bytes:
        raise DownloadError(f"{path.name} has {size_bytes} bytes; at most {most_bytes} are downloaded as one file")
    make_folder(path.parent)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            for block in answer.stream(min_chunk_size=1 << 20):
                got_bytes += file.write(memoryview(block))
        if got_bytes != size_bytes:
            raise DownloadError(f"{path.name}: {got_bytes} bytes arrived where {size_bytes} were announced; try again")


def _fetch(file: BucketFile) -> Path:
    import obstore

    version = hashlib.sha256(f"{file}#{file.version}".encode()).hexdigest()[:16]
    path = downloads_folder() / version / file.name
    if not path.is_file():
        make_folder(path.parent)
        with held_file(path.parent / ".lock"):  # Two processes must not fetch it both.
            if not path.is_file():
                _make_room(file)
                with _explained(str(file)):
                    answer = obstore.get(_open_bucket(file.bucket), file.key)
                    if answer.meta["size"] != file.size_bytes:
                        raise DownloadError(f"{file} has other than the {file.size_bytes} bytes that the bucket lists")
                    _save(answer, path, most_bytes=file.size_bytes)
    os.utime(path)  # What was used longest ago is removed first.
    return path


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
