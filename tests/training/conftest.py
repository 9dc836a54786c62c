"""What the tests of whole trainings share: a tiny cache, and runs of each test's own."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.caches import Cache, make_cache


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Runs of this test only, and an accelerate that has not fixed its precision yet."""
    monkeypatch.setenv("JEPA_RUNS_HOME", str(tmp_path / "runs"))
    AcceleratorState._reset_state(reset_partial_state=True)
    return tmp_path / "runs"
