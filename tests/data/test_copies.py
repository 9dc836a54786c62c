"""Claims: recordings of one content are on one side of the split and count once among the held-out; no other episode moves for it."""

import hashlib

import numpy as np
import pytest

from jepa_cache.config.schema import SplitConfig
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.splits import TRAIN, VAL, split_of
from tests import caches
from tests.caches import make_cache

UNITS = {hashlib.sha256(unit.encode()).hexdigest(): [f"{unit}{number}" for number in range(4)] for unit in "abc"}


@pytest.fixture(scope="module", params=["float16", "int8"])
def copied(request, tmp_path_factory):
    """Twelve episodes, of which b0 and c2 are a1 once more, in stores of other neighbours; c3 has its actions, but shows something else."""
    episodes = [episode for digest in sorted(UNITS) for episode in UNITS[digest]]  # in the order in which they are made
    source = {"b0": "a1", "c2": "a1", "c3": "a1"}
    seeds, shown = iter([episodes.index(source.get(episode, episode)) for episode in episodes]), iter(episodes)
    make_controls, make_tokens = caches.make_controls, caches.make_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "make_controls", lambda n, _: make_controls(n, np.random.default_rng(next(seeds))))
        patch.setattr(caches, "make_tokens", lambda yaw: make_tokens(yaw + 70 * (next(shown) == "c3")))
        return make_cache(tmp_path_factory.mktemp("copied"), units=UNITS, dtype=request.param)


def test_copies_are_found_by_what_they_do_and_show(copied, capsys):
    dataset = CachedDataset(copied.dataset.manifest, copied.root)
    assert dataset.find_copies() == {"b0": "a1", "c2": "a1"}
    assert dataset.find_copies() == {"b0": "a1", "c2": "a1"}
    assert capsys.readouterr().err.count("recordings that repeat another one: 2 (first: b0 is a1)") == 1


def test_copies_follow_the_first_and_all_others_stay_where_their_key_puts_them(copied):
    for seed in range(8):
        split = SplitConfig(val_share=0.5, seed=seed)
        train, held_out = ({s.episode for s in copied.dataset.segments_of(side, split)} for side in (TRAIN, VAL))
        for episode in (episode for episodes in UNITS.values() for episode in episodes):
            side = split_of("a1" if episode in ("b0", "c2") else episode, val_share=0.5, seed=seed)
            assert (episode in train) == (side == TRAIN)
            assert (episode in held_out) == (side == VAL and episode not in ("b0", "c2"))
