"""Claims: the cache root is found as documented; files and folders in it appear whole or not at all, whoever dies when."""

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from jepa_cache.store import root as store_root
from jepa_cache.store.root import (
    CacheRoot,
    atomic_file,
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    replaced_files,
    resolve_cache_root,
    temporary_folder,
)
from tests.faults import FaultyDisk, Killed


def test_params_win_over_the_environment_and_that_over_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JEPA_CACHE_HOME", str(tmp_path / "variable"))
    assert resolve_cache_root("here", tmp_path / "base").path == tmp_path / "base/here"
    assert resolve_cache_root(str(tmp_path / "there"), tmp_path / "base").path == tmp_path / "there"
    assert resolve_cache_root(None, tmp_path).path == tmp_path / "variable"
    monkeypatch.delenv("JEPA_CACHE_HOME")
    assert resolve_cache_root(None, tmp_path).path == tmp_path / "home/.cache/jepa-cache"
    assert resolve_cache_root("~/mine", tmp_path).path == tmp_path / "home/mine"


def test_a_url_that_is_no_object_store_is_refused():
    with pytest.raises(ValueError, match=r"s3://bucket/prefix or gs://bucket/prefix; got 'ftp://bucket/x'"):
        resolve_cache_root("ftp://bucket/x", Path())


def test_places_follow_from_fingerprint_and_digest_alone():
    root = CacheRoot(Path("/r"))
    digest = "0123456789abcdef" * 4
    assert root.tokens("fp", digest) == Path("/r/tokens/fp/0123456789abcdef0123456789abcdef.zarr")
    assert root.controls("fp", digest) == Path("/r/controls/fp/0123456789abcdef0123456789abcdef.parquet")
    assert root.actions("fp", digest) == Path("/r/actions/fp/0123456789abcdef0123456789abcdef.zarr")
    assert root.manifest("d") == Path("/r/manifests/d.json")


def test_a_file_appears_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "deep/file"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"one")
        assert not path.exists()
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and [file.name for file in path.parent.iterdir()] == ["file"]


def test_content_is_forced_to_the_disk_before_the_rename(tmp_path, monkeypatch):
    events, real_sync = [], store_root.sync

    def sync(path):
        events.append(("sync", path.name.startswith(".tmp-") or path.name, (tmp_path / "a").exists()))
        real_sync(path)

    monkeypatch.setattr(store_root, "sync", sync)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"x")
    assert events == [("sync", True, False), ("sync", tmp_path.name, True)]
    synced = []
    monkeypatch.setattr(store_root, "sync", lambda path: synced.append((path.name, (tmp_path / "b").exists())))
    with temporary_folder(tmp_path / "b") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/file").write_bytes(b"x")
        publish_folder(folder, tmp_path / "b")
    assert synced[:2] == [("file", False), ("inner", False)] and synced[-1] == (tmp_path.name, True)
    assert [published for _, published in synced] == [False, False, False, True]


