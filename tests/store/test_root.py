"""Claims: the cache root is found as documented; a folder of something else is none, and stays as it is.

What dead writers of ours left in a root is removed, and nothing else.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jepa_cache.files import temporary_folder
from jepa_cache.store.collection import remove_unneeded
from jepa_cache.store.remote import resolve_cache_root
from jepa_cache.store.root import MARKER, MARKER_TEXT, CacheRoot


def test_params_win_over_the_environment_and_that_over_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JEPA_CACHE_HOME", str(tmp_path / "variable"))
    assert resolve_cache_root("here", tmp_path / "base").path == tmp_path / "base/here"
    assert resolve_cache_root(str(tmp_path / "there"), tmp_path / "base").path == tmp_path / "there"
    assert resolve_cache_root(None, tmp_path).path == tmp_path / "variable"
    monkeypatch.delenv("JEPA_CACHE_HOME")
    assert resolve_cache_root(None, tmp_path).path == tmp_path / "home/.cache/jepa-cache"
    assert resolve_cache_root("~/mine", tmp_path).path == tmp_path / "home/mine"


def test_a_root_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*JEPA_CACHE_HOME"):
        CacheRoot(tmp_path / "file" / "root").check_writable()
    CacheRoot(tmp_path / "new" / "root").check_writable()
    assert [path.name for path in (tmp_path / "new" / "root").iterdir()] == [MARKER]


@pytest.fixture
def public():
    """A folder that another user may enter: pytest's own are closed to all others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def run_as_nobody(code, *arguments):
    """What a snippet prints that runs as another user."""
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    start = "import os, sys; from pathlib import Path; from jepa_cache.store.root import *\n"
    code = f"{start}os.setgid(65534); os.setuid(65534); root = CacheRoot(Path(sys.argv[1]))\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["closed", "no file may be made"])
def test_what_another_user_may_not_do_is_told_as_a_permission(public, mode):
    CacheRoot(public / "root").check_writable()
    (public / "root").chmod(mode)
    told = run_as_nobody("root.check_writable()", public / "root")
    assert "cannot be written ([Errno 13] Permission denied: " in told and "No such file" not in told


def test_what_a_dead_encoder_of_another_user_left_stays_and_blocks_nobody(public):
    root = CacheRoot(public / "root")
    root.check_writable()
    root.path.chmod(0o777)
    fill(root.path, [f"tokens/{ID}/.jepa-cache-0123456789ab-u.zarr{end}" for end in ("/x", ".lock")])
    before = listing(root.path)
    told = run_as_nobody("root.check_writable(); print(len(root.remove_stale_temporaries()), 'kept')", root.path)
    assert told == "1 kept\n" and listing(root.path) == before
    assert root.remove_stale_temporaries() == [] and not list(root.path.rglob("*.lock"))


def fill(folder, names):
    """Write files; a name that ends in / is an empty folder. Returns all that is there."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text(name)
    return listing(folder)


def listing(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_text() for path in folder.rglob("*")}


ID = "0123456789abcdef" * 2
STORE = f"tokens/{ID}/{ID}.zarr/store.json"


OF_OTHERS = (
    "notes.txt",
    ".tmp-draft/x .tmp-0123456789ab-notes.txt",
    "tokens/mymodel/vocabulary.json controls/x/log.parquet",
    f"tokens/{ID}/x",
    f"tokens/{ID}/{ID}.zarr/zarr.json",
    "README.md in-use.lock",
)


@pytest.mark.parametrize("names", OF_OTHERS)
def test_a_folder_of_other_things_is_refused_as_a_root_and_stays_as_it_is(tmp_path, names):
    before = fill(tmp_path, names.split())
    root = CacheRoot(tmp_path)
    for refused in (root.check_writable, root.check_ours, lambda: remove_unneeded(root)):
        with pytest.raises(ValueError, match=rf"{tmp_path} is no cache root: it holds .*, but not the file {MARKER}"):
            refused()
    assert listing(tmp_path) == before
    (tmp_path / MARKER).touch()  # the way out that the message names
    root.check_writable()
    remove_unneeded(root)
    assert before.items() <= listing(tmp_path).items(), "and even then all of it stays"


OF_OURS = {
    "empty": "",
    "new disk": "lost+found/ .DS_Store",
    "another encode begins": ".jepa-cache-0123456789ab-check",
    "first release, no store": "in-use.lock tokens/ unfinished/x",
    "first release": f"notes.txt {STORE}",
}


@pytest.mark.parametrize("names", OF_OURS.values(), ids=OF_OURS)
def test_an_empty_folder_and_a_root_of_the_first_release_become_marked_roots(tmp_path, names):
    before = fill(tmp_path, names.split())
    CacheRoot(tmp_path).check_writable()
    assert listing(tmp_path) == {**before, MARKER: MARKER_TEXT}


def test_what_dead_writers_left_in_the_root_is_removed_and_nothing_else(tmp_path):
    root = CacheRoot(tmp_path)
    ours = ".jepa-cache-0123456789ab"
    left = [f"{ours}-README.md", f"tokens/{ID}/{ours}-u.zarr/x", f"controls/{ID}/{ours}-u.parquet"]
    left += [f"manifests/.tmp-0123456789ab-{ID}.json", f"actions/{ID}/.jepa-cache-000000000000-u.zarr.claim"]
    kept = [STORE, f"controls/{ID}/{ID}.parquet", f"other/{ours}-x", f"tokens/mine/{ours}-x"]
    fill(tmp_path, [*kept, *left])
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", [f"{ID}/.jepa-cache-0123456789ab-x"])
    (tmp_path / "manifests/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"tokens/{'f' * 32}").symlink_to(tmp_path / "elsewhere" / ID)
    link = tmp_path / f"tokens/{ID}/{'f' * 32}.zarr"
    link.symlink_to(tmp_path / "elsewhere")
    assert list(root.iter_stores("tokens")) == [(tmp_path / STORE).parent], "nor is a link a store"
    with temporary_folder(root.tokens(ID, "v" * 32)) as living, root.claimed(root.actions(ID, "w" * 32)):
        assert root.remove_stale_temporaries() == []
        assert living.is_dir() and root.is_claimed(root.actions(ID, "w" * 32))
    files = {name for name, content in listing(tmp_path).items() if content}
    assert files == {*kept, f"elsewhere/{ID}/.jepa-cache-0123456789ab-x"}
