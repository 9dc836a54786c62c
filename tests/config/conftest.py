"""A copy of the settings that a test may edit."""

import shutil

import pytest

from jepa_cache.config.loading import REPOSITORY_ROOT


@pytest.fixture
def root(tmp_path):
    """A folder with params.yaml and configs/."""
    shutil.copy(REPOSITORY_ROOT / "params.yaml", tmp_path)
    shutil.copytree(REPOSITORY_ROOT / "configs", tmp_path / "configs")
    return tmp_path
