"""Windows: runs of T steps inside one segment, and the pure rule that says which window is drawn when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jepa_cache.data.cache import Segment


class Window(NamedTuple):
    """Steps [start, start + T) of store number `store`."""

    store: int
    start: int
    segment: int  # position in the list of segments it was drawn from


class WindowIndex:
    """All windows of T steps in a list of segments, numbered; costs memory per segment, not per window."""

    def __init__(self, segments: Sequence[Segment], num_steps: int) -> None:
        """Number the windows.

        Args:
            segments: Where windows may lie.
            num_steps: T.

        Raises:
            ValueError: When no segment is long enough.
        """
        self.segments = list(segments)
        self.num_steps = num_steps
        counts = np.array([max(0, s.stop - s.start - num_steps + 1) for s in self.segments], np.int64)
        self._ends = np.cumsum(counts)
        if len(self) == 0:
            longest = max((s.stop - s.start for s in self.segments), default=0)
            raise ValueError(
                f"no segment holds a window of {num_steps} steps: there are {len(self.segments)} segments, the longest has "
                f"{longest}; lower train.window_steps, raise encode.fps, or add longer recordings"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Window:
        """Window `number`.

        Raises:
            IndexError: Unless 0 <= number < len.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"windows are numbered from 0 to {len(self) - 1}; asked for {number}")
        position = int(np.searchsorted(self._ends, number, side="right"))
        segment = self.segments[position]
        num_windows = segment.stop - segment.start - self.num_steps + 1
        offset = int(number - (self._ends[position] - num_windows))
        return Window(segment.store, segment.start + offset, position)


class WindowSampler:
    """Draws windows without replacement, epoch after epoch.

    A pure function of (seed, step, rank, world size): whatever the number of loader threads or processes, and after any
    resume, train step k sees the same global batch. Each epoch is a permutation of all windows seeded by (seed, epoch);
    the global batch of a step is the next run of that order, and rank r takes its r-th part.
    """

    def __init__(self, num_windows: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Fix the order.

        Args:
            num_windows: Windows in the index.
            batch_size: B of one process.
            seed: Of the order.
            rank: This process.
            world_size: Processes.
        """
        self._num_windows, self._batch_size = num_windows, batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._permutation: tuple[int, np.ndarray] | None = None

    def numbers(self, step: int) -> np.ndarray:
        """Window numbers [B] of this rank's batch at `step` (from 0)."""
        first = (step * self._world_size + self._rank) * self._batch_size
        positions = np.arange(first, first + self._batch_size)
        epochs, places = np.divmod(positions, self._num_windows)
        return np.array([self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def epoch(self, step: int) -> float:
        """Passes over all windows before `step`."""
        return step * self._world_size * self._batch_size / self._num_windows

    def _order(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            # Philox is counter based: (seed, epoch) names the stream, nothing has to be replayed.
            generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
            self._permutation = (epoch, generator.permutation(self._num_windows))
        return self._permutation[1]


def spread_windows(index: WindowIndex, per_episode: int) -> list[int]:
    """Window numbers for evaluation: up to `per_episode` evenly spread over each episode, in order."""
    of_episode: dict[str, list[int]] = {}
    first = 0
    for segment in index.segments:
        count = max(0, segment.stop - segment.start - index.num_steps + 1)
        of_episode.setdefault(segment.episode, []).extend(range(first, first + count))
        first += count
    chosen = []
    for numbers in of_episode.values():
        picks = np.linspace(0, len(numbers) - 1, min(per_episode, len(numbers))).round().astype(int)
        chosen += [numbers[pick] for pick in np.unique(picks)]
    return chosen
