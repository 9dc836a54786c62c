"""Claims: wherever a run is killed, or the disk is full or read-only, the next run ends with what an undisturbed one gives.

Bit for bit; nothing half-written is ever readable as whole, and no temporary file stays. Everything is on the disk before
the rename that publishes it, and the rename is before anything that relies on it.
"""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from jepa_cache.store.controls import iter_controls
from jepa_cache.store.layout import check_store
from jepa_cache.store.manifest import read_manifest
from jepa_cache.store.root import LOCK_FILE, MARKER, CacheRoot
from tests.encoded import all_files, make_tiny_tar, run_stage_one, tiniest_config
from tests.faults import WRITES, FaultyDisk, Killed

CONFIG = tiniest_config()
SAID = {"full": "No space left on device", "readonly": "Read-only file system"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_tar(tmp_path_factory.mktemp("recordings"), "a")


def fill(folder, root):
    run_stage_one(folder, CacheRoot(root), CONFIG)


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Every file of an undisturbed run, and the changes that it made to the disk, in order."""
    root = tmp_path_factory.mktemp("undisturbed") / "cache"
    with FaultyDisk(root) as disk:
        fill(folder, root)
    return all_files(root), disk.changes, root


def check_published(root):
    """Whatever carries its final name is whole, to the last byte."""
    for store in root.glob("*/*/[!.]*.zarr"):
        check_store(store, read_data=True)
    for path in root.glob("controls/*/[!.]*.parquet"):
        assert list(iter_controls(path))
    for path in root.glob("manifests/[!.]*.json"):
        for part, entry in read_manifest(path).stores:
            assert CacheRoot(root).tokens(part.fingerprint, entry.unit_digest).is_dir()


def disturb(folder, undisturbed, base, how, points):
    """Run into the fault at each of some changes, look at what it left, and run again."""
    files, changes, _ = undisturbed
    for point in points:
        root = base / f"{how}-{point}"
        with FaultyDisk(root, point, how) as disk, pytest.raises((Killed, OSError, ValueError)) as caught:
            fill(folder, root)
        assert disk.stopped
        check_published(root)
        if how in SAID:
            assert SAID[how] in str(caught.value), changes[point]
        if how == "full":
            assert not list(root.rglob(".jepa-cache-*")), changes[point]
        fill(folder, root)
        assert all_files(root) == files and not list(root.rglob(".jepa-cache-*")), changes[point]
        shutil.rmtree(root)


def is_publication(change):
    return change.kind == "rename" and not any(".jepa-cache-" in part for part in change.target.parts)


def numbers_of(changes, how):
    """The changes at which a fault of this kind can be seen."""
    kinds = {"half": ("write",), "full": WRITES}.get(how)
    matters = [point for point, change in enumerate(changes) if (change.kind in kinds if kinds else True)]
    if how == "readonly":
        last = max(point for point, change in enumerate(changes) if change.kind != "fsync")
        matters = [point for point in matters if point <= last]
    return matters


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["kill", "half", "full", "readonly"])
def test_a_fault_is_made_good_by_the_next_run_and_a_disk_that_refuses_is_said(
    folder, undisturbed, tmp_path, how, every
):
    changes = undisturbed[1]
    points = numbers_of(changes, how)
    if how == "kill" and not every:  # just before and just after each publication, and in between
        published = [point for point in points if is_publication(changes[point])]
        points = sorted({*published, *(point + 1 for point in published), *points[::24]})
    elif not every:
        points = points[:: {"half": 5, "full": 14, "readonly": 20}[how]]
    disturb(folder, undisturbed, tmp_path, how, points)


class Durability:
    """What would survive a power cut: written bytes after an fsync of their file, names after one of their folder."""

    def __init__(self, root):
        self.root = root
        self.unsynced_bytes, self.unsynced_names = set(), set()

    def apply(self, change):
        kind, path, target = change
        if kind in ("write", "truncate"):
            self.unsynced_bytes.add(path)
        if kind in ("create", "mkdir", "unlink", "rmdir") and path != self.root:
            self.unsynced_names.add(path)
        if kind in ("unlink", "rmdir"):
            self.unsynced_bytes.discard(path)
        if kind == "fsync":
            self.unsynced_bytes.discard(path)
            self.unsynced_names = {name for name in self.unsynced_names if name.parent != path}
        if kind == "rename":
            for names in (self.unsynced_bytes, self.unsynced_names):
                for name in [name for name in names if name == path or path in name.parents]:
                    names.discard(name)
                    names.add(target / name.relative_to(path))
            self.unsynced_names |= {path, target}

    def lost_below(self, path):
        """What of a file or folder a power cut would take away or empty, its own name aside."""
        lost = {name for name in self.unsynced_bytes if name == path or path in name.parents}
        return lost | {name for name in self.unsynced_names if path in name.parents or name in path.parents}


def test_everything_is_on_the_disk_before_the_rename_that_publishes_it(undisturbed):
    _, changes, root = undisturbed
    state, published = Durability(root), []
    for change in changes:
        if is_publication(change):
            assert state.lost_below(change.path) == set(), change
            # What was published before, and this relies on, has its name on the disk by now.
            assert not state.unsynced_names & set(published), change
            published.append(change.target)
        state.apply(change)
    order = [path.relative_to(root).parts[0] for path in published]
    assert order == [MARKER, "controls", "tokens", "actions", "manifests"]
    # At the end only names of book-keeping and temporary files are in doubt.
    assert not state.unsynced_bytes
    assert {name.name for name in state.unsynced_names if ".jepa-cache-" not in name.name} <= {LOCK_FILE}


def test_nothing_is_locked_by_a_folder_or_by_a_file_that_is_open_for_reading_only(folder, tmp_path, monkeypatch):
    locked, real = [], fcntl.flock

    def flock(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        locked.append((path.name, path.is_dir(), fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE))
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    fill(folder, tmp_path / "cache")
    # NFS refuses locks on folders and exclusive ones on files that cannot be written.
    assert locked and all(not is_dir and mode == os.O_RDWR for _, is_dir, mode in locked), locked
