"""What the cache commands share: their arguments, one result as text or JSON, and exit codes.

0: all is well. 1: a problem was found, or the command refused. 2: wrong usage, or it could not be checked.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jepa_cache.cli.stage import describe_error, guarded, repeat_typed
from jepa_cache.config.loading import (
    data_base,
    find_repository,
    load_config,
    manifest_path,
    recordings_base,
    split_arguments,
)
from jepa_cache.config.paths import printable
from jepa_cache.config.schema import Config
from jepa_cache.store.manifest import Manifest, read_manifest
from jepa_cache.store.remote import resolve_cache_root
from jepa_cache.store.root import CacheRoot, RefusedError

PROBLEM, UNCHECKED = 1, 2
NUM_SHOWN = 20
"""Lines of a list that may be long."""

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document")]
Recordings = Annotated[
    list[str] | None, typer.Argument(help="recordings, as encode.py takes them; key=value or FILE.yaml")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as cache.root=/data/cache, or FILE.yaml")]


class Outcome(NamedTuple):
    """The result of a command: one JSON document, the same in words, and whether all is well: exit code 0, else 1."""

    document: dict[str, Any]
    lines: list[str]
    fine: bool = True


class Checkout(NamedTuple):
    """What the arguments of a command mean in the checkout that it was typed in."""

    repository: Path
    config: Config
    paths: list[str]
    base: Path  # that relative recordings are meant from
    root: CacheRoot

    @property
    def manifest_path(self) -> Path:
        """Where stage one leaves its manifest in this checkout."""
        return manifest_path(self.config, self.repository)

    def read_manifest(self, path: Path | None) -> Manifest:
        """The manifest at `path`, else the one that stage one wrote in this checkout.

        Raises:
            ValueError: It is missing or damaged.
        """
        return read_manifest(path or self.manifest_path)


def open_checkout(arguments: Sequence[str] | None) -> Checkout:
    """Read the settings of the checkout around the present folder.

    Args:
        arguments: Recordings and `key=value` overrides, as the stages take them.

    Raises:
        ValueError: A setting is wrong.
    """
    overrides, paths = split_arguments(arguments)
    repository = find_repository(Path.cwd())
    config = load_config(repository, overrides)
    root = resolve_cache_root(config.cache.root, data_base(repository))
    for damage in root.refresh():
        print(f"damaged: {damage}", file=sys.stderr)
    return Checkout(repository, config, paths, recordings_base(config, repository), root)


def report(work: Callable[[], Outcome], *, as_json: bool, typed: Sequence[str] | None = None) -> None:
    """Do the work and print its result, with --json as the one document on stdout; ends with its exit code.

    What the work itself prints goes to stderr then. Commands that it tells to type have the recordings and settings `typed` here.
    """
    try:
        with guarded(sys.stderr if as_json else sys.stdout):
            document, lines, fine = work()
            lines = [repeat_typed(line, typed or ()) for line in lines]
        code = 0 if fine else PROBLEM
    except (ValueError, OSError, KeyboardInterrupt) as error:
        message = f"error: {repeat_typed(describe_error(error), typed or ())}"
        if isinstance(error, KeyboardInterrupt):
            message = "interrupted; nothing is left half-done, so the same command can be run again"
        document, lines = {"error": message.removeprefix("error: ")}, []
        code = PROBLEM if isinstance(error, RefusedError) else UNCHECKED
        print(message, file=sys.stderr)
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False))
    elif lines:
        print("\n".join(printable(line, keep="\t") for line in lines))
    if code:
        raise typer.Exit(code)


def shorten(lines: Sequence[str], indent: str = "") -> list[str]:
    """The first 20 lines of a list, and how many more there are in the JSON document."""
    if len(lines) <= NUM_SHOWN:
        return list(lines)
    return [*lines[:NUM_SHOWN], f"{indent}... and {len(lines) - NUM_SHOWN} more (--json lists all)"]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: columns of text to the left, columns of numbers (by their last row) to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [re.fullmatch(r"-|-?[\d.]+(e[-+]\d+)?%?", cell) is not None for cell in rows[-1]]
    return [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def describe_bytes(num_bytes: float) -> str:
    """A size in words, in units of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
