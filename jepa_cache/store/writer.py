"""Writes one token store in private and publishes it in one atomic step."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jepa_cache.config.paths import default_num_threads
from jepa_cache.files import publish_folder, remove_stale_temporaries, temporary_folder
from jepa_cache.store import layout
from jepa_cache.store.quantisation import check_width, decode, encode, get_codec, is_finite, measure_channels
from jepa_cache.store.reader import ArrayReader, list_checksums
from jepa_cache.store.recipe import canonical_json

STAGING_FILE = "staging.float16"


class TokenWriter:
    """Collects the steps of one unit and publishes them as one store; leaves nothing behind unless `publish` ran.

    Whole zarr shards are written at once: writing one in pieces costs about eight times as much. Where codes are stored,
    the steps wait in float16 until all are there, and are quantised shard by shard when published.
    """

    def __init__(self, final: Path, *, num_tokens: int, width: int, dtype: str = "float16") -> None:
        check_width(dtype, width)
        self.final = final
        self._num_tokens, self._width = num_tokens, width
        self._dtype, self._codec = dtype, get_codec(dtype)
        self._stack = ExitStack()
        self._pending = np.empty((layout.SHARD_STEPS, num_tokens, width), self._codec.given)
        self._num_pending = 0
        self._num_shards = 0
        self._errors: list[np.ndarray] = []  # rows [3] of every step, as `append` takes them

    def __enter__(self) -> TokenWriter:
        remove_stale_temporaries(self.final.parent)
        self._folder = self._stack.enter_context(temporary_folder(self.final))
        self._array = layout.create_tokens_array(self._folder, self._num_tokens, self._width, self._dtype)
        # Where codes are stored, float16 steps wait here, since channel statistics need all of them; never published.
        self._staging = self._folder / STAGING_FILE if self._codec.max_code is not None else None
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def num_steps(self) -> int:
        """Steps appended so far."""
        return self._num_shards * layout.SHARD_STEPS + self._num_pending

    def append(self, tokens: np.ndarray, errors: np.ndarray | None = None) -> None:
        """Add steps [T, N, D] at the end: float16, or the bits of bfloat16 as uint16 where that is stored; finite.

        `errors` [T, 3] float64 are those of each step's cast, as `measure_error` gives them; None where nobody measured them.
        """
        expected = (self._num_tokens, self._width)
        if tokens.dtype != self._pending.dtype or tokens.shape[1:] != expected:
            raise ValueError(
                f"tokens must be {self._pending.dtype} [T, {expected[0]}, {expected[1]}]; got {tokens.dtype} {tokens.shape}"
            )
        if not is_finite(tokens):
            raise ValueError(
                f"tokens of steps {self.num_steps} to {self.num_steps + len(tokens)} hold non-finite values"
            )
        self._errors += [] if errors is None else list(errors)
        while len(tokens):
            part = tokens[: layout.SHARD_STEPS - self._num_pending]
            self._pending[self._num_pending : self._num_pending + len(part)] = part
            self._num_pending += len(part)
            tokens = tokens[len(part) :]
            if self._num_pending == layout.SHARD_STEPS:
                self._write_shard()

    def roll_back(self, num_steps: int) -> None:
        """Forget every step from `num_steps` on, for an episode that turned out to be unreadable half-way."""
        shard, rest = divmod(num_steps, layout.SHARD_STEPS)
        del self._errors[num_steps:]
        if shard < self._num_shards:
            self._num_shards = shard
            if self._staging is not None:
                self._read_staged(self._staging, shard)
                os.truncate(self._staging, shard * self._pending.nbytes)
            else:
                self._pending[:rest] = self._array[shard * layout.SHARD_STEPS : num_steps]
                self._resize(shard * layout.SHARD_STEPS)
        self._num_pending = rest

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
        num_steps = self.num_steps
        if self._num_pending:
            self._write_shard()
        self._resize(num_steps)
        if self._staging is not None:
            self._quantise(self._staging, num_steps)
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
        layout.write_store_file(self._folder, self.final, counted, provenance, checksums)
        for name in names:
            with ArrayReader(self._folder, name) as reader:
                for chunk in range(reader.num_chunks):
                    reader.check_chunk(chunk)
        return publish_folder(self._folder, self.final)

    def _write_shard(self) -> None:
        start = self._num_shards * layout.SHARD_STEPS
        tokens = self._pending[: self._num_pending]
        if self._staging is not None:
            with self._staging.open("ab") as file:
                file.write(tokens.data)
        else:
            self._resize(start + self._num_pending)
            self._array[start : start + self._num_pending] = tokens
        self._num_shards += 1
        self._num_pending = 0

    def _resize(self, num_steps: int) -> None:
        self._array.resize((num_steps, *self._array.shape[1:]))

    def _read_staged(self, staging: Path, shard: int) -> np.ndarray:
        """The steps of one shard, in the head of the buffer of all shards."""
        with staging.open("rb") as file:
            file.seek(shard * self._pending.nbytes)
            num_bytes = file.readinto(memoryview(self._pending).cast("B"))
        return self._pending[: num_bytes // self._pending[0].nbytes]

    def _quantise(self, staging: Path, num_steps: int) -> None:
        """Turn the staged steps into codes and scales, in two passes over them: channel statistics, then codes."""
        steps, shards = self._pending, range(self._num_shards)
        channels = measure_channels((self._read_staged(staging, shard) for shard in shards), self._width)
        token_scales = layout.create_token_scales(self._folder, num_steps, *steps.shape[1:], self._dtype)
        codes = np.empty((len(steps), *self._array.shape[1:]), self._array.dtype)
        scales = np.empty((len(steps), *token_scales.shape[1:]), token_scales.dtype)

        def quantise(row: int) -> np.ndarray:
            codes[row], scales[row] = encode(steps[row], self._dtype, channels)
            return measure_error(decode(codes[row], self._dtype, scales[row], channels), steps[row])

        self._errors = []
        with ThreadPoolExecutor(default_num_threads(), thread_name_prefix="quantise") as pool:
            for shard in shards:
                staged = self._read_staged(staging, shard)
                self._errors += pool.map(quantise, range(len(staged)))
                run = slice(shard * layout.SHARD_STEPS, shard * layout.SHARD_STEPS + len(staged))
                self._array[run], token_scales[run] = codes[: len(staged)], scales[: len(staged)]
        staging.unlink(missing_ok=True)  # there is none of a store without steps
        layout.write_channels(self._folder, channels)


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
