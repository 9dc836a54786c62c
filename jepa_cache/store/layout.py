"""Names, shapes and codecs of a token store: Zarr v3 that zarr-python, xarray, dask and tensorstore read without our code.

`tokens` [n, N, D], dimensions step, token, channel; inner chunks of 8 steps in shards of 512, bytes + crc32c, no
compressor. float16, or as `store.quantisation` says, then with `token_scales` [n, N], `channel_scales` [D] and `channel_means`
[D] beside it. In the same group lie `steps.parquet`, `segments.parquet` and `store.json`. docs/store_format.md tells
everything that another program needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from jepa_cache.store.quantisation import Channels, get_scheme, scales_dtype, scales_shape

if TYPE_CHECKING:
    import zarr

FORMAT_VERSION = 1
CHUNK_STEPS = 8
SHARD_STEPS = 512
TOKENS = "tokens"
TOKEN_SCALES = "token_scales"
CHANNEL_SCALES = "channel_scales"
CHANNEL_MEANS = "channel_means"
SCALE_ARRAYS = (TOKEN_SCALES, CHANNEL_SCALES, CHANNEL_MEANS)
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


def create_tokens_array(store: Path, num_tokens: int, width: int, dtype: str = "float16") -> zarr.Array:
    """An empty tokens array in a new group at `store`, stored as `quantisation` says; it grows by resizing."""
    import zarr

    scheme = get_scheme(dtype)
    zarr.create_group(store, zarr_format=3, overwrite=False)
    shape = (0, num_tokens, width // scheme.codes_per_item)
    last = "channel" if scheme.codes_per_item == 1 else "byte"
    attributes = {} if scheme.meaning is None else {"scheme": dtype, "meaning": scheme.meaning}
    return _create_array(store, TOKENS, shape, ("step", "token", last), scheme.dtype, scheme.fill_value, attributes)


def create_token_scales(store: Path, num_steps: int, num_tokens: int, width: int, dtype: str) -> zarr.Array:
    """The array of token scales beside the tokens."""
    shape = scales_shape(dtype, num_steps, num_tokens, width)
    dimensions = ("step", "token", "group")[: len(shape)]
    return _create_array(store, TOKEN_SCALES, shape, dimensions, scales_dtype(dtype).name, float("nan"))


def write_channels(store: Path, channels: Channels) -> None:
    """Write the channels' scales and means beside the tokens, each as one chunk of one shard."""
    for name, values in ((CHANNEL_SCALES, channels.scales), (CHANNEL_MEANS, channels.means)):
        rows = len(values)
        array = _create_array(
            store, name, values.shape, ("channel",), "float32", float("nan"), chunk_rows=rows, shard_rows=rows
        )
        array[...] = values


def _create_array(
    store: Path,
    name: str,
    shape: tuple[int, ...],
    dimensions: tuple[str, ...],
    dtype: str,
    fill_value: float,
    attributes: Mapping[str, str] | None = None,
    *,
    chunk_rows: int = CHUNK_STEPS,
    shard_rows: int = SHARD_STEPS,
) -> zarr.Array:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    return zarr.open_group(store, mode="r+").create_array(
        name,
        shape=shape,
        chunks=(chunk_rows, *shape[1:]),
        shards=(shard_rows, *shape[1:]),
        dtype=dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=fill_value,
        dimension_names=dimensions,
        attributes=dict(attributes or {}),
    )
