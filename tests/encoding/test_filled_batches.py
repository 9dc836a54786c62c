"""Claims: with `encode.fill_batches` every batch of a unit but its last is full, and nothing else about its store is another.

Episodes of several lengths, one of them bad; bits, where a processor's products give others for another number of rows, within those of float16.
"""

import dataclasses
import shutil

import numpy as np
import pytest

from jepa_cache.encoder import frozen
from jepa_cache.encoding.verification import compare_online
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.root import CacheRoot
from tests.encoded import (
    BATCH,
    STRIDE,
    all_files,
    encode,
    make_tars,
    read_everything,
    same_numbers,
    tiny_config,
)
from tests.makers import make_rows, make_video, make_vpt_pair, to_jsonl, write_vpt_tar
from tests.videos import damage_packet

LENGTHS = {"a": [61, 17, 130, 44], "b": [52]}  # frames; every fourth is sampled
MODES = {"frame": 1, "tubelet": 2, "clip": 4}  # frames of an input
FILLED = {"fill_batches": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    names = {tar: {f"{tar}{length}": length for length in lengths} for tar, lengths in LENGTHS.items()}
    return make_tars(tmp_path_factory.mktemp("recordings"), names)


@pytest.fixture
def sizes(monkeypatch):
    """How many inputs each batch had that the encoder was given."""
    real, seen = frozen.FrozenEncoder.encode, []
    monkeypatch.setattr(frozen.FrozenEncoder, "encode", lambda self, it: seen.append(len(it)) or real(self, it))
    return seen


def cut(count):
    return [min(BATCH, count - start) for start in range(0, count, BATCH)]


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_filled_within_a_unit_and_the_store_is_the_same(folder, tmp_path, sizes, mode):
    config, numbers = tiny_config(mode=mode, frames_per_clip=4), []
    inputs = {tar: [-(-length // STRIDE) // MODES[mode] for length in lengths] for tar, lengths in LENGTHS.items()}
    for settings, expected in (
        ({}, [size for counts in inputs.values() for count in counts for size in cut(count)]),
        (FILLED, [size for counts in inputs.values() for size in cut(sum(counts))]),
    ):
        sizes.clear()
        config = dataclasses.replace(config, encode=dataclasses.replace(config.encode, **settings))
        result = encode(folder, root := tmp_path / f"cache{len(numbers)}", config)
        assert sorted(sizes) == sorted(expected)  # stage one takes units in the order of their digests
        numbers.append((result.manifest, read_everything(CacheRoot(root), result.manifest)))
    (plain, one), (filled, other) = numbers
    assert plain.fingerprint == filled.fingerprint and one.keys() == other.keys()
    for name in one:
        if name.endswith(" tokens"):
            assert np.abs(one[name].astype(np.float32) - other[name]).max() <= 2e-3, name
        else:
            assert same_numbers(one[name], other[name]), name


def test_a_bad_video_between_others_is_taken_back_with_what_waited_of_it(tmp_path):
    pairs = {name: make_vpt_pair(length, seed) for seed, (name, length) in enumerate({"x": 45, "z": 70}.items())}
    video = make_video(150, 7)
    for number in range(120, 130):  # noise may by chance be a picture
        video = damage_packet(video, number, seed=number)
    write_vpt_tar(tmp_path / "whole/a.tar", pairs)
    write_vpt_tar(
        tmp_path / "with/a.tar", {"x": pairs["x"], "y": (video, to_jsonl(make_rows(150, 7))), "z": pairs["z"]}
    )
    config = tiny_config(**FILLED, max_skipped_share=0.5)
    whole, found = (encode(tmp_path / it, tmp_path / f"{it}-cache", config) for it in ("whole", "with"))
    assert [it["key"] for it in found.manifest.skipped] == ["y"] and found.timing.num_frames > whole.timing.num_frames
    one, other = (
        read_everything(CacheRoot(tmp_path / f"{it}-cache"), result.manifest)
        for it, result in (("whole", whole), ("with", found))
    )
    assert np.abs(one["0 tokens"].astype(np.float32) - other["0 tokens"]).max() <= 2e-3
    assert all(same_numbers(one[name], other[name]) for name in one if name not in ("0 tokens", "segments"))


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_s_bytes_depend_on_it_alone_and_encoding_again_compares_batches_of_the_same_size(
    folder, tmp_path, sizes, mode
):
    config = tiny_config(mode=mode, frames_per_clip=4, **FILLED)
    result = encode(folder, root := tmp_path / "cache", config)
    made = set(sizes)
    before, cache = all_files(root), CacheRoot(root)
    for entry in result.manifest.entries:  # as after a kill: the others stay
        store = cache.tokens(result.manifest.fingerprint, entry.unit_digest)
        assert read_store_file(store).provenance["fill_batches"] is True
        shutil.rmtree(store)
        assert encode(folder, root, config).num_encoded == 1 and all_files(root) == before
    plain = dataclasses.replace(config, encode=dataclasses.replace(config.encode, fill_batches=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "cache-state"))
        sizes.clear()
        found = compare_online(result.manifest, plain, [str(folder)], cache, base=folder, num_steps=1000, seed=0)
    assert len(found.steps) == result.manifest.num_steps and found.describe()["bit_equal"] and not found.changes
    assert set(sizes) == made
