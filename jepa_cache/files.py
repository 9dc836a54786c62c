"""Files and folders that appear whole or not at all, and locks that die with their process.

The ground floor: the only file of the package that renames or locks. A writer fills a private temporary beside the final
place and publishes it by one rename; while it lives it holds a lock on the temporary, so what a killed one left is known.

Locks are `flock` on small files: never on folders, whose locks network file systems do not share between machines, and never
through descriptors that cannot write where that can be had, for NFS refuses exclusive ones. The kernel lets a lock go when
its process ends, however it ends; at most its empty file stays, which the next writer removes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_PREFIX = ".jepa-cache-"  # then twelve hex digits and a hyphen: no other program's files are named so
LOCK_SUFFIX = ".lock"  # beside a temporary folder: its writer lives
CLAIM_SUFFIX = ".claim"  # of the file that says who makes a store
FULL = (errno.ENOSPC, errno.EDQUOT)
OURS = re.compile(
    r"\.jepa-cache-[0-9a-f]{12}-.+"
    # What the first release left beside stores, manifests and checkpoints, in the exact form that it had.
    r"|\.tmp-[0-9a-f]{12}-([0-9a-f]{32}\.(zarr|parquet|json)|step-[0-9]{8})(\.lock)?|\.tmp-[0-9a-f]{32}\.zarr\.claim",
    re.DOTALL,
)


class DiskFullError(OSError):
    """A disk is full, or a quota is used up; says where, what is free there, and the way out."""


@contextmanager
def full_disk_named(place: Path) -> Iterator[None]:
    """Turn what libraries say of a full disk, often without a path, into one message; other errors pass.

    Args:
        place: What is written in the block, where the error does not name it itself.

    Raises:
        DiskFullError: The disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        link: BaseException | None = error
        while link is not None:  # torch raises an error of its own from Python's
            code = getattr(link, "errno", None) or next((n for n in FULL if f"(os error {n})" in str(link)), None)
            if code in FULL:
                place = Path(getattr(link, "filename", None) or place)
                folder = next(path for path in (place.absolute(), *place.absolute().parents) if path.is_dir())
                raise DiskFullError(
                    f"{os.strerror(code)}: {place} cannot be written, {shutil.disk_usage(folder).free / 1e6:.1f} MB are free "
                    "there. Make room (`jepa-cache gc` lists what no manifest needs), or take another disk (cache.root, "
                    "$JEPA_RUNS_HOME, $TMPDIR, another checkout); then type the same command again: what was finished is kept"
                ) from error
            link = link.__cause__ or link.__context__
        raise


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is renamed to `path`.

    A crash at any moment leaves the old file or the new one, never a part.

    Args:
        path: Of the file; its folder is made.
        durable: Force it to the disk first; without, the machine may stop with an empty file under the name.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    descriptor = lock_file(temporary, create=True, wait=True)
    assert descriptor is not None
    mode = os.fstat(descriptor).st_mode & 0o777
    try:
        try:
            with full_disk_named(path):
                yield temporary
            if temporary.stat().st_mode & 0o777 != mode:  # safetensors puts a file there that its owner alone may read
                temporary.chmod(mode)
            publish_file(temporary, path, durable=durable)
        finally:
            temporary.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """Yield a private folder beside `final`, to be filled and published; removed when the block leaves it there."""
    make_folder(final.parent)
    temporary = temporary_beside(final)
    with held_file(_lock_of(temporary)):  # there before the folder and gone after it, so the folder is never without
        temporary.mkdir()
        try:
            with full_disk_named(final):
                yield temporary
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)


def publish_file(temporary: Path, final: Path, *, durable: bool = True) -> None:
    """Give a finished file its name, in place of what has it; synced first where it has to survive a power cut."""
    if durable:
        sync(temporary)
    temporary.replace(final)
    if durable:
        sync(final.parent)


def publish_folder(temporary: Path, final: Path) -> bool:
    """Sync a finished folder and rename it to its final place; False when another writer was there first.

    The loser leaves its own folder alone: both hold the same content by construction.
    """
    for folder, _, files in os.walk(temporary, topdown=False):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        return False
    sync(final.parent)
    return True


