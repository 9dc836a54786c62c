"""The cache for programs of one's own: the tokens of an episode, and batches of windows for a model that is not this project's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.config.loading import find_repository, load_config
from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import TRAIN, VAL, CachedDataset, Segment, open_dataset
from jepa_cache.data.frames import read_frames
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.scaler import ColumnScaler, Scaler
from jepa_cache.data.windows import WindowIndex, WindowSampler


class Run(NamedTuple):
    """Steps of an episode in a row.

    Attributes:
        tokens: [T, N, D] float32, raw encoder output.
        actions: [T-1, A] float32, unscaled; `actions[t]` leads from step t to t+1.
        states: [T, S] float32, unscaled.
    """

    tokens: Tensor
    actions: Tensor
    states: Tensor


class Dataset:
    """What a project has encoded, by episodes and windows. The columns of actions and states are those of `space`."""

    def __init__(self, cached: CachedDataset, config: Config) -> None:
        """Put a cache together with the settings that say what is held out and left out. `Dataset.open` does it all."""
        self.cached, self.space, self._config = cached, cached.space, config
        self._segments = {name: cached.segments_of(name, config.split, config.filter) for name in (TRAIN, VAL)}
        columns = (tuple(column.name for column in some) for some in (self.space.actions, self.space.states))
        as_recorded = [ColumnScaler(names, (0.0,) * len(names), (1.0,) * len(names)) for names in columns]
        self._unscaled = Scaler(*as_recorded, 0, "", cached.manifest.action_fingerprint)

    @classmethod
    def open(cls, overrides: Sequence[str] = ()) -> Dataset:
        """Open what `python stages/encode.py` left in the project around the present folder; `overrides` are those of the stages.

        Raises:
            ValueError: Nothing was encoded, its stores are gone, or settings are not those that it was encoded with.
        """
        root = find_repository(Path.cwd())
        config = load_config(root, overrides)
        return cls(open_dataset(config, root), config)

    def keys(self, split: str | None = None) -> list[str]:
        """Keys of the episodes, sorted: of one split ("train" or "val"), or of both."""
        names = self._segments if split is None else (split,)
        return sorted({segment.episode for name in names for segment in self._find(name)})

    def episode(self, key: str) -> list[Run]:
        """The steps of an episode in order: one run, or several where steps are missing or filtered out, or cameras have runs of their own.

        Raises:
            ValueError: There is no such episode.
        """
        return [self._read(segment) for segment in self.segments(key)]

    def segments(self, key: str) -> list[Segment]:
        """Where the runs of an episode lie; a ValueError where there is no such episode."""
        found = [segment for some in self._segments.values() for segment in some if segment.episode == key]
        if not found:
            keys = self.keys()
            raise ValueError(f"there is no episode {key!r}; there are {len(keys)}, such as {', '.join(keys[:3])}")
        return found

    def frames(self, key: str) -> list[np.ndarray | None]:
        """The frames uint8 [T, h, w, 3] of an episode's runs; None where the recording is not on this machine any more, or was changed."""
        return read_frames(self._config, self.cached, self.segments(key))

    def _read(self, segment: Segment) -> Run:
        num_steps = segment.stop - segment.start
        loader = WindowLoader(self.cached, WindowIndex([segment], num_steps), self._unscaled)
        batch = to_device(loader.read([0]), torch.device("cpu"))
        return Run(batch.tokens[0].float(), batch.actions[0], batch.states[0])

    def windows(
        self,
        num_steps: int,
        *,
        batch_size: int = 32,
        split: str = TRAIN,
        seed: int = 0,
        num_epochs: int = 1,
        num_threads: int = 1,
    ) -> Iterator[Run]:
        """Batches of windows of T steps in a row, each window once an epoch, in an order that `seed` decides; the last may be smaller.

        Yields:
            tokens [B, T, N, D], actions [B, T-1, A] and states [B, T, S], unscaled, on the CPU. Threads read ahead.

        Raises:
            ValueError: No episode of the split has so many steps in a row.
        """
        index = WindowIndex(self._find(split), num_steps)
        sampler = WindowSampler(len(index), batch_size, seed=seed)
        left = num_epochs * len(index)
        batches = (sampler.numbers(step)[: left - step * batch_size] for step in range(-(-left // batch_size)))
        loader = WindowLoader(self.cached, index, self._unscaled, num_threads=num_threads)
        for batch in loader.iterate(batches, torch.device("cpu")):
            # Copies: the loader fills its buffers again.
            yield Run(batch.tokens.to(torch.float32, copy=True), batch.actions.clone(), batch.states.clone())

    def _find(self, split: str) -> list[Segment]:
        if split not in self._segments:
            raise ValueError(f"a split is {TRAIN!r} or {VAL!r}; got {split!r}")
        return self._segments[split]
