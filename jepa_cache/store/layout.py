"""Names, shapes and codecs of a token store: Zarr v3 that zarr-python, xarray, dask and tensorstore read without our code.

`tokens` [n, N, D] float16, dimensions step, token, channel; inner chunks of 8 steps in shards of 512, bytes + crc32c, no
compressor, fill value NaN. Beside it, in the same group, `steps.parquet`, `segments.parquet` and `store.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    import zarr

FORMAT_VERSION = 1
CHUNK_STEPS = 8
SHARD_STEPS = 512
TOKENS = "tokens"
STEPS_FILE = "steps.parquet"
SEGMENTS_FILE = "segments.parquet"
STORE_FILE = "store.json"

# One row per step (row of `tokens`). What stage-two filters need, so that they never touch the video again.
STEPS_SCHEMA = pa.schema(
    [
        pa.field("segment", pa.int32()),
        pa.field("frame", pa.int64()),  # index in the video of the step's anchor frame
        pa.field("tick", pa.int64()),  # row of the episode's controls at the anchor
        pa.field("gui", pa.bool_()),  # a screen was open at the anchor
        pa.field(
            "idle", pa.float32()
        ),  # share of the ticks from this anchor to the next without any control; NaN at the end
        pa.field("luma_mean", pa.float32()),  # of the anchor frame, 0 to 255
        pa.field("luma_std", pa.float32()),
    ]
)

# One row per segment: a contiguous run of steps [start, stop) from which windows may be drawn.
SEGMENTS_SCHEMA = pa.schema(
    [
        pa.field("segment", pa.int32()),
        pa.field("episode", pa.string()),
        pa.field("start", pa.int64()),
        pa.field("stop", pa.int64()),
        pa.field("step_hz", pa.float64()),
    ]
)


def shard_path(store: Path, shard: int) -> Path:
    """File of zarr shard number `shard` of the tokens array (Zarr's default chunk key encoding)."""
    return store / TOKENS / "c" / str(shard) / "0" / "0"


def create_tokens_array(store: Path, num_tokens: int, width: int) -> zarr.Array:
    """An empty tokens array in a new group at `store`; it grows by resizing."""
    import numpy as np
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    group = zarr.create_group(store, zarr_format=3, overwrite=False)
    return group.create_array(
        TOKENS,
        shape=(0, num_tokens, width),
        chunks=(CHUNK_STEPS, num_tokens, width),
        shards=(SHARD_STEPS, num_tokens, width),
        dtype="float16",
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=np.nan,
        dimension_names=("step", "token", "channel"),
    )
