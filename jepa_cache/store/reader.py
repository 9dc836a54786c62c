"""Reads runs of steps from the arrays of a store into given buffers, by the shard index.

The first time that any of a chunk is read it is checked: its crc32c must be the one beside it and the one that store.json lists.
Large windows that are in memory are copied out of the mapped file, as quick as any raw memory map; all else is read by
`os.preadv`, which can say what the disk could not give (docs/benchmarks.md). The order of chunks in a shard is never assumed: the
index is read. Chunks that lie back to back are read by one call, their checksums going to a buffer beside the steps.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jepa_cache.store import layout
from jepa_cache.store.damage import WAY_OUT, StoreDamagedError
from jepa_cache.store.shards import (
    CRC_BYTES,
    MISSING,
    OPEN_SHARDS,
    OpenShard,
    array_shard_path,
    read_all,
    read_array_layout,
)
from jepa_cache.store.verify import StoreFile, read_content, read_store_file

CRC_PIECE_BYTES = 1 << 20  # a checksum holds the interpreter, so other threads get their turn in between
MAPPED_BYTES = 128 << 10  # a smaller window is read by the time it is known whether it is in memory

_UNREAD = bytearray(CRC_BYTES)  # where checksums go that were checked before; never looked at
_scratch = threading.local()


class ArrayReader:
    """Random access along the first axis of one array of a store; safe to use from several threads.

    The crc32c of a chunk is checked the first time that any of it is read. Open files are shared with all other readers of
    the process and bounded in number.

    Attributes:
        shape: [n, ...].
        dtype: Of the values.
        num_chunks: Chunks of the array.
    """

    def __init__(self, store: Path, name: str = layout.TOKENS, *, verify_checksums: bool = True) -> None:
        """Read the metadata; files are opened on demand.

        Args:
            store: Folder of the store.
            name: Of the array in it.
            verify_checksums: False leaves the chunks' checksums unread; the shard indexes are checked all the same.

        Raises:
            StoreDamagedError: When the metadata is missing, not as it was written, or another format's.
        """
        self.store, self.name = store, name
        stated = read_store_file(store)
        record = stated.files.get(f"{name}/zarr.json")
        if record is None:
            raise StoreDamagedError(f"{store / layout.STORE_FILE} does not list {name}/zarr.json; {WAY_OUT}")
        array = read_array_layout(store, name, record.sha256)
        self._listed = stated.crc32c.get(name)  # None of stores that were made before these were listed
        self.shape, self.dtype = array.shape, array.dtype
        self._chunk_steps, self._shard_chunks, self._chunk_bytes = array[2:]
        self._shard_steps = self._chunk_steps * self._shard_chunks
        self._step_bytes = self._chunk_bytes // self._chunk_steps
        self._stored_bytes = self._chunk_bytes + CRC_BYTES
        self.num_chunks = -(-self.shape[0] // self._chunk_steps)
        self._checked = bytearray(self.num_chunks) if verify_checksums else b"\1" * self.num_chunks
        self._key = object()  # of this reader's shards among the open ones

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the open shard files go; a later read opens them again."""
        OPEN_SHARDS.drop((self._key, shard) for shard in range(-(-self.num_chunks // self._shard_chunks)))

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the rows from `start` on.

        Args:
            start: First row.
            out: [T, ...] of the array's dtype, C-contiguous; T may span chunks and shards. Its content is undefined when
                an error is raised.

        Raises:
            IndexError: When the run leaves the array.
            StoreDamagedError: When a chunk is missing, short or fails its checksum.
        """
        if out.dtype != self.dtype or out.shape[1:] != self.shape[1:] or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {self.dtype} [T, {', '.join(map(str, self.shape[1:]))}]; got {out.dtype} {out.shape}"
            )
        stop = start + len(out)
        if start < 0 or stop > self.shape[0]:
            raise IndexError(f"{self.store} holds steps 0 to {self.shape[0]}; asked for {start} to {stop}")
        if not len(out):
            return
        target, step_bytes = memoryview(out).cast("B"), self._step_bytes
        number, row = divmod(start, self._shard_steps)
        while row + (stop - start) > self._shard_steps:
            count = self._shard_steps - row
            self._read_in_shard(number, row, count, target[: count * step_bytes])
            start, number, row, target = start + count, number + 1, 0, target[count * step_bytes :]
        self._read_in_shard(number, row, stop - start, target)

    def check_chunk(self, chunk: int) -> None:
        """Read one chunk and check its crc32c, whatever was checked before.

        Raises:
            StoreDamagedError: When it is missing, short or does not match.
        """
        self._read_whole(self._shard(chunk // self._shard_chunks), chunk, 0, memoryview(b""))

    def _read_in_shard(self, number: int, row: int, count: int, target: memoryview) -> None:
        """Fill `target` with `count` rows of one shard, by one call where that is possible."""
        # A window of a small encoder is copied in 2 microseconds, so every line counts here.
        shard = OPEN_SHARDS.get((self._key, number)) or self._shard(number)
        chunk_steps, step_bytes = self._chunk_steps, self._step_bytes
        inner, skipped = divmod(row, chunk_steps)
        last, base = (row + count - 1) // chunk_steps, number * self._shard_chunks
        if last < shard.num_in_order and self._checked.find(0, base + inner, base + last + 1) < 0:
            begin, wanted = inner * self._stored_bytes + skipped * step_bytes, count * step_bytes
            pieces, num_bytes = [target], wanted + (last - inner) * CRC_BYTES
            if last > inner:
                filled, chunk_bytes = (chunk_steps - skipped) * step_bytes, self._chunk_bytes
                pieces = [target[:filled]]
                for done in range(filled, wanted, chunk_bytes):
                    pieces += (_UNREAD, target[done : done + chunk_bytes])
            try:
                if wanted > MAPPED_BYTES and shard.is_in_memory(begin, num_bytes):
                    shard.copy(pieces, begin)
                    return
                if shard.readv(pieces, begin) == num_bytes:
                    return
            except OSError:
                pass  # chunk by chunk, which names the one that cannot be read
        while target:
            inner, skipped = divmod(row, chunk_steps)
            num_bytes = min((chunk_steps - skipped) * step_bytes, len(target))
            self._read_chunk(shard, base + inner, skipped * step_bytes, target[:num_bytes])
            row, target = row + num_bytes // step_bytes, target[num_bytes:]

    def _read_chunk(self, shard: OpenShard, chunk: int, skip: int, target: memoryview) -> None:
        """Fill `target` with the bytes of one chunk from `skip` on; one that is not checked yet is read as a whole."""
        if self._checked[chunk]:
            self._fill(shard, chunk, [target], self._offset(shard, chunk) + skip)
        else:
            self._read_whole(shard, chunk, skip, target)

    def _read_whole(self, shard: OpenShard, chunk: int, skip: int, target: memoryview) -> None:
        # The wanted bytes go straight to their place, the others and the checksum beside.
        beside = _take_scratch(self._stored_bytes - len(target))
        parts = [beside[:skip], target, beside[skip:-CRC_BYTES], beside[-CRC_BYTES:]]
        self._fill(shard, chunk, parts, self._offset(shard, chunk))
        value = 0
        for part in parts[:3]:
            for begin in range(0, len(part), CRC_PIECE_BYTES):
                value = google_crc32c.extend(value, np.frombuffer(part[begin : begin + CRC_PIECE_BYTES], np.uint8))
        if value != int.from_bytes(parts[3], "little"):
            raise self._damaged(chunk, "its checksum does not match")
        if self._listed is not None and parts[3].hex() != self._listed_checksum(chunk):
            raise self._damaged(
                chunk, "it is another chunk than was written: its checksum is not the one in store.json"
            )
        if isinstance(self._checked, bytearray):
            self._checked[chunk] = 1

    def _listed_checksum(self, chunk: int) -> str:
        """The crc32c that store.json lists of a chunk: its bytes as hexadecimal digits; "" where it lists too few."""
        number, inner = divmod(chunk, self._shard_chunks)
        listed = self._listed or []
        return listed[number][8 * inner : 8 * inner + 8] if number < len(listed) else ""

    def _fill(self, shard: OpenShard, chunk: int, pieces: list[memoryview], begin: int) -> None:
        """Fill the pieces one after the other with the bytes of a chunk's file from `begin` on."""
        try:
            num_read = read_all(shard.readv, pieces, begin)
        except OSError as error:
            raise self._damaged(chunk, f"it cannot be read ({error})") from error
        if num_read < sum(map(len, pieces)):
            raise self._damaged(chunk, "the file ends inside it")

    def _shard(self, number: int) -> OpenShard:
        shard = OPEN_SHARDS.get((self._key, number))
        if shard is None:
            shard = OpenShard(self._shard_path(number), self._shard_chunks, self._stored_bytes)
            shard = OPEN_SHARDS.add((self._key, number), shard)
        return shard

    def _offset(self, shard: OpenShard, chunk: int) -> int:
        offset, num_bytes = shard.index[chunk % self._shard_chunks]
        if offset == MISSING:
            raise self._damaged(chunk, "the shard index does not list it")
        if num_bytes != self._stored_bytes:
            raise self._damaged(chunk, f"the shard index gives it {num_bytes} bytes instead of {self._stored_bytes}")
        return offset

    def _shard_path(self, number: int) -> Path:
        return array_shard_path(self.store, self.name, number, len(self.shape))

    def _damaged(self, chunk: int, reason: str) -> StoreDamagedError:
        start = chunk * self._chunk_steps
        stop = min(start + self._chunk_steps, self.shape[0])
        where = f"steps {start} to {stop}{_describe_episodes(self.store, start, stop)}"
        path = self._shard_path(chunk // self._shard_chunks)
        return StoreDamagedError(f"chunk {chunk} ({where}) in {path}: {reason}; {WAY_OUT}")


class TokenReader(ArrayReader):
    """The tokens [n, N, D] of one store."""

    def __init__(self, store: Path, *, verify_checksums: bool = True) -> None:
        """Read the metadata, as `ArrayReader` does."""
        super().__init__(store, layout.TOKENS, verify_checksums=verify_checksums)
        self.num_steps, self.num_tokens, self.width = self.shape


def read_table(
    store: Path, name: str, stated: StoreFile | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the step or segment table of a store, after a check of all its bytes: the checksums of Parquet leave out names.

    Args:
        store: Folder of the store.
        name: Of the table in it.
        stated: What its store.json says, where that was read before.
        columns: Those that are needed, where not all are.

    Raises:
        StoreDamagedError: When it is missing or damaged.
    """
    path = store / name
    record = (stated or read_store_file(store)).files.get(name)
    if record is None:
        raise StoreDamagedError(f"{store / layout.STORE_FILE} does not list {name}; {WAY_OUT}")
    try:
        raw = read_content(path, record.sha256)
        # Not pq.read_table, which takes three times as long to find out that it was given one file.
        with pq.ParquetFile(pa.BufferReader(raw)) as file:
            return file.read(None if columns is None else list(columns), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise StoreDamagedError(f"{path} is missing or damaged ({error}); {WAY_OUT}") from error


def _take_scratch(num_bytes: int) -> memoryview:
    """This thread's buffer for bytes that nobody asked for, kept between reads."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = _scratch.buffer = bytearray(num_bytes)
    return memoryview(buffer)[:num_bytes]


def _describe_episodes(store: Path, start: int, stop: int) -> str:
    """The episodes of these steps, as far as the segment table can be read."""
    try:
        segments = read_table(store, layout.SEGMENTS_FILE).to_pylist()
    except ValueError:  # its own damage is not what was asked about
        return ""
    episodes = sorted({row["episode"] for row in segments if row["start"] < stop and start < row["stop"]})
    return f", episode {', '.join(episodes)}" if episodes else ""
