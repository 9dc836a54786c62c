"""Puts what a project starts from into the wheel, as jepa_cache/template: `jepa-cache init` writes it, and it holds the presets."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROJECT = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "configs", "stages")
"""As in jepa_cache/cli/main.py, which cannot be imported before what it needs is installed."""


class BuildWithTemplate(build_py):
    """The usual build, and the files of a project beside the modules."""

    def run(self) -> None:
        """Build; an editable install takes the files from the checkout."""
        super().run()
        template = Path(self.build_lib) / "jepa_cache/template"
        shutil.rmtree(template, ignore_errors=True)  # of an earlier build
        for name in () if self.editable_mode else PROJECT:
            (template / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, template / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / name, template / name)


setup(cmdclass={"build_py": BuildWithTemplate})
