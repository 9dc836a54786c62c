"""Files of strangers, read within bounds: JSON, numeric Parquet columns and HDF5 arrays; nothing is run, no link is followed.

Each form has one cap on what is parsed or unpacked at once, because a small file may announce, or unpack to, any size.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from jepa_cache.episode import RecordingError
from jepa_cache.media.tar import describe_stand_in

MAX_LINE_BYTES = 1 << 20
"""Of JSON, one line: real ones have up to 1.2 kB. Parsed, JSON can take 30 times its bytes."""

BATCH_ROWS = 4096
MAX_GROUP_VALUES = 1 << 26
"""Numbers in one column of one row group of Parquet. Encoded, equal numbers take next to nothing, so file sizes bound nothing; the
files that LeRobot writes (100 MB) hold up to 25 million."""

MAX_HDF5_VALUES = 8 << 20
"""Of one HDF5 array, or of one chunk, which is unpacked as a whole: 7 columns at 15 Hz for 18 hours."""


class RecordsError(RecordingError):
    """A file of records that cannot be used; the message names it."""


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        RecordsError: The file is missing, above `max_bytes`, no JSON, or no object.
    """
    with _open(path) as file:
        # A read allocates what is requested, however small the file is.
        data = file.read(min(os.fstat(file.fileno()).st_size, max_bytes) + 1)
    if len(data) > max_bytes:
        raise RecordsError(f"{path.name} has more than {max_bytes} bytes, the most that is read of such a file")
    return parse_object(data, path.name)


def iter_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Read a jsonl file line by line, without the empty lines.

    Raises:
        RecordsError: The file is missing, a line is above 1 MiB, or one is no JSON object.
    """
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield parse_object(line, f"line {number} of {path.name}", MAX_LINE_BYTES)


def parse_object(data: bytes, where: str, max_bytes: int | None = None) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        RecordsError: It is above `max_bytes`, no JSON, or no object; the message begins with `where`.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise RecordsError(f"{where} is longer than {max_bytes} bytes")
    try:
        value = orjson.loads(data)  # A third of the time: VPT lines are read by the hundred thousand.
    except orjson.JSONDecodeError:
        value = _parse_lenient(data, where)
    if not isinstance(value, dict):
        raise RecordsError(f"{where} must hold a JSON object; got {repr(value)[:60]}")
    return value


def _parse_lenient(data: bytes, where: str) -> Any:
    """What Python's own parser takes beyond the standard: NaN, lone surrogates, and numbers of any size."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # Bad UTF-8 is a ValueError; depth without end a RecursionError.
        raise RecordsError(f"{where} is no JSON: {describe_stand_in(data) or error}") from error


def read_rate(fields: Mapping[str, Any], name: str, where: str) -> float:
    """A field that holds a rate in Hz.

    Raises:
        RecordsError: It is no positive, finite number; one of 400 digits is none either.
    """
    value = fields.get(name)
    rate = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            rate = float(value)
    if not (math.isfinite(rate) and rate > 0):
        raise RecordsError(f"{where}: {name} must be a positive number, in Hz; got {repr(value)[:60]}")
    return rate


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a plain file; to open a pipe in its place would wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RecordsError(f"{path} is no plain file but a pipe, device or folder")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise RecordsError(f"{path} cannot be read: {error.strerror or error}") from error


def iter_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of at most 4096 rows of a Parquet file: column name to [n, W] float64, W = 1 for plain numbers.

    Other columns are not read. Lists must have one length within a column.

    Raises:
        RecordsError: No Parquet file, a column that is missing (the names at hand are listed), not numeric, has nulls, lists of
            several lengths, or more numbers in a row group than any controls hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            for column in columns:
                if column not in names:
                    raise RecordsError(f"{path.name} has no column {column!r}; it has {', '.join(names)}")
            _check_row_groups(file, path, columns)
            widths: dict[str, int] = {}
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False):
                # Columns come in the order of the file; names with dots are not looked up as paths here.
                arrays = {name: _to_array(batch.column(name), f"{path.name}: {name}") for name in columns}
                for name, array in arrays.items():
                    if widths.setdefault(name, array.shape[1]) != array.shape[1]:
                        raise RecordsError(
                            f"{path.name}: {name} has rows of {widths[name]} and of {array.shape[1]} numbers"
                        )
                yield arrays
    except RecordsError:
        raise
    except (pa.ArrowException, OSError, OverflowError, ValueError) as error:  # ValueError: names that are no UTF-8.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecordsError(f"{path.name} cannot be read as parquet: {reason[:200]}") from error


