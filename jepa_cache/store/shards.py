"""Zarr shards as files: what the array's metadata says of them, and a bounded number of open ones with their indexes.

A shard without compressor is its chunks, each followed by its crc32c, with an index (offset and length of each chunk,
16 bytes) and the index's own crc32c at the end.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from jepa_cache.store.damage import WAY_OUT, StoreDamagedError

CRC_BYTES = 4
ENTRY_BYTES = 16  # of a chunk in the index
MISSING = np.iinfo(np.uint64).max  # offset and length of a chunk that was never written
DTYPES = ("uint8", "int8", "uint16", "float16", "float32")
# Two descriptors each, of the 1024 that a process may usually have. Beyond it a shard costs opening and reading its index again.
MAX_OPEN_SHARDS = 384

_BYTE = bytearray(1)  # never looked at


class ArrayLayout(NamedTuple):
    """How an array lies on the disk.

    Attributes:
        shape: [n, ...].
        dtype: Of the values, little endian.
        chunk_steps: Rows of a chunk.
        shard_chunks: Chunks of a shard.
        chunk_bytes: Of a chunk's values, without its checksum; the last chunk is as large as the others.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_steps: int
    shard_chunks: int
    chunk_bytes: int


def read_array_layout(store: Path, name: str, sha256: str | None = None) -> ArrayLayout:
    """Read the metadata of an array that is cut along its first axis only.

    Args:
        store: Folder of the store.
        name: Of the array in it.
        sha256: That of the metadata when it was written; None where nothing says.

    Raises:
        StoreDamagedError: When it is missing, has changed, or is not in this program's format.
    """
    path = store / name / "zarr.json"
    try:
        raw = path.read_bytes()
        metadata = json.loads(raw)
    except FileNotFoundError as error:
        raise StoreDamagedError(f"{path} is missing; {WAY_OUT}") from error
    except ValueError as error:
        raise StoreDamagedError(f"{path} is no valid JSON; {WAY_OUT}") from error
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise StoreDamagedError(f"{path} has changed since it was written (sha256 differs); {WAY_OUT}")
    try:
        shape, rest = tuple(metadata["shape"]), tuple(metadata["shape"][1:])
        shard_shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        (sharding,) = metadata["codecs"]
        configuration = sharding["configuration"]
        chunk_shape = tuple(configuration["chunk_shape"])
        codecs = [[codec["name"] for codec in configuration[key]] for key in ("codecs", "index_codecs")]
        endians = [
            codec.get("configuration", {}).get("endian", "little")
            for key in ("codecs", "index_codecs")
            for codec in configuration[key]
        ]
        known = (
            sharding["name"] == "sharding_indexed"
            and codecs == [["bytes", "crc32c"]] * 2
            and set(endians) == {"little"}
            and configuration.get("index_location", "end") == "end"
            and metadata["data_type"] in DTYPES
            and chunk_shape[1:] == shard_shape[1:] == rest
            and shard_shape[0] % chunk_shape[0] == 0
        )
        dtype = np.dtype(metadata["data_type"]).newbyteorder("<") if known else np.dtype("u1")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreDamagedError(
            f"{path} does not describe an array of this program's format ({error!r}); {WAY_OUT}"
        ) from error
    if not known:
        raise StoreDamagedError(
            f"{path}: the array is not in this program's format ({metadata['data_type']}, chunks {chunk_shape} in shards "
            f"{shard_shape}, {codecs[0]}); {WAY_OUT}"
        )
    chunk_bytes = math.prod(chunk_shape) * dtype.itemsize
    return ArrayLayout(shape, dtype, chunk_shape[0], shard_shape[0] // chunk_shape[0], chunk_bytes)


def array_shard_path(store: Path, name: str, shard: int, num_dimensions: int) -> Path:
    """File of one shard of an array that is cut along its first axis only (Zarr's default chunk keys)."""
    return store.joinpath(name, "c", str(shard), *["0"] * (num_dimensions - 1))


class OpenShard:
    """The descriptor of one shard file and its index; the file is closed when nobody refers to it any more.

    So a thread that reads from it while it is pushed out by others reads on from the same file, never from another one
    that was given the same descriptor.

    Attributes:
        readv: Fills buffers from an offset on, as `os.preadv` does.
        index: [offset, length] of every chunk.
        num_in_order: So many chunks from the first on lie back to back from the beginning of the file.
    """

    __slots__ = ("_descriptor", "_mapped", "index", "num_in_order", "readv")

    def __init__(self, path: Path, num_chunks: int, stored_bytes: int) -> None:
        """Open the file and read its index.

        Args:
            path: The file.
            num_chunks: Of a shard.
            stored_bytes: Of a chunk with its checksum.

        Raises:
            StoreDamagedError: When it is missing, or its index is damaged.
        """
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreDamagedError(f"{path} is missing; {WAY_OUT}") from error
        self.readv: Callable[[Sequence[memoryview], int], int] = functools.partial(os.preadv, self._descriptor)
        num_bytes = os.fstat(self._descriptor).st_size
        size = num_chunks * ENTRY_BYTES + CRC_BYTES
        buffer = bytearray(size)
        try:
            num_read, raw = read_all(self.readv, [memoryview(buffer)], max(0, num_bytes - size)), bytes(buffer)
        except OSError as error:
            raise StoreDamagedError(f"{path} cannot be read ({error}); {WAY_OUT}") from error
        if num_read != size or google_crc32c.value(raw[:-CRC_BYTES]) != int.from_bytes(raw[-CRC_BYTES:], "little"):
            raise StoreDamagedError(f"the shard index at the end of {path} is damaged; {WAY_OUT}")
        index = np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(num_chunks, 2)
        offsets, lengths, room = index[:, 0], index[:, 1], np.uint64(num_bytes - size)
        beyond = (offsets > room) | (lengths > room - np.minimum(offsets, room))
        if (beyond & (offsets != MISSING)).any():
            raise StoreDamagedError(f"{path} is shorter than its shard index says; {WAY_OUT}")
        expected = np.arange(num_chunks, dtype=np.uint64) * np.uint64(stored_bytes)
        in_order = (offsets == expected) & (lengths == stored_bytes)
        self.index: list[list[int]] = index.tolist()
        self.num_in_order = num_chunks if in_order.all() else int(in_order.argmin())
        self._mapped = np.frombuffer(mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ), np.uint8)

    def is_in_memory(self, begin: int, num_bytes: int) -> bool:
        """Whether the ends of these bytes can be had without waiting for the disk.

        Never where the file has been cut. The map is for what is in memory only: a page that the disk cannot
        give would end the process, where `readv` raises.
        """
        try:
            return all(os.preadv(self._descriptor, [_BYTE], at, os.RWF_NOWAIT) for at in (begin, begin + num_bytes - 1))
        except (OSError, AttributeError):  # EAGAIN: it is not; else it cannot be told here, or there is no such flag
            return False

    def copy(self, pieces: Sequence[memoryview | bytearray], begin: int) -> None:
        """Fill buffers one after the other as `readv` does, out of memory; only where `is_in_memory` said so."""
        for piece in pieces:
            np.copyto(np.frombuffer(piece, np.uint8), self._mapped[begin : begin + len(piece)])
            begin += len(piece)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit `os` may be gone already
        if self._descriptor >= 0:
            close(self._descriptor)


