"""Which data set a folder looks like, by the names in it: for hints where the chosen source finds nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MAX_ENTRIES = 20_000
"""Names that are looked at: a raw release has millions, and what it is shows in the first of them."""

WAYS_OUT = {
    "trajectory.h5": ("droid_raw", "{file} is of the raw DROID release: dataset=droid_raw reads {folder}"),
    ".tfrecord-": (
        "droid_rlds",
        "{file} is a tfrecord shard: dataset=droid_rlds reads {folder}, and other robots' RLDS data by naming their features",
    ),
    "meta/info.json": (
        "lerobot",
        "{file} is of a LeRobot data set: a copy of configs/dataset/lerobot.yaml that names {folder} in `inputs` reads it",
    ),
    ".tar": ("vpt", "{file} is a tar shard: dataset=vpt reads those of .mp4 + .jsonl pairs"),
    ".jsonl": (
        "vpt",
        "{file} lies there loose: `jepa-cache pack {folder} OUT` makes tar shards of .mp4 + .jsonl pairs for dataset=vpt",
    ),
    ".json": (
        "mp4_json",
        "{file} lies beside videos: dataset=mp4_json reads .mp4 + .json pairs, see docs/add_a_dataset.md",
    ),
    ".mp4": (
        None,
        "it holds video files such as {file}: `jepa-cache pack {folder} OUT` makes tar shards of .mp4 + .jsonl pairs for dataset=vpt; "
        "docs/add_a_dataset.md says what other videos need",
    ),
}
"""Marks of a form, the most telling one first: a mark that more than one form has stands below those that only one has."""


def find_way_out(folder: Path, source: str) -> str | None:
    """What in a folder shows that another source reads it, and how; None where nothing does, or it is `source`'s own form.

    Reads names alone.
    """
    found: dict[str, Path] = {}
    for file in _iter_files(folder):
        mark = _find_mark(file)
        if mark is not None:
            found.setdefault(mark, file)
        if mark == next(iter(WAYS_OUT)):
            break
    if ".mp4" not in found:
        found.pop(".json", None)
        found.pop(".jsonl", None)
    for mark, (reader, words) in WAYS_OUT.items():
        if mark in found:
            if reader == source and mark != ".jsonl":  # loose pairs are vpt's, and have to be packed for it
                return None
            data = found[mark].parents[1] if mark == "meta/info.json" else folder
            return words.format(file=found[mark].relative_to(folder), folder=data)
    return None


def _find_mark(file: Path) -> str | None:
    if file.parts[-2:] == ("meta", "info.json"):
        return "meta/info.json"
    if file.name == "trajectory.h5":
        return file.name
    if ".tfrecord-" in file.name:
        return ".tfrecord-"
    return file.suffix if file.suffix in WAYS_OUT else None


def _iter_files(folder: Path) -> Iterator[Path]:
    """Files below a folder in a fixed order, the first MAX_ENTRIES of them."""
    left = MAX_ENTRIES
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names)[:left]:
            yield Path(parent, name)
        left -= len(names) + len(folders)
        if left <= 0:
            return
