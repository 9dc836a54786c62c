"""One encoded data set for the tests of stage two's input."""

from typing import NamedTuple

import pytest

from jepa_cache.config.schema import SplitConfig
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.root import CacheRoot
from tests.encoded import encode, make_tars, tiny_config

SPLIT = SplitConfig(val_share=0.4, seed=3)
EPISODES = {"a": {"e0": 81, "e1": 60, "e2": 45}, "b": {"e3": 70, "e4": 52}, "c": {"e5": 66}}


class Encoded(NamedTuple):
    """A manifest and the root it was made in; `open` gives a data set of its own."""

    manifest: Manifest
    root: CacheRoot

    def open(self) -> CachedDataset:
        return CachedDataset(self.manifest, self.root)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory) -> Encoded:
    folder = tmp_path_factory.mktemp("data")
    make_tars(folder / "in", EPISODES)
    result = encode(folder / "in", folder / "cache", tiny_config(action_space="vpt36"))
    return Encoded(result.manifest, CacheRoot(folder / "cache"))


@pytest.fixture
def dataset(encoded):
    opened = encoded.open()
    yield opened
    opened.close()
