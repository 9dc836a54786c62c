"""`jepa-cache init`: a project of one's own, with the settings, presets and stages of this version, that works like a checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from jepa_cache.config.loading import REPOSITORY_ROOT

PROJECT = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "configs", "stages")


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
