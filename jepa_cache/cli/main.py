"""The `jepa-cache` console command: one file per command, of which only the one that was typed is imported."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import typer

from jepa_cache.cli.stage import run_stage

# Command to its file, in which its function has the command's name; `export` is a group of its own.
COMMANDS = {
    "estimate": "estimate",
    "status": "status",
    "verify": "verify",
    "gc": "gc",
    "export": "export",
    "inspect": "inspect",
    "pack": "data",
    "add-encoder": "presets",
    "index-droid": "data",
    "compare": "compare",
    "params": "presets",
    "doctor": "doctor",
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
        only: Command that is going to run; of the others, or of all with any other word, only the help is there.
    """
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        help="Work on recordings and on the feature cache.",
    )
    app.callback()(lambda: None)  # with one command alone typer would take its name for an argument
    for name, module in COMMANDS.items():
        if name != only:
            app.command(name, help=read_help(module, name.replace("-", "_")))(lambda: None)
            continue
        command = getattr(importlib.import_module(f"jepa_cache.cli.{module}"), name.replace("-", "_"))
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, help=read_help(module, command.__name__))(command)
    return app


def read_help(module: str, function: str) -> str:
    """What --help says: the docstring up to its arguments and errors, read without importing the command."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if not found:  # a group: what its file is for
        return (ast.get_docstring(tree) or "").partition("`: ")[2].capitalize()
    return re.split(r"\n\n(Args|Raises):", ast.get_docstring(found[0]) or "")[0]


def main() -> None:
    """Run the command; an error that a user can cause is one message and exit code 1."""
    typed = next(iter(sys.argv[1:]), None)
    if typed in INSTEAD:
        print(f"error: there is no command `jepa-cache {typed}`; type `{INSTEAD[typed]}`", file=sys.stderr)
        sys.exit(2)
    run_stage(build_app(typed))
