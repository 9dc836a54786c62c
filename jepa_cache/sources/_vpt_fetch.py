"""OpenAI's published VPT recordings: index files, an estimate of the bytes, and downloads that become tar shards."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from jepa_cache.config.machine import existing_folder
from jepa_cache.media.download import DownloadError, download_file, probe_url
from jepa_cache.media.packing import pack_folder

MAX_INDEX_BYTES = 256 << 20  # OpenAI's largest index has some 20 MB.
STAGING = ".downloads"
SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


class Recording(NamedTuple):
    """One segment of an index: its key in the tar shards, and its files by suffix (`mp4`, `jsonl`, `options`) to URL."""

    key: str
    urls: dict[str, str]


class Failure(NamedTuple):
    """A recording that could not be had, and why."""

    key: str
    reason: str


class Estimate(NamedTuple):
    """Bytes of `num_recordings`, from the sizes of `num_asked` of them (all, when they are as many)."""

    num_recordings: int
    num_asked: int
    total_bytes: int
    failures: list[Failure]


class FetchReport(NamedTuple):
    """What `fetch_recordings` did: keys packed now and those in tar shards before, the new tar shards, bytes, failures."""

    fetched: list[str]
    present: list[str]
    tars: list[Path]
    size_bytes: int
    failures: list[Failure]


def read_index(place: str, staging: Path, *, sleep: Callable[[float], None] = time.sleep) -> list[Recording]:
    """Read an index file of OpenAI's: `{"basedir": URL, "relpaths": ["data/10.0/<segment>.mp4", ...]}`.

    The index is not trusted: a path with `..`, an absolute one, one with a scheme, host, query or unusual characters, and one
    that is no mp4, is an error that names it. So every file lies below `basedir`, and is written below the output folder.

    Args:
        place: A file, or a http(s) URL, which is downloaded first.
        staging: The folder that an index from the network is kept in while it is read.
        sleep: Waits between attempts, seconds.

    Raises:
        ValueError: No index, or one that breaks these rules. DownloadError: It cannot be downloaded.

    Source: openai/Video-Pre-Training, "Contractor Demonstrations"; recording folders are recorder versions.
    """
    path = Path(place).expanduser()
    if urlsplit(place).scheme in ("http", "https"):
        path = staging / f"index-{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"
        path.unlink(missing_ok=True)
        download_file(place, path, sleep=sleep)
    if not path.is_file():
        raise ValueError(f"there is no index file {place}; give the path or URL of one of OpenAI's index json files")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{place} has {path.stat().st_size} bytes; an index has at most {MAX_INDEX_BYTES}")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no JSON: {error}") from error
    basedir = index.get("basedir") if isinstance(index, dict) else None
    relpaths = index.get("relpaths") if isinstance(index, dict) else None
    if not isinstance(basedir, str) or not isinstance(relpaths, list) or not relpaths:
        raise ValueError(f'{place} is no VPT index: it must hold {{"basedir": URL, "relpaths": [...]}} with some paths')
    parts = urlsplit(basedir)
    if (
        parts.scheme not in ("http", "https")
        or not parts.netloc
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise ValueError(f"{place}: basedir must be a plain http(s) URL; got {basedir!r}")
    recordings: dict[str, Recording] = {}
    for relpath in relpaths:
        recording = _read_relpath(place, basedir.rstrip("/"), relpath)
        if recordings.setdefault(recording.key, recording) != recording:
            raise ValueError(
                f"{place} names two recordings {recording.key!r}: {recordings[recording.key].urls['mp4']} and {relpath}"
            )
    return list(recordings.values())


def _read_relpath(place: str, basedir: str, relpath: object) -> Recording:
    parts = relpath.split("/") if isinstance(relpath, str) else []
    if not parts or not all(SAFE_PART.fullmatch(part) for part in parts) or not parts[-1].endswith(".mp4"):
        raise ValueError(
            f"{place}: a relpath must be a plain relative path that ends in .mp4, such as data/10.0/<segment>.mp4, without "
            f"'..', host or query; got {repr(relpath)[:120]}"
        )
    url = f"{basedir}/{relpath.removesuffix('.mp4')}"
    # The last folder is the recorder version, and part of the key; what is above it is the server's own affair.
    # WebDataset takes a dot inside a name for the beginning of the suffix.
    key = "/".join([*parts[-2:-1], parts[-1].removesuffix(".mp4").replace(".", "_")])
    return Recording(key, {"mp4": f"{url}.mp4", "jsonl": f"{url}.jsonl", "options": f"{url}-options.json"})


def estimate_bytes(
    recordings: Sequence[Recording], suffixes: Sequence[str], *, num_asked: int = 8, sleep: Callable = time.sleep
) -> Estimate:
    """Estimate the bytes of recordings from the sizes (HEAD) of up to `num_asked` of them, spread evenly.

    Recordings that cannot be asked are in `failures`; where none can, the estimate is 0 bytes of 0 asked.
    """
    step = max(1, len(recordings) // num_asked)
    sizes, failures = [], []
    for recording in list(recordings[::step])[:num_asked]:
        try:
            sizes.append(sum(probe_url(recording.urls[suffix], sleep=sleep).size_bytes for suffix in suffixes))
        except DownloadError as error:
            failures.append(Failure(recording.key, str(error)))
    mean = sum(sizes) / len(sizes) if sizes else 0.0
    return Estimate(len(recordings), len(sizes), round(mean * len(recordings)), failures)


def packed_keys(folder: Path) -> set[str]:
    """Keys of the recordings in the tar shards of a folder; reads headers only.

    Raises:
        ValueError: A tar shard cannot be read.
    """
    keys = set()
    for tar_path in sorted(folder.glob("*.tar")):
        try:
            with tarfile.open(tar_path, "r:") as tar:
                keys |= {name.removesuffix(".mp4") for name in tar.getnames() if name.endswith(".mp4")}
        except tarfile.TarError as error:
            raise ValueError(f"{tar_path} is no readable tar shard ({error}); move it out of {folder}") from error
    return keys


def fetch_recordings(
    recordings: Sequence[Recording],
    out: Path,
    *,
    options: bool = False,
    max_tar_bytes: int = 1 << 30,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> FetchReport:
    """Download recordings and pack them into tar shards in `out`, one shard whenever `max_tar_bytes` have arrived.

    Recordings that lie in a tar shard of `out` are not downloaded again, and no tar shard is ever rewritten: what was encoded
    from it is found again. Downloads wait in `out/.downloads`; they are removed when their shard is complete, and after a
    crash the same command goes on with them. A recording that cannot be had is named, the others go on.

    Args:
        recordings: From `read_index`.
        out: The folder of the tar shards.
        options: Keep each segment's `-options.json` too, under `out/options`; training does not need them.
        max_tar_bytes: Of recordings in one tar shard.
        say: Takes a line of progress per recording.
        sleep: Waits between attempts, seconds.

    Raises:
        ValueError: A tar shard in `out` cannot be read. OSError: The disk is full or not writable.
    """
    present, staging = packed_keys(out), out / STAGING
    report = FetchReport([], [recording.key for recording in recordings if recording.key in present], [], 0, [])
    staged: list[str] = []
    staged_bytes = total_bytes = 0
    for number, recording in enumerate(recordings, start=1):
        if recording.key in present:
            _remove(staging, [recording.key])  # A crash came between the tar shard and this.
            continue
        try:
            size_bytes = sum(
                download_file(recording.urls[suffix], staging / "pack" / f"{recording.key}.{suffix}", sleep=sleep)
                for suffix in ("mp4", "jsonl")
            )
            if options:
                download_file(recording.urls["options"], out / "options" / f"{recording.key}-options.json", sleep=sleep)
        except DownloadError as error:
            report.failures.append(Failure(recording.key, str(error)))
            say(f"[{number}/{len(recordings)}] {recording.key}: failed: {error}")
            continue
        say(f"[{number}/{len(recordings)}] {recording.key}: {size_bytes / 1e6:.1f} MB")
        staged.append(recording.key)
        staged_bytes, total_bytes = staged_bytes + size_bytes, total_bytes + size_bytes
        if staged_bytes >= max_tar_bytes:
            report.tars.extend(_pack(staging, staged, out))
            report.fetched.extend(staged)
            staged, staged_bytes = [], 0
    if staged:
        report.tars.extend(_pack(staging, staged, out))
        report.fetched.extend(staged)
    return report._replace(size_bytes=total_bytes)


def _pack(staging: Path, keys: Sequence[str], out: Path) -> list[Path]:
    """One tar shard of these recordings, named by them; nothing else that waits in the staging folder is in it."""
    batch = staging / "batch"
    shutil.rmtree(batch, ignore_errors=True)
    for key in keys:
        for suffix in ("mp4", "jsonl"):
            target = batch / f"{key}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(staging / "pack" / f"{key}.{suffix}")
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:12]
    tars = pack_folder(batch, out, prefix=f"vpt-{name}", max_bytes=1 << 62, overwrite=True).tars
    shutil.rmtree(batch)
    _remove(staging, keys)
    return tars


def _remove(staging: Path, keys: Sequence[str]) -> None:
    for key in keys:
        for suffix in ("mp4", "jsonl"):
            (staging / "pack" / f"{key}.{suffix}").unlink(missing_ok=True)


def check_disk(out: Path, needed_bytes: int, max_tar_bytes: int = 1 << 30) -> None:
    """Refuse a download that the disk cannot hold: the tar shards, and one shard's recordings beside them.

    Raises:
        ValueError: Too little space is free.
    """
    free_bytes = shutil.disk_usage(existing_folder(out)).free
    needed_bytes += min(needed_bytes, max_tar_bytes)
    if needed_bytes > free_bytes:
        raise ValueError(
            f"about {needed_bytes / 1e9:.1f} GB are needed below {out}, but {free_bytes / 1e9:.1f} GB are free there; "
            "lower --num, or choose another --out"
        )
