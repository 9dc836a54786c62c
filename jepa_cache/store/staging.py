"""float16 steps that wait on the disk until their store is complete: its channel statistics need all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Staging:
    """Whole zarr shards of steps as plain float16 files in a writer's private folder; nothing of it is ever published."""

    def __init__(self, folder: Path) -> None:
        """Make the folder."""
        self._folder = folder
        self._lengths: list[int] = []
        folder.mkdir()

    def append(self, steps: np.ndarray) -> None:
        """Add [T, N, D] float16 steps as the next shard."""
        self._path(len(self._lengths)).write_bytes(steps.data)
        self._lengths.append(len(steps))

    def read(self, shard: int, out: np.ndarray) -> np.ndarray:
        """The steps of one shard, in the head of the buffer `out` [T, N, D]."""
        steps = out[: self._lengths[shard]]
        with self._path(shard).open("rb", buffering=0) as file:
            got = file.readinto(steps.reshape(-1).view(np.uint8))
        assert got == steps.nbytes, f"{self._path(shard)} gave {got} of {steps.nbytes} bytes"
        return steps

    def iter_shards(self, out: np.ndarray) -> Iterator[np.ndarray]:
        """Every shard in turn, each in the same buffer `out`."""
        for shard in range(len(self._lengths)):
            yield self.read(shard, out)

    def truncate(self, num_shards: int) -> None:
        """Forget the shards from `num_shards` on."""
        del self._lengths[num_shards:]

    def close(self) -> None:
        """Remove the folder, with what truncation left in it."""
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard}.float16"
