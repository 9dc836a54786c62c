"""A local table of file digests by path, size and modification time, so that terabytes are not hashed again.

It lives in $XDG_STATE_HOME/jepa-cache (default ~/.local/state), outside the cache root and outside any workspace.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from jepa_cache.store.recipe import file_digest

SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (
    path TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, modified_ns INTEGER NOT NULL, digest TEXT NOT NULL
)"""
UNITS_SCHEMA = "CREATE TABLE IF NOT EXISTS units (digest TEXT PRIMARY KEY, files TEXT NOT NULL)"


def state_folder() -> Path:
    """Folder of what this machine remembers: $XDG_STATE_HOME/jepa-cache, else ~/.local/state/jepa-cache."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "jepa-cache"


class DigestTable:
    """sha256 digests of files; a file is hashed again when its size or modification time changed."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or state_folder()) / "digests.sqlite"

    def digest(self, path: Path) -> str:
        """sha256 of `path`, hexadecimal. Cost: reads the file only when it is new or changed."""
        path = path.resolve()
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        with closing(self._connect()) as connection:
            row = connection.execute(
                "SELECT digest FROM digests WHERE path = ? AND num_bytes = ? AND modified_ns = ?", key
            ).fetchone()
            if row:
                return row[0]
            digest = file_digest(path)
            with connection:
                connection.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?)", (*key, digest))
            return digest

    def digest_unit(self, files: Sequence[Path]) -> str:
        """sha256 of a unit of input: of its only file, else of its files' digests in their order; remembered for `find_unit`."""
        digest = self._join(files)
        names = json.dumps([str(file.resolve()) for file in files])
        with closing(self._connect()) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO units VALUES (?, ?)", (digest, names))
        return digest

    def find_unit(self, digest: str) -> tuple[Path, ...] | None:
        """The files on this machine that made up this unit when last looked at, if they still do."""
        with closing(self._connect()) as connection:
            row = connection.execute("SELECT files FROM units WHERE digest = ?", (digest,)).fetchone()
        files = tuple(Path(name) for name in json.loads(row[0])) if row else ()
        if not files or not all(file.is_file() for file in files):
            return None
        return files if self._join(files) == digest else None

    def _join(self, files: Sequence[Path]) -> str:
        digests = [self.digest(file) for file in files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute(SCHEMA)
        connection.execute(UNITS_SCHEMA)
        return connection
