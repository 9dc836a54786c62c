"""Claims: a file's digest is sha256, remembered by place, size and time, and never wrong after the file changed by either."""

import hashlib
import os
import threading

import pytest

from jepa_cache.store import digests
from jepa_cache.store.digests import DigestTable, state_folder


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
