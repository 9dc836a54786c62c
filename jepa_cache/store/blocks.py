"""Objects read like files, with what was read kept on the local disk up to a bound: the least recently used goes first."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import google_crc32c

from jepa_cache.files import OURS, atomic_file
from jepa_cache.store.damage import WAY_OUT, StoreDamagedError
from jepa_cache.store.objects import Bucket

BLOCK_BYTES = 1 << 20  # small against a chunk of real tokens (4 MB), large against a request's overhead
CRC_BYTES = 4
WRITING_S = 3600  # a temporary file that is older was left by a process that died
ROUNDS = 16  # the folder is looked through each time that a sixteenth of the bound was written


class BlockCache:
    """Blocks of objects as files in one folder, each with its crc32c; shared by threads and processes.

    A block that is damaged or gone is fetched again. The bound holds for one process; each further one may exceed it by a
    sixteenth, since it looks at what the others wrote only then.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._unseen = max_bytes  # bytes written since the folder was last looked through; at first unknown
        self._lock = threading.Lock()

    def get(self, name: str, block: int, num_bytes: int) -> bytes | None:
        """A block that is kept, of this size."""
        path = self.folder / f"{name}-{block}"
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        data, checksum = data[:-CRC_BYTES], data[-CRC_BYTES:]
        if len(data) != num_bytes or google_crc32c.value(data) != int.from_bytes(checksum, "little"):
            path.unlink(missing_ok=True)  # the machine stopped while it was written, or the disk is bad
            return None
        return data

    def read(self, name: str, block: int, pieces: Sequence[memoryview], begin: int) -> bool:
        """Fill buffers from a block that this process has checked before; False when it is not kept any more."""
        try:
            descriptor = os.open(self.folder / f"{name}-{block}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            os.utime(descriptor)
            return os.preadv(descriptor, pieces, begin) == sum(map(len, pieces))
        finally:
            os.close(descriptor)

    def put(self, name: str, block: int, data: memoryview) -> None:
        """Keep a block.

        Raises:
            OSError: When the disk is full.
        """
        size = len(data) + CRC_BYTES
        if size > self.max_bytes:
            return
        self._make_room(size)
        try:
            with atomic_file(self.folder / f"{name}-{block}", durable=False) as temporary, temporary.open("wb") as file:
                file.write(data)
                file.write(google_crc32c.value(bytes(data)).to_bytes(CRC_BYTES, "little"))
        except OSError as error:
            error.add_note(f"while keeping what was read in {self.folder}; see $JEPA_CACHE_LOCAL_GB")
            raise

    def _make_room(self, size: int) -> None:
        with self._lock:
            self._unseen += size
            if self._unseen <= self.max_bytes // ROUNDS:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = []
            for entry in os.scandir(self.folder):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                being_written = OURS.fullmatch(entry.name) and time.time() - stat.st_mtime < WRITING_S
                kept.append((math.inf if being_written else stat.st_mtime, stat.st_size, entry.path))
            # Room for what is written until the next look.
            excess = sum(num_bytes for _, num_bytes, _ in kept) + max(size, self.max_bytes // ROUNDS) - self.max_bytes
            for modified, num_bytes, path in sorted(kept):
                if excess <= 0 or modified == math.inf:
                    break
                Path(path).unlink(missing_ok=True)
                excess -= num_bytes
            self._unseen = size


class RemoteFile:
    """An object that is never written again, read in ranges as with `os.preadv`; safe to use from several threads."""

    def __init__(self, bucket: Bucket, key: str, num_bytes: int, cache: BlockCache | None) -> None:
        """Ask nothing yet.

        Args:
            bucket: Where it lies.
            key: Its name there.
            num_bytes: Its size.
            cache: What is kept here; None asks the bucket each time, for exactly what is wanted.
        """
        self.num_bytes = num_bytes
        self._bucket, self._key, self._cache = bucket, key, cache
        self._name = hashlib.sha256(f"{bucket.url} {key}".encode()).hexdigest()[:32]
        # A block is torn only where the whole machine stopped, so one look at each by this process is enough.
        self._checked = bytearray(-(-num_bytes // BLOCK_BYTES))

    def readv(self, pieces: Sequence[memoryview], begin: int) -> int:
        """Fill buffers of bytes, one after the other, from `begin` on; returns how many bytes there were.

        Raises:
            StoreDamagedError: When the object is gone or shorter than it was.
            ObjectStoreError: When the bucket cannot be read.
        """
        end = min(begin + sum(len(piece) for piece in pieces), self.num_bytes)
        if begin >= end:
            return 0
        if self._cache is None:
            _copy(self._get([begin], [end - begin])[0], pieces)
            return end - begin
        missing, position, rest = {}, begin, list(pieces)
        while position < end:
            block, offset = divmod(position, BLOCK_BYTES)
            stop = min(end, (block + 1) * BLOCK_BYTES)
            part, rest = _split(rest, stop - position)
            if not self._read_kept(block, part, offset):
                missing[block] = (part, offset)
            position = stop
        if missing:
            starts = [block * BLOCK_BYTES for block in missing]
            fetched = self._get(starts, [self._block_bytes(block) for block in missing])
            for (block, (part, offset)), data in zip(missing.items(), fetched, strict=True):
                _copy(data[offset:], part)
                self._cache.put(self._name, block, data)
                self._checked[block] = 1
        return end - begin

    def digest(self) -> str:
        """sha256 of the content, hexadecimal. Cost: reads all of it, past what is kept here.

        Raises:
            StoreDamagedError: When the object is gone or shorter than it was.
            ObjectStoreError: When the bucket cannot be read.
        """
        digest = hashlib.sha256()
        with self._damage_named():
            for part in self._bucket.iter_parts(self._key, self.num_bytes):
                digest.update(part)
        return digest.hexdigest()

    def _read_kept(self, block: int, part: list[memoryview], offset: int) -> bool:
        """Fill buffers from what is kept of a block; False when it is not kept."""
        if self._checked[block]:
            return self._cache.read(self._name, block, part, offset)
        data = self._cache.get(self._name, block, self._block_bytes(block))
        if data is None:
            return False
        _copy(memoryview(data)[offset:], part)
        self._checked[block] = 1
        return True

    def _block_bytes(self, block: int) -> int:
        return min(BLOCK_BYTES, self.num_bytes - block * BLOCK_BYTES)

    def _get(self, starts: Sequence[int], lengths: Sequence[int]) -> list[memoryview]:
        with self._damage_named():
            return self._bucket.get_ranges(self._key, starts, lengths)

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, EOFError) as error:
            reason = str(error) if isinstance(error, EOFError) else "it is missing"
            raise StoreDamagedError(f"{self._bucket.url}/{self._key}: {reason}; {WAY_OUT}") from error


def _split(pieces: list[memoryview], num_bytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """Cut buffers that follow each other into those of the first bytes and the rest."""
    first = []
    for number, piece in enumerate(pieces):
        if len(piece) > num_bytes:
            return [*first, piece[:num_bytes]] if num_bytes else first, [piece[num_bytes:], *pieces[number + 1 :]]
        first.append(piece)
        num_bytes -= len(piece)
    return first, []


def _copy(data: memoryview, pieces: Sequence[memoryview]) -> None:
    """Fill buffers with the beginning of `data`, as far as it reaches."""
    for piece in pieces:
        part = data[: len(piece)]
        piece[: len(part)] = part
        data = data[len(part) :]
