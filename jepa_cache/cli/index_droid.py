"""`jepa-cache index-droid`: a list of the episodes of a raw DROID download, for stage one and for the official training."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.cli.pack import print_skipped
from jepa_cache.files import atomic_file
from jepa_cache.sources.droid_raw import index_folder


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
    print_skipped(incomplete, "folders")
    print(f"next: set `dataset: droid_raw` in params.yaml, then python stages/encode.py {shlex.quote(str(out))}")
