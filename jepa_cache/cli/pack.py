"""`jepa-cache pack`: a folder of recordings to tar shards that stage one reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.media.tar import pack_folder

NUM_SHOWN = 20


def pack(
    folder: Annotated[Path, typer.Argument(help="where the recordings lie, searched recursively")],
    out: Annotated[Path, typer.Argument(help="where the tar shards go")],
    *,
    max_gb: Annotated[float, typer.Option(help="most gigabytes of recordings in one tar shard")] = 1.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the tar shards of an earlier pack")] = False,
) -> None:
    """Pack a folder of <segment>.mp4 + <segment>.jsonl pairs into tar shards under OUT, and name the skipped files.

    Raises:
        ValueError: Nothing to pack, or OUT already holds tar shards and `overwrite` is not set.
    """
    tars, num_episodes, size_bytes, skipped = pack_folder(folder, out, max_bytes=int(max_gb * 1e9), overwrite=overwrite)
    to = f" to {tars[-1].name}" if tars[1:] else ""
    print(f"packed {num_episodes} recordings ({size_bytes / 1e6:.1f} MB) into {len(tars)} tar shards: {tars[0]}{to}")
    print_skipped([f"{file.name}: {file.reason}" for file in skipped], "files")
    print(f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")


def print_skipped(lines: list[str], what: str) -> None:
    """Print how many were skipped, and the first of them with their reasons."""
    if lines:
        more = [f"... and {len(lines) - NUM_SHOWN} more"] if lines[NUM_SHOWN:] else []
        print("\n  ".join([f"skipped {len(lines)} {what}:", *lines[:NUM_SHOWN], *more]))
