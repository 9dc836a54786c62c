"""Claims: files and folders appear whole or not at all, whoever dies when; what one process holds no other gets meanwhile.

Nothing of a lock stays that could be mistaken for one, and only what a dead writer left is removed.
"""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import SafetensorError

from jepa_cache import files
from jepa_cache.files import (
    DiskFullError,
    atomic_file,
    claim_path,
    full_disk_named,
    held_file,
    is_claimed,
    lock_file,
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    replace_link,
    replaced_files,
    temporary_folder,
    try_claim,
)
from jepa_cache.store.root import CacheRoot
from tests.faults import FaultyDisk, Killed

HOLDER = """
import sys, time
from pathlib import Path
from jepa_cache.files import try_claim
claim = try_claim(Path(sys.argv[1]))
print("held" if claim else "busy", flush=True)
time.sleep(60)
"""


def test_a_claim_is_one_process_s_until_that_dies_however_it_dies(tmp_path):
    path = claim_path(tmp_path / "store")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "held"
        assert try_claim(path) is None and is_claimed(path)
        remove_stale_temporaries(tmp_path)
        assert path.is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.is_file() and not is_claimed(path)
    claim = try_claim(path)
    assert claim is not None and try_claim(path) is None, "two claims of one process exclude each other"
    claim.release()
    path.touch()  # as a dead holder leaves it
    remove_stale_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [] and not is_claimed(path) and lock_file(path) is None


@pytest.mark.parametrize("another", [False, True], ids=["gone", "another in its place"])
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch, another):
    path, real, calls = tmp_path / "claim", fcntl.flock, []

    def flock(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:  # its holder removes the file and lets go, just as we come to lock it
            path.unlink()
            if another:
                path.touch()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    descriptor = lock_file(path, create=True)
    assert len(calls) == 2 and os.path.samestat(os.fstat(descriptor), path.stat())
    os.close(descriptor)


def test_who_waits_gets_the_file_when_it_is_let_go_and_its_file_is_gone_before_the_lock(tmp_path, monkeypatch):
    path, order, real, seen = tmp_path / "file", [], os.close, []
    claim = try_claim(path)
    monkeypatch.setattr(os, "close", lambda descriptor: (seen.append(path.exists()), real(descriptor)))

    def wait():
        with held_file(path):
            order.append("got it")

    thread = threading.Thread(target=wait)
    thread.start()
    threading.Event().wait(0.05)
    order.append("let go")
    claim.release()
    assert not seen[0], "else the file of another's lock would be removed"
    thread.join(10)
    assert order == ["let go", "got it"] and not path.exists()


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
        with temporary_folder(tmp_path / "c") as folder:
            publish_folder(folder, tmp_path / "c")
        with atomic_file(tmp_path / "d"):
            pass
        remove_stale_temporaries(tmp_path)
        remove_folder(tmp_path / "c")
    assert len(list(folder_of_open.iterdir())) == before


def test_a_file_appears_only_when_its_block_ends_well(tmp_path):
    path = tmp_path / "deep/file"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"one")
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "the user's own permissions"


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


TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
TORCH.__context__ = OSError(errno.ENOSPC, "No space left on device")
FULL_DISKS = {
    "disk": (OSError(errno.ENOSPC, ""), "No space left on device"),
    "quota": (OSError(errno.EDQUOT, ""), "Disk quota exceeded"),
    "torch": (TORCH, "No space left on device"),
    "safetensors": (SafetensorError("I/O error: No space (os error 28)"), "No space left on device"),
}


@pytest.mark.parametrize("writer", [atomic_file, temporary_folder])
@pytest.mark.parametrize(("error", "says"), FULL_DISKS.values(), ids=FULL_DISKS)
def test_a_full_disk_is_told_with_the_place_what_is_free_and_the_way_out(tmp_path, writer, error, says):
    place = rf"^{says}: {tmp_path / 'final'} cannot be written, [\d.]+ MB are free there\."
    with pytest.raises(DiskFullError, match=rf"{place} .*gc.*cache\.root.*same command"), writer(tmp_path / "final"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_by_the_error_s_own_path_and_other_errors_pass(tmp_path):
    with pytest.raises(DiskFullError, match=f"device: {tmp_path}/other cannot"), full_disk_named(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "", str(tmp_path / "other"))
    for error in (OSError(errno.EIO, "bad disk"), ValueError("28"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, atomic_file(tmp_path / "final"):
            raise error
        assert raised.value is error


def test_only_the_temporaries_of_dead_writers_are_removed(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from jepa_cache.files import *\n"
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


DIGEST = "0" * 32
OURS = [
    *(".jepa-cache-0123456789ab-notes.txt", ".jepa-cache-0123456789ab-store.zarr/tokens/x"),
    # of the first release, in its exact form
    *(f".tmp-0123456789ab-{DIGEST}.{ending}" for ending in ("zarr/tokens/x", "parquet", "json")),
    *(f".tmp-{DIGEST}.zarr.claim", ".tmp-0123456789ab-step-00000600/optimizer.pt"),
]
OTHERS = [
    *(".tmp-draft", ".tmp-0123456789ab-draft.txt", ".tmp-folder/x", f".tmp-{DIGEST}.zarr/x"),
    *(".jepa-cache-notes", ".jepa-cache-0123456789AB-x", ".jepa-cache-0123456789ab", "x.jepa-cache-0123456789ab-x"),
]


def test_a_file_or_folder_goes_only_under_a_name_that_is_ours_alone(tmp_path):
    for name in OURS + OTHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert remove_stale_temporaries(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {name.partition("/")[0] for name in OTHERS}


def test_links_and_sockets_stay_under_any_name_and_nothing_behind_them_is_touched(tmp_path, monkeypatch):
    folder, target = tmp_path / "folder", tmp_path / "target"
    folder.mkdir()
    (target / "inner").mkdir(parents=True)
    (folder / ".jepa-cache-0123456789ab-link").symlink_to(target)
    (folder / ".jepa-cache-0123456789ab-dangling.lock").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # the whole path may be too long for a socket
        listener.bind(".jepa-cache-0123456789ab-socket")
    assert remove_stale_temporaries(folder) == []
    assert len(list(folder.iterdir())) == 3 and (target / "inner").is_dir()
    remove_folder(folder / ".jepa-cache-0123456789ab-link")
    assert len(list(folder.iterdir())) == 2 and (target / "inner").is_dir(), (
        "of a link in the place of a store, the link"
    )


def test_a_store_that_is_removed_is_whole_or_gone_at_every_moment(tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/file").write_text("x")
    seen, rmtree = [], files.shutil.rmtree

    def looking(path):
        seen.append((tmp_path / "store").exists())
        rmtree(path)

    monkeypatch.setattr(files.shutil, "rmtree", looking)
    remove_folder(tmp_path / "store")
    assert seen == [False] and list(tmp_path.iterdir()) == []


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


def test_a_link_in_whose_place_a_folder_was_copied_is_named(tmp_path):
    (tmp_path / "latest").mkdir()
    with pytest.raises(ValueError, match=r"latest is a folder and not a link: .* Delete it; step-1 stays"):
        replace_link(tmp_path / "latest", "step-1")
