"""Numeric columns of parquet files of strangers, a batch of rows at a time, within bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH_ROWS = 4096
MAX_BATCH_BYTES = 256 << 20
"""4096 rows of 8192 float64; a robot has some dozens."""

MAX_WIDTH = 4096
MAX_GROUP_VALUES = 1 << 28
"""Numbers in one column of one row group. Encoded, equal numbers take next to nothing, so file sizes bound nothing; the files
that LeRobot writes (100 MB) hold up to 25 million."""


class ParquetError(ValueError):
    """A parquet file that cannot be used; the message names file and column."""


def iter_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of at most 4096 rows: column name to [n, W] float64, W = 1 for plain numbers.

    Other columns are not read. Lists must have one length within a column.

    Raises:
        ParquetError: No parquet file, a column that is missing (the names at hand are listed), not numeric, has nulls, lists
            of several lengths or wider than 4096, or a batch above 256 MiB.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            for column in columns:
                if column not in names:
                    raise ParquetError(f"{path.name} has no column {column!r}; it has {', '.join(names)}")
            _check_row_groups(file, path, columns)
            widths: dict[str, int] = {}
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns), use_threads=False):
                if batch.nbytes > MAX_BATCH_BYTES:
                    raise ParquetError(
                        f"{path.name} has {batch.nbytes} bytes in {len(batch)} rows; too much to be controls"
                    )
                # Columns come in the order of the file; names with dots are not looked up as paths here.
                arrays = {name: _to_array(batch.column(name), f"{path.name}: {name}") for name in columns}
                for name, array in arrays.items():
                    if widths.setdefault(name, array.shape[1]) != array.shape[1]:
                        raise ParquetError(
                            f"{path.name}: {name} has rows of {widths[name]} and of {array.shape[1]} numbers"
                        )
                yield arrays
    except ParquetError:
        raise
    except (pa.ArrowException, OSError, OverflowError, ValueError) as error:  # ValueError: names that are no UTF-8.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ParquetError(f"{path.name} cannot be read as parquet: {reason[:200]}") from error


def _check_row_groups(file: Any, path: Path, columns: Sequence[str]) -> None:
    """Refuse a row group that announces more than any controls can hold, before it is unpacked."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            wanted = any(
                chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns
            )
            if wanted and chunk.num_values > MAX_GROUP_VALUES:
                raise ParquetError(
                    f"{path.name}: {chunk.path_in_schema} holds {chunk.num_values} numbers in one row group; at most "
                    f"{MAX_GROUP_VALUES} are read"
                )


def _to_array(column: Any, where: str) -> np.ndarray:
    import pyarrow as pa

    kind = column.type
    num_rows = len(column)
    if column.null_count:
        raise ParquetError(f"{where} has empty cells")
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = np.asarray(column.value_lengths()) if num_rows else np.array([0])
        width = int(lengths[0])
        if not (lengths == width).all() or not 0 < width <= MAX_WIDTH:
            raise ParquetError(
                f"{where} must hold lists of one length up to {MAX_WIDTH}; got {lengths.min()} to {lengths.max()}"
            )
        column = column.flatten()
        kind = column.type
        if column.null_count:
            raise ParquetError(f"{where} has empty cells")
    else:
        width = 1
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ParquetError(f"{where} must hold numbers; it holds {str(kind)[:60]}")
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64).reshape(num_rows, width)
