"""A local table of file digests by path, size and modification time, so that terabytes are not hashed again.

It lives in $XDG_STATE_HOME/jepa-cache (default ~/.local/state), outside the cache root and outside any workspace.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from jepa_cache.config.machine import spell_name, state_folder
from jepa_cache.store.recipe import file_digest

SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (
    path TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, modified_ns INTEGER NOT NULL, digest TEXT NOT NULL
)"""
SAVE_S = 1.0
LARGE_BYTES = 16 << 20
UNITS_SCHEMA = "CREATE TABLE IF NOT EXISTS units (digest TEXT PRIMARY KEY, files TEXT NOT NULL)"


class Remembered(NamedTuple):
    """What the table held at one moment.

    Attributes:
        files: Path to size, modification time (ns) and sha256 as of the last look.
        units: Files of a unit to the sha256 of every content that they were seen with.
    """

    files: Mapping[str, tuple[int, int, str]]
    units: Mapping[tuple[str, ...], Sequence[str]]

    def digest(self, path: Path) -> str | None:
        """sha256 of a file that has not changed since it was last hashed; else None. Never reads it."""
        path = path.resolve()
        known, stat = self.files.get(spell_name(str(path))), path.stat()
        return known[2] if known and known[:2] == (stat.st_size, stat.st_mtime_ns) else None

    def earlier(self, files: Sequence[Path]) -> Sequence[str]:
        """sha256 of every content that a unit of these files was seen with."""
        return self.units.get(tuple(str(file.resolve()) for file in files), ())


def join_digests(digests: Sequence[str]) -> str:
    """sha256 of a unit from those of its files, in their order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


class DigestTable:
    """sha256 digests of files; a file is hashed again when its size or modification time changed."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or state_folder()) / "digests.sqlite"

    def digest(self, path: Path) -> str:
        """sha256 of `path`, hexadecimal. Cost: reads the file only when it is new or changed."""
        with closing(self._connect()) as connection, connection:
            return _digest_file(connection, path)

    def digest_unit(self, files: Sequence[Path]) -> str:
        """sha256 of a unit of input: of its only file, else of its files' digests in their order; remembered for `find_unit`."""
        (digest,) = self.digest_units([files])
        return digest

    def digest_units(self, units: Iterable[Sequence[Path]]) -> Iterator[str]:
        """`digest_unit` of one unit after the other.

        Cost: the disk is waited for once a second, not for each unit; what a killed run hashed before is not hashed again.
        """
        with closing(self._connect()) as connection, connection:
            saved = time.monotonic()
            for files in units:
                digest = join_digests([_digest_file(connection, file) for file in files])
                row = (digest, json.dumps([str(file.resolve()) for file in files]))
                if not connection.execute("SELECT 1 FROM units WHERE digest = ? AND files = ?", row).fetchone():
                    connection.execute("INSERT OR REPLACE INTO units VALUES (?, ?)", row)
                if time.monotonic() - saved > SAVE_S:
                    connection.commit()
                    saved = time.monotonic()
                yield digest

    def remember(self) -> Remembered:
        """Everything in the table at once, to look up thousands of files without asking for each."""
        with closing(self._connect()) as connection:
            files = connection.execute("SELECT path, num_bytes, modified_ns, digest FROM digests").fetchall()
            units = connection.execute("SELECT digest, files FROM units").fetchall()
        names: dict[tuple[str, ...], list[str]] = {}
        for digest, text in units:
            names.setdefault(tuple(json.loads(text)), []).append(digest)
        return Remembered(
            {path: (num_bytes, modified_ns, digest) for path, num_bytes, modified_ns, digest in files}, names
        )

    def find_unit(self, digest: str) -> tuple[Path, ...] | None:
        """The files on this machine that made up this unit when last looked at, if they still do."""
        with closing(self._connect()) as connection:
            row = connection.execute("SELECT files FROM units WHERE digest = ?", (digest,)).fetchone()
        files = tuple(Path(name) for name in json.loads(row[0])) if row else ()
        if not files or not all(file.is_file() for file in files):
            return None
        return files if join_digests([self.digest(file) for file in files]) == digest else None

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = sqlite3.connect(self.path, timeout=60)
            connection.execute(SCHEMA)
            connection.execute(UNITS_SCHEMA)
        except sqlite3.Error as error:
            raise ValueError(
                f"the table of digests {self.path} cannot be opened ({error}); set $XDG_STATE_HOME to a folder that can be "
                "written, or delete the file: recordings are then hashed again"
            ) from error
        return connection


def _digest_file(connection: sqlite3.Connection, path: Path) -> str:
    path = path.resolve()
    stat = path.stat()
    key = (spell_name(str(path)), stat.st_size, stat.st_mtime_ns)
    row = connection.execute(
        "SELECT digest FROM digests WHERE path = ? AND num_bytes = ? AND modified_ns = ?", key
    ).fetchone()
    if row:
        return row[0]
    if stat.st_size > LARGE_BYTES:
        connection.commit()  # else others would wait for the table as long as this takes
    digest = file_digest(path)
    connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", (*key, digest))
    return digest