def list_checksums(store: Path, name: str) -> list[str]:
    """What store.json lists of an array: of each shard the crc32c of its chunks, 8 hexadecimal digits each, in their order.

    Raises:
        StoreDamagedError: When a shard or a chunk is missing.
    """
    array = read_array_layout(store, name)
    listed, left = [], -(-array.shape[0] // array.chunk_steps)
    while left > 0:
        path = array_shard_path(store, name, len(listed), len(array.shape))
        shard = OpenShard(path, array.shard_chunks, array.chunk_bytes + CRC_BYTES)
        text = b""
        for offset, _ in shard.index[:left]:
            stored = memoryview(bytearray(CRC_BYTES))
            if offset == MISSING or read_all(shard.readv, [stored], offset + array.chunk_bytes) != CRC_BYTES:
                raise StoreDamagedError(f"a chunk of {path} is missing; {WAY_OUT}")
            text += stored
        listed.append(text.hex())
        left -= array.shard_chunks
    return listed


def read_all(readv: Callable[[Sequence[memoryview], int], int], pieces: Sequence[memoryview], begin: int) -> int:
    """Fill buffers of bytes one after the other from `begin` on, however many calls it takes.

    Returns:
        How many bytes there were: fewer than asked for where the file ends.
    """
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
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._shards)

    def get(self, key: Hashable) -> OpenShard | None:
        """The open shard of this key, if it is kept."""
        return self._shards.get(key)

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
