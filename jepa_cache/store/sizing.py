"""How many bytes and files a unit's stores take, before they are made.

Tokens, scales, checksums and indexes are exact: chunks are whole, so a shard that is partly filled takes whole chunks and a
whole index. What has no fixed size (JSON, Parquet) follows constants that were measured on the sample data set; they
matter for tiny tokens only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jepa_cache.store.layout import CHUNK_STEPS, SHARD_STEPS
from jepa_cache.store.quantisation import get_codec, scales_dtype, scales_shape

CRC_BYTES, INDEX_ENTRY_BYTES = 4, 16
GROUP_BYTES, ARRAY_BYTES = (
    640,
    1150,
)  # zarr.json of the group, and of each array; each array's also stands in the group's
STORE_FILE_BYTES = 1900  # store.json with its recipe
LISTED_FILE_BYTES = 135  # in store.json, for each file
LISTED_CHUNK_BYTES, LISTED_SHARD_BYTES, LISTED_ARRAY_BYTES = 8, 10, 22  # there too, for their checksums
STEPS_FILE_BYTES, STEP_ROW_BYTES = 1970, 12.8
SEGMENTS_FILE_BYTES, SEGMENT_ROW_BYTES = 1700, 56.0
ACTIONS_STORE_BYTES, ACTION_COLUMN_BYTES = 4350, 110
CONTROLS_FILE_BYTES, CONTROLS_EPISODE_BYTES, CONTROLS_TICK_BYTES = 4400, 6400, 19.5  # of VPT's 37 columns


class Size(NamedTuple):
    """Bytes and files."""

    num_bytes: int
    num_files: int


def measure_arrays(dtype: str, num_steps: int, num_tokens: int, width: int) -> list[Size]:
    """The shard files of each array of a token store: tokens, and where they are codes the scales of tokens and channels.

    Args:
        dtype: Stored dtype, a name in `quantisation.CODECS`.
        num_steps: n.
        num_tokens: N.
        width: D.
    """
    scheme = get_codec(dtype)
    row_bytes = num_tokens * (width // scheme.codes_per_item) * np.dtype(scheme.dtype).itemsize
    arrays = [_measure_array(num_steps, row_bytes, CHUNK_STEPS, SHARD_STEPS)]
    if scheme.max_code is not None:
        scales = math.prod(scales_shape(dtype, 1, num_tokens, width)) * scales_dtype(dtype).itemsize
        arrays.append(_measure_array(num_steps, scales, CHUNK_STEPS, SHARD_STEPS))
        arrays += [_measure_array(width, 4, width, width)] * 2
    return arrays


def measure_tokens(dtype: str, num_steps: int, num_segments: int, num_tokens: int, width: int) -> Size:
    """The token store of one unit, with its tables and metadata; `num_segments` are the rows of the segment table."""
    arrays = measure_arrays(dtype, num_steps, num_tokens, width)
    num_shards = sum(array.num_files for array in arrays)
    tables = STEPS_FILE_BYTES + STEP_ROW_BYTES * num_steps + SEGMENTS_FILE_BYTES + SEGMENT_ROW_BYTES * num_segments
    metadata = GROUP_BYTES + 2 * ARRAY_BYTES * len(arrays) + STORE_FILE_BYTES
    metadata += LISTED_FILE_BYTES * (num_shards + 3 + len(arrays)) + LISTED_ARRAY_BYTES * (len(arrays) + 1)
    metadata += LISTED_SHARD_BYTES * num_shards + LISTED_CHUNK_BYTES * -(-num_steps // CHUNK_STEPS) * min(
        len(arrays), 2
    )
    num_bytes = sum(array.num_bytes for array in arrays) + round(tables + metadata)
    return Size(num_bytes, num_shards + 4 + len(arrays))


def measure_actions(num_steps: int, num_columns: int) -> Size:
    """The actions and states of one unit, of so many columns together."""
    values = 4 * num_columns * num_steps + 2 * CRC_BYTES
    return Size(values + ACTIONS_STORE_BYTES + ACTION_COLUMN_BYTES * num_columns, 6)


def measure_controls(num_episodes: int, num_ticks: int) -> Size:
    """The controls of one unit, of so many native ticks."""
    return Size(round(CONTROLS_FILE_BYTES + CONTROLS_EPISODE_BYTES * num_episodes + CONTROLS_TICK_BYTES * num_ticks), 1)


def _measure_array(num_rows: int, row_bytes: int, chunk_rows: int, shard_rows: int) -> Size:
    """The shard files of an array: whole chunks with a checksum each, and a whole index with its own at the end."""
    num_chunks, num_shards = -(-num_rows // chunk_rows), -(-num_rows // shard_rows)
    index = shard_rows // chunk_rows * INDEX_ENTRY_BYTES + CRC_BYTES
    return Size(num_chunks * (chunk_rows * row_bytes + CRC_BYTES) + num_shards * index, num_shards)
