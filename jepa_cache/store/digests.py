"""A local table of file digests by path, size, times and inode, so that terabytes are not hashed again.

It lives in $XDG_STATE_HOME/jepa-cache (default ~/.local/state), outside the cache root and outside any workspace. A file that took another's
place with its size and modification time (`touch -r`, `mv`, `cp -p`) has another inode or change time, which no program sets. Where a file system has no lasting inodes
(some network and FUSE mounts) files are hashed again after each mount, in the worst case at every look: slow, never wrong. One that knows neither
inodes nor change times hides such a replacement.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from jepa_cache.config.paths import spell_name, state_folder
from jepa_cache.files import file_digest

# The first release has a table `digests` without inode and change time in the same file. It is left to that release: its
# rows were not seen with them, so those files are hashed once more. `units` has one place for each content; it is read, not written.
SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, modified_ns INTEGER NOT NULL, changed_ns INTEGER NOT NULL,
    inode TEXT NOT NULL, digest TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS units (digest TEXT PRIMARY KEY, files TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS places (digest TEXT, files TEXT, PRIMARY KEY (digest, files));
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
PLACES = "SELECT digest, files FROM places {where} UNION SELECT digest, files FROM units {where}"
SAVE_S = 1.0
LARGE_BYTES = 16 << 20


class Look(NamedTuple):
    """By what a file is known, without reading it, to be still the one that it was; the inode as text, for it may fill 64 bits."""

    num_bytes: int
    modified_ns: int
    changed_ns: int
    inode: str


def look_at(path: Path) -> Look:
    """Cost: one stat."""
    stat = path.stat()
    return Look(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, str(stat.st_ino))


class Remembered:
    """What the table held at one moment, to look up thousands of files without a query for each."""

    def __init__(self, files: Mapping[str, tuple[Look, str]], units: Mapping[str, Sequence[str]]) -> None:
        self._files = files  # path to how the file looked when it was last hashed, and its sha256
        self._units = units  # files of a unit, as JSON, to the sha256 of every content that they were seen with
        self._folders: dict[str, str] = {}

    def digest(self, path: Path) -> str | None:
        """sha256 of a file that has not changed since it was last hashed; else None. Never reads it."""
        known = self._files.get(spell_name(self._resolve(path)))
        return known[1] if known and known[0] == look_at(path) else None

    def earlier(self, files: Sequence[Path]) -> Sequence[str]:
        """sha256 of every content that a unit of these files was seen with."""
        return self._units.get(json.dumps([self._resolve(file) for file in files]), ())

    def _resolve(self, path: Path) -> str:
        """`path.resolve()`, but the links of each folder are followed once: of ten thousand files that takes most of the time."""
        if not isinstance(path, Path) or path.is_symlink():  # the former in a bucket
            return str(path.resolve())
        folder = str(path.parent)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return f"{self._folders[folder]}/{path.name}"


def join_digests(digests: Sequence[str]) -> str:
    """sha256 of a unit from those of its files, in their order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


class DigestTable:
    """sha256 digests of files; a file is hashed again when its size, one of its times or its inode changed."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or state_folder()) / "digests.sqlite"

    def digest(self, path: Path) -> str:
        """sha256 of `path`, hexadecimal. Cost: reads the file only when it is new or changed."""
        with self._open() as connection:
            return _digest_file(connection, path)

    def digest_anew(self, path: Path) -> str:
        """sha256 of `path`, whatever the table says of it, which then says this. Cost: reads the file."""
        with self._open() as connection:
            return _hash_file(connection, path.resolve())

    def digest_unit(self, files: Sequence[Path]) -> str:
        """sha256 of a unit of input: of its only file, else of its files' digests in their order; remembered for `find_unit`."""
        with self.hashing() as digest_files:
            return digest_files(files)

    @contextmanager
    def hashing(self) -> Iterator[Callable[[Sequence[Path]], str]]:
        """Yield `digest_unit` for many units; the disk is waited for once a second, not for each of them."""
        with self._open() as connection:
            saved = [time.monotonic()]

            def digest_files(files: Sequence[Path]) -> str:
                digest = join_digests([_digest_file(connection, file) for file in files])
                row = (digest, json.dumps([str(file.resolve()) for file in files]))
                if not connection.execute("SELECT 1 FROM places WHERE digest = ? AND files = ?", row).fetchone():
                    connection.execute("INSERT OR IGNORE INTO places VALUES (?, ?)", row)
                if time.monotonic() - saved[0] > SAVE_S:
                    connection.commit()
                    saved[0] = time.monotonic()
                return digest

            yield digest_files

    def remember(self) -> Remembered:
        """Everything in the table at once."""
        names: dict[str, list[str]] = {}
        with self._open() as connection:
            rows = connection.execute("SELECT path, num_bytes, modified_ns, changed_ns, inode, digest FROM files")
            files = {path: (Look(*look), digest) for path, *look, digest in rows}
            for digest, text in connection.execute(PLACES.format(where="")):
                names.setdefault(text, []).append(digest)
        return Remembered(files, names)

    def find_unit(self, digest: str) -> tuple[Path, ...] | None:
        """The files on this machine that make up this unit still, at one of the places where it was seen."""
        with self._open() as connection:
            rows = connection.execute(PLACES.format(where="WHERE digest = ?1"), (digest,)).fetchall()
        for _, names in rows:
            files = tuple(Path(name) for name in json.loads(names))
            if all(file.is_file() for file in files) and join_digests([self.digest(file) for file in files]) == digest:
                return files
        return None

    def note(self, facts: Mapping[str, str]) -> None:
        """Remember what was found out of contents that never change, under names that hold their digests."""
        if facts:
            with self._open() as connection:
                connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))

    def recall(self, names: Iterable[str]) -> dict[str, str]:
        """What `note` was told of these names, of those that it knows."""
        with self._open() as connection:
            query = "SELECT name, value FROM facts WHERE name = ?"
            return dict(row for name in names if (row := connection.execute(query, (name,)).fetchone()))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection that is committed at the end of the block."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
                connection.executescript(SCHEMA)
                yield connection
        except sqlite3.Error as error:
            raise ValueError(
                f"the table of digests {self.path} cannot be used ({error}); set $XDG_STATE_HOME to a folder that can be "
                "written, or delete the file: recordings are then hashed again"
            ) from error


def _digest_file(connection: sqlite3.Connection, path: Path) -> str:
    path = path.resolve()
    row = connection.execute(
        "SELECT digest FROM files WHERE path = ? AND num_bytes = ? AND modified_ns = ? AND changed_ns = ? AND inode = ?",
        (spell_name(str(path)), *look_at(path)),
    ).fetchone()
    return row[0] if row else _hash_file(connection, path)


def _hash_file(connection: sqlite3.Connection, path: Path) -> str:
    look = look_at(path)  # before it is read: a change meanwhile is seen at the next look
    if look.num_bytes > LARGE_BYTES:
        connection.commit()  # else others would wait for the table as long as this takes
    digest = file_digest(path)
    connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (spell_name(str(path)), *look, digest))
    return digest
