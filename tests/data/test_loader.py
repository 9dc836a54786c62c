"""Claims: a batch holds exactly the stored steps of its windows for any number of threads, and nothing overwrites it while in use.

Errors in reading threads reach the caller, and an early end leaves no thread behind. Values stay where they are on the same device
(tests/test_dtypes.py: the numbers that codes stand for).
"""

import itertools
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.actions import get_action_space
from jepa_cache.config.schema import ScalerConfig
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.loader import Batch, WindowLoader, to_device
from jepa_cache.data.scaler import fit_scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.store.reader import StoreDamagedError
from jepa_cache.store.root import CacheRoot

NUM_STEPS = 5


@pytest.fixture
def parts(dataset):
    scaler = fit_scaler(dataset, dataset.segments, ScalerConfig("standard", "standard"))
    return dataset, WindowIndex(dataset.segments, NUM_STEPS), scaler


def drawn_batches(index, num_batches=12, size=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(index), size).tolist() for _ in range(num_batches)]


def expected_batch(parts, numbers):
    """Tokens, actions and states of windows, read one by one with zarr and scaled by hand."""
    import zarr

    dataset, index, scaler = parts
    tokens, actions, states = [], [], []
    for number in numbers:
        window = index[number]
        run = slice(window.start, window.start + NUM_STEPS)
        tokens.append(zarr.open_group(dataset._token_paths[window.store], mode="r")["tokens"][run])
        all_actions, all_states = dataset.controls(window.store)
        raw = all_actions[run][:-1], all_states[run]
        for rows, values, fitted in ((actions, raw[0], scaler.actions), (states, raw[1], scaler.states)):
            rows.append((values.astype(np.float64) - np.array(fitted.mean)) / np.array(fitted.scale))
    return tuple(np.stack(rows) for rows in (tokens, actions, states))


def check(batch, expected):
    tokens, actions, states = expected
    assert batch.tokens.dtype == torch.float16 and np.array_equal(batch.tokens.numpy(), tokens)
    assert np.array_equal(batch.actions.numpy(), actions.astype(np.float32))
    assert np.array_equal(batch.states.numpy(), states.astype(np.float32))
    assert torch.isfinite(batch.actions).all()


def moved_by_sums(dataset):
    """The data set in an action space whose actions add up and have an inverse, and a scaler for it."""
    dataset.space = get_action_space("vector_sum36x2")
    return fit_scaler(dataset, dataset.segments, ScalerConfig("standard", "standard"))


def test_batches_of_mixed_step_lengths_hold_the_steps_asked_for_and_what_leads_from_each_to_the_next(dataset):
    scaler, num_steps = moved_by_sums(dataset), 3
    index = WindowIndex(dataset.segments, num_steps, (1, 2, 5), time_reversal=True)
    batches, seen = drawn_batches(index, num_batches=8, size=16), set()
    for batch, numbers in zip(
        WindowLoader(dataset, index, scaler, num_threads=2).iterate(batches), batches, strict=True
    ):
        for row, number in enumerate(numbers):
            window, token = index[number], np.empty((1, *batch.tokens.shape[2:]), np.float16)
            actions, states = dataset.controls(window.store)
            sign = 1 if window.step_length > 0 else -1
            steps = [window.start + step * window.step_length for step in range(num_steps)]
            for step, place in enumerate(steps):
                dataset.read_tokens(window.store, place, token)
                assert np.array_equal(batch.tokens[row, step].numpy(), token[0])
                assert np.array_equal(batch.states[row, step].numpy(), scaler.states.apply(states[place]))
            for step, (one, other) in enumerate(itertools.pairwise(steps)):
                summed = sign * actions[min(one, other) : max(one, other)].astype(np.float64).sum(axis=0)
                assert np.allclose(batch.actions[row, step].numpy(), scaler.actions.apply(summed), rtol=1e-6, atol=1e-6)
            seen.add(window.step_length)
    assert seen == {1, -1, 2, -2, 5, -5}


def test_step_lengths_and_directions_that_the_action_space_has_not_are_refused_before_anything_is_read(parts):
    dataset, _, scaler = parts
    with pytest.raises(ValueError, match=r"vpt36 have no inverse.*23 binary.*time_reversal"):
        WindowLoader(dataset, WindowIndex(dataset.segments, 3, (1,), time_reversal=True), scaler)
    dataset.space = replace(dataset.space, joined=None)
    with pytest.raises(ValueError, match=r"do not follow.*train\.step_lengths"):
        WindowLoader(dataset, WindowIndex(dataset.segments, 3, (2,)), scaler)


