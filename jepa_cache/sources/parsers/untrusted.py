"""Files of strangers: JSON, numeric Parquet columns and HDF5 arrays; no code is run, no link is followed, sizes have one cap."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError

from jepa_cache.episode import RecordingError
from jepa_cache.media.remote import BucketFile
from jepa_cache.media.tar import describe_stand_in

MAX_LINE_BYTES = 1 << 20
"""Of JSON, one line: real ones have up to 1.2 kB. Parsed, JSON can take 30 times its bytes."""

BATCH_ROWS = 4096
MAX_VALUES = 1 << 26
"""Numbers that a column of a row group of Parquet, or an array of HDF5, may announce: packed, equal numbers take next to nothing, so
file sizes bound nothing. The files that LeRobot writes (100 MB) hold up to 25 million."""

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class RecordsError(RecordingError):
    """A file of records that cannot be used; the message names it."""


def read_object(path: Path | BucketFile, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object; a RecordsError as of `parse_object`, or where the file is missing."""
    with _open(path) as file:
        # A read allocates what is requested, however small the file is.
        return parse_object(file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1), path.name, max_bytes)


def iter_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jsonl file line by line, without the empty lines; a RecordsError as of `parse_object`."""
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if line.strip():
                yield parse_object(line, f"line {number} of {path.name}")


def parse_object(data: bytes, where: str, max_bytes: int = MAX_LINE_BYTES) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        RecordsError: It is above `max_bytes`, no JSON, or no object; the message begins with `where`.
    """
    if len(data) > max_bytes:
        raise RecordsError(f"{where} is longer than {max_bytes} bytes")
    try:
        value = orjson.loads(data)  # A third of the time: VPT lines are read by the hundred thousand.
    except orjson.JSONDecodeError:
        try:  # Python's own parser takes more than the standard: NaN, lone surrogates, and numbers of any size.
            value = json.loads(data)
        except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError; depth without end a RecursionError.
            raise RecordsError(f"{where} is no JSON: {describe_stand_in(data) or error}") from error
    if not isinstance(value, dict):
        raise RecordsError(f"{where} must hold a JSON object; got {repr(value)[:60]}")
    return value


def check_fields(model: type[AnyModel], fields: Mapping[str, Any], where: str, hint: str = "") -> AnyModel:
    """What a pydantic model reads of an object; a RecordsError names the first wrong field, its value and the rule."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        name, value = ".".join(map(str, wrong["loc"])), repr(wrong["input"])[:120]
        raise RecordsError(f"{where}: {name}: {wrong['msg']}; got {value}{hint}") from error


@contextlib.contextmanager
def _open(path: Path | BucketFile) -> Iterator[BinaryIO]:
    """Open a plain file; to open a pipe in its place would wait for ever."""
    try:
        if not path.is_file():
            raise RecordsError(f"{path} is no plain file, or is not there")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise RecordsError(f"{path} cannot be read: {error.strerror or error}") from error


def iter_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of at most 4096 rows of a Parquet file: column name to [n, W] float64, W = 1 for plain numbers.

    Raises:
        RecordsError: No Parquet file, a column that is missing (the names at hand are listed), not numeric, has nulls,
            lists of several lengths, or more than MAX_VALUES numbers in a row group.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                raise RecordsError(f"{path.name} has no column {missing[0]!r}; it has {', '.join(names)}")
            for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
                for chunk in map(group.column, range(group.num_columns)):
                    if chunk.num_values > MAX_VALUES:
                        raise RecordsError(
                            f"{path.name}: {chunk.path_in_schema} holds {chunk.num_values} numbers in one row group"
                        )
            widths: dict[str, int] = {}
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False):
                # Columns come in the order of the file; names with dots are not looked up as paths here.
                arrays = {name: _to_array(batch.column(name), f"{path.name}: {name}") for name in columns}
                for name, array in arrays.items():
                    if widths.setdefault(name, array.shape[1]) != array.shape[1]:
                        raise RecordsError(f"{path.name}: {name} must hold lists of one length")
                yield arrays
    except RecordsError:
        raise
    except (pa.ArrowException, OSError, OverflowError, ValueError) as error:  # ValueError: names that are no UTF-8.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecordsError(f"{path.name} cannot be read as parquet: {reason[:200]}") from error


def _to_array(column: Any, where: str) -> np.ndarray:
    import pyarrow as pa

    kinds, num_rows, width, num_empty = pa.types, len(column), 1, column.null_count
    if kinds.is_list(column.type) or kinds.is_large_list(column.type) or kinds.is_fixed_size_list(column.type):
        lengths = np.unique(column.drop_null().value_lengths()) if num_rows else np.array([1])
        if len(lengths) != 1 or lengths[0] == 0:
            raise RecordsError(f"{where} must hold lists of one length above 0; got lengths {lengths.tolist()[:5]}")
        column, width = column.flatten(), int(lengths[0])
    if num_empty or column.null_count:
        raise RecordsError(f"{where} has empty cells")
    if not (kinds.is_integer(column.type) or kinds.is_floating(column.type) or kinds.is_boolean(column.type)):
        raise RecordsError(f"{where} must hold numbers; it holds {str(column.type)[:60]}")
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64).reshape(num_rows, width)


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open an HDF5 file for `read_array`; a RecordsError where it is missing or no HDF5 file."""
    import h5py

    try:
        # Without locks: data folders are often mounted read-only, where HDF5's locks fail.
        file = h5py.File(path, "r", locking=False)
    except Exception as error:
        raise RecordsError(f"{path.name} cannot be opened as HDF5: {error}") from error
    with file:
        yield file


def read_array(file: Any, name: str, width: int) -> np.ndarray | None:
    """Read the numeric array at a path of an HDF5 file that `open_hdf5` opened: [M, width] float64, from [M] where width is 1.

    None where the file has nothing of this name.

    Raises:
        RecordsError: It is no numeric array of this width, its data lie outside the file, it is too large, or cannot be
            read.
    """
    import h5py

    where = f"{name} in {Path(file.filename).name}"
    try:
        node = file
        for part in name.split("/"):  # Looking a path up at once would open the file that an external link names.
            if not isinstance(node, h5py.Group) or not node.id.links.exists(part.encode()):
                return None
            if node.get(part, getclass=True, getlink=True) is not h5py.HardLink:
                raise RecordsError(f"{where} is a soft or external link, which is not followed: store the array itself")
            node = node[part]
        if not isinstance(node, h5py.Dataset) or node.dtype.kind not in "fiub":
            raise RecordsError(f"{where} is no numeric array")
        if node.is_virtual or node.external:
            raise RecordsError(f"the data of {where} lie outside the file; only data within it are read")
        if node.ndim < 1 or node.shape[1:] not in ([(width,)] if width > 1 else [(), (1,)]):
            raise RecordsError(f"{where} must be [M, {width}]; got {node.shape}")
        if (num_values := max(node.size, math.prod(node.chunks or ()))) > MAX_VALUES:  # a chunk is unpacked as a whole
            raise RecordsError(f"{where} announces {num_values} numbers at once; at most {MAX_VALUES} are read")
        return np.asarray(node[...], np.float64).reshape(len(node), width)
    except RecordsError:
        raise
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError and others for damaged files.
        raise RecordsError(f"{where} cannot be read: {error}") from error
