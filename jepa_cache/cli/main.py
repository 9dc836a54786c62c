"""The `jepa-cache` console command: registers one function per command file."""

from __future__ import annotations

import sys

import typer

from jepa_cache.cli.doctor import doctor
from jepa_cache.cli.index_droid import index_droid
from jepa_cache.cli.inspect_data import inspect
from jepa_cache.cli.pack import pack
from jepa_cache.cli.params import params

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Work on recordings and on the feature cache.",
)
for command in (doctor, index_droid, inspect, pack, params):
    app.command(help=command.__doc__.partition("\n\n")[0])(command)


def main() -> None:
    """Run the command; an error that a user can cause is one message and exit code 1."""
    try:
        app()
    except ValueError as error:
        sys.exit(f"error: {error}")
