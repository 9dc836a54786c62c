"""A local table of file digests by path, size and modification time, so that terabytes are not hashed again.

It lives in $XDG_STATE_HOME/jepa-cache (default ~/.local/state), outside the cache root and outside any workspace.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from jepa_cache.store.recipe import file_digest

SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (
    path TEXT PRIMARY KEY, num_bytes INTEGER NOT NULL, modified_ns INTEGER NOT NULL, digest TEXT NOT NULL
)"""


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

    def find(self, digest: str) -> Path | None:
        """A file on this machine that had this digest when it was last looked at, if it is still there unchanged."""
        with closing(self._connect()) as connection:
            rows = connection.execute("SELECT path, num_bytes, modified_ns FROM digests WHERE digest = ?", (digest,))
            for path, num_bytes, modified_ns in rows.fetchall():
                file = Path(path)
                if file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (num_bytes, modified_ns):
                    return file
        return None

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        connection.execute(SCHEMA)
        return connection