def test_the_loser_of_a_race_takes_its_folder_away_and_leaves_the_winner_s(tmp_path):
    final = tmp_path / "store"
    with temporary_folder(final) as loser:
        (loser / "who").write_text("loser")
        with temporary_folder(final) as winner:
            (winner / "who").write_text("winner")
            assert publish_folder(winner, final)
        assert not publish_folder(loser, final)
    assert (final / "who").read_text() == "winner"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_rename_that_fails_for_another_reason_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    with temporary_folder(tmp_path / "store") as folder:
        monkeypatch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            publish_folder(folder, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_only_the_temporaries_of_dead_writers_are_removed(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from jepa_cache.store.root import *\n"
        "with temporary_folder(Path(sys.argv[1]) / 'a') as folder, atomic_file(Path(sys.argv[1]) / 'b') as file:\n"
        "    (folder / 'x').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "published").mkdir()
    with temporary_folder(tmp_path / "c") as folder, atomic_file(tmp_path / "d") as file:
        remove_stale_temporaries(tmp_path)
        assert set(tmp_path.iterdir()) == {folder, Path(f"{folder}.lock"), file, tmp_path / "published"}
        file.write_text("d")
        assert publish_folder(folder, tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"published", "c", "d"}
    remove_stale_temporaries(tmp_path / "absent")


def test_a_store_that_is_removed_is_whole_or_gone_at_every_moment(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/file").write_text("x")
    seen, rmtree = [], store_root.shutil.rmtree

    def looking(path):
        seen.append((tmp_path / "store").exists())
        rmtree(path)

    monkeypatch.setattr(store_root.shutil, "rmtree", looking)
    remove_folder(tmp_path / "store")
    assert seen == [False] and list(tmp_path.iterdir()) == []


def test_no_descriptor_stays_open(tmp_path):
    folder_of_open = Path("/proc/self/fd")
    if not folder_of_open.is_dir():
        pytest.skip("this system does not list open files")
    before = len(list(folder_of_open.iterdir()))
    for _ in range(20):
        with temporary_folder(tmp_path / "a") as folder:
            publish_folder(folder, tmp_path / "a")
        with atomic_file(tmp_path / "b"):
            pass
        remove_stale_temporaries(tmp_path)
        remove_folder(tmp_path / "a")
    assert len(list(folder_of_open.iterdir())) == before


def test_a_root_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*JEPA_CACHE_HOME"):
        CacheRoot(tmp_path / "file" / "root").check_writable()
    CacheRoot(tmp_path / "new" / "root").check_writable()
    assert list((tmp_path / "new" / "root").iterdir()) == []


def test_new_folders_are_on_the_disk_before_anything_is_put_into_them(tmp_path, monkeypatch):
    synced, real_sync = [], store_root.sync
    monkeypatch.setattr(store_root, "sync", lambda path: (synced.append(path), real_sync(path)))
    store_root.make_folder(tmp_path / "a/b/c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    store_root.make_folder(tmp_path / "a/b/c")
    assert len(synced) == 3


def test_a_store_that_another_process_removed_first_is_no_error(tmp_path):
    remove_folder(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_remove_the_same_left_over(tmp_path, monkeypatch):
    (tmp_path / ".tmp-0-u.zarr/inner").mkdir(parents=True)
    rmtree, calls = store_root.shutil.rmtree, []

    def outrun(path):
        calls.append(path)
        rmtree(path / "inner" if len(calls) == 1 else path)
        if len(calls) == 1:
            raise FileNotFoundError(path / "inner")

    monkeypatch.setattr(store_root.shutil, "rmtree", outrun)
    remove_stale_temporaries(tmp_path)
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def test_what_dead_writers_left_anywhere_below_the_root_is_removed_and_nothing_else(tmp_path):
    root = CacheRoot(tmp_path)
    left = [
        ".tmp-0-README.md",
        "tokens/fp/.tmp-1-u.zarr/x",
        "controls/fp/.tmp-2-u.parquet",
        "manifests/.tmp-3-m.json",
        "actions/fp/.tmp-u.zarr.claim",
    ]
    kept = ["tokens/fp/u.zarr/tokens/c/0", "controls/fp/u.parquet", "manifests/m.json", "other/file"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with temporary_folder(root.tokens("fp", "v" * 32)) as living, root.claimed(root.actions("fp", "w" * 32)):
        root.remove_stale_temporaries()
        assert living.is_dir() and root.is_claimed(root.actions("fp", "w" * 32))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_files_are_made_with_the_user_s_own_permissions(tmp_path):
    with atomic_file(tmp_path / "a"):
        pass
    plain = tmp_path / "b"
    plain.touch()
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("url", ["s3:/bucket/prefix", "http://bucket/prefix", "s3:///prefix"])
def test_a_mistyped_url_is_no_folder(tmp_path, url):
    with pytest.raises(ValueError, match=r"named s3://bucket/prefix or gs://bucket/prefix; got"):
        resolve_cache_root(url, tmp_path)


def test_results_are_replaced_when_all_new_ones_are_there_and_old_and_new_never_mix(tmp_path):
    """Killed at any change on the disk there are old files or new ones, never both; while metrics.json is there, all of them."""
    names = {"old": ("a.csv", "pictures/a", "metrics.json"), "new": ("b.csv", "pictures/b", "metrics.json")}
    out, ends, stop_at = tmp_path / "out", set(), 0

    def write(text: str) -> None:
        with replaced_files(out, "metrics.json", ("*.csv", "pictures")) as folder:
            for name in names[text]:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)

    out.mkdir()
    (out / "notes.txt").write_text("mine")
    while "whole" not in ends:
        write("old")
        with FaultyDisk(tmp_path, stop_at) as disk, suppress(Killed):
            write("new")
        files = [
            path for path in out.rglob("*") if path.is_file() and not path.relative_to(out).parts[0].startswith(".")
        ]
        found = {str(path.relative_to(out)): path.read_text() for path in files}
        assert found.pop("notes.txt") == "mine"
        texts = set(found.values())
        assert len(texts) <= 1, f"killed at change {stop_at}: {found}"
        if "metrics.json" in found:
            assert found.keys() == set(names[found["metrics.json"]]), f"killed at change {stop_at}: {found}"
        ends |= texts if disk.stopped else {"whole"}
        stop_at += 1
    assert ends == {"old", "new", "whole"} and len(list(out.iterdir())) == 4
