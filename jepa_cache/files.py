"""Files and folders that appear whole or not at all, and locks that die with their process.

The ground floor: the only file of the package that renames or locks. A writer fills a private temporary beside the final
path and publishes it by one rename; while it lives it holds a lock on the temporary, so what a killed one left is known.

Locks are `flock` on small files: never on folders, whose locks network file systems do not share between machines, and never
through descriptors that cannot write where that can be had, for NFS refuses exclusive ones. The kernel releases a lock when
its process ends, however it ends; at most its empty file stays, which the next writer removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

LOCK_SUFFIX = ".lock"  # beside a temporary folder: its writer lives
FULL = (errno.ENOSPC, errno.EDQUOT)
OURS = re.compile(  # then twelve hex digits and a hyphen: no other program's files are named so
    r"\.jepa-cache-[0-9a-f]{12}-.+"
    # What the first release left beside stores, manifests and checkpoints, in the exact form that it had.
    r"|\.tmp-[0-9a-f]{12}-([0-9a-f]{32}\.(zarr|parquet|json)|step-[0-9]{8})(\.lock)?|\.tmp-[0-9a-f]{32}\.zarr\.claim",
    re.DOTALL,
)


class DiskFullError(OSError):
    """A disk is full, or a quota is used up; says where, what is free there, and the way out."""


def existing_folder(path: Path) -> Path:
    """`path` or the nearest folder above it that is there: on its disk `path` would be made."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn what libraries say of a full disk while they write `path`, often without naming it, into one message; other errors pass."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        link: BaseException | None = error
        while link is not None:  # torch raises an error of its own from Python's
            code = getattr(link, "errno", None) or next((n for n in FULL if f"(os error {n})" in str(link)), None)
            if code in FULL:
                path = Path(getattr(link, "filename", None) or path)
                free = shutil.disk_usage(existing_folder(path)).free
                raise DiskFullError(
                    f"{os.strerror(code)}: {path} cannot be written, {free / 1e6:.1f} MB are free there. Make room "
                    "(`jepa-cache gc` lists what no manifest needs), or take another disk (cache.root, "
                    "$JEPA_RUNS_HOME, $TMPDIR, another checkout); then type the same command again: what was finished is kept"
                ) from error
            link = link.__cause__ or link.__context__
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is renamed to `path`.

    A crash at any moment leaves the old file or the new one, never a part.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    with held_file(temporary):
        mode = temporary.stat().st_mode
        with full_disk_named(path):
            yield temporary
        if temporary.stat().st_mode != mode:  # safetensors puts a file there that its owner alone may read
            temporary.chmod(mode & 0o777)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


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
            _remove_tree(temporary)


def publish_folder(temporary: Path, final: Path) -> bool:
    """Sync a finished folder and rename it to its final path; False when another writer was there first.

    The loser leaves its own folder alone: both hold the same content by construction.
    """
    for folder, _, names in os.walk(temporary, topdown=False):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            sync(path)
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
    one comes: whenever the process is killed, old and new never lie side by side. The file `last` goes first and comes last:
    while it is there, all are. What has another name and matches none of the patterns `stale` stays.
    """
    remove_stale_temporaries(folder)
    with temporary_folder(folder / "new") as fresh:
        yield fresh
        for path in fresh.rglob("*"):
            sync(path)
        names = sorted((path.name for path in fresh.iterdir()), key=lambda name: name == last)
        old = [path for path in folder.iterdir() if path.name in names or any(map(path.match, stale))]
        for path in sorted(old, key=lambda path: path.name != last):
            _remove_tree(path)
        for name in names:
            (fresh / name).rename(folder / name)
        sync(folder)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal. Cost: reads the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_link(link: Path, target: str) -> None:
    """Point a symbolic link to a name in its folder, in one step; for one process at a time."""
    if link.is_dir() and not link.is_symlink():
        raise ValueError(
            f"{link} is a folder and not a link: it was copied with links followed. Delete it; {target} stays"
        )
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is whole or gone at every moment: renamed first, then deleted."""
    temporary = temporary_beside(path)
    with suppress(FileNotFoundError):  # another process did it
        path.rename(temporary)
        _remove_tree(temporary)


def remove_stale_temporaries(folder: Path) -> list[Path]:
    """Remove what writers left in a folder when they were killed; returns what is another user's and may not be removed."""
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
    elif (descriptor := lock_file(path)) is not None:  # else a living writer's, or published or removed just now
        if path.suffix == LOCK_SUFFIX:
            _remove_tree(path.with_suffix(""))
        Claim(path, descriptor).release()


def is_abandoned(temporary: Path) -> bool:
    """Whether no living writer holds a temporary file or folder; False where another user's lock may not be read."""
    try:
        return not is_claimed(_lock_of(temporary) if temporary.is_dir() else temporary)
    except PermissionError:
        return False


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each on the disk before anything is put into it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def measure_bytes(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; what vanishes meanwhile counts nothing."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names] or [path] * path.is_file()
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
    return path.parent / f".jepa-cache-{secrets.token_hex(6)}-{path.name}"


def claim_path(final: Path) -> Path:
    """The file by which the making of a store is claimed, beside its path."""
    return final.parent / f".jepa-cache-{'0' * 12}-{final.name}.claim"


class Claim(NamedTuple):
    """One process's lock on a file, until it is released or the process dies."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Remove the file, then let others lock one of its name."""
        try:
            self.path.unlink(missing_ok=True)
        finally:
            os.close(self.descriptor)


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
    """Open and lock a file, made where it is missing with `create`, together with others who lock it `shared`.

    Gives the descriptor, to be closed; None when another holds the file and we do not `wait`, or it is missing and not to be made.
    An OSError means that the folder cannot be written, or its file system knows no locks.
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
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
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


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(temporary.name + LOCK_SUFFIX)


def _remove_tree(path: Path) -> None:
    if path.is_symlink() or path.is_file():  # a link in the place of a store: what it leads to is not ours
        path.unlink(missing_ok=True)
    while path.exists():
        with suppress(FileNotFoundError):  # two processes may remove the same left-over
            shutil.rmtree(path)
