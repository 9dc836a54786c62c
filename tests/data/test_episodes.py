"""Claims of data/episodes.py: an episode and every batch hold what the cache holds, unscaled; each window comes once an epoch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.config.schema import SplitConfig
from jepa_cache.data.dataset import TRAIN, VAL
from jepa_cache.data.episodes import Dataset
from jepa_cache.data.windows import WindowIndex
from jepa_cache.store.quantisation import decode
from tests.caches import make_cache

SPLIT = SplitConfig(val_share=0.25, seed=0, exact_below=40)


@pytest.fixture(scope="module", params=["float16", "int8"])
def cache(request, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), dtype=request.param)


def stored(cache, segment):
    """Tokens [T, N, D] float32 of a segment, by the reader of the cache."""
    dataset, shape = cache.dataset, (segment.stop - segment.start, cache.dataset.manifest.num_tokens)
    tokens = np.empty((*shape, dataset.manifest.width), dataset.scheme.dtype)
    dataset.read_tokens(segment.store, segment.start, tokens)
    if dataset.dtype == "float16":
        return tokens.astype(np.float32)
    scales = np.empty(shape, np.float32)
    dataset.read_token_scales(segment.store, segment.start, scales)
    return decode(tokens, dataset.dtype, scales, dataset.channels(segment.store))


def test_an_episode_is_what_the_cache_holds_of_it(cache):
    dataset = Dataset(cache.dataset, replace(cache.config, split=SPLIT))
    assert len(dataset.keys()) == 8 and len(dataset.keys(VAL)) == 2
    assert {*dataset.keys(TRAIN)} | {*dataset.keys(VAL)} == {*dataset.keys()}
    for segment in cache.dataset.segments:
        (run,) = dataset.episode(segment.episode)
        assert run.tokens.dtype == torch.float32 and np.array_equal(run.tokens, stored(cache, segment))
        for ours, theirs in zip(run[1:], cache.dataset.controls_of(segment), strict=True):
            assert np.array_equal(ours, theirs)
    with pytest.raises(ValueError, match="there is no episode 'other'; there are 8, such as episode-0"):
        dataset.episode("other")


def test_each_window_of_a_split_comes_once_an_epoch_in_an_order_of_its_own(cache):
    dataset = Dataset(cache.dataset, replace(cache.config, split=SPLIT))
    runs = [run for key in dataset.keys(TRAIN) for run in dataset.episode(key)]
    wanted = {
        run.tokens[start : start + 5].numpy().tobytes(): run for run in runs for start in range(len(run.tokens) - 4)
    }
    batches = list(
        dataset.windows(5, batch_size=16, num_threads=2)
    )  # kept, so that a buffer that is filled again would show
    seen = [tokens.numpy().tobytes() for batch in batches for tokens in batch.tokens]
    assert len(seen) == len(wanted) == sum(len(run.tokens) - 4 for run in runs) and {*seen} == {*wanted}
    assert {len(batch.tokens) for batch in batches[:-1]} == {16} and 0 < len(batches[-1].tokens) <= 16
    first = batches[0]
    source = wanted[first.tokens[0].numpy().tobytes()]
    start = next(at for at in range(len(source.tokens)) if torch.equal(source.tokens[at : at + 5], first.tokens[0]))
    assert torch.equal(first.actions[0], source.actions[start : start + 4])
    assert torch.equal(first.states[0], source.states[start : start + 5])
    twice = [tokens.numpy().tobytes() for batch in dataset.windows(5, num_epochs=2, seed=1) for tokens in batch.tokens]
    assert sorted(twice) == sorted([*seen, *seen]) and twice[: len(seen)] != seen
    with pytest.raises(ValueError, match="a split is 'train' or 'val'; got 'test'"):
        next(dataset.windows(5, split="test"))
    with pytest.raises(ValueError, match="no segment holds a window of 99 steps"):
        next(dataset.windows(99))
    with pytest.raises(
        ValueError, match=r"evaluate and plan need held-out episodes, and split\.val_share=0 holds none out"
    ):
        WindowIndex([], 8)
