"""The `jepa-cache` console command: one file per command, of which only the one that was typed is imported; and `params`."""

from __future__ import annotations

import ast
import importlib
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jepa_cache.cli.stage import run_stage
from jepa_cache.config.loading import find_repository, load_config

# Command to its file, in which its function has the command's name; `export` is a group of its own.
COMMANDS = {
    "estimate": "estimate",
    "status": "status",
    "verify": "verify",
    "gc": "gc",
    "export": "export",
    "inspect": "inspect",
    "pack": "preparation",
    "add-encoder": "preparation",
    "compare": "compare",
    "params": "main",
    "doctor": "doctor",
}
INSTEAD = {
    "plan": "jepa-cache estimate",
    "repair": "jepa-cache verify --repair",
    "index-droid": "jepa-cache inspect dataset=droid_raw FOLDER",
    **{stage: f"python stages/{stage}.py" for stage in ("sample", "encode", "fit_scaler", "evaluate")},
    "train": "python stages/train_predictor.py",
}


def build_app(only: str | None = None) -> typer.Typer:
    """The console command, in which the command `only` works, and of the others just the help is there."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        help="Work on recordings and on the feature cache.",
    )
    app.callback()(lambda: None)  # with one command alone typer would take its name for an argument
    for name, module in COMMANDS.items():
        function = name.replace("-", "_")
        if name != only:
            app.command(name, help=read_help(module, function))(lambda: None)
            continue
        command = getattr(importlib.import_module(f"jepa_cache.cli.{module}"), function)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def read_help(module: str, function: str) -> str:
    """The docstring of a command, read without importing it; of a group that of its file."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return ast.get_docstring(node) or ""
    return (ast.get_docstring(tree) or "").partition("`: ")[2].capitalize()


def params(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as train.lr=3e-4")] = None,
) -> None:
    """Print the resolved settings and where each comes from."""
    config = load_config(find_repository(Path.cwd()), overrides or [])
    values: dict[str, Any] = {}
    for section, settings in vars(config).items():
        if is_dataclass(settings):
            for key, value in asdict(settings).items():
                nested = value.items() if isinstance(value, dict) else ()
                values |= {f"{section}.{key}.{inner}": it for inner, it in nested} or {f"{section}.{key}": value}
    width = max(map(len, values))
    for key, value in values.items():
        shown = repr(value) if isinstance(value, str) else str(value)
        print(f"{key:<{width}}  {shown:<40}  {config.origins.get(key, '')}")


def main() -> None:
    """Run the command; an error that a user can cause is one message and exit code 1."""
    typed = next(iter(sys.argv[1:]), None)
    if typed in INSTEAD:
        print(f"error: there is no command `jepa-cache {typed}`; type `{INSTEAD[typed]}`", file=sys.stderr)
        sys.exit(2)
    run_stage(build_app(typed))
