"""Windows: T evenly spaced steps inside one segment, and the pure rule that says which window is drawn when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import TRAIN, VAL, CachedDataset, Segment

LEAST_HELD_OUT = 2  # episodes: intervals are over them, and a control takes another's actions
LEAST_FOR_YES = 6  # with fewer no paired test can reach 0.05, so no answer of an evaluation is `yes`
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
    """Steps start, start + step_length, ... of store number `store`: T of them, backwards in time where the step length is negative."""

    store: int
    start: int
    segment: int  # position in the list of segments it was drawn from
    step_length: int = 1

    def rows(self, num_steps: int) -> slice:
        """The rows of the store that its T steps are, in the window's order."""
        stop = self.start + num_steps * self.step_length
        return slice(self.start, stop if stop >= 0 else None, self.step_length)


class WindowIndex:
    """All windows of T steps in a list of segments, numbered; costs memory per segment, not per window.

    Numbers go segment by segment; within one, step length by step length (with time reversal k and then -k), then by place.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        num_steps: int,
        step_lengths: Sequence[int] = (1,),
        time_reversal: bool = False,
    ) -> None:
        """Number the windows.

        Args:
            segments: Where windows may lie.
            num_steps: T.
            step_lengths: Steps of the cache from one step of a window to the next; a segment holds those that fit into it.
            time_reversal: Whether every window is there a second time, backwards.

        Raises:
            ValueError: When there is no segment, or none that is long enough for one of the step lengths.
        """
        self.segments = list(segments)
        if not self.segments:
            raise ValueError(
                f"there is no episode to take windows of {num_steps} steps from: this side of the split has none, or filters cut all of its "
                "steps. evaluate and plan need held-out episodes, and split.val_share=0 holds none out; look at split.* and filter.*"
            )
        self.num_steps = num_steps
        self.step_lengths = tuple(sign * k for k in step_lengths for sign in ((1, -1) if time_reversal else (1,)))
        lengths = np.array([segment.stop - segment.start for segment in self.segments], np.int64)
        longest = int(lengths.max(initial=0))
        for step_length in step_lengths:
            if longest <= (num_steps - 1) * step_length:
                apart = f", each {step_length} steps of the cache after the one before" if step_length > 1 else ""
                lower = "train.step_lengths, evaluate.step_length or " if step_length > 1 else ""
                raise ValueError(
                    f"no segment holds a window of {num_steps} steps{apart}: there are {len(self.segments)} segments, the longest has "
                    f"{longest}; lower {lower}train.window_steps (evaluate.num_context_steps and evaluate.horizon, or "
                    "plan.num_context_steps and plan.horizons, where these ask for more), "
                    "raise encode.fps, or add longer recordings"
                )
        spans = (num_steps - 1) * np.abs(np.array(self.step_lengths, np.int64))
        self._counts = np.maximum(0, lengths[:, None] - spans)  # [segments, step lengths]
        self._ends = np.cumsum(self._counts)

    def counts(self) -> list[int]:
        """Windows of each segment."""
        return self._counts.sum(axis=1).tolist()

    def iter_runs(self) -> Iterator[tuple[int, int, range]]:
        """Segment, step length and numbers of all windows of one segment and step length, in the order of their numbers."""
        first = 0
        for position, counts in enumerate(self._counts.tolist()):
            for step_length, count in zip(self.step_lengths, counts, strict=True):
                yield position, step_length, range(first, first + count)
                first += count

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Window:
        """Window `number`.

        Raises:
            IndexError: Unless 0 <= number < len.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"windows are numbered from 0 to {len(self) - 1}; asked for {number}")
        place = int(self._ends.searchsorted(number, side="right"))
        position, turn = divmod(place, len(self.step_lengths))
        segment, step_length = self.segments[position], self.step_lengths[turn]
        start = segment.start + number - (int(self._ends[place - 1]) if place else 0)
        # Backwards, a window begins at the last of its steps in time.
        return Window(segment.store, start - min(0, step_length) * (self.num_steps - 1), position, step_length)


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
    """Window numbers for evaluation: up to `per_episode` of each step length, evenly spread over each episode, in order."""
    alike: dict[tuple[str, int], list[int]] = {}
    for position, step_length, numbers in index.iter_runs():
        alike.setdefault((index.segments[position].episode, step_length), []).extend(numbers)
    chosen = []
    for numbers in alike.values():
        picks = np.linspace(0, len(numbers) - 1, min(per_episode, len(numbers))).round().astype(int)
        chosen += [numbers[pick] for pick in np.unique(picks)]
    return chosen


def find_obstacle(dataset: CachedDataset, config: Config) -> str | None:
    """Why `evaluate` would refuse what is trained on a data set, with the counts of episodes; None where it would not.

    An episode counts where one of its segments holds a window of the training and the steps of an open loop.
    """
    evaluate = config.evaluate
    num_steps = max(config.train.window_steps, evaluate.num_context_steps + evaluate.horizon)
    num_steps = (num_steps - 1) * evaluate.step_length + 1
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
        "train.window_steps and evaluate.num_context_steps + evaluate.horizon, evaluate.step_length apart). Add recordings, "
        "set another split.val_share or split.seed, or lower these steps"
    ) + ("; to train on every episode and evaluate nothing, set split.val_share=0" if config.split.val_share else "")


def count_episodes(segments: Sequence[Segment]) -> int:
    """Different episodes among segments."""
    return len({segment.episode for segment in segments})
