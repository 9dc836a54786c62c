"""Claims of encode.max_units: the first units and no others are read, hashed and encoded; the manifest says so; the whole finds them again."""

import dataclasses

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from jepa_cache.encoding.run import describe_result
from jepa_cache.store import digests
from jepa_cache.store.root import CacheRoot
from tests.encoded import encode, make_tiny_tar, tiniest_config
from tests.workspace import SUITE_SETTINGS


def first(num):
    config = tiniest_config()
    return dataclasses.replace(config, encode=dataclasses.replace(config.encode, max_units=num))


def test_only_the_first_units_are_read_and_the_whole_data_set_finds_them_again(tmp_path, monkeypatch):
    folder, root = tmp_path / "in", tmp_path / "cache"
    for seed, name in enumerate("abc"):
        make_tiny_tar(folder, name, seed)
    read, real = [], digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: read.append(path.name) or real(path))
    part = encode(folder, root, first(2))
    assert part.num_encoded == 2 and {name for name in read if name.endswith(".tar")} == {"a.tar", "b.tar"}
    assert part.manifest.notes == ("encode.max_units is 2: 1 of 3 units were not read",)
    assert "note: encode.max_units is 2" in describe_result(part, CacheRoot(root))
    whole = encode(folder, root, first(3))
    assert whole.num_encoded == 1 and not whole.manifest.notes
    assert whole.manifest.to_bytes() == encode(folder, root, first(None)).manifest.to_bytes()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_that_cannot_be_is_refused(value):
    with pytest.raises(ConfigError, match="max_units"):
        load_config(SUITE_SETTINGS, [f"encode.max_units={value}"])


def test_the_old_key_names_the_new_one(tmp_path):
    with pytest.raises(ConfigError, match="max_units"):
        load_config(SUITE_SETTINGS, ["encode.max_episodes=3"])
