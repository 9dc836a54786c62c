"""Writes one token store in private and publishes it in one atomic step."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jepa_cache.config.paths import default_num_threads
from jepa_cache.files import publish_folder, remove_stale_temporaries, temporary_folder
from jepa_cache.store import layout
from jepa_cache.store.quantisation import (
    Channels,
    check_width,
    decode,
    encode,
    get_codec,
    is_finite,
    measure_channels,
    sum_channels,
)
from jepa_cache.store.reader import CRC_BYTES, MISSING, ArrayReader, crc32c_of, list_checksums
from jepa_cache.store.recipe import canonical_json

if TYPE_CHECKING:
    import zarr

STAGING_FILE = "staging.float16"
Quantise = Callable[[np.ndarray, Channels], tuple[np.ndarray, ...]]
SHARD_CHUNKS = layout.SHARD_STEPS // layout.CHUNK_STEPS
STAGED_STEPS = 64  # read back and quantised at once
SIDE_BY_SIDE_BYTES = 1 << 18  # smaller chunks are written sooner than they are handed to another thread


class ShardWriter:
    """Writes the rows of an array [n, ...] that is cut along its first axis, byte for byte as Zarr does (see `reader`).

    Without a compressor all chunks have one length, so their places are known and threads write them side by side. A
    shard's sha256 is taken on the way, when its bytes are at hand.
    """

    def __init__(self, store: Path, array: zarr.Array, pool: ThreadPoolExecutor) -> None:
        self.num_rows = 0
        self.digests: dict[str, str] = {}  # sha256 of the finished shards by their path in the store
        self._store, self._array, self._pool = store, array, pool
        # Rows that wait until their chunk is full.
        self._waiting = np.empty((layout.CHUNK_STEPS, *array.shape[1:]), array.dtype)
        self._stored_bytes = self._waiting.nbytes + CRC_BYTES
        self._num_chunks = 0  # that are written
        self._descriptor = -1
        self._digest = hashlib.sha256()  # of the open shard so far

    def append(self, rows: np.ndarray) -> None:
        """Add rows [k, ...] of the array's dtype; returns when all but those of an unfinished chunk are written."""
        while len(rows):
            waiting = self.num_rows % layout.CHUNK_STEPS
            if waiting or len(rows) < layout.CHUNK_STEPS:
                part = rows[: layout.CHUNK_STEPS - waiting]
                self._waiting[waiting : waiting + len(part)] = part
                chunks = [self._waiting] if waiting + len(part) == layout.CHUNK_STEPS else []
            else:
                room = SHARD_CHUNKS - self._num_chunks % SHARD_CHUNKS
                part = rows[: min(room, len(rows) // layout.CHUNK_STEPS) * layout.CHUNK_STEPS]
                chunks = np.ascontiguousarray(part).reshape(-1, *self._waiting.shape)
            self.num_rows += len(part)
            rows = rows[len(part) :]
            self._write(chunks)

    def roll_back(self, num_rows: int) -> None:
        """Forget every row from `num_rows` on."""
        num_chunks, rest = divmod(num_rows, layout.CHUNK_STEPS)
        if num_chunks < self._num_chunks:
            self.close()
            shard, inside = divmod(num_chunks, SHARD_CHUNKS)
            last = (self._num_chunks - 1) // SHARD_CHUNKS
            for number in range(shard, last + 1):
                self.digests.pop(self._name(number), None)
            with (self._store / self._name(shard)).open("rb") as file:
                self._digest = hashlib.sha256()
                for _ in range(inside):
                    self._digest.update(file.read(self._stored_bytes))
                file.readinto(memoryview(self._waiting).cast("B")[: rest * self._waiting[0].nbytes])
            for number in range(shard + (inside > 0), last + 1):
                (self._store / self._name(number)).unlink()
            if inside:
                self._descriptor = os.open(self._store / self._name(shard), os.O_WRONLY | os.O_CLOEXEC)
                os.ftruncate(self._descriptor, inside * self._stored_bytes)
            self._num_chunks = num_chunks
        self.num_rows = num_rows

    def finish(self) -> None:
        """Write what waits, and the array's length."""
        if rest := self.num_rows % layout.CHUNK_STEPS:
            self._waiting[rest:] = self._array.fill_value
            self._write([self._waiting])
        if self._num_chunks % SHARD_CHUNKS:
            self._end_shard()
        self._array.resize((self.num_rows, *self._array.shape[1:]))

    def close(self) -> None:
        """Let the open file go; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _name(self, shard: int) -> str:
        path = layout.shard_path(self._store, shard, self._array.basename, len(self._array.shape))
        return str(path.relative_to(self._store))

    def _write(self, chunks: Sequence[np.ndarray]) -> None:
        """Write chunks that all belong to one shard."""
        if not len(chunks):
            return
        number, first = divmod(self._num_chunks, SHARD_CHUNKS)
        if first == 0:
            path = self._store / self._name(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._digest = hashlib.sha256()
        parts = [memoryview(chunk).cast("B") for chunk in chunks]
        side_by_side = self._pool.map if self._stored_bytes > SIDE_BY_SIDE_BYTES else map
        sums = side_by_side(self._write_chunk, parts, range(first, first + len(parts)))
        for part, crc in zip(parts, sums, strict=True):
            self._digest.update(part)
            self._digest.update(crc)
        self._num_chunks += len(parts)
        if self._num_chunks % SHARD_CHUNKS == 0:
            self._end_shard()

    def _write_chunk(self, part: memoryview, inner: int) -> bytes:
        crc = crc32c_of(part).to_bytes(CRC_BYTES, "little")
        write_all(self._descriptor, [part, memoryview(crc)], inner * self._stored_bytes)
        return crc

    def _end_shard(self) -> None:
        """Write the index behind the chunks."""
        count = (self._num_chunks - 1) % SHARD_CHUNKS + 1
        index = np.full((SHARD_CHUNKS, 2), MISSING, "<u8")
        index[:count, 0] = np.arange(count) * self._stored_bytes
        index[:count, 1] = self._stored_bytes
        raw = index.tobytes()
        raw += crc32c_of(memoryview(raw)).to_bytes(CRC_BYTES, "little")
        write_all(self._descriptor, [memoryview(raw)], count * self._stored_bytes)
        self._digest.update(raw)
        self.digests[self._name((self._num_chunks - 1) // SHARD_CHUNKS)] = self._digest.hexdigest()
        self.close()


class TokenWriter:
    """Collects the steps of one unit and publishes them as one store; leaves nothing behind unless `publish` ran.

    Where codes are stored, the steps wait in float16 in a file until all are there, and are quantised when published: here, by
    threads, or by `quantise`, which takes steps [T, N, D] and the channels and gives the same codes and scales, and the errors;
    `sums` is `sum_channels` or gives the same.
    """

    def __init__(
        self,
        final: Path,
        *,
        num_tokens: int,
        width: int,
        dtype: str = "float16",
        quantise: Quantise | None = None,
        sums: Callable[[np.ndarray, np.ndarray], np.ndarray] = sum_channels,
    ) -> None:
        check_width(dtype, width)
        self.final = final
        self._num_tokens, self._width = num_tokens, width
        self._dtype, self._codec = dtype, get_codec(dtype)
        self._stack = ExitStack()
        self._num_staged = 0
        self._quantise_run, self._sums = quantise or self._quantise_by_threads, sums
        self._errors: list[np.ndarray] = []  # rows [3] of every step, as `append` takes them

    def __enter__(self) -> TokenWriter:
        remove_stale_temporaries(self.final.parent)
        self._folder = self._stack.enter_context(temporary_folder(self.final))
        self._pool = self._stack.enter_context(ThreadPoolExecutor(default_num_threads(), thread_name_prefix="shard"))
        array = layout.create_tokens_array(self._folder, self._num_tokens, self._width, self._dtype)
        self._tokens = ShardWriter(self._folder, array, self._pool)
        self._stack.callback(self._tokens.close)
        # Where codes are stored, float16 steps wait here, since channel statistics need all of them; never published.
        self._staging = None
        if self._codec.max_code is not None:
            self._staging = self._stack.enter_context((self._folder / STAGING_FILE).open("w+b"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def num_steps(self) -> int:
        """Steps appended so far."""
        return self._tokens.num_rows if self._staging is None else self._num_staged

    def append(self, tokens: np.ndarray, errors: np.ndarray | None = None) -> None:
        """Add steps [T, N, D] at the end: float16, or the bits of bfloat16 as uint16 where that is stored; finite.

        `errors` [T, 3] float64 are those of each step's cast, as `measure_error` gives them; None where nobody measured them.
        """
        expected = (self._num_tokens, self._width)
        if tokens.dtype != self._codec.given or tokens.shape[1:] != expected:
            raise ValueError(
                f"tokens must be {self._codec.given} [T, {expected[0]}, {expected[1]}]; got {tokens.dtype} {tokens.shape}"
            )
        if not is_finite(tokens):
            raise ValueError(
                f"tokens of steps {self.num_steps} to {self.num_steps + len(tokens)} hold non-finite values"
            )
        self._errors += [] if errors is None else list(errors)
        if self._staging is None:
            self._tokens.append(tokens)
        else:
            self._staging.write(np.ascontiguousarray(tokens).data)
            self._num_staged += len(tokens)

    def roll_back(self, num_steps: int) -> None:
        """Forget every step from `num_steps` on, for an episode that turned out to be unreadable half-way."""
        del self._errors[num_steps:]
        if self._staging is None:
            self._tokens.roll_back(num_steps)
        else:
            self._staging.truncate(num_steps * self._num_tokens * self._width * 2)
            self._staging.seek(0, os.SEEK_END)
            self._num_staged = num_steps

    def publish(
        self, steps: pa.Table, segments: pa.Table, metadata: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> bool:
        """Write the tables, check every chunk by reading it back, and rename the store to its final path.

        The metadata (recipe, skipped recordings) is part of the store's digest, the provenance (device, versions) is not.
        False when another writer had published the same store meanwhile.
        """
        import zarr

        if len(steps) != self.num_steps:
            raise ValueError(f"the step table has {len(steps)} rows, but {self.num_steps} steps were appended")
        num_steps, digests = self.num_steps, {}
        if self._staging is not None:
            digests = self._quantise(self._staging)
        self._tokens.finish()
        digests |= self._tokens.digests
        pq.write_table(steps, self._folder / layout.STEPS_FILE, write_page_checksum=True)
        pq.write_table(segments, self._folder / layout.SEGMENTS_FILE, write_page_checksum=True)
        with warnings.catch_warnings():
            # Consolidated metadata spares readers a listing, which would stumble over the Parquet files.
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")
            zarr.consolidate_metadata(str(self._folder), zarr_format=3)
        counted = {
            **metadata,
            "num_steps": num_steps,
            "steps_digest": digest_steps(steps, segments),
            "reconstruction": describe_errors(self._errors) if len(self._errors) == num_steps else None,
        }
        names = sorted(path.parent.name for path in self._folder.glob("*/zarr.json"))
        checksums = {name: list_checksums(self._folder, name) for name in names}
        layout.write_store_file(self._folder, self.final, counted, provenance, checksums, digests)
        for name in names:
            with ArrayReader(self._folder, name) as reader:
                check = self._pool.map if reader.num_bytes > SIDE_BY_SIDE_BYTES * SHARD_CHUNKS else map
                for _ in check(reader.check_chunk, range(reader.num_chunks)):
                    pass
        return publish_folder(self._folder, self.final)

    def _iter_staged(self, staging: BinaryIO) -> Iterator[np.ndarray]:
        """Runs [T, N, D] of the staged steps, in a buffer that the next run overwrites."""
        run = np.empty((STAGED_STEPS, self._num_tokens, self._width), self._codec.given)
        staging.seek(0)
        for start in range(0, self._num_staged, STAGED_STEPS):
            part = run[: self._num_staged - start]
            if staging.readinto(memoryview(part).cast("B")) != part.nbytes:
                raise OSError(f"{staging.name} was cut short while it was read")
            yield part

    def _quantise(self, staging: BinaryIO) -> dict[str, str]:
        """Turn the staged steps into codes and scales, in two passes over them: channel statistics, then codes.

        Gives the sha256 of the scales' shards, as `ShardWriter.digests` does.
        """
        channels = measure_channels(self._iter_staged(staging), self._width, self._sums)
        array = layout.create_token_scales(self._folder, self._num_tokens, self._width, self._dtype)
        token_scales = ShardWriter(self._folder, array, self._pool)
        self._stack.callback(token_scales.close)

        self._errors = []
        for run in self._iter_staged(staging):
            codes, scales, errors = self._quantise_run(run, channels)
            self._tokens.append(codes)
            token_scales.append(scales)
            self._errors += list(errors)
        staging.close()
        (self._folder / STAGING_FILE).unlink()
        token_scales.finish()
        layout.write_channels(self._folder, channels)
        return token_scales.digests

    def _quantise_by_threads(self, run: np.ndarray, channels: Channels) -> tuple[np.ndarray, ...]:
        def quantise(step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            codes, scales = encode(step, self._dtype, channels)
            return codes, scales, measure_error(decode(codes, self._dtype, scales, channels), step)

        return tuple(map(np.stack, zip(*self._pool.map(quantise, run), strict=True)))


def write_all(descriptor: int, pieces: list[memoryview], begin: int) -> None:
    """Write buffers one after the other from `begin` on; a disk that takes a part of them is given the rest."""
    while pieces:
        done = os.pwritev(descriptor, pieces, begin)
        begin += done
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = pieces[0][done:]


def measure_error(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Sum of squared errors, sum of squares of the truth and largest error of one step: [N, D] each to [3] float64."""
    truth = truth.astype(np.float32)
    error = values - truth
    largest = max(error.max(), -error.min())
    squared, squares = (np.square(a, out=a).sum(axis=0).sum(dtype=np.float64) for a in (error, truth))
    return np.array([squared, squares, largest])


def describe_errors(errors: Sequence[np.ndarray]) -> dict[str, float]:
    """Error relative to the values, both as root mean squares, and the largest error, of all steps.

    Three digits, so that the order in which a device adds up cannot change a store's digest.
    """
    squared, squares = (math.fsum(float(row[column]) for row in errors) for column in (0, 1))
    relative = math.sqrt(squared / squares) if squares else 0.0
    largest = max((float(row[2]) for row in errors), default=0.0)
    return {"max_abs": float(f"{largest:.3g}"), "relative_rmse": float(f"{relative:.3g}")}


def digest_steps(steps: pa.Table, segments: pa.Table) -> str:
    """Hash of what actions depend on: the ticks [n] of the steps, and episode, start and stop of each segment."""
    runs = segments.select(["episode", "start", "stop"]).to_pylist()
    return hashlib.sha256(canonical_json({"segments": runs, "ticks": steps.column("tick").to_pylist()})).hexdigest()


def table(schema: pa.Schema, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.Table:
    """An Arrow table of exactly this schema."""
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
