"""A checkout of this repository in a temporary folder, with a small sample data set, for tests that run it as users do."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE_SETTINGS = Path(__file__).resolve().parent / "settings"
"""params.yaml as it is released, and the presets: what tests load in place of the checkout's, which an experiment may have changed."""
CHECKOUT = (
    *("jepa_cache", "stages", "configs", "docs", "benchmarks"),
    *("dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt", "Makefile", "README.md"),
    *(".gitignore", ".dvcignore", ".dvc/.gitignore", ".dvc/config"),
)
"""What a user has of the repository; nothing that a training, `dvc repro` or an editor may have left beside it."""

SMALLER = {
    "configs/dataset/sample.yaml": {
        "num_episodes: 48": "num_episodes: 4",
        "episode_s: 20.0": "episode_s: 3.0",
        "episodes_per_tar: 12": "episodes_per_tar: 2",
    },
    "configs/train/demo.yaml": {
        "num_steps: 600": "num_steps: 6",
        "num_warmup: 50": "num_warmup: 1",
        "num_anneal: 180": "num_anneal: 2",
        "batch_size: 32": "batch_size: 4",
        "checkpoint_every: 200": "checkpoint_every: 2",
        "log_every: 10": "log_every: 1",
    },
    "params.yaml": {
        "val_share: 0.25": "val_share: 0.5",
        "windows_per_episode: 16": "windows_per_episode: 4",
        "num_bootstrap: 2000": "num_bootstrap: 100",
        "measure: [energy, distances]": "measure: [distances]",
    },
}


def copy_settings(folder: Path) -> Path:
    """params.yaml and configs/ of the suite in `folder`, to be edited there."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SUITE_SETTINGS / "params.yaml", folder)
    shutil.copytree(SUITE_SETTINGS / "configs", folder / "configs")
    return folder


class Workspace:
    """A git checkout with a cache, state and runs folder of its own; commands run in it as a user types them."""

    def __init__(self, folder: Path, *, smaller: bool = True) -> None:
        self.root = folder / "checkout"
        self.cache = folder / "cache"
        self.env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "JEPA_CACHE_HOME": str(self.cache),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "downloads"),
            "DVC_NO_ANALYTICS": "1",
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.com",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.com",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("GIT_DIR", "GIT_INDEX_FILE"):
            self.env.pop(name, None)
        for name in CHECKOUT:
            copy = shutil.copy
            if (ROOT / name).is_dir():
                copy = functools.partial(shutil.copytree, ignore=shutil.ignore_patterns("__pycache__"))
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, self.root / name)
        shutil.copy(SUITE_SETTINGS / "params.yaml", self.root)
        for name, changes in SMALLER.items() if smaller else ():
            for old, new in changes.items():
                self.edit(name, old, new)
        self.run("git", "init", "-q")
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "start")

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text in one file; it must be there."""
        text = (self.root / name).read_text()
        assert old in text, f"{name} does not hold {old!r}"
        (self.root / name).write_text(text.replace(old, new, 1))

    def run(self, *command: str, fails: bool = False, timeout: float = 300) -> str:
        """Run a command in the checkout; returns what it printed."""
        output, code = self.call(command, timeout)
        assert (code != 0) == fails, f"{' '.join(command)} ended with {code}:\n{output[-6000:]}"
        return output

    def call(self, command: Sequence[str], timeout: float = 600) -> tuple[str, int]:
        """Run a command in the checkout; returns what it printed, and its exit code."""
        result = subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=timeout)
        return result.stdout + result.stderr, result.returncode

    def python(self, *arguments: str, fails: bool = False) -> str:
        """Run `python ...` in the checkout."""
        return self.run(sys.executable, *arguments, fails=fails)

    def stores(self) -> dict[str, int]:
        """Every file below the tokens folder of the cache with its modification time: unchanged means nothing was encoded."""
        files = (self.cache / "tokens").rglob("*")
        return {str(path.relative_to(self.cache)): path.stat().st_mtime_ns for path in files}