def _check_row_groups(file: Any, path: Path, columns: Sequence[str]) -> None:
    """Refuse a row group that announces more than any controls can hold, before it is unpacked."""
    for group in range(file.metadata.num_row_groups):
        row_group = file.metadata.row_group(group)
        for chunk in map(row_group.column, range(row_group.num_columns)):
            name = chunk.path_in_schema
            wanted = any(name == column or name.startswith(f"{column}.") for column in columns)
            if wanted and chunk.num_values > MAX_GROUP_VALUES:
                raise RecordsError(
                    f"{path.name}: {name} holds {chunk.num_values} numbers in one row group; at most {MAX_GROUP_VALUES} are read"
                )


def _to_array(column: Any, where: str) -> np.ndarray:
    import pyarrow as pa

    num_rows, width = len(column), 1
    if column.null_count:
        raise RecordsError(f"{where} has empty cells")
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = np.asarray(column.value_lengths()) if num_rows else np.array([0])
        width = int(lengths[0])
        if width == 0 or (lengths != width).any():
            raise RecordsError(
                f"{where} must hold lists of one length above 0; got {lengths.min()} to {lengths.max()} numbers"
            )
        column = column.flatten()
        if column.null_count:
            raise RecordsError(f"{where} has empty cells")
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise RecordsError(f"{where} must hold numbers; it holds {str(kind)[:60]}")
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64).reshape(num_rows, width)


class Hdf5File:
    """An HDF5 file opened for reading; a context manager. Follows hard links only, and returns copies."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            RecordsError: It is missing or no HDF5 file.
        """
        import h5py

        self._name = path.name
        # Walked already: opening a group takes longer than reading an episode's column.
        self._groups: dict[str, Any] = {}
        try:
            # Without locks: data folders are often mounted read-only, where HDF5's locks fail.
            self._file = h5py.File(path, "r", locking=False)
        except Exception as error:
            raise RecordsError(f"{path.name} cannot be opened as HDF5: {error}") from error

    def __enter__(self) -> Hdf5File:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._groups.clear()
        self._file.close()

    def read(self, name: str, width: int) -> np.ndarray | None:
        """Read one array.

        Args:
            name: Its path in the file.
            width: C, its columns; an array of shape [M] has one.

        Returns:
            [M, C] float64, or None where the file has nothing of this name.

        Raises:
            RecordsError: It is no numeric array of this width, its data lie outside the file, it is too large, or cannot be read.
        """
        import h5py

        try:
            dataset = self._find(name)
            if dataset is None:
                return None
            if not isinstance(dataset, h5py.Dataset):
                raise RecordsError(f"{name} in {self._name} is no array")
            self._check(dataset, name, width)
            return np.asarray(dataset[...], np.float64).reshape(len(dataset), width)
        except RecordsError:
            raise
        except Exception as error:  # h5py raises OSError, KeyError, RuntimeError and others for damaged files.
            raise RecordsError(f"{name} in {self._name} cannot be read: {error}") from error

    def _find(self, name: str) -> Any:
        """Walk to an object by hard links. Looking a path up at once would open the file that an external link names."""
        import h5py

        above, _, last = name.rpartition("/")
        if above and above not in self._groups:
            self._groups[above] = self._find(above)
        node = self._groups[above] if above else self._file
        if not isinstance(node, h5py.Group) or not node.id.links.exists(last.encode()):
            return None
        if node.id.links.get_info(last.encode()).type != h5py.h5l.TYPE_HARD:
            raise RecordsError(
                f"{name} in {self._name} is a soft or external link, which is not followed: it may lead to other files. "
                "Store the array itself (h5repack does not; copy it with h5py)"
            )
        return node[last]

    def _check(self, dataset: Any, name: str, width: int) -> None:
        if dataset.is_virtual or dataset.external:
            raise RecordsError(f"the data of {name} lie outside {self._name}; only data within the file are read")
        if dataset.dtype.kind not in "fiub":
            raise RecordsError(f"{name} in {self._name} must be numeric; got {dataset.dtype}")
        if dataset.ndim < 1 or dataset.shape[1:] not in ([(width,)] if width > 1 else [(), (1,)]):
            raise RecordsError(f"{name} in {self._name} must be [M, {width}]; got {dataset.shape}")
        num_values = max(math.prod(dataset.shape), math.prod(dataset.chunks or ()))
        if num_values > MAX_HDF5_VALUES:
            raise RecordsError(
                f"{name} in {self._name} states {num_values} numbers at once; at most {MAX_HDF5_VALUES} are read"
            )
