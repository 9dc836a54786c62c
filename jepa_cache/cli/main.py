"""The `jepa-cache` console command: one file per command, of which only the one that was typed is imported; and `init` and `params`."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.cli.stage import run_stage
from jepa_cache.config.loading import REPOSITORY_ROOT, find_repository, load_config
from jepa_cache.config.parsing import flatten

# Command to its file, in which its function has the command's name; `export` is a group of its own.
COMMANDS = {
    "init": "main",
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
    "view": "view",
    "params": "main",
    "doctor": "doctor",
}
STAGES = {
    **{name: name for name in ("sample", "encode", "evaluate", "plan", "act")},
    **{"fit-scaler": "fit_scaler", "train": "train_predictor"},
}
"""Command to the script in stages/ that it runs."""
PROJECT = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "configs", "stages")
"""What `init` writes: what a checkout has besides the package."""


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
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as train.lr=3e-4, or FILE.yaml")
    ] = None,
) -> None:
    """Print the resolved settings and where each comes from."""
    config = load_config(find_repository(Path.cwd()), overrides or [])
    settings = {name: asdict(it) if is_dataclass(it) else it for name, it in vars(config).items()}
    values = flatten({name: it for name, it in settings.items() if name not in ("members", "origins")})
    width = max(map(len, values))
    for key, value in values.items():
        shown = repr(value) if isinstance(value, str) else str(value)
        print(f"{key:<{width}}  {shown:<40}  {config.origins.get(key, '')}")


def init(
    folder: Annotated[Path, typer.Argument(help="a new folder, or one that holds none of these files yet")],
) -> None:
    """Write a project: params.yaml, dvc.yaml, presets and stages, to change as you like; `dvc repro` works in it.

    Where the folder lies in no git repository one is begun, with a first commit, since experiments need both. Nothing is written over.
    """
    if there := [name for name in PROJECT if (folder / name).exists()]:
        raise ValueError(f"{folder} holds {', '.join(there)} already; name a new folder. Nothing was written")
    for name in PROJECT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY_ROOT / name).is_dir():
            shutil.copytree(REPOSITORY_ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(REPOSITORY_ROOT / name, folder / name)
    pipeline = folder / "dvc.yaml"  # the package is no part of the project: a new version of it makes no stage stale
    pipeline.write_text(re.sub(r"\n +- jepa_cache/.*", "", pipeline.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {folder}: params.yaml, dvc.yaml, configs/, stages/")
    if shutil.which("git") is None:
        print("git is not installed; dvc needs a git repository around the project")
    elif subprocess.run(["git", "rev-parse"], cwd=folder, capture_output=True).returncode:
        known = subprocess.run(["git", "config", "user.email"], cwd=folder, capture_output=True).returncode == 0
        author = [] if known else ["-c", "user.name=jepa-cache", "-c", "user.email=jepa-cache@localhost"]
        for command in (["init"], ["add", "--all"], [*author, "commit", "--message", "A project of jepa-cache"]):
            subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
        print("began a git repository in it, with a first commit")
    print(
        f"next: cd {folder} && dvc repro    (or stage by stage: jepa-cache sample, encode, fit-scaler, train, evaluate)"
    )


def main() -> None:
    """Run the command; an error that a user can cause is one message and exit code 1."""
    typed = next(iter(sys.argv[1:]), None)
    if typed == "--version":
        print(version("jepa-cache"))
    elif typed in STAGES:
        run_stage(lambda: run_script(STAGES[typed], sys.argv[2:]))
    else:
        run_stage(build_app(typed))


def run_script(stage: str, arguments: list[str]) -> None:
    """Run a stage's script of the project around the present folder, as `python stages/NAME.py` does; its --help works in any folder."""
    script = find_repository(Path.cwd(), read_only="--help" in arguments) / f"stages/{stage}.py"
    if not script.is_file():
        raise ValueError(f"{script} is missing; `jepa-cache init FOLDER` writes a project with it")
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
