"""A copy of the settings that a test may edit."""

import pytest

from tests.workspace import copy_settings


@pytest.fixture
def root(tmp_path):
    """A folder with params.yaml and configs/."""
    return copy_settings(tmp_path)
