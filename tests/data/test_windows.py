"""Claims: windows are numbered without gaps and never leave their segment; the sampler is a pure function of seed and step.

It gives the same global batch for any number of processes, before and after a resume, and no window twice within an epoch.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jepa_cache.data.dataset import Segment
from jepa_cache.data.windows import (
    MIXTURE_BLOCK,
    WindowGroup,
    WindowIndex,
    WindowSampler,
    first_cached_rows,
    spread_windows,
)


@st.composite
def segment_lists(draw):
    segments, start = [], 0
    for number in range(draw(st.integers(1, 8))):
        start += draw(st.integers(0, 5))
        stop = start + draw(st.integers(1, 20))
        segments.append(Segment(draw(st.integers(0, 2)), f"e{number // 2}", start, stop))
        start = stop
    return segments


@settings(deadline=None)  # of time nothing is claimed
@given(segment_lists(), st.integers(1, 5), st.lists(st.integers(1, 9), min_size=1, unique=True), st.booleans())
def test_windows_of_several_step_lengths_are_every_spaced_run_inside_a_segment_once_in_each_direction(
    segments, num_steps, step_lengths, time_reversal
):
    longest = max(segment.stop - segment.start for segment in segments)
    if longest <= (num_steps - 1) * max(step_lengths):
        with pytest.raises(ValueError, match=f"window of {num_steps} steps.*the longest has {longest}; lower"):
            WindowIndex(segments, num_steps, step_lengths, time_reversal)
        return
    index = WindowIndex(segments, num_steps, step_lengths, time_reversal)
    rows = range(max(segment.stop for segment in segments))
    found, positions = [], []
    for number in range(len(index)):
        window = index[number]
        found.append((window.store, *rows[window.rows(num_steps)]))
        positions.append(window.segment)
        assert np.diff(found[-1][1:]).tolist() == [window.step_length] * (num_steps - 1)
    expected = []
    for segment in segments:
        for step_length in step_lengths:
            last = segment.stop - (num_steps - 1) * step_length
            runs = [[start + step * step_length for step in range(num_steps)] for start in range(segment.start, last)]
            expected += [(segment.store, *run) for run in runs]
            expected += [(segment.store, *run[::-1]) for run in runs if time_reversal]
    assert sorted(found) == sorted(expected)
    assert found == expected or len(step_lengths) > 1 or time_reversal, "in order"
    for number in (-1, len(index)):
        with pytest.raises(IndexError):
            index[number]
    assert positions == sorted(positions) and index.counts() == np.bincount(positions, minlength=len(segments)).tolist()
    runs = list(index.iter_runs())
    assert [number for _, _, numbers in runs for number in numbers] == list(range(len(index)))
    for segment, step_length, numbers in runs:
        assert {(index[n].segment, index[n].step_length) for n in numbers} <= {(segment, step_length)}


def test_a_step_length_that_no_segment_holds_is_refused_by_name():
    segments = [Segment(0, "a", 0, 9), Segment(0, "b", 9, 12)]
    assert len(WindowIndex(segments, 3, (1, 4))) == 7 + 1 + 1
    with pytest.raises(
        ValueError, match=r"3 steps, each 5 steps of the cache after .*longest has 9.*train\.step_lengths"
    ):
        WindowIndex(segments, 3, (1, 5))


samplers = st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31))


@given(samplers)
def test_an_epoch_holds_every_window_once_and_the_next_has_another_order(sampler):
    num_windows, batch_size, seed = sampler
    drawn = WindowSampler(num_windows, batch_size, seed=seed)
    num_batches = -(-2 * num_windows // batch_size)
    numbers = np.concatenate([drawn.numbers(step) for step in range(num_batches)])
    one, two = numbers[:num_windows].tolist(), numbers[num_windows : 2 * num_windows].tolist()
    assert sorted(one) == sorted(two) == list(range(num_windows))
    if num_windows > 20:
        assert one != two


def global_batches(num_windows, batch_size, seed, groups, *, world_size, steps):
    """The batches of these steps, put together from the shares of newly made samplers, one a process."""
    ranks = [
        WindowSampler(num_windows, batch_size // world_size, seed=seed, rank=rank, world_size=world_size, groups=groups)
        for rank in range(world_size)
    ]
    return [np.concatenate([rank.numbers(step) for rank in ranks]).tolist() for step in steps]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 3)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 8), st.sampled_from([1, 2, 4])), min_size=1, max_size=4),
)
def test_a_run_that_goes_on_with_other_numbers_of_processes_sees_the_same_windows(data_sets, quarter, seed, runs):
    groups = [WindowGroup(*group) for group in data_sets]
    arguments = sum(group.count for group in groups), 4 * quarter, seed, groups if len(groups) > 1 else ()
    resumed, step = [], 0
    for num_steps, world_size in runs:
        resumed += global_batches(*arguments, world_size=world_size, steps=range(step, step + num_steps))
        step += num_steps
    assert resumed == global_batches(*arguments, world_size=1, steps=range(step))


def test_another_seed_gives_another_order_and_neighbours_are_apart():
    orders = {tuple(WindowSampler(50, 50, seed=seed).numbers(0).tolist()) for seed in range(20)}
    assert len(orders) == 20
    # Of a random order about 2 neighbouring pairs in 5000 differ by 1.
    assert (np.abs(np.diff(WindowSampler(5000, 5000, seed=0).numbers(0))) == 1).sum() < 15


@given(segment_lists(), st.integers(1, 6), st.integers(1, 12))
def test_evaluation_windows_are_spread_evenly_over_each_episode(segments, num_steps, per_episode):
    assume(any(segment.stop - segment.start >= num_steps for segment in segments))
    index = WindowIndex(segments, num_steps)
    chosen = spread_windows(index, per_episode)
    assert len(set(chosen)) == len(chosen)
    of_episode = {}
    for number in range(len(index)):
        of_episode.setdefault(index.segments[index[number].segment].episode, []).append(number)
    for numbers in of_episode.values():
        picks = [numbers.index(number) for number in chosen if number in numbers]
        assert len(picks) == min(per_episode, len(numbers))
        assert picks == sorted(picks)
        if len(picks) > 1:
            assert picks[0] == 0 and picks[-1] == len(numbers) - 1
            assert np.ptp(np.diff(picks)) <= 1


def test_a_mixture_draws_each_data_set_at_its_rate_and_each_window_equally_often():
    groups = [WindowGroup(50, 1.0), WindowGroup(7, 3.0)]
    sampler = WindowSampler(57, 16, seed=3, groups=groups)
    drawn = np.concatenate([sampler.numbers(step) for step in range(4 * MIXTURE_BLOCK // 16)])
    assert (drawn < 50).sum() == MIXTURE_BLOCK
    counts = np.bincount(drawn, minlength=57)
    assert np.ptp(counts[:50]) <= 1 and np.ptp(counts[50:]) <= 1


def test_a_data_set_of_a_mixture_without_windows_is_refused():
    with pytest.raises(ValueError, match="needs windows"):
        WindowSampler(5, 2, seed=0, groups=[WindowGroup(5, 1.0), WindowGroup(0, 1.0)])


def test_steps_are_numbered_from_the_first_cached_one_of_an_episode_in_its_store():
    segments = [
        Segment(0, "a", 7, 9),
        Segment(0, "a", 3, 5),
        Segment(0, "a", 20, 22),
        Segment(0, "b", 9, 12),
        Segment(1, "a", 0, 2),
    ]
    assert first_cached_rows(segments) == {(0, "a"): 3, (0, "b"): 9, (1, "a"): 0}
