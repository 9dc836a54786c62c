"""Controls and the actions made of them, kept beside the tokens so that another action space never decodes a video."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from jepa_cache.files import atomic_file, publish_folder, temporary_folder
from jepa_cache.store.layout import (
    REMEDY,
    StoreDamagedError,
    StoreFile,
    changed_error,
    identity_of,
    read_content,
    read_store_file,
    write_store_file,
)

EPISODE_COLUMN = "episode"
ACTIONS = "actions"
STATES = "states"
IDENTITY_KEY = b"place"  # so that no other unit's file is taken for it
SHA256_KEY = b"file_sha256"  # of the whole file with these 64 digits as 0: of Parquet's own checksums none covers names
# How the thrift of a Parquet file's footer holds a text of 64 letters under that key.
SHA256_ENTRY = re.compile(SHA256_KEY + rb"\x18\x40([0-9a-f]{64})")


def publish_controls(final: Path, episodes: Iterable[tuple[str, Mapping[str, np.ndarray]]]) -> None:
    """Publish the controls of one unit as Parquet, one row group per episode, when `episodes` ends well.

    It gives (key, name to [M] array), the same names and dtypes for every episode of a source.
    """
    with atomic_file(final) as path:
        with ExitStack() as stack:
            writer = None
            for episode, controls in episodes:
                num_ticks = len(next(iter(controls.values())))
                columns = {EPISODE_COLUMN: [episode] * num_ticks, **controls}
                table = pa.table({name: pa.array(values) for name, values in columns.items()})
                writer = writer or stack.enter_context(
                    pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
                )
                writer.write_table(table, row_group_size=max(1, num_ticks))
            schema = pa.schema([pa.field(EPISODE_COLUMN, pa.string())])
            writer = writer or stack.enter_context(pq.ParquetWriter(path, schema))
            writer.add_key_value_metadata({IDENTITY_KEY: identity_of(final), SHA256_KEY: "0" * 64})
        _seal(path)


def iter_controls(path: Path, *, names_only: bool = False) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield (episode key, name to [M] array) for every episode of a unit, in the order they were written; `names_only` without arrays.

    StoreDamagedError where the file cannot be read, is another unit's, or a byte of it has changed.
    """
    try:
        raw = path.read_bytes()
        _check_seal(path, raw)
        with pq.ParquetFile(pa.BufferReader(raw), page_checksum_verification=True) as file:
            identity = (file.metadata.metadata or {}).get(IDENTITY_KEY, b"").decode()
            if identity != identity_of(path):
                raise StoreDamagedError(f"{path} holds the controls of {identity!r}, not its own; {REMEDY}")
            for group in range(file.num_row_groups):
                # In this thread: one of Arrow's that drops the bytes while Python ends (an error is on its way out) aborts it.
                table = file.read_row_group(group, [EPISODE_COLUMN] if names_only else None, use_threads=False)
                episode = table.column(EPISODE_COLUMN)[0].as_py()
                names = [name for name in table.column_names if name != EPISODE_COLUMN]
                controls = {name: table.column(name).to_numpy(zero_copy_only=False) for name in names}
                yield episode, controls
    except StoreDamagedError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:  # the last two: a damaged name of a column
        raise StoreDamagedError(f"{path} is missing or damaged ({error}); {REMEDY}") from error


def list_episodes(path: Path) -> list[str] | None:
    """The episodes of a controls file, in the order they were written; None where it is not there or damaged, which is named. Cost: reads it."""
    try:
        return [episode for episode, _ in iter_controls(path, names_only=True)] if path.is_file() else None
    except StoreDamagedError as error:
        print(f"damaged, reading the controls from the recordings again: {error}")
        return None


def _seal(path: Path) -> None:
    """Put the sha256 of a finished file into it, in place of the zeros that it was computed with."""
    raw = path.read_bytes()
    start = list(SHA256_ENTRY.finditer(raw))[-1].start(1)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(hashlib.sha256(raw).hexdigest().encode())


def _check_seal(path: Path, raw: bytes) -> None:
    """Raise StoreDamagedError unless a file has its own sha256 in it."""
    found = list(SHA256_ENTRY.finditer(raw))
    start, stop = found[-1].span(1) if found else (0, 0)
    if hashlib.sha256(raw[:start] + b"0" * (stop - start) + raw[stop:]).hexdigest().encode() != raw[start:stop]:
        raise changed_error(path)


def write_actions(final: Path, actions: np.ndarray, states: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Publish the actions [n, A] and states [n, S] of one unit, float32, as a small Zarr group.

    Row i of the actions leads from step i to i+1; the last row of each segment is NaN.
    """
    import zarr
    from zarr.codecs import Crc32cCodec

    with temporary_folder(final) as folder:
        group = zarr.create_group(folder, zarr_format=3)
        for name, values, channel in ((ACTIONS, actions, "action"), (STATES, states, "state")):
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=(max(1, len(values)), values.shape[1]),
                dtype="float32",
                compressors=[Crc32cCodec()],
                fill_value=np.nan,
                dimension_names=("step", channel),
            )
            array[...] = values
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            zarr.consolidate_metadata(str(folder), zarr_format=3)
        write_store_file(folder, final, metadata, {})
        publish_folder(folder, final)


def read_actions(store: Path) -> tuple[np.ndarray, np.ndarray]:
    """The whole actions [n, A] and states [n, S] of one unit, float32; ValueError where the store is missing or damaged.

    Cost: a fifth of a millisecond of a small store, where opening it with Zarr takes six: a data set may be ten thousand of them.
    """
    try:
        stated = read_store_file(store)
        return _read_chunk(store, ACTIONS, stated), _read_chunk(store, STATES, stated)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"the actions store {store} is missing or damaged ({error}); {REMEDY}") from error


def _read_chunk(store: Path, name: str, stated: StoreFile) -> np.ndarray:
    """An array as `write_actions` makes it: float32 in one chunk with its crc32c, which Zarr leaves out where all is NaN."""
    described, values = f"{name}/zarr.json", f"{name}/c/0/0"
    layout = orjson.loads(read_content(f"{store}/{described}", stated.files[described].sha256))
    shape, chunk = tuple(layout["shape"]), layout["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = [codec["name"] for codec in layout["codecs"]]
    if layout["data_type"] != "float32" or codecs != ["bytes", "crc32c"] or shape[0] > chunk[0] or shape[1] != chunk[1]:
        raise ValueError(f"{described} describes another array than this program writes")
    if values not in stated.files:
        return np.full(shape, np.nan, np.float32)
    raw = read_content(f"{store}/{values}", stated.files[values].sha256)
    return np.frombuffer(raw, "<f4", math.prod(chunk)).reshape(chunk)[: shape[0]].copy()
