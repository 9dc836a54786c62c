"""The `jepa-cache` console command: one file per command, of which only the one that was typed is imported; and `params`."""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from jepa_cache.cli.stage import run_stage
from jepa_cache.config.loading import REPOSITORY_ROOT, find_repository, load_config

# Command to its file, in which its function has the command's name; `export` is a group of its own.
COMMANDS = {
    "init": "init",
    "estimate": "estimate",
    "status": "status",
    "verify": "verify",
    "gc": "gc",
    "export": "export",
    "pull": "sharing",
    "inspect": "inspect",
    "pack": "preparation",
    "add-encoder": "preparation",
    "compare": "compare",
    "params": "main",
    "doctor": "doctor",
}
STAGES = {
    **{name: name for name in ("sample", "encode", "evaluate", "plan", "act")},
    **{"fit-scaler": "fit_scaler", "train": "train_predictor"},
}
"""Command to the script in stages/ that it runs."""
INSTEAD = {
    "repair": "verify --repair",
    "fit_scaler": "fit-scaler",
    "train_predictor": "train",
    "index-droid": "inspect dataset=droid_raw FOLDER",
}


def build_app(only: str | None = None) -> typer.Typer:
    """The console command, in which the command `only` works, and of the others just the help is there."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        help="Run the stages of a project, and work on recordings and on the feature cache. --version prints the version.",
    )
    app.callback()(lambda: None)  # with one command alone typer would take its name for an argument
    for name, stage in STAGES.items():
        text = ast.get_docstring(ast.parse((REPOSITORY_ROOT / f"stages/{stage}.py").read_text(encoding="utf-8"))) or ""
        app.command(name, help=f"{text.partition(chr(10))[0]} (stages/{stage}.py)")(lambda: None)
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
        print(f"error: there is no command `jepa-cache {typed}`; type `jepa-cache {INSTEAD[typed]}`", file=sys.stderr)
        sys.exit(2)
    if typed == "--version":
        print(version("jepa-cache"))
    elif typed in STAGES:
        run_stage(lambda: run_script(STAGES[typed], sys.argv[2:]))
    else:
        run_stage(build_app(typed))


def run_script(stage: str, arguments: list[str]) -> None:
    """Run a stage's script of the project around the present folder, as `python stages/NAME.py` does."""
    script = find_repository(Path.cwd()) / f"stages/{stage}.py"
    if not script.is_file():
        raise ValueError(f"{script} is missing; `jepa-cache init FOLDER` writes a project with it")
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
