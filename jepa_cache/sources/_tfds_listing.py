"""Where the shards of a TFDS directory lie, on disk or in a bucket."""

from __future__ import annotations

import fnmatch
import glob
from pathlib import Path

from jepa_cache.media.remote import BUCKET_SCHEME, BucketFile, list_files
from jepa_cache.media.tar import walk
from jepa_cache.sources._tfds_features import FEATURES_FILE
from jepa_cache.sources._tfrecords import parse_shard_name


def list_local(given: str, base: Path) -> list[Path]:
    """The tfrecord shards that a folder, file, glob or brace range names, with every features.json beside one."""
    from braceexpand import braceexpand

    literal = base / Path(given).expanduser()
    found: list[Path] = []
    for name in [given] if literal.exists() else braceexpand(given):
        path = base / Path(name).expanduser()
        for match in [path] if path.exists() else [Path(match) for match in glob.glob(str(path), recursive=True)]:  # noqa: PTH207
            if match.is_dir():
                found += [folder / name for folder, _, names in walk(match) for name in names if ".tfrecord-" in name]
            else:
                found.append(match)
    beside = {path.parent / FEATURES_FILE for path in found}
    return [*found, *(path for path in beside if path.is_file())]


def list_bucket(given: str) -> list[BucketFile]:
    """The files of a folder in a bucket, or those that its last part names as a glob or brace range, with features.json."""
    from braceexpand import braceexpand

    if not given.startswith(BUCKET_SCHEME):
        raise ValueError(
            f"{given!r}: of addresses only {BUCKET_SCHEME}bucket/folder is read; copy the directory and give DIR"
        )
    folder, _, last = given.rpartition("/")
    named = not parse_shard_name(last) and not any(sign in last for sign in "*?[{")
    try:
        files = list_files(given if named else folder)
    except ValueError as error:
        raise ValueError(
            f"{given} cannot be listed: {error}. Is the network reachable, and is it the folder that holds {FEATURES_FILE}? "
            f"Or copy it with `gsutil -m cp -r {given} DIR` and give DIR"
        ) from error
    if named:
        return files
    patterns = list(braceexpand(last))
    return [
        file
        for file in files
        if file.name == FEATURES_FILE or any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
    ]
