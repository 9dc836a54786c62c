"""What a compressed predictor is trained on: the steps of a data set as latents, compressed once into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import Window, WindowIndex
from jepa_cache.predictor.compressed import Compressor
from jepa_cache.predictor.rollout import as_reps
from jepa_cache.store.quantisation import Codec

FIT_STEPS = 8192  # steps that the components are fitted to, evenly spread over all; 64 components need no more
FIT_WINDOWS = 2048  # windows that the kept share, one number, is fitted to
BLOCK_BYTES = 2**26  # of float32 tokens that are held at once


class TokenReader:
    """Reads windows of a data set as the predictor sees them, on its device, a bounded number at a time."""

    def __init__(
        self, dataset: CachedDataset, scaler: Scaler, index: WindowIndex, *, normalize_reps: bool, device: torch.device
    ) -> None:
        self.index = index
        self._loader = WindowLoader(dataset, index, scaler)
        self._normalize_reps, self._device = normalize_reps, device
        numbers = 4 * index.num_steps * dataset.manifest.num_tokens * dataset.manifest.width
        self._block = max(1, BLOCK_BYTES // numbers)

    def read(self, limit: int | None = None) -> Iterator[tuple[list[Window], Tensor]]:
        """Yield where windows lie and their tokens [n, T, N, E]: all in order, or at most `limit`, evenly spread."""
        every = 1 if limit is None else -(-len(self.index) // limit)
        numbers = np.arange(0, len(self.index), every)
        chunks = [numbers[start : start + self._block] for start in range(0, len(numbers), self._block)]
        for batch in self._loader.iterate(chunks, self._device):
            yield [self.index[int(number)] for number in batch.numbers], as_reps(batch.tokens, self._normalize_reps)


def halve(segments: Sequence[Segment], copies: Mapping[str, str]) -> tuple[list[Segment], list[Segment]]:
    """Segments of every other episode, and of the others, by name; copies of one recording go together."""
    first = [copies.get(segment.episode, segment.episode) for segment in segments]
    odd = set(sorted(set(first))[1::2])
    return tuple(
        [it for it, name in zip(segments, first, strict=True) if (name in odd) == side] for side in (False, True)
    )


class LatentDataset:
    """Latents of a data set's steps, in memory, read by the loader as if they were a data set of one token a step.

    Memory: 4 P bytes a step; 10^6 steps of 64 components are 256 MB.
    """

    dtype = "float32"
    scheme = Codec("float32", "float32", "float32", np.nan)

    def __init__(self, dataset: CachedDataset, compressor: Compressor, steps: TokenReader) -> None:
        """Compress all steps of a reader of windows of one step."""
        self.manifest = replace(dataset.manifest, num_tokens=1, width=compressor.latent_dim)
        self.space, self.controls = dataset.space, dataset.controls
        self._latents: dict[int, np.ndarray] = {}  # [steps of the store, 1, P]; NaN where no segment lies
        for windows, tokens in steps.read():
            with torch.no_grad():
                z = compressor.compress(tokens[:, 0]).cpu().numpy()
            for window, row in zip(windows, z, strict=True):
                if window.store not in self._latents:
                    shape = (self.manifest.entries[window.store].num_steps, 1, compressor.latent_dim)
                    self._latents[window.store] = np.full(shape, np.nan, np.float32)
                self._latents[window.store][window.start, 0] = row

    def read_tokens(self, store: int, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, 1, P] with the latents of the steps from `start` on."""
        out[...] = self._latents[store][start : start + len(out)]
