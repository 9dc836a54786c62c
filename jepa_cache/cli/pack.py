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
    """Pack a folder of <segment>.mp4 + <segment>.jsonl pairs into tar shards under OUT, and say what was left out.

    Args:
        folder: Where the recordings lie, searched recursively.
        out: Where the tar shards go.
        max_gb: Most gigabytes (10^9 bytes) of recordings in one tar shard.
        overwrite: Replace the tar shards of an earlier pack.

    Raises:
        ValueError: Nothing to pack, or OUT already holds tar shards and `overwrite` is not set.
    """
    report = pack_folder(folder, out, max_bytes=int(max_gb * 1e9), overwrite=overwrite)
    print(
        f"packed {report.num_episodes} recordings ({report.size_bytes / 1e6:.1f} MB) into {len(report.tars)} tar shards: "
        f"{report.tars[0]}{f' to {report.tars[-1].name}' if len(report.tars) > 1 else ''}"
    )
    if report.left_out:
        print(f"left out {len(report.left_out)} files:")
        for left_out in report.left_out[:NUM_SHOWN]:
            print(f"  {left_out.name}: {left_out.reason}")
        if len(report.left_out) > NUM_SHOWN:
            print(f"  ... and {len(report.left_out) - NUM_SHOWN} more")
    print(f"next: set `dataset: vpt` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")
