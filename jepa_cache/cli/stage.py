"""What stage scripts and commands share: a stage's arguments, and how results and errors reach a terminal."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from jepa_cache.config.loading import load_config, split_arguments
from jepa_cache.config.paths import is_full_gpu, printable
from jepa_cache.files import OURS, full_disk_named

NEXT = re.compile(
    r"(?:python stages/(\w+)\.py|jepa-cache verify --repair(?: --against-online \d+ --seed \d+)?)(?=`|$)", re.MULTILINE
)


def parse_stage_arguments(
    root: Path, description: str | None, argv: list[str] | None, *, paths: str | None = None, **options: dict[str, Any]
) -> argparse.Namespace:
    """Parse a stage's command line into `config`, the settings of the checkout at `root`, `paths`, and the options.

    `again` holds the typed settings, to be shown behind the next command. `paths` is the help for positional paths, None where
    the stage takes none. Of the options, each with what argparse is told of it, one may be given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="PATH | key=value | FILE.yaml" if paths else "key=value | FILE.yaml",
        help=f"{paths + '; ' if paths else ''}overrides of params.yaml, such as train.lr=3e-4, or a file of them",
    )
    for name, how in options.items():
        parser.add_argument(f"--{name}", **how)
    parsed = parser.parse_intermixed_args(argv)
    overrides, parsed.paths = split_arguments(parsed.arguments)
    if len(given := [name for name in options if getattr(parsed, name)]) > 1:
        parser.error(f"--{' and --'.join(given)} exclude each other")
    if parsed.paths and paths is None:
        parser.error(
            f"unexpected argument {parsed.paths[0]!r}: this stage takes overrides only, key=value or a .yaml file of them"
        )
    parsed.config = load_config(root, overrides)
    parsed.again = _type_again(overrides)
    return parsed


def _type_again(overrides: Iterable[str]) -> str:
    """Overrides as one types them behind a command."""
    return "".join(f" {shlex.quote(override)}" for override in overrides)


def repeat_typed(text: str, arguments: Iterable[str]) -> str:
    """A text that tells which command to type next, with the settings that were typed; and the recordings, if that takes some."""
    settings, recordings = split_arguments(arguments)

    def repeat(found: re.Match) -> str:
        takes_recordings = found[1] is None or found[1] == "encode"
        return found[0] + _type_again([*recordings * takes_recordings, *settings])

    return NEXT.sub(repeat, text)


class PrintableOutput:
    """A stdout through which only printable characters, line ends and tabs pass; for a whole command."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; returns its length, as a stream does."""
        self._stream.write(printable(text, keep="\n\t"))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def guarded(stream: TextIO) -> Iterator[None]:
    """Print to `stream` without control characters; a full disk is that of temporary files where no error says more."""
    with full_disk_named(Path(tempfile.gettempdir())), redirect_stdout(PrintableOutput(stream)):
        yield


def describe_error(error: BaseException) -> str:
    """An error as a user is shown it: its message, and under it what was added where it passed.

    A line may only continue indented, as those of our messages do: else a name could end one and begin another.
    """
    told = str(error)
    if isinstance(error, OSError) and OURS.fullmatch((path := Path(str(error.filename))).name):
        told = (
            f"{path.parent} cannot be written ({error.strerror}); give this user the right to, or name another folder"
        )
    text = "\n  ".join([told, *getattr(error, "__notes__", [])])
    return "\n  ".join(printable(line, keep="\t") for line in text.split("\n  "))


def describe_full_gpu(error: RuntimeError) -> str:
    """What to lower when a GPU's memory is full, whichever stage it was: the error names none of our settings."""
    return (
        f"the GPU's memory is full ({str(error).splitlines()[0]})\n"
        "  train: lower train.batch_size and raise train.grad_accumulation as much, or set activation_checkpointing: true in the predictor's preset\n"
        "  encode: lower encode.batch_size; evaluate: lower evaluate.batch_size; plan and act: lower num_samples\n"
        "  nvidia-smi lists what else is on this GPU; CUDA_VISIBLE_DEVICES=1 before the command takes another one"
    )


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage or command; an error that a user can cause is one message without a traceback, exit code 1.

    A stage that the message tells to run is shown with the settings that were typed here.
    """
    try:
        with guarded(sys.stdout):
            main()
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        sys.exit(f"error: {repeat_typed(describe_error(error), split_arguments(sys.argv[1:])[0])}")
    except RuntimeError as error:
        if not is_full_gpu(error):
            raise
        sys.exit(f"error: {describe_full_gpu(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; type the same command again: encode and train resume, the others start over")
