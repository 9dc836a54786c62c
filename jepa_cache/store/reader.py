"""Reads runs of steps from the arrays of a store into given buffers, by the shard index.

The first time that any of a chunk is read it is checked: its crc32c must be the one beside it and the one that store.json lists.
Large windows that are in memory are copied out of the mapped file, as quick as any raw memory map; all else is read by
`os.preadv`, which can say what the disk could not give (docs/benchmarks.md). The order of chunks in a shard is never assumed: the
index is read. Chunks that lie back to back are read by one call, their checksums going to a buffer beside the steps.

A shard without compressor is its chunks, each followed by its crc32c, with an index (offset and length of each chunk,
16 bytes) and the index's own crc32c at the end.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numcodecs.checksum32 import CRC32C

from jepa_cache.store import layout
from jepa_cache.store.layout import REMEDY, StoreDamagedError, StoreFile, read_content, read_store_file
from jepa_cache.store.quantisation import CODECS

CRC_BYTES = 4
ENTRY_BYTES = 16  # of a chunk in the index
MISSING = np.iinfo(np.uint64).max  # offset and length of a chunk that was never written
# Two descriptors each, of the 1024 that a process may usually have. Beyond it a shard costs opening and reading its index again.
MAX_OPEN_SHARDS = 384

_BYTE = bytearray(1)  # never looked at
CRC_PIECE_BYTES = 1 << 20  # a checksum holds the interpreter, so other threads get their turn in between
MAPPED_BYTES = 128 << 10  # a smaller window is read by the time it is known whether it is in memory

_UNREAD = bytearray(CRC_BYTES)  # where checksums go that were checked before; never looked at
_scratch = threading.local()


class ArrayLayout(NamedTuple):
    """How an array [n, ...] that is cut along its first axis lies on the disk."""

    shape: tuple[int, ...]
    dtype: np.dtype  # of the values, little endian
    chunk_steps: int  # rows of a chunk
    shard_chunks: int  # chunks of a shard
    chunk_bytes: int  # of a chunk's values, without its checksum; the last chunk is as large as the others


def read_array_layout(store: Path, name: str, sha256: str | None = None) -> ArrayLayout:
    """Read the metadata of an array; StoreDamagedError where it has another sha256, or describes no array of ours."""
    path = store / name / "zarr.json"
    try:
        raw = path.read_bytes() if sha256 is None else read_content(path, sha256)
        metadata = orjson.loads(raw)
        (sharding,) = metadata["codecs"]
        inner, chunk = sharding["configuration"], tuple(sharding["configuration"]["chunk_shape"])
        shape, shard = tuple(metadata["shape"]), tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = [[_name_codec(codec) for codec in inner[key]] for key in ("codecs", "index_codecs")]
        dtypes = {"float16", "float32"} | {codec.dtype for codec in CODECS.values()}
        is_ours = codecs == [["bytes", "crc32c"]] * 2 and metadata["data_type"] in dtypes
        is_ours = is_ours and inner.get("index_location", "end") == "end"
        if not is_ours or not chunk[1:] == shard[1:] == shape[1:] or shard[0] % chunk[0]:
            raise ValueError(f"{metadata['data_type']}, chunks {chunk} in shards {shard}, {codecs[0]}")
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{path} is missing; {REMEDY}") from error
    except StoreDamagedError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreDamagedError(f"{path} is not in this program's format ({error}); {REMEDY}") from error
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    return ArrayLayout(shape, dtype, chunk[0], shard[0] // chunk[0], math.prod(chunk) * dtype.itemsize)


def _name_codec(codec: dict[str, Any]) -> str:
    endian = codec.get("configuration", {}).get("endian", "little")
    return codec["name"] if endian == "little" else f"{endian} endian"


class OpenShard:
    """The descriptor of one shard file and its index; the file is closed when nobody refers to it any more.

    So a thread that reads from it while it is pushed out by others reads on from the same file, never from another one
    that was given the same descriptor.
    """

    __slots__ = ("_descriptor", "_mapped", "index", "num_in_order", "readv")

    def __init__(self, path: Path, num_chunks: int, stored_bytes: int) -> None:
        """Read the index of `num_chunks` chunks, each of `stored_bytes` with its checksum; StoreDamagedError names damage."""
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreDamagedError(f"{path} is missing; {REMEDY}") from error
        # Fills buffers from an offset on.
        self.readv: Callable[[Sequence[memoryview], int], int] = functools.partial(os.preadv, self._descriptor)
        num_bytes = os.fstat(self._descriptor).st_size
        raw = bytearray(num_chunks * ENTRY_BYTES + CRC_BYTES)
        try:
            num_read = read_all(self.readv, [memoryview(raw)], max(0, num_bytes - len(raw)))
        except OSError as error:
            raise StoreDamagedError(f"{path} cannot be read ({error}); {REMEDY}") from error
        stored, crc = bytes(raw[:-CRC_BYTES]), int.from_bytes(raw[-CRC_BYTES:], "little")
        if num_read != len(raw) or CRC32C.checksum(stored) != crc:
            raise StoreDamagedError(f"the shard index at the end of {path} is damaged; {REMEDY}")
        index = np.frombuffer(stored, "<u8").reshape(num_chunks, 2)
        offsets, lengths = index[:, 0], index[:, 1]
        if ((offsets + lengths > num_bytes - len(raw)) & (offsets != MISSING)).any():
            raise StoreDamagedError(f"{path} is shorter than its shard index says; {REMEDY}")
        expected = np.arange(num_chunks, dtype=np.uint64) * np.uint64(stored_bytes)
        in_order = (offsets == expected) & (lengths == stored_bytes)
        self.index: list[list[int]] = index.tolist()  # [offset, length] of every chunk
        # So many chunks from the first on lie back to back from the beginning of the file.
        self.num_in_order = num_chunks if in_order.all() else int(in_order.argmin())
        self._mapped = np.frombuffer(mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ), np.uint8)

    def is_in_memory(self, begin: int, num_bytes: int) -> bool:
        """Whether the ends of these bytes can be had without waiting for the disk; never where the file has been cut.

        The map is for what is in memory only: a page that the disk cannot give would end the process, where `readv` raises.
        """
        try:
            return all(os.preadv(self._descriptor, [_BYTE], at, os.RWF_NOWAIT) for at in (begin, begin + num_bytes - 1))
        except (OSError, AttributeError):  # EAGAIN: it is not; else it cannot be known here, or there is no such flag
            return False

    def copy(self, pieces: Sequence[memoryview | bytearray], begin: int) -> None:
        """Fill buffers one after the other as `readv` does, out of memory; only where `is_in_memory` said so."""
        for piece in pieces:
            np.copyto(np.frombuffer(piece, np.uint8), self._mapped[begin : begin + len(piece)])
            begin += len(piece)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit `os` may be gone already
        if self._descriptor >= 0:
            close(self._descriptor)


def crc32c_of(*parts: memoryview) -> int:
    """The crc32c of buffers one behind the other."""
    value = 0
    for part in parts:
        for begin in range(0, len(part), CRC_PIECE_BYTES):
            value = CRC32C.checksum(np.frombuffer(part[begin : begin + CRC_PIECE_BYTES], np.uint8), value)
    return value


def list_checksums(store: Path, name: str) -> list[str]:
    """What store.json lists of an array: of each shard the crc32c of its chunks, 8 hexadecimal digits each, in their order."""
    array = read_array_layout(store, name)
    listed, left = [], -(-array.shape[0] // array.chunk_steps)
    while left > 0:
        path = layout.shard_path(store, len(listed), name, len(array.shape))
        shard = OpenShard(path, array.shard_chunks, array.chunk_bytes + CRC_BYTES)
        text = b""
        for offset, _ in shard.index[:left]:
            stored = memoryview(bytearray(CRC_BYTES))
            if offset == MISSING or read_all(shard.readv, [stored], offset + array.chunk_bytes) != CRC_BYTES:
                raise StoreDamagedError(f"a chunk of {path} is missing; {REMEDY}")
            text += stored
        listed.append(text.hex())
        left -= array.shard_chunks
    return listed


def read_all(readv: Callable[[Sequence[memoryview], int], int], pieces: Sequence[memoryview], begin: int) -> int:
    """Fill buffers one after the other from `begin` on; returns how many bytes there were: fewer where the file ends."""
    left, total = [piece for piece in pieces if piece], 0
    while left and (got := readv(left, begin + total)):
        total += got
        while left and got >= len(left[0]):
            got -= len(left.pop(0))
        if got:
            left[0] = left[0][got:]
    return total


class OpenShards:
    """The open shards of all readers of this process: beyond `limit` the one that was opened first is let go.

    A process may open 1024 files on most systems, so however many stores a data set has, no more are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._shards: dict[Hashable, OpenShard] = {}
        self.get = self._shards.get
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def add(self, key: Hashable, shard: OpenShard) -> OpenShard:
        """Keep a shard that was just opened; returns the one of a thread that was quicker, if there is one."""
        with self._lock:
            kept = self._shards.setdefault(key, shard)
            while len(self._shards) > self.limit:
                del self._shards[next(iter(self._shards))]
            return kept

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Let these go."""
        with self._lock:
            for key in keys:
                self._shards.pop(key, None)


OPEN_SHARDS = OpenShards(MAX_OPEN_SHARDS)


class ArrayReader:
    """Random access along the first axis of one array [n, ...] of a store; safe to use from several threads."""

    def __init__(self, store: Path, name: str = layout.TOKENS, *, verify_checksums: bool = True) -> None:
        """Read the metadata; files are opened on demand. Without `verify_checksums` those of the shard indexes are checked alone."""
        self.store, self.name = store, name
        stated = read_store_file(store)
        array = read_array_layout(store, name, stated.files[f"{name}/zarr.json"].sha256)
        self._listed = stated.crc32c[name]
        self.shape, self.dtype = array.shape, array.dtype
        self._chunk_steps, self._shard_chunks, self._chunk_bytes = array[2:]
        self._shard_steps = self._chunk_steps * self._shard_chunks
        self._step_bytes = self._chunk_bytes // self._chunk_steps
        self._stored_bytes = self._chunk_bytes + CRC_BYTES
        self.num_chunks = -(-self.shape[0] // self._chunk_steps)
        self.num_bytes = self.num_chunks * self._chunk_bytes
        self._checked = bytearray(self.num_chunks) if verify_checksums else b"\1" * self.num_chunks
        self._key = object()  # of this reader's shards among the open ones

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the open shard files go; a later read opens them again."""
        OPEN_SHARDS.drop((self._key, shard) for shard in range(-(-self.num_chunks // self._shard_chunks)))

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, ...], C-contiguous and of the array's dtype, with the rows from `start` on.

        Raises:
            IndexError: The run leaves the array.
            StoreDamagedError: A chunk is missing, short or fails its checksum; the content of `out` is undefined then.
        """
        if out.dtype != self.dtype or out.shape[1:] != self.shape[1:] or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {self.dtype} [T, {', '.join(map(str, self.shape[1:]))}]; got {out.dtype} {out.shape}"
            )
        stop = start + len(out)
        if start < 0 or stop > self.shape[0]:
            raise IndexError(f"{self.store} holds steps 0 to {self.shape[0]}; requested are {start} to {stop}")
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
        """Read one chunk and check its crc32c, whatever was checked before; StoreDamagedError where it does not match."""
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
        if crc32c_of(*parts[:3]) != int.from_bytes(parts[3], "little"):
            raise self._damaged(chunk, "its checksum does not match")
        number, inner = divmod(chunk, self._shard_chunks)
        listed = self._listed[number : number + 1]  # of the shard's chunks, 8 digits each
        if [parts[3].hex()] != [text[8 * inner : 8 * inner + 8] for text in listed]:
            raise self._damaged(
                chunk, "it is another chunk than was written: its checksum is not the one in store.json"
            )
        if isinstance(self._checked, bytearray):
            self._checked[chunk] = 1

    def _fill(self, shard: OpenShard, chunk: int, pieces: list[memoryview], begin: int) -> None:
        """Fill the pieces one after the other with the bytes of a chunk's file from `begin` on."""
        try:
            num_read = read_all(shard.readv, pieces, begin)
        except OSError as error:
            raise self._damaged(chunk, f"it cannot be read ({error})") from error
        if num_read < sum(map(len, pieces)):
            raise self._damaged(chunk, "the file ends inside it")

    def _shard(self, number: int) -> OpenShard:
        if (shard := OPEN_SHARDS.get((self._key, number))) is not None:
            return shard
        opened = OpenShard(self._shard_path(number), self._shard_chunks, self._stored_bytes)
        return OPEN_SHARDS.add((self._key, number), opened)

    def _offset(self, shard: OpenShard, chunk: int) -> int:
        offset, num_bytes = shard.index[chunk % self._shard_chunks]
        if offset == MISSING:
            raise self._damaged(chunk, "the shard index does not list it")
        if num_bytes != self._stored_bytes:
            raise self._damaged(chunk, f"the shard index gives it {num_bytes} bytes instead of {self._stored_bytes}")
        return offset

    def _shard_path(self, number: int) -> Path:
        return layout.shard_path(self.store, number, self.name, len(self.shape))

    def _damaged(self, chunk: int, reason: str) -> StoreDamagedError:
        start = chunk * self._chunk_steps
        stop = min(start + self._chunk_steps, self.shape[0])
        where = f"steps {start} to {stop}{_describe_episodes(self.store, start, stop)}"
        path = self._shard_path(chunk // self._shard_chunks)
        return StoreDamagedError(f"chunk {chunk} ({where}) in {path}: {reason}; {REMEDY}")


def read_table(
    store: Path, name: str, stated: StoreFile | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the step or segment table of a store, after a check of all its bytes: the checksums of Parquet leave out names.

    `stated` is what its store.json says, where that was read before. StoreDamagedError where the table is missing or damaged.
    """
    path = store / name
    record = (stated or read_store_file(store)).files.get(name)
    if record is None:
        raise StoreDamagedError(f"{store / layout.STORE_FILE} does not list {name}; {REMEDY}")
    try:
        raw = read_content(path, record.sha256)
        # Not pq.read_table, which takes three times as long to find out that it was given one file.
        with pq.ParquetFile(pa.BufferReader(raw)) as file:
            return file.read(None if columns is None else list(columns), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise StoreDamagedError(f"{path} is missing or damaged ({error}); {REMEDY}") from error


def _take_scratch(num_bytes: int) -> memoryview:
    """This thread's buffer for bytes that nobody wants, kept between reads."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < num_bytes:
        buffer = _scratch.buffer = bytearray(num_bytes)
    return memoryview(buffer)[:num_bytes]


def _describe_episodes(store: Path, start: int, stop: int) -> str:
    """The episodes of these steps, as far as the segment table can be read."""
    try:
        segments = read_table(store, layout.SEGMENTS_FILE).to_pylist()
    except ValueError:  # its own damage is another matter
        return ""
    episodes = sorted({row["episode"] for row in segments if row["start"] < stop and start < row["stop"]})
    return f", episode {', '.join(episodes)}" if episodes else ""


def read_keys(store: Path) -> tuple[list[str], list[str]]:
    """Keys of the recordings of a token store in the order of its unit, and of those that were skipped, as they were called when it was made."""
    stated = read_store_file(store)
    episodes = read_table(store, layout.SEGMENTS_FILE, stated, ("episode",)).column("episode").to_pylist()
    return list(dict.fromkeys(episodes)), [recording["key"] for recording in stated.metadata["skipped"]]
