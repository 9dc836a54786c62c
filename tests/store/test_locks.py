"""Claims: what one process holds no other gets, until it lets go or dies; nothing of a lock stays that could be mistaken for one."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jepa_cache.store.locks import held_file, is_claimed, lock_file, try_claim
from jepa_cache.store.root import CacheRoot, remove_stale_temporaries

HOLDER = """
import sys, time
from pathlib import Path
from jepa_cache.store.locks import try_claim
claim = try_claim(Path(sys.argv[1]))
print("held" if claim else "busy", flush=True)
time.sleep(60)
"""


def start_holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_a_claim_is_one_process_s_until_that_dies_however_it_dies(tmp_path):
    path = tmp_path / ".tmp-store.claim"
    process, answer = start_holder(path)
    try:
        assert answer == "held"
        assert try_claim(path) is None and is_claimed(path)
        remove_stale_temporaries(tmp_path)
        assert path.is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.is_file() and not is_claimed(path)
    claim = try_claim(path)
    assert claim is not None
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_the_file_that_a_dead_holder_left_is_removed(tmp_path):
    path = tmp_path / ".tmp-store.claim"
    process, _ = start_holder(path)
    process.kill()
    process.communicate()
    remove_stale_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [] and not is_claimed(path)


def test_two_claims_of_one_process_exclude_each_other(tmp_path):
    claim = try_claim(tmp_path / "claim")
    assert try_claim(tmp_path / "claim") is None
    claim.release()
    assert not is_claimed(tmp_path / "claim")


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "claim", fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:  # its holder removes the file and lets go, just as we come to lock it
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = lock_file(path, create=True)
    assert len(calls) == 2 and os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)


def test_who_waits_gets_the_file_when_it_is_let_go(tmp_path):
    path, order = tmp_path / "file", []
    claim = try_claim(path)

    def wait():
        with held_file(path):
            order.append("got it")

    thread = threading.Thread(target=wait)
    thread.start()
    threading.Event().wait(0.05)
    order.append("let go")
    claim.release()
    thread.join(10)
    assert order == ["let go", "got it"] and not path.exists()


def test_a_claim_s_file_is_gone_before_its_lock_so_that_no_other_s_is_removed(tmp_path, monkeypatch):
    path, real, seen = tmp_path / "claim", os.close, []
    claim = try_claim(path)
    monkeypatch.setattr(os, "close", lambda descriptor: (seen.append(path.exists()), real(descriptor)))
    claim.release()
    assert seen == [False]


def test_another_user_s_file_is_locked_through_reading(tmp_path, monkeypatch):
    path, real = tmp_path / "claim", os.open
    path.touch()

    def refuse_writing(name, flags, *arguments, **options):
        if flags & os.O_RDWR:
            raise PermissionError
        return real(name, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse_writing)
    claim = try_claim(path)
    assert claim is not None and try_claim(path) is None
    claim.release()


def test_no_file_and_no_folder_is_no_claim(tmp_path):
    assert not is_claimed(tmp_path / "absent") and lock_file(tmp_path / "absent") is None
    with pytest.raises(FileNotFoundError):
        try_claim(tmp_path / "absent/claim")


def test_a_file_system_without_locks_is_refused_before_any_work(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"cannot be written .*Function not implemented.*Lustre.*flock"):
        CacheRoot(tmp_path / "root").check_writable()


def test_no_descriptor_stays_open(tmp_path):
    folder_of_open = Path("/proc/self/fd")
    if not folder_of_open.is_dir():
        pytest.skip("this system does not list open files")
    before = len(list(folder_of_open.iterdir()))
    for _ in range(20):
        claim = try_claim(tmp_path / "a")
        assert try_claim(tmp_path / "a") is None and is_claimed(tmp_path / "a")
        claim.release()
        with held_file(tmp_path / "b"):
            assert lock_file(tmp_path / "b") is None
    assert len(list(folder_of_open.iterdir())) == before
