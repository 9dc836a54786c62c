"""Windows: runs of T steps inside one segment, and the pure rule that says which window is drawn when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import TRAIN, VAL, CachedDataset, Segment

LEAST_HELD_OUT = 2  # episodes: intervals are over them, and a control takes another's actions
MIXTURE_BLOCK = 1024  # draws in which a mixture keeps its shares exactly
GROUP_STRIDE = 1 << 32  # keeps the streams of a mixture's groups apart


def first_cached_rows(segments: Iterable[Segment]) -> dict[tuple[int, str], int]:
    """Store and episode to the row of its first cached step, from which steps are numbered wherever people read them.

    Args:
        segments: All of the data set (`CachedDataset.segments`); what filters left of them would number from their first cut.
    """
    first: dict[tuple[int, str], int] = {}
    for segment in segments:
        key = segment.store, segment.episode
        first[key] = min(first.get(key, segment.start), segment.start)
    return first


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
                f"{longest}; lower train.window_steps (evaluate.num_context_steps and evaluate.horizon, or plan.num_context_steps and plan.horizons, where these ask for more), "
                "raise encode.fps, or add longer recordings"
            )

    def counts(self) -> list[int]:
        """Windows of each segment."""
        return np.diff(self._ends, prepend=0).tolist()

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


class WindowGroup(NamedTuple):
    """Windows of one data set of a mixture: `count` of them in the index, drawn at a rate in proportion to `weight`."""

    count: int
    weight: float


class WindowSampler:
    """Draws windows without replacement, epoch after epoch.

    A pure function of (seed, step, rank, world size): whatever the number of loader threads or processes, and after any
    resume, train step k sees the same global batch. Each epoch is a permutation of all windows seeded by (seed, epoch);
    the global batch of a step is the next run of that order, and rank r takes its r-th part.

    In a mixture every group has its own epochs, and each run of `MIXTURE_BLOCK` draws holds every group exactly as often
    as its weight says (rounded), in an order seeded by (seed, block).
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[WindowGroup] = (),
    ) -> None:
        """Fix the order.

        Args:
            num_windows: Windows in the index.
            batch_size: B of one process.
            seed: Of the order.
            rank: This process.
            world_size: Processes.
            groups: Of a mixture, in the order of the index; their counts add up to `num_windows`.

        Raises:
            ValueError: A group has no window, or the counts do not add up.
        """
        groups = list(groups) or [WindowGroup(num_windows, 1.0)]
        if sum(group.count for group in groups) != num_windows or min(group.count for group in groups) < 1:
            raise ValueError(
                f"every data set of a mixture needs windows, {num_windows} in all; got {[g.count for g in groups]}"
            )
        self._num_windows, self._batch_size = num_windows, batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._counts = np.array([group.count for group in groups])
        self._firsts = np.cumsum(self._counts) - self._counts
        self._shares = _block_shares(np.array([group.weight for group in groups]))
        self._block: tuple[int, np.ndarray] | None = None
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def numbers(self, step: int) -> np.ndarray:
        """Window numbers [B] of this rank's batch at `step` (from 0)."""
        first = (step * self._world_size + self._rank) * self._batch_size
        return np.array([self._draw(position) for position in range(first, first + self._batch_size)])

    def epoch(self, step: int) -> float:
        """Passes over as many windows as there are, before `step`."""
        return step * self._world_size * self._batch_size / self._num_windows

    def _draw(self, position: int) -> int:
        group, draw = 0, position
        if len(self._counts) > 1:
            block, place = divmod(position, MIXTURE_BLOCK)
            order = self._block_order(block)
            group = int(order[place])
            draw = block * int(self._shares[group]) + int((order[:place] == group).sum())
        epoch, place = divmod(draw, int(self._counts[group]))
        return int(self._firsts[group] + self._order(group, epoch)[place])

    def _block_order(self, block: int) -> np.ndarray:
        if self._block is None or self._block[0] != block:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, block], counter=1))
            self._block = (block, generator.permutation(np.repeat(np.arange(len(self._shares)), self._shares)))
        return self._block[1]

    def _order(self, group: int, epoch: int) -> np.ndarray:
        if self._permutations.get(group, (None,))[0] != epoch:
            # Philox is counter based: (seed, epoch) names the stream, nothing has to be replayed.
            generator = np.random.Generator(np.random.Philox(key=[self._seed + group * GROUP_STRIDE, epoch]))
            self._permutations[group] = (epoch, generator.permutation(self._counts[group]))
        return self._permutations[group][1]


def _block_shares(weights: np.ndarray) -> np.ndarray:
    """How often each group stands in a block: its share of the weights, by largest remainders, at least once."""
    exact = weights / weights.sum() * MIXTURE_BLOCK
    shares = np.maximum(np.floor(exact).astype(int), 1)
    while shares.sum() != MIXTURE_BLOCK:
        step = 1 if shares.sum() < MIXTURE_BLOCK else -1
        shares[np.argmax(step * (exact - shares))] += step
    return shares


def spread_windows(index: WindowIndex, per_episode: int) -> list[int]:
    """Window numbers for evaluation: up to `per_episode` evenly spread over each episode, in order."""
    of_episode: dict[str, list[int]] = {}
    first = 0
    for segment, count in zip(index.segments, index.counts(), strict=True):
        of_episode.setdefault(segment.episode, []).extend(range(first, first + count))
        first += count
    chosen = []
    for numbers in of_episode.values():
        picks = np.linspace(0, len(numbers) - 1, min(per_episode, len(numbers))).round().astype(int)
        chosen += [numbers[pick] for pick in np.unique(picks)]
    return chosen


def find_obstacle(dataset: CachedDataset, config: Config) -> str | None:
    """Why `evaluate` would refuse what is trained on a data set, with the counts of episodes; None where it would not.

    An episode counts where one of its segments holds a window of the training and the steps of an open loop.
    """
    evaluate = config.evaluate
    num_steps = max(config.train.window_steps, evaluate.num_context_steps + evaluate.horizon)
    least_train = 2 if "probes" in evaluate.measure else 1
    counts, enough = [], True
    for name, split, least in (("training", TRAIN, least_train), ("held out", VAL, LEAST_HELD_OUT)):
        segments = dataset.segments_of(split, config.split, config.filter)
        total = count_episodes(segments)
        long = count_episodes([segment for segment in segments if segment.stop - segment.start >= num_steps])
        counts.append(f"{total} {name}" + (f" ({long} with {num_steps} steps in a row)" if long < total else ""))
        enough &= long >= least
    if enough:
        return None
    return (
        f"{', '.join(counts)}; evaluate needs {LEAST_HELD_OUT} held out and {least_train} for training with {num_steps} steps in a row (the most of "
        "train.window_steps and evaluate.num_context_steps + evaluate.horizon). Add recordings, set another split.val_share or split.seed, or "
        "lower these steps; to train on every episode and evaluate nothing, set split.val_share=0"
    )


def count_episodes(segments: Sequence[Segment]) -> int:
    """Different episodes among segments."""
    return len({segment.episode for segment in segments})
