"""What every stage script shares: its arguments, and how an error a user can cause is shown."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

from jepa_cache.config.loading import is_override
from jepa_cache.config.terminal import PrintableOutput, printable
from jepa_cache.files import full_disk_named


class StageArguments(NamedTuple):
    """`key=value` overrides of params.yaml, positional paths, whether to start over, and how many processes work where."""

    overrides: list[str]
    paths: list[str]
    fresh: bool
    num_workers: int | None = None
    scheduler: str | None = None


def parse_stage_arguments(
    description: str | None,
    argv: list[str] | None,
    *,
    paths: str | None = None,
    fresh: str | None = None,
    workers: str | None = None,
) -> StageArguments:
    """Parse a stage's command line.

    Args:
        description: Help text: the script's docstring.
        argv: Arguments; None means the process's own.
        paths: Help for positional paths; None when the stage takes none.
        fresh: Help for --fresh; None when the stage has no such flag.
        workers: Help for --workers, beside which there is --scheduler; None when the stage is one process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="PATH | key=value" if paths else "key=value",
        help=f"{paths}; key=value overrides of params.yaml"
        if paths
        else "overrides of params.yaml, such as train.lr=3e-4",
    )
    if fresh is not None:
        parser.add_argument("--fresh", action="store_true", help=fresh)
    if workers is not None:
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--workers", type=int, metavar="N", help=workers)
        where.add_argument(
            "--scheduler", metavar="ADDRESS", help="workers of a Dask scheduler, such as tcp://node:8786"
        )
    parsed = parser.parse_intermixed_args(argv)
    overrides = [argument for argument in parsed.arguments if is_override(argument)]
    positional = [argument for argument in parsed.arguments if not is_override(argument)]
    if positional and paths is None:
        parser.error(f"unexpected argument {positional[0]!r}: this stage takes key=value overrides only")
    return StageArguments(
        overrides,
        positional,
        fresh=getattr(parsed, "fresh", False),
        num_workers=getattr(parsed, "workers", None),
        scheduler=getattr(parsed, "scheduler", None),
    )


def describe_error(error: BaseException) -> str:
    """An error as a user is shown it: its message, and under it what was added where it passed.

    A line may only continue indented, as those of our messages do: else a name could end one and begin another.
    """
    text = "\n  ".join([str(error), *getattr(error, "__notes__", [])])
    return "\n  ".join(printable(line, keep="\t") for line in text.split("\n  "))


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; an error that a user can cause is shown as one message without a traceback, exit code 1."""
    try:
        with full_disk_named(Path(tempfile.gettempdir())), redirect_stdout(PrintableOutput(sys.stdout)):
            main()
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        sys.exit(f"error: {describe_error(error)}")
    except KeyboardInterrupt:
        sys.exit(
            "interrupted; type the same command again: encode and train go on from what is there, the others start over"
        )
