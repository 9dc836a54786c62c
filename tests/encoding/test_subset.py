"""Claims of encode.max_episodes: the first recordings and no others are read, hashed and encoded; the manifest says so.

A part never becomes the whole's store, and whole units are shared with a run over everything.
"""

import dataclasses

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from jepa_cache.encoding.run import describe_result
from jepa_cache.store import digests
from jepa_cache.store.root import CacheRoot
from tests.encoded import encode, make_tars, read_episodes, tiny_config
from tests.workspace import SUITE_SETTINGS

EPISODES = {"a": {"a0": 20, "a1": 24}, "b": {"b0": 28, "b1": 32}, "c": {"c0": 20}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tars(tmp_path_factory.mktemp("recordings"), EPISODES)


def first(num):
    config = tiny_config()
    return dataclasses.replace(config, encode=dataclasses.replace(config.encode, max_episodes=num))


def test_only_the_first_recordings_are_read_and_a_part_is_never_the_whole(folder, tmp_path, monkeypatch):
    read, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: read.append(path.name) or real(path))
    root = tmp_path / "cache"
    part = encode(folder, root, first(3))
    assert sorted(read_episodes(part, root)) == ["a0", "a1", "b0"]
    assert sorted(read) == ["a.tar", "b.tar"], "b.tar is the part of it; c.tar is not looked at"
    assert part.manifest.notes[0].startswith(
        "encode.max_episodes is 3: only the first 3 recordings are in here; 1 of 3"
    )
    assert "note: encode.max_episodes is 3" in describe_result(part, CacheRoot(root))
    assert (part.num_units, part.num_encoded) == (2, 2)
    again = encode(folder, root, first(3))
    assert again.manifest == part.manifest and again.num_encoded == 0 and len(read) == 2

    whole = encode(folder, root)
    assert sorted(read_episodes(whole, root)) == ["a0", "a1", "b0", "b1", "c0"]
    assert whole.num_encoded == 2, "a.tar was whole already"
    parts, wholes = ({entry.unit_digest for entry in result.manifest.entries} for result in (part, whole))
    assert len(parts & wholes) == 1
    assert not [note for note in whole.manifest.notes if "max_episodes" in note]
    assert whole.manifest.fingerprint == part.manifest.fingerprint


def test_more_than_there_are_is_everything(folder, tmp_path):
    everything = encode(folder, tmp_path / "cache")
    assert encode(folder, tmp_path / "cache", first(5)).manifest == everything.manifest


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "all"])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="max_episodes"):
        load_config(SUITE_SETTINGS, [f"encode.max_episodes={value}"])
