"""Claims: a file's digest is sha256, remembered by place, size, times and inode, and never wrong after any of them changed.

So another file in its place is seen though it has size and time of the old one. A damaged table is named with the way out.
"""

import hashlib
import os
import sqlite3
import threading

import pytest

from jepa_cache.config.machine import state_folder
from jepa_cache.store import digests
from jepa_cache.store.digests import DigestTable, join_digests


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read to be hashed."""
    names, real = [], digests.file_digest

    def counted(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    return names


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_once_whatever_it_is_called_by(tmp_path, hashed):
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "link", tmp_path / "x/../a"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert DigestTable(tmp_path / "state").digest(path) == sha256(b"content")
    assert hashed == ["a"]


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_that_changed_in_size_or_time_is_hashed_again(tmp_path, hashed, change):
    path, table = tmp_path / "a", DigestTable(tmp_path / "state")
    path.write_bytes(b"content")
    table.digest(path)
    stat = path.stat()
    path.write_bytes(b"another" if change == "time" else b"longer content")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (1 if change == "time" else 0)))
    assert table.digest(path) == sha256(path.read_bytes())
    assert hashed == ["a", "a"]
    table.digest(path)
    assert hashed == ["a", "a"]


def in_place(path, other):
    path.write_bytes(other.read_bytes())


def moved(path, other):
    other.rename(path)


@pytest.mark.parametrize("replace", [in_place, moved])
def test_another_file_of_the_same_size_and_time_is_hashed(tmp_path, replace):
    path, other, table = tmp_path / "a", tmp_path / "b", DigestTable(tmp_path / "state")
    for file, content in ((path, b"content"), (other, b"another")):
        file.write_bytes(content)
        os.utime(file, ns=(10**18, 10**18))
    table.digest(path)
    replace(path, other)
    os.utime(path, ns=(10**18, 10**18))  # as touch -r, cp -p and packers with constant times do
    assert table.remember().digest(path) is None
    assert table.digest(path) == sha256(b"another")


def test_what_the_first_release_remembered_without_inodes_is_hashed_once_more_and_left_to_it(tmp_path, hashed):
    path, table = tmp_path / "a", DigestTable(tmp_path / "state")
    path.write_bytes(b"content")
    table.path.parent.mkdir()
    old = (str(path), 7, path.stat().st_mtime_ns, sha256(b"another"))
    with sqlite3.connect(table.path) as connection:
        connection.execute(
            "CREATE TABLE digests (path TEXT PRIMARY KEY, num_bytes INTEGER, modified_ns INTEGER, digest TEXT)"
        )
        connection.execute("INSERT INTO digests VALUES (?, ?, ?, ?)", old)
    assert [table.digest(path), table.digest(path)] == [sha256(b"content")] * 2 and hashed == ["a"]
    with sqlite3.connect(table.path) as connection:
        assert connection.execute("SELECT * FROM digests").fetchall() == [old]


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(tmp_path, monkeypatch):
    path, table = tmp_path / "a", DigestTable(tmp_path / "state")
    path.write_bytes(b"first")
    real = digests.file_digest

    def interrupted(file):
        digest = real(file)
        path.write_bytes(b"second, longer")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(digests, "file_digest", interrupted)
        table.digest(path)
    assert table.digest(path) == sha256(b"second, longer")


def test_a_unit_is_found_by_its_digest_only_while_its_files_are_unchanged(tmp_path):
    table = DigestTable(tmp_path / "state")
    files = tuple(tmp_path / name for name in "ab")
    for file in files:
        file.write_bytes(file.name.encode())
    one, both = table.digest_unit(files[:1]), table.digest_unit(files)
    assert one == sha256(b"a") and both not in (one, table.digest_unit(files[::-1]))
    assert table.find_unit(one) == files[:1] and table.find_unit(both) == files
    assert table.find_unit("0" * 64) is None
    files[1].write_bytes(b"longer")
    assert table.find_unit(both) is None and table.find_unit(one) == files[:1]
    files[0].unlink()
    assert table.find_unit(one) is None


def test_the_table_lies_in_the_state_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state_folder() == tmp_path / "state/jepa-cache"
    (tmp_path / "a").write_bytes(b"x")
    DigestTable().digest(tmp_path / "a")
    assert [path.name for path in (tmp_path / "state/jepa-cache").iterdir()] == ["digests.sqlite"]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "home/.local/state/jepa-cache"


def test_several_writers_share_one_table(tmp_path):
    results = {}

    def work(number):
        path = tmp_path / f"file{number}"
        path.write_bytes(str(number).encode())
        results[number] = DigestTable(tmp_path / "state").digest(path)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {number: sha256(str(number).encode()) for number in range(12)}


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        DigestTable(tmp_path / "state").digest(tmp_path / "absent")


def test_what_is_remembered_at_once_is_what_the_table_would_say_without_reading(tmp_path, monkeypatch):
    table = DigestTable(tmp_path / "state")
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    with table.hashing() as digest_files:
        digests = [digest_files(files) for files in ([paths[0]], paths[1:])]
    assert digests == [table.digest_unit([paths[0]]), table.digest_unit(paths[1:])]
    paths[0].write_bytes(b"changed")
    monkeypatch.setattr("jepa_cache.store.digests.file_digest", lambda _: pytest.fail("a file was read"))
    remembered = table.remember()
    assert remembered.digest(paths[0]) is None
    assert join_digests([remembered.digest(path) for path in paths[1:]]) == digests[1]
    assert list(remembered.earlier([paths[0]])) == [digests[0]] and list(remembered.earlier(paths)) == []


def test_every_content_that_a_file_was_seen_with_is_remembered(tmp_path):
    table, path = DigestTable(tmp_path / "state"), tmp_path / "a.tar"
    seen = []
    for content in (b"first", b"second", b"third"):
        path.write_bytes(content)
        seen.append(table.digest_unit([path]))
    assert sorted(table.remember().earlier([path])) == sorted(seen)


def test_what_was_hashed_before_a_run_ended_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("jepa_cache.store.digests.SAVE_S", 0.0)
    table, good, gone = DigestTable(tmp_path / "state"), tmp_path / "good", tmp_path / "gone"
    good.write_bytes(b"x")
    with pytest.raises(FileNotFoundError), table.hashing() as digest_files:
        digest_files([good])
        digest_files([gone])
    assert table.remember().digest(good) is not None


def test_the_table_is_free_for_others_while_a_large_file_is_hashed(tmp_path, monkeypatch):
    """Hashing may take minutes; another process must be able to write its own digests meanwhile."""
    monkeypatch.setattr("jepa_cache.store.digests.LARGE_BYTES", 0)
    table, paths = DigestTable(tmp_path / "state"), [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode())

    def hash_slowly(path):
        with sqlite3.connect(table.path, timeout=0.1) as other:
            other.execute("INSERT OR REPLACE INTO units VALUES ('x', '[]')")
        return path.name

    monkeypatch.setattr("jepa_cache.store.digests.file_digest", hash_slowly)
    with table.hashing() as digest_files:
        assert [digest_files([path]) for path in paths] == ["a", "b"]


def no_database(path):
    path.write_bytes(b"no database at all, but long enough to be taken for one" * 20)


def damaged_inside(path):
    """Its head is whole, so that it opens; the pages with the rows are not."""
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\x99" * (len(raw) - 4096)
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [no_database, damaged_inside])
def test_a_damaged_table_is_named_with_the_way_out(tmp_path, damage):
    table, path = DigestTable(tmp_path), tmp_path / "a"
    path.write_bytes(b"content")
    table.digest_unit([path])
    damage(table.path)
    for use in (table.remember, lambda: table.digest_unit([path]), lambda: table.find_unit("0" * 64)):
        with pytest.raises(ValueError, match=r"digests\.sqlite cannot be used .* delete the file"):
            use()
