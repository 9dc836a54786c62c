"""What all tests share: one torch thread, settings of the suite's own, and a cache, state and runs folder of their own."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two threads on a busy machine are many times slower

# What the user has set decides nothing here, also not before the first fixture. JEPA_GOLDEN_DIR is an option of the suite itself.
for name in [name for name in os.environ if name.startswith("JEPA_") and name != "JEPA_GOLDEN_DIR"]:
    del os.environ[name]
for name in ("DVC_ROOT", "DVC_STAGE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402

from jepa_cache.config.loading import REPOSITORY_ROOT  # noqa: E402
from tests.workspace import SUITE_SETTINGS  # noqa: E402

pytest_plugins = ["tests.store.s3_server"]


def _set_folders(patch, home):
    patch.setenv("JEPA_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_STATE_HOME", str(home / "state"))
    patch.setenv("XDG_CACHE_HOME", str(home / "downloads"))


@pytest.fixture(autouse=True, scope="session")
def private_session(tmp_path_factory):
    """What commands find from the present folder is the suite's settings; fixtures of a module write nothing of the user's either."""
    home = tmp_path_factory.mktemp("session")
    for path in SUITE_SETTINGS.iterdir():
        (home / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        _set_folders(patch, home)
        patch.chdir(home)
        # What a test starts in another folder finds the checkout's packages, `tests` among them.
        patch.setenv("PYTHONPATH", str(REPOSITORY_ROOT))
        yield


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, digest table, runs or downloads."""
    home = tmp_path_factory.mktemp("home")
    _set_folders(monkeypatch, home)
    return home


# Minutes long, as whole checkouts run in them: started first, so that no worker waits for another at the end.
LONG_FILES = [
    "test_pipeline.py",
    "test_resume.py",
    "test_trainer.py",
    "test_remote.py",
    "test_distribution.py",
    "test_crashes.py",
    "test_verify.py",
    "test_mixtures.py",
    "test_cameras.py",
    "test_acting.py",
    "test_dtypes.py",
    "test_pictures.py",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))
