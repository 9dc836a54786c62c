"""Claims: a file's digest is sha256, remembered by path, size, times and inode, and never wrong after any of them changed.

So another file in its place is seen though it has size and time of the old one. A damaged table is named with the way out.
"""

import hashlib
import json
import os
import sqlite3

import pytest

from jepa_cache.config.paths import state_folder
from jepa_cache.store import digests
from jepa_cache.store.digests import DigestTable, join_digests


@pytest.fixture
def table(tmp_path):
    return DigestTable(tmp_path / "state")


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read to be hashed."""
    names, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: names.append(path.name) or real(path))
    return names


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write(path, content):
    path.write_bytes(content)
    os.utime(path, ns=(10**18, 10**18))  # as touch -r, cp -p and packers with constant times do
    return path


def test_a_file_is_hashed_once_whatever_it_is_called_by(tmp_path, table, hashed):
    write(tmp_path / "a", b"content")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "x").mkdir()
    for path in (tmp_path / "a", tmp_path / "link", tmp_path / "x/../a"):
        assert DigestTable(table.path.parent).digest(path) == sha256(b"content")
    assert hashed == ["a"]
    with pytest.raises(FileNotFoundError):
        table.digest(tmp_path / "absent")


def moved(path, content):
    write(path.with_name("b"), content).rename(path)


def touched(path, content):
    os.utime(write(path, content), ns=(10**18, 10**18 + 1))


@pytest.mark.parametrize(
    ("replace", "content"),
    [(write, b"longer content"), (touched, b"another"), (write, b"another"), (moved, b"another")],
    ids=["size", "time", "in its place", "moved there"],
)
def test_a_file_that_changed_in_any_way_is_hashed_again_and_once(tmp_path, table, hashed, replace, content):
    path = write(tmp_path / "a", b"content")
    table.digest(path)
    replace(path, content)
    assert table.remember().digest(path) is None
    assert [table.digest(path), table.digest(path)] == [sha256(content)] * 2 and hashed == ["a", "a"]


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(tmp_path, table, monkeypatch):
    path, real = write(tmp_path / "a", b"first"), digests.file_digest
    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", lambda file: (real(file), write(path, b"second, longer"))[0])
        table.digest(path)
    assert table.digest(path) == sha256(b"second, longer")


def test_a_unit_is_found_by_its_digest_only_while_its_files_are_unchanged(tmp_path, table):
    files = tuple(write(tmp_path / name, name.encode()) for name in "ab")
    one, both = table.digest_unit(files[:1]), table.digest_unit(files)
    assert one == sha256(b"a") and both not in (one, table.digest_unit(files[::-1]))
    assert table.find_unit(one) == files[:1] and table.find_unit(both) == files
    assert table.find_unit("0" * 64) is None
    write(files[1], b"longer")
    assert table.find_unit(both) is None and table.find_unit(one) == files[:1]
    files[0].unlink()
    assert table.find_unit(one) is None


def test_a_place_that_an_earlier_release_noted_is_known(tmp_path, table):
    original = write(tmp_path / "original", b"x")
    digest = table.digest_unit([original])
    with sqlite3.connect(table.path) as connection:
        connection.execute("DELETE FROM places")
        connection.execute("INSERT INTO units VALUES (?, ?)", (digest, json.dumps([str(original)])))
    assert table.find_unit(digest) == (original,) and list(table.remember().earlier([original])) == [digest]


def test_the_table_lies_in_the_state_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    DigestTable().digest(write(tmp_path / "a", b"x"))
    assert [path.name for path in (tmp_path / "state/jepa-cache").iterdir()] == ["digests.sqlite"]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "home/.local/state/jepa-cache"


def test_what_is_remembered_at_once_is_what_the_table_would_say_without_reading(tmp_path, table, hashed):
    paths = [write(tmp_path / name, name.encode()) for name in "abc"]
    with table.hashing() as digest_files:
        found = [digest_files(files) for files in ([paths[0]], paths[1:])]
    seen = [found[0], *(table.digest_unit([write(paths[0], text)]) for text in (b"second", b"third"))]
    write(paths[0], b"changed")
    hashed.clear()
    remembered = table.remember()
    assert remembered.digest(paths[0]) is None
    assert join_digests([remembered.digest(path) for path in paths[1:]]) == found[1] and hashed == []
    assert sorted(remembered.earlier([paths[0]])) == sorted(seen), "every content that it was seen with"
    assert list(remembered.earlier(paths)) == []


def test_what_was_hashed_before_a_run_ended_is_kept(tmp_path, table, monkeypatch):
    monkeypatch.setattr(digests, "SAVE_S", 0.0)
    good = write(tmp_path / "good", b"x")
    with pytest.raises(FileNotFoundError), table.hashing() as digest_files:
        digest_files([good])
        digest_files([tmp_path / "gone"])
    assert table.remember().digest(good) is not None


def test_the_table_is_free_for_others_while_a_large_file_is_hashed(tmp_path, table, monkeypatch):
    """Hashing may take minutes; another process must be able to write its own digests meanwhile."""
    monkeypatch.setattr(digests, "LARGE_BYTES", 0)

    def hash_slowly(path):
        with sqlite3.connect(table.path, timeout=0.1) as other:
            other.execute("INSERT OR REPLACE INTO places VALUES ('x', '[]')")
        return path.name

    monkeypatch.setattr(digests, "file_digest", hash_slowly)
    with table.hashing() as digest_files:
        assert [digest_files([write(tmp_path / name, b"x")]) for name in "ab"] == ["a", "b"]


@pytest.mark.parametrize("inside", [False, True], ids=["no database", "damaged pages"])
def test_a_damaged_table_is_named_with_the_way_out(tmp_path, table, inside):
    path = write(tmp_path / "a", b"content")
    table.digest_unit([path])
    raw = table.path.read_bytes()
    table.path.write_bytes(raw[:4096] + b"\x99" * (len(raw) - 4096) if inside else b"no database at all " * 99)
    for use in (table.remember, lambda: table.digest_unit([path]), lambda: table.find_unit("0" * 64)):
        with pytest.raises(ValueError, match=r"digests\.sqlite cannot be used .* delete the file"):
            use()
