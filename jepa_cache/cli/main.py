"""The `jepa-cache` console command: one file per command, of which only the one that was typed is imported."""

from __future__ import annotations

import importlib
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import typer

from jepa_cache.cli.outcome import UNCHECKED, help_of
from jepa_cache.cli.stage import describe_error
from jepa_cache.config.terminal import PrintableOutput
from jepa_cache.files import full_disk_named

# Command to its module and function; `export` is a group of its own.
COMMANDS = {
    "estimate": ("estimate", "estimate"),
    "status": ("status", "status"),
    "verify": ("verify", "verify"),
    "gc": ("gc", "gc"),
    "export": ("export", "export"),
    "inspect": ("inspect", "inspect"),
    "pack": ("pack", "pack"),
    "add-encoder": ("add_encoder", "add_encoder"),
    "index-droid": ("index_droid", "index_droid"),
    "compare": ("compare", "compare"),
    "params": ("params", "params"),
    "doctor": ("doctor", "doctor"),
}
INSTEAD = {
    "plan": "jepa-cache estimate",
    "repair": "jepa-cache verify --repair",
    **{stage: f"python stages/{stage}.py" for stage in ("sample", "encode", "fit_scaler", "evaluate")},
    "train": "python stages/train_predictor.py",
}


def build_app(only: str | None = None) -> typer.Typer:
    """The console command.

    Args:
        only: Command to register alone, so that the others are not imported; any other word registers all.
    """
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        help="Work on recordings and on the feature cache.",
    )
    app.callback()(lambda: None)  # with one command alone typer would take its name for an argument
    for name in [only] if only in COMMANDS else COMMANDS:
        module, function = COMMANDS[name]
        command = getattr(importlib.import_module(f"jepa_cache.cli.{module}"), function)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, help=help_of(command))(command)
    return app


def main() -> None:
    """Run the command; an error that a user can cause is one message and exit code 1."""
    typed = next(iter(sys.argv[1:]), None)
    if typed in INSTEAD:
        print(f"error: there is no command `jepa-cache {typed}`; type `{INSTEAD[typed]}`", file=sys.stderr)
        sys.exit(UNCHECKED)
    try:
        with full_disk_named(Path(tempfile.gettempdir())), redirect_stdout(PrintableOutput(sys.stdout)):
            build_app(typed)()
    except (ValueError, OSError) as error:  # OSError: a full disk, a file that cannot be written
        sys.exit(f"error: {describe_error(error)}")
