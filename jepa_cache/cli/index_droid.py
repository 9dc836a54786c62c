"""`jepa-cache index-droid`: a list of the episodes of a raw DROID download, for stage one and for the official training."""

from __future__ import annotations

import csv
import io
import shlex
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.files import atomic_file
from jepa_cache.sources.droid_raw import index_folder

NUM_SHOWN = 20


def index_droid(
    root: Annotated[Path, typer.Argument(help="the raw DROID download, searched recursively")],
    out: Annotated[Path, typer.Argument(help="the list to write, .csv or .txt")],
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier list")] = False,
) -> None:
    """List the complete episodes below ROOT in OUT, one folder a line, and say what was left out.

    Args:
        root: The raw DROID download, searched recursively.
        out: The list to write; the official V-JEPA 2-AC training takes it as well.
        overwrite: Replace an earlier list.

    Raises:
        ValueError: OUT is there already or has another ending, or ROOT holds no episode.
    """
    if out.suffix.lower() not in (".csv", ".txt"):
        raise ValueError(f"a list of episodes ends in .csv or .txt; got {out}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is there already; add --overwrite to replace it")
    complete, left_out = index_folder(root)
    if not complete:
        raise ValueError(f"none of the {len(left_out)} episodes below {root} is complete (first: {left_out[0].reason})")
    text = io.StringIO()
    csv.writer(text, delimiter=" ", lineterminator="\n").writerows([str(folder.resolve())] for folder in complete)
    with atomic_file(out) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    print(f"listed {len(complete)} episodes in {out}")
    if left_out:
        print(f"left out {len(left_out)} folders:")
        for folder, reason in left_out[:NUM_SHOWN]:
            print(f"  {folder}: {reason}")
        if len(left_out) > NUM_SHOWN:
            print(f"  ... and {len(left_out) - NUM_SHOWN} more")
    print(f"next: set `dataset: droid_raw` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")