def test_batches_of_different_sizes_and_none_at_all(parts):
    loader = WindowLoader(*parts, num_threads=2)
    batches = [[0, 1, 2], [3], [4, 5], [1], [2, 2, 2]]
    for batch, numbers in zip(loader.iterate(batches), batches, strict=True):
        check(batch, expected_batch(parts, numbers))
    assert list(loader.iterate([])) == []
    one = loader.read([0, 1])  # in buffers of its own
    loader.read([7, 9])
    check(one, expected_batch(parts, [0, 1]))


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_batches_are_the_stored_steps_in_order_and_not_overwritten_while_the_next_ones_are_read(parts, num_threads):
    batches = drawn_batches(parts[1], num_batches=10)
    loader, filled = WindowLoader(*parts, num_threads=num_threads), []
    fill = loader._fill

    def counted(*arguments):
        result = fill(*arguments)
        filled.append(1)
        return result

    loader._fill = counted
    for taken, (batch, numbers) in enumerate(zip(loader.iterate(batches), batches, strict=True)):
        # Wait until everything that is read ahead has been read.
        deadline = time.monotonic() + 20
        while len(filled) < min(len(batches), taken + 1 + num_threads) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(filled) >= min(len(batches), taken + 1 + num_threads)
        assert batch.numbers.tolist() == numbers
        check(batch, expected_batch(parts, numbers))


def test_no_more_is_read_ahead_than_the_buffers_hold(parts):
    asked = []

    def numbers():
        for number in range(50):
            asked.append(number)
            yield [number % 7]

    batches = WindowLoader(*parts, num_threads=2).iterate(numbers())
    next(batches)
    assert len(asked) <= 4
    batches.close()
    batches = WindowLoader(*parts, num_threads=1).iterate(drawn_batches(parts[1], 20))
    assert len({batch.tokens.data_ptr() for batch in batches}) == 3, "buffers are allocated once"


@pytest.mark.parametrize("num_threads", [1, 4])
def test_stopping_early_ends_the_threads(parts, num_threads):
    before = threading.active_count()
    batches = WindowLoader(*parts, num_threads=num_threads).iterate(drawn_batches(parts[1], 30))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_an_error_in_a_reading_thread_reaches_the_caller_and_ends_the_threads(parts, monkeypatch):
    dataset, index, scaler = parts
    real, calls = dataset.read_tokens, []

    def failing(store, start, out):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("the disk is gone")
        real(store, start, out)

    monkeypatch.setattr(dataset, "read_tokens", failing)
    before = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in WindowLoader(dataset, index, scaler, num_threads=2).iterate([[n] for n in range(10)]):
            pass
    assert threading.active_count() == before


@pytest.fixture
def moved(encoded, tmp_path):
    """The encoded data set's stores in a place of their own, to be damaged."""
    shutil.copytree(encoded.root.path, tmp_path / "cache")
    return CacheRoot(tmp_path / "cache")


def test_stores_that_are_gone_or_another_are_refused_when_the_data_set_is_opened(encoded, moved, tmp_path):
    paths = [moved.tokens(encoded.manifest.fingerprint, entry.unit_digest) for entry in encoded.manifest.entries]
    shutil.move(paths[0], tmp_path / "store")
    with pytest.raises(ValueError, match=r"1 of the stores in the manifest are not in .*encode\.py"):
        CachedDataset(encoded.manifest, moved)
    shutil.copytree(paths[1], paths[0])
    with pytest.raises(StoreDamagedError, match="not the store that its path says"):
        CachedDataset(encoded.manifest, moved)


# --- stored codes on a device ----------------------------------------------------------------------------------------------

B, T, N, D = 3, 4, 5, 128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_stay_the_same_memory_on_the_same_device(dtype):
    tokens = torch.zeros(B, T, N, D, dtype=dtype)
    batch = Batch(tokens, torch.zeros(B, T - 1, 2), torch.zeros(B, T, 2), np.arange(B))
    moved = to_device(batch, torch.device("cpu"))
    assert moved.tokens.dtype == dtype and moved.tokens.data_ptr() == tokens.data_ptr()
