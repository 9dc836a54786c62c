"""Writes one token store in private and publishes it in one atomic step."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jepa_cache.store import layout
from jepa_cache.store.recipe import canonical_json
from jepa_cache.store.root import publish_folder, remove_stale_temporaries, temporary_folder
from jepa_cache.store.verify import write_store_file


class TokenWriter:
    """Collects the steps of one unit and publishes them as one store; leaves nothing behind unless `publish` ran.

    Whole zarr shards are written at once: writing one in pieces costs about eight times as much.
    """

    def __init__(self, final: Path, *, num_tokens: int, width: int) -> None:
        self.final = final
        self._num_tokens, self._width = num_tokens, width
        self._stack = ExitStack()
        self._pending = np.empty((layout.SHARD_STEPS, num_tokens, width), np.float16)
        self._num_pending = 0
        self._num_shards = 0

    def __enter__(self) -> TokenWriter:
        remove_stale_temporaries(self.final.parent)
        self._folder = self._stack.enter_context(temporary_folder(self.final))
        self._array = layout.create_tokens_array(self._folder, self._num_tokens, self._width)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_steps(self) -> int:
        """Steps appended so far."""
        return self._num_shards * layout.SHARD_STEPS + self._num_pending

    def append(self, tokens: np.ndarray) -> None:
        """Add steps at the end.

        Args:
            tokens: [T, N, D] float16, finite.

        Raises:
            ValueError: When the shape or dtype is another, or a value is not finite.
        """
        expected = (self._num_tokens, self._width)
        if tokens.dtype != np.float16 or tokens.shape[1:] != expected:
            raise ValueError(
                f"tokens must be float16 [T, {expected[0]}, {expected[1]}]; got {tokens.dtype} {tokens.shape}"
            )
        if not np.isfinite(tokens).all():
            raise ValueError(
                f"tokens of steps {self.num_steps} to {self.num_steps + len(tokens)} hold non-finite values"
            )
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
        if shard < self._num_shards:
            self._pending[:rest] = self._array[shard * layout.SHARD_STEPS : num_steps]
            self._num_shards = shard
            self._array.resize((shard * layout.SHARD_STEPS, self._num_tokens, self._width))
        self._num_pending = rest

    def publish(
        self, steps: pa.Table, segments: pa.Table, card: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> bool:
        """Write the tables, check every file by reading it back, and rename the store to its final place.

        Args:
            steps: One row per step, `layout.STEPS_SCHEMA`.
            segments: `layout.SEGMENTS_SCHEMA`.
            card: What decides or describes the content (recipe, skipped recordings); part of the store's digest.
            provenance: What was there when it was made (device, versions, decoders); recorded, not part of the digest.

        Returns:
            False when another writer had published the same store meanwhile.
        """
        import zarr

        if len(steps) != self.num_steps:
            raise ValueError(f"the step table has {len(steps)} rows, but {self.num_steps} steps were appended")
        num_steps = self.num_steps
        if self._num_pending:
            self._write_shard()
        self._array.resize((num_steps, self._num_tokens, self._width))
        pq.write_table(steps, self._folder / layout.STEPS_FILE, write_page_checksum=True)
        pq.write_table(segments, self._folder / layout.SEGMENTS_FILE, write_page_checksum=True)
        with warnings.catch_warnings():
            # Consolidated metadata spares readers a listing, which would stumble over the Parquet files.
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            warnings.filterwarnings("ignore", message="Object at .* is not recognized")
            zarr.consolidate_metadata(str(self._folder), zarr_format=3)
        counted = {**card, "num_steps": num_steps, "steps_digest": digest_steps(steps, segments)}
        write_store_file(self._folder, counted, provenance)
        check_shards(self._folder, num_steps)
        return publish_folder(self._folder, self.final)

    def _write_shard(self) -> None:
        start = self._num_shards * layout.SHARD_STEPS
        self._array.resize((start + self._num_pending, self._num_tokens, self._width))
        self._array[start : start + self._num_pending] = self._pending[: self._num_pending]
        self._num_shards += 1
        self._num_pending = 0


def check_shards(store: Path, num_steps: int) -> None:
    """Read every chunk of a store back and check its crc32c.

    Raises:
        StoreDamagedError: Naming the shard and chunk.
    """
    from jepa_cache.store.reader import TokenReader

    with TokenReader(store) as reader:
        for chunk in range(-(-num_steps // layout.CHUNK_STEPS)):
            reader.check_chunk(chunk)


def digest_steps(steps: pa.Table, segments: pa.Table) -> str:
    """Hash of what actions depend on: the ticks [n] of the steps, and episode, start and stop of each segment."""
    runs = segments.select(["episode", "start", "stop"]).to_pylist()
    return hashlib.sha256(canonical_json({"segments": runs, "ticks": steps.column("tick").to_pylist()})).hexdigest()


def table(schema: pa.Schema, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> pa.Table:
    """An Arrow table of exactly this schema."""
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)
