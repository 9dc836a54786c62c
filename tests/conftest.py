"""What all tests share: one torch thread, and a cache, state and runs folder of their own."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two threads on a busy machine are many times slower

import pytest


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
