"""OpenAI's published VPT recordings: index files, an estimate of the bytes, and downloads that become tar shards."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from jepa_cache.files import existing_folder
from jepa_cache.media.remote import DownloadError, fetch_file, measure_url
from jepa_cache.media.tar import SUFFIXES, list_samples, write_tar
from jepa_cache.sources.parsers.untrusted import check_fields, read_object

MAX_INDEX_BYTES = 256 << 20  # OpenAI's largest index has some 20 MB.
MAX_TAR_BYTES = 1 << 30
NUM_MEASURED = 8
STAGING = ".downloads"
PART = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"


class Index(BaseModel):
    """An index file, whose relative paths cannot leave their folder, here or on the server."""

    basedir: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+(/[^?#@\s]*)?$")]
    relpaths: Annotated[list[Annotated[str, Field(pattern=rf"^({PART}/)*{PART}\.mp4$")]], Field(min_length=1)]


def fetch_vpt(index: str, out: Path, *, start: int = 0, num: int = 20, dry_run: bool = False) -> dict[str, str]:
    """Download `num` recordings of an index and pack them into tar shards in `out`, one whenever 1 GiB has arrived.

    Recordings that lie in a tar shard of `out` are not downloaded again, and no tar shard is ever rewritten: what was
    encoded from it is found again. Downloads wait in `out/.downloads`; they are removed when their shard is complete,
    and after a crash the same command resumes with them. `dry_run` ends after the estimate of the bytes.

    Returns:
        Key to reason of the recordings that could not be fetched; the others were.

    Raises:
        ValueError: No index, a tar shard in `out` that cannot be read, or a disk that is too small. OSError: It cannot
            be written.
    """
    recordings = read_index(index, out / STAGING)
    chosen, present = list(recordings)[start : start + num], _list_packed(out)
    missing = [key for key in chosen if key not in present]
    print(f"{len(recordings)} recordings in the index, {len(chosen)} chosen, {len(chosen) - len(missing)} at hand")
    failures = _check_disk(out, {key: recordings[key] for key in missing})
    if dry_run:
        return failures
    for key in present:  # A crash came between the tar shard and this.
        _remove_staged(out, key)
    failures, staged, staged_bytes, num_tars = {}, [], 0, 0
    for number, key in enumerate(missing, start=1):
        try:
            files = [(f"{recordings[key]}.{suffix}", _staged(out, key, suffix)) for suffix in SUFFIXES]
            size_bytes = sum(fetch_file(url, path) for url, path in files)
            print(f"[{number}/{len(missing)}] {key}: {size_bytes / 1e6:.1f} MB")
            staged.append(key)
            staged_bytes += size_bytes
        except DownloadError as error:
            failures[key] = str(error)
            print(f"[{number}/{len(missing)}] {key}: failed: {error}")
        if staged and (staged_bytes >= MAX_TAR_BYTES or number == len(missing)):
            _pack(out, staged)
            staged, staged_bytes, num_tars = [], 0, num_tars + 1
    print(f"packed {len(missing) - len(failures)} recordings as {num_tars} tar shards")
    return failures


def read_index(location: str, staging: Path) -> dict[str, str]:
    """Read an index file of OpenAI's: `{"basedir": URL, "relpaths": ["data/10.0/<segment>.mp4", ...]}`.

    Args:
        location: A file, or a http(s) URL, which is downloaded first.
        staging: The folder that an index from the network is kept in while it is read.

    Returns:
        By the recording's key in the tar shards, the URL of its files without their suffix.

    Raises:
        ValueError: No index, or one that breaks these rules. DownloadError: It cannot be downloaded.

    Source: openai/Video-Pre-Training, "Contractor Demonstrations"; recording folders are recorder versions.
    """
    path = Path(location).expanduser()
    if urlsplit(location).scheme in ("http", "https"):
        path = staging / "index.json"
        path.unlink(missing_ok=True)
        fetch_file(location, path)
    hint = ". An index holds a plain http(s) basedir and plain relative paths such as data/10.0/<segment>.mp4"
    index = check_fields(Index, read_object(path, MAX_INDEX_BYTES), location, hint)
    urls: dict[str, str] = {}
    for relpath in index.relpaths:
        # The last folder is the recorder version, and part of the key; what is above it is the server's own affair.
        # WebDataset takes a dot inside a name for the beginning of the suffix.
        *folders, name = relpath.removesuffix(".mp4").split("/")
        key, url = "/".join([*folders[-1:], name.replace(".", "_")]), f"{index.basedir.rstrip('/')}/{relpath}"
        if urls.setdefault(key, url.removesuffix(".mp4")) != url.removesuffix(".mp4"):
            raise ValueError(f"{location} names two recordings {key!r}; the second is {relpath}")
    return urls


def _check_disk(out: Path, recordings: Mapping[str, str]) -> dict[str, str]:
    """Estimate the bytes by a few recordings, spread evenly, and refuse a disk that cannot hold them.

    The disk holds the tar shards, and one shard's recordings beside them. Returns key to reason of those that cannot be
    measured.
    """
    sizes, failures = [], {}
    for key in list(recordings)[:: max(1, len(recordings) // NUM_MEASURED)][:NUM_MEASURED]:
        try:
            sizes.append(sum(measure_url(f"{recordings[key]}.{suffix}") for suffix in SUFFIXES))
        except DownloadError as error:
            failures[key] = str(error)
    num_bytes = round(sum(sizes) / max(1, len(sizes)) * len(recordings))
    print(f"to download: about {num_bytes / 1e9:.2f} GB, from the sizes of {len(sizes)} recordings")
    needed_bytes, free_bytes = num_bytes + min(num_bytes, MAX_TAR_BYTES), shutil.disk_usage(existing_folder(out)).free
    if needed_bytes > free_bytes:
        raise ValueError(
            f"about {needed_bytes / 1e9:.1f} GB are needed below {out}, but {free_bytes / 1e9:.1f} GB are free there; "
            "lower --num, or choose another --out"
        )
    return failures


def _list_packed(folder: Path) -> set[str]:
    """Keys of the recordings in the tar shards of a folder; reads headers only."""
    keys = set()
    for tar in sorted(folder.glob("*.tar")):
        for sample in list_samples(tar, SUFFIXES):
            if sample.problem is not None:
                raise ValueError(f"{tar} is no readable tar shard ({sample.problem}); move it out of {folder}")
            keys.add(sample.key)
    return keys


def _pack(out: Path, keys: Sequence[str]) -> None:
    """One tar shard of these recordings, named by them."""
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:12]
    files = {key: {suffix: _staged(out, key, suffix) for suffix in SUFFIXES} for key in sorted(keys)}
    write_tar(out / f"vpt-{name}-000000.tar", files)
    for key in keys:
        _remove_staged(out, key)


def _staged(out: Path, key: str, suffix: str) -> Path:
    return out / STAGING / "pack" / f"{key}.{suffix}"


def _remove_staged(out: Path, key: str) -> None:
    for suffix in SUFFIXES:
        _staged(out, key, suffix).unlink(missing_ok=True)
