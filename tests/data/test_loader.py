"""Claims: a batch holds exactly the stored steps of its windows for any number of threads, and nothing overwrites it while in use.

Errors in reading threads reach the caller, and an early end leaves no thread behind.
"""

import threading
import time

import numpy as np
import pytest
import torch

from jepa_cache.config.schema import ScalerConfig
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.scaler import fit_scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.store import layout
from jepa_cache.store.reader import StoreDamagedError

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


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_batches_are_the_stored_steps_in_the_order_asked_for(parts, num_threads):
    batches = drawn_batches(parts[1])
    seen = 0
    for batch, numbers in zip(WindowLoader(*parts, num_threads=num_threads).iterate(batches), batches, strict=True):
        assert batch.numbers.tolist() == numbers
        check(batch, expected_batch(parts, numbers))
        seen += 1
    assert seen == len(batches)


def test_batches_of_different_sizes_and_none_at_all(parts):
    loader = WindowLoader(*parts, num_threads=2)
    batches = [[0, 1, 2], [3], [4, 5], [1], [2, 2, 2]]
    for batch, numbers in zip(loader.iterate(batches), batches, strict=True):
        check(batch, expected_batch(parts, numbers))
    assert list(loader.iterate([])) == []


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_batch_in_use_is_not_overwritten_while_the_next_ones_are_read(parts, num_threads):
    batches = drawn_batches(parts[1], num_batches=10)
    loader, filled = WindowLoader(*parts, num_threads=num_threads), []
    fill = loader._fill

    def counted(buffer, numbers):
        result = fill(buffer, numbers)
        filled.append(1)
        return result

    loader._fill = counted
    for taken, (batch, numbers) in enumerate(zip(loader.iterate(batches), batches, strict=True)):
        # Wait until everything that is read ahead has been read.
        deadline = time.monotonic() + 20
        while len(filled) < min(len(batches), taken + 1 + num_threads) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(filled) >= min(len(batches), taken + 1 + num_threads)
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


def test_buffers_are_allocated_once(parts):
    loader = WindowLoader(*parts, num_threads=1)
    places = {batch.tokens.data_ptr() for batch in loader.iterate(drawn_batches(parts[1], 20))}
    assert len(places) == 3


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


def test_a_damaged_chunk_is_named_with_its_episode(encoded, tmp_path):
    import shutil

    from jepa_cache.data.cache import CachedDataset
    from jepa_cache.store.root import CacheRoot

    shutil.copytree(encoded.root.path, tmp_path / "cache")
    dataset = CachedDataset(encoded.manifest, CacheRoot(tmp_path / "cache"))
    path = layout.shard_path(dataset._token_paths[0], 0)
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    scaler = fit_scaler(dataset, dataset.segments, ScalerConfig("none", "none"))
    with pytest.raises(StoreDamagedError, match="checksum") as caught:
        WindowLoader(dataset, WindowIndex(dataset.segments, NUM_STEPS), scaler).read([0])
    assert dataset.segments[0].episode in caught.value.__notes__[0]
    dataset.close()


def test_a_read_batch_has_buffers_of_its_own(parts):
    loader = WindowLoader(*parts)
    one = loader.read([0, 1])
    loader.read([7, 9])
    check(one, expected_batch(parts, [0, 1]))


def test_stores_that_are_gone_or_another_are_refused_when_the_data_set_is_opened(encoded, tmp_path):
    import shutil

    from jepa_cache.data.cache import CachedDataset
    from jepa_cache.store.root import CacheRoot

    shutil.copytree(encoded.root.path, tmp_path / "cache")
    root = CacheRoot(tmp_path / "cache")
    paths = [root.tokens(encoded.manifest.fingerprint, entry.unit_digest) for entry in encoded.manifest.entries]
    (tmp_path / "kept").mkdir()
    shutil.move(paths[0], tmp_path / "kept/store")
    with pytest.raises(ValueError, match=r"1 of the stores in the manifest are not in .*encode\.py"):
        CachedDataset(encoded.manifest, root)
    shutil.copytree(paths[1], paths[0])
    with pytest.raises(StoreDamagedError, match="not the store that its path says"):
        CachedDataset(encoded.manifest, root)
