"""OpenAI's published VPT recordings: index files, an estimate of the bytes, and downloads that become tar shards."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from jepa_cache.config.machine import existing_folder
from jepa_cache.media.remote import DownloadError, fetch_file, measure_url
from jepa_cache.media.tar import list_samples, pack_folder

MAX_INDEX_BYTES = 256 << 20  # OpenAI's largest index has some 20 MB.
MAX_TAR_BYTES = 1 << 30
NUM_MEASURED = 8
STAGING = ".downloads"
SUFFIXES = ("mp4", "jsonl")
SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


class Recording(NamedTuple):
    """One segment of an index: its key in the tar shards, and its files by suffix (`mp4`, `jsonl`, `options`) to URL."""

    key: str
    urls: dict[str, str]


def fetch_vpt(
    index: str, out: Path, *, start: int = 0, num: int = 20, options: bool = False, dry_run: bool = False
) -> dict[str, str]:
    """Download recordings of an index and pack them into tar shards in `out`, one shard whenever 1 GiB has arrived.

    Recordings that lie in a tar shard of `out` are not downloaded again, and no tar shard is ever rewritten: what was encoded from
    it is found again. Downloads wait in `out/.downloads`; they are removed when their shard is complete, and after a crash the
    same command resumes with them.

    Args:
        index: Path or URL of an index file.
        out: The folder of the tar shards.
        start: Position in the index of the first recording.
        num: Number of recordings.
        options: Keep each segment's `-options.json` too, under `out/options`; training does not need them.
        dry_run: Estimate the bytes and end.

    Returns:
        Key to reason of the recordings that could not be fetched; the others were.

    Raises:
        ValueError: No index, a tar shard in `out` that cannot be read, or a disk that is too small. OSError: It cannot be written.
    """
    recordings = read_index(index, out / STAGING)
    chosen = recordings[start : start + num]
    present = packed_keys(out)
    missing = [recording for recording in chosen if recording.key not in present]
    print(f"{len(recordings)} recordings in the index, {len(chosen)} chosen, {len(chosen) - len(missing)} at hand")
    needed_bytes, failures = _estimate_bytes(missing, (*SUFFIXES, "options") if options else SUFFIXES)
    _check_disk(out, needed_bytes)
    if dry_run:
        return failures
    failures, staged, staged_bytes, tars = {}, [], 0, []
    for number, recording in enumerate(chosen, start=1):
        if recording.key in present:
            _remove(out / STAGING, [recording.key])  # A crash came between the tar shard and this.
            continue
        where = f"[{number}/{len(chosen)}] {recording.key}"
        try:
            size_bytes = _fetch(recording, out, options)
        except DownloadError as error:
            failures[recording.key] = str(error)
            print(f"{where}: failed: {error}")
            continue
        print(f"{where}: {size_bytes / 1e6:.1f} MB")
        staged.append(recording.key)
        staged_bytes += size_bytes
        if staged_bytes >= MAX_TAR_BYTES:
            tars += _pack(out, staged)
            staged, staged_bytes = [], 0
    if staged:
        tars += _pack(out, staged)
    print(f"packed {len(missing) - len(failures)} recordings as {len(tars)} tar shards")
    return failures


def read_index(place: str, staging: Path) -> list[Recording]:
    """Read an index file of OpenAI's: `{"basedir": URL, "relpaths": ["data/10.0/<segment>.mp4", ...]}`.

    The index is not trusted: a path with `..`, an absolute one, one with a scheme, host, query or unusual characters, and one
    that is no mp4, is an error that names it. So every file lies below `basedir`, and is written below the output folder.

    Args:
        place: A file, or a http(s) URL, which is downloaded first.
        staging: The folder that an index from the network is kept in while it is read.

    Raises:
        ValueError: No index, or one that breaks these rules. DownloadError: It cannot be downloaded.

    Source: openai/Video-Pre-Training, "Contractor Demonstrations"; recording folders are recorder versions.
    """
    path = Path(place).expanduser()
    if urlsplit(place).scheme in ("http", "https"):
        path = staging / f"index-{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"
        path.unlink(missing_ok=True)
        fetch_file(place, path)
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


def _estimate_bytes(recordings: Sequence[Recording], suffixes: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Bytes by the sizes of a few recordings, spread evenly, and which of these could not be measured."""
    sizes, failures = [], {}
    for recording in recordings[:: max(1, len(recordings) // NUM_MEASURED)][:NUM_MEASURED]:
        try:
            sizes.append(sum(measure_url(recording.urls[suffix]) for suffix in suffixes))
        except DownloadError as error:
            failures[recording.key] = str(error)
    needed_bytes = round(sum(sizes) / max(1, len(sizes)) * len(recordings))
    print(f"to download: about {needed_bytes / 1e9:.2f} GB, from the sizes of {len(sizes)} recordings")
    return needed_bytes, failures


def packed_keys(folder: Path) -> set[str]:
    """Keys of the recordings in the tar shards of a folder; reads headers only.

    Raises:
        ValueError: A tar shard cannot be read.
    """
    keys = set()
    for tar_path in sorted(folder.glob("*.tar")):
        for sample in list_samples(tar_path, SUFFIXES):
            if sample.problem is not None:
                raise ValueError(f"{tar_path} is no readable tar shard ({sample.problem}); move it out of {folder}")
            keys.add(sample.key)
    return keys


def _fetch(recording: Recording, out: Path, options: bool) -> int:
    size_bytes = sum(
        fetch_file(recording.urls[suffix], _staged(out / STAGING, recording.key, suffix)) for suffix in SUFFIXES
    )
    if options:
        fetch_file(recording.urls["options"], out / "options" / f"{recording.key}-options.json")
    return size_bytes


def _pack(out: Path, keys: Sequence[str]) -> list[Path]:
    """One tar shard of these recordings, named by them; nothing else that waits in the staging folder is in it."""
    batch = out / STAGING / "batch"
    shutil.rmtree(batch, ignore_errors=True)
    for key in keys:
        for suffix in SUFFIXES:
            target = batch / f"{key}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(_staged(out / STAGING, key, suffix))
    name = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:12]
    tars = pack_folder(batch, out, prefix=f"vpt-{name}", max_bytes=1 << 62, overwrite=True).tars
    shutil.rmtree(batch)
    _remove(out / STAGING, keys)
    return tars


def _staged(staging: Path, key: str, suffix: str) -> Path:
    return staging / "pack" / f"{key}.{suffix}"


def _remove(staging: Path, keys: Sequence[str]) -> None:
    for key in keys:
        for suffix in SUFFIXES:
            _staged(staging, key, suffix).unlink(missing_ok=True)


def _check_disk(out: Path, needed_bytes: int) -> None:
    """Refuse a download that the disk cannot hold: the tar shards, and one shard's recordings beside them."""
    free_bytes = shutil.disk_usage(existing_folder(out)).free
    needed_bytes += min(needed_bytes, MAX_TAR_BYTES)
    if needed_bytes > free_bytes:
        raise ValueError(
            f"about {needed_bytes / 1e9:.1f} GB are needed below {out}, but {free_bytes / 1e9:.1f} GB are free there; "
            "lower --num, or choose another --out"
        )
