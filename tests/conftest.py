"""What all tests share: one torch thread, and a cache, state and runs folder of their own."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two threads on a busy machine are many times slower

import pytest

pytest_plugins = ["tests.store.s3_server"]


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, digest table, runs or downloads."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("JEPA_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "downloads"))
    monkeypatch.delenv("JEPA_RUNS_HOME", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return home


# Minutes long, as whole checkouts run in them: started first, so that no worker waits for another at the end.
LONG_FILES = ("test_pipeline.py", "test_real_recordings.py", "test_mixtures.py", "test_trainer.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))
