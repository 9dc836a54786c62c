"""How fast stage one was on this machine, kept in the state folder for `jepa-cache plan`; never under the cache root."""

from __future__ import annotations

import platform
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jepa_cache.config.machine import state_folder
from jepa_cache.config.schema import Config

if TYPE_CHECKING:
    from jepa_cache.encoding.pipeline import Timing

LONG_S = 10.0  # a shorter run says little, so it never takes the place of a longer one
COLUMNS = "node, encoder, device, compute_dtype, resolution, mode"


class Rate(NamedTuple):
    """Frames per second of one run of stage one, with what it was measured on."""

    encoder: str
    device: str
    compute_dtype: str
    resolution: int
    mode: str
    num_frames: int
    elapsed_s: float
    limit: str  # what the others waited for

    @property
    def frames_per_s(self) -> float:
        """Sampled frames per second, decoding and writing included."""
        return self.num_frames / self.elapsed_s


def record_rate(config: Config, timing: Timing | None) -> None:
    """Remember how fast a run in this process was; nothing where nothing was encoded."""
    if timing is None or timing.num_frames == 0 or timing.elapsed_s <= 0:
        return
    encoder, encode = config.encoder, config.encode
    key = (
        platform.node(),
        encoder.name,
        _name_device(encode.device),
        encode.compute_dtype,
        encoder.resolution,
        encode.mode,
    )
    with closing(_connect()) as connection, connection:
        row = connection.execute(f"SELECT elapsed_s FROM rates WHERE ({COLUMNS}) = (?, ?, ?, ?, ?, ?)", key).fetchone()
        if row is None or timing.elapsed_s >= min(LONG_S, row[0]):
            values = (*key, timing.num_frames, timing.elapsed_s, timing.limit)
            connection.execute("INSERT OR REPLACE INTO rates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


def find_rate(config: Config) -> Rate | None:
    """The rate that was measured on this machine for these settings; of several devices the fastest, unless one is named."""
    encoder, encode = config.encoder, config.encode
    with closing(_connect()) as connection:
        rows = connection.execute(
            "SELECT encoder, device, compute_dtype, resolution, mode, num_frames, elapsed_s, bound FROM rates "
            "WHERE (node, encoder, compute_dtype, resolution, mode) = (?, ?, ?, ?, ?)",
            (platform.node(), encoder.name, encode.compute_dtype, encoder.resolution, encode.mode),
        ).fetchall()
    rates = [Rate(*row) for row in rows]
    if encode.device != "auto":
        rates = [rate for rate in rates if (rate.device == "cpu") == (encode.device == "cpu")]
    return max(rates, key=lambda rate: rate.frames_per_s, default=None)


def _name_device(wanted: str) -> str:
    import torch

    from jepa_cache.encoding.filling import resolve_device

    device = resolve_device(wanted)
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def _connect() -> sqlite3.Connection:
    path: Path = state_folder() / "rates.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=60)
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS rates ({COLUMNS}, num_frames INTEGER, elapsed_s REAL, bound TEXT, PRIMARY KEY ({COLUMNS}))"
    )
    return connection
