"""`jepa-cache pack` and `jepa-cache index-droid`: folders of recordings as tar shards, or as a list of episodes."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.files import atomic_file
from jepa_cache.media.tar import pack_folder
from jepa_cache.sources.droid_raw import index_folder

NUM_SHOWN = 20


def pack(
    folder: Annotated[Path, typer.Argument(help="where the recordings lie, searched recursively")],
    out: Annotated[Path, typer.Argument(help="where the tar shards go")],
    *,
    max_gb: Annotated[float, typer.Option(min=0, help="most gigabytes of recordings in one tar shard")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the tar shards of an earlier pack")] = False,
) -> None:
    """Pack a folder of <segment>.mp4 + <segment>.jsonl pairs into tar shards under OUT, and name the skipped files.

    Raises:
        ValueError: Nothing to pack, or OUT already holds tar shards and `overwrite` is not set.
    """
    tars, num_episodes, size_bytes, skipped = pack_folder(folder, out, max_bytes=int(max_gb * 1e9), overwrite=overwrite)
    to = f" to {tars[-1].name}" if tars[1:] else ""
    print(f"packed {num_episodes} recordings ({size_bytes / 1e6:.1f} MB) into {len(tars)} tar shards: {tars[0]}{to}")
    _print_skipped(skipped, "files")
    print(f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")


def index_droid(
    root: Annotated[Path, typer.Argument(help="the raw DROID download, searched recursively")],
    out: Annotated[Path, typer.Argument(help="the list to write, .csv or .txt")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier list")] = False,
) -> None:
    """List the complete episodes below ROOT in OUT, one folder a line, and name the skipped folders.

    Raises:
        ValueError: OUT exists or has another ending, or ROOT holds no complete episode.
    """
    if out.suffix.lower() not in (".csv", ".txt"):
        raise ValueError(f"a list of episodes ends in .csv or .txt; got {out}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; add --overwrite to replace it")
    complete, incomplete = index_folder(root)
    if not complete:
        raise ValueError(f"none of the {len(incomplete)} episodes below {root} is complete; the first: {incomplete[0]}")
    with atomic_file(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=" ", lineterminator="\n").writerows([str(folder.resolve())] for folder in complete)
    print(f"listed {len(complete)} episodes in {out}")
    _print_skipped(incomplete, "folders")
    print(f"next: set `dataset: droid_raw` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")


def _print_skipped(lines: list[str], what: str) -> None:
    """Print how many were skipped, and the first of them with their reasons."""
    if lines:
        more = [f"... and {len(lines) - NUM_SHOWN} more"] if lines[NUM_SHOWN:] else []
        print("\n  ".join([f"skipped {len(lines)} {what}:", *lines[:NUM_SHOWN], *more]))