@contextmanager
def replaced_files(folder: Path, last: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a private folder; when the block ends well its files take the place of those of their names in `folder`.

    When the block fails, or the process is killed in it, `folder` stays as it was. All old files go before the first new
    one comes: whenever the process is killed, old and new never lie side by side. What has another name and matches no
    pattern stays.

    Args:
        folder: Of the results; made where absent.
        last: Name of the file that goes first and comes last: while it is there, all are.
        stale: Patterns of what an earlier run may have left there that this one does not write.
    """
    remove_stale_temporaries(folder)
    with temporary_folder(folder / "new") as fresh:
        yield fresh
        for path in fresh.rglob("*"):
            sync(path)
        names = sorted((path.name for path in fresh.iterdir()), key=lambda name: name == last)
        old = [path for path in folder.iterdir() if path.name in names or any(map(path.match, stale))]
        for path in sorted(old, key=lambda path: path.name != last):
            if path.is_dir() and not path.is_symlink():
                _remove_tree(path)
            else:
                path.unlink()
        for name in names:
            (fresh / name).rename(folder / name)
        sync(folder)


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link to a name in its folder, in one step; for one process at a time."""
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is whole or gone at every moment: renamed first, then deleted."""
    temporary = temporary_beside(path)
    try:
        path.rename(temporary)
    except FileNotFoundError:
        return  # another process did it
    _remove_tree(temporary)


def remove_stale_temporaries(folder: Path) -> list[Path]:
    """Remove what writers left in a folder when they were killed; living writers hold a lock on theirs.

    Returns:
        What is another user's and may not be removed.
    """
    kept = []
    for path in list_temporaries(folder):
        try:
            _remove_stale(path)
        except PermissionError:
            kept.append(path)
    return kept


def list_temporaries(folder: Path) -> list[Path]:
    """Our temporary files and folders in a folder, by name; a link or socket of such a name is none, and nothing is followed."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if OURS.fullmatch(entry.name)]
    real = (entry for entry in found if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False))
    return sorted(Path(entry.path) for entry in real)


def _remove_stale(path: Path) -> None:
    # A folder comes before its lock, by which it is removed in the same look.
    if path.is_dir():
        if not _lock_of(path).exists():  # a store that was being removed
            _remove_tree(path)
        return
    descriptor = lock_file(path)
    if descriptor is None:  # a living writer's, or one that was published or removed just now
        return
    try:
        if path.suffix == LOCK_SUFFIX:
            _remove_tree(path.with_suffix(""))
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def is_abandoned(temporary: Path) -> bool:
    """Whether no living writer holds a temporary file or folder; False where another user's lock may not be read."""
    try:
        return not is_claimed(_lock_of(temporary) if temporary.is_dir() else temporary)
    except PermissionError:
        return False


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each on the disk before anything is put into it."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def measure_bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; what vanishes meanwhile counts nothing."""
    files = (
        [path] if not path.is_dir() else [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    )
    num_bytes = 0
    for file in files:
        with suppress(FileNotFoundError):
            num_bytes += file.stat().st_size
    return num_bytes


def sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A name beside `path` that nobody else has."""
    return path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}-{path.name}"


def claim_path(final: Path) -> Path:
    """The file by which the making of a store is claimed, beside its place."""
    return final.parent / f"{TEMPORARY_PREFIX}{'0' * 12}-{final.name}{CLAIM_SUFFIX}"


class Claim:
    """One process's right to make one store, until it is released or the process dies."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Let others have it, and remove its file."""
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


def try_claim(path: Path) -> Claim | None:
    """Make and lock the file `path`; None when another process, or another call in this one, holds it."""
    descriptor = lock_file(path, create=True)
    return None if descriptor is None else Claim(path, descriptor)


def is_claimed(path: Path) -> bool:
    """Whether a living process holds the file `path`."""
    descriptor = lock_file(path)
    if descriptor is None:
        return path.exists()
    os.close(descriptor)
    return False


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Make and lock the file `path` for the block, waiting for whoever holds it; it is removed at the end."""
    descriptor = lock_file(path, create=True, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        Claim(path, descriptor).release()


def lock_file(path: Path, *, create: bool = False, wait: bool = False, shared: bool = False) -> int | None:
    """Open and lock a file.

    Args:
        path: The file.
        create: Make it where it is missing.
        wait: For whoever holds it.
        shared: Together with others who lock it so.

    Returns:
        The descriptor, to be closed; None when the file is held by another, or missing and not to be made.

    Raises:
        OSError: The folder cannot be written, or its file system knows no locks.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            descriptor = _open(path, os.O_CREAT if create else 0)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            fcntl.flock(descriptor, kind)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file while we opened it: the lock is on nothing


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:  # another user's file: a local file system locks it all the same
        if flags & os.O_CREAT and not path.exists() and not os.access(path.parent, os.W_OK):
            raise  # it may not be made: "no such file" would be the wrong reason
        return os.open(path, os.O_RDONLY)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(temporary.name + LOCK_SUFFIX)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():  # in the place of a store: what it leads to is not ours
        path.unlink(missing_ok=True)
    while path.exists():
        with suppress(FileNotFoundError):  # two processes may remove the same left-over
            shutil.rmtree(path)
