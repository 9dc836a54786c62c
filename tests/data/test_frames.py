"""Claims of data/frames.py: the frames of windows are the ones that their steps were made of, whatever folders are called now.

What cannot be shown is said.
"""

import shutil

import numpy as np
import pytest

from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.episodes import Dataset
from jepa_cache.data.frames import read_frames
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.media.video import open_video
from jepa_cache.sources import take_key
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.root import CacheRoot
from tests.caches import TICKS_PER_STEP, make_recorded
from tests.encoded import tiniest_config
from tests.sources import examples


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return make_recorded(tmp_path_factory.mktemp("frames"), 3)


def test_frames_of_windows_that_overlap_are_those_of_their_steps_in_any_order(recorded):
    cache, tar, videos = recorded
    assert read_frames(cache.config, cache.dataset, cache.dataset.segments[:1]) == [None], "not yet on this machine"
    DigestTable().digest_unit([tar])
    runs = []
    for segment in cache.dataset.segments:
        runs += [segment._replace(start=segment.start + a, stop=segment.start + b) for a, b in ((5, 9), (2, 7), (5, 9))]
    runs = runs[::-1]
    starts = {segment.episode: segment.start for segment in cache.dataset.segments}
    for run, frames in zip(runs, read_frames(cache.config, cache.dataset, runs), strict=True):
        with open_video(videos[run.episode]) as video:
            expected = video.read((np.arange(run.start, run.stop) - starts[run.episode]) * TICKS_PER_STEP)
        np.testing.assert_array_equal(frames, expected)
    assert read_frames(cache.config, cache.dataset, [Segment(0, "nobody", 0, 4)]) == [None], "its unit does not hold it"


def encode(config, folder, cache):
    """What is encoded below a folder, opened, and how many units the encoder ran for."""
    root = CacheRoot(cache)
    result = encode_dataset(config, [str(folder)], base=folder, root=root)
    return Dataset(CachedDataset(result.manifest, root), config), result


def read_all(dataset):
    keys = dataset.keys()
    found = {key: dataset.frames(key) for key in keys}
    assert all(run is not None for runs in found.values() for run in runs), "on this machine"
    return {key: np.concatenate(runs) for key, runs in found.items()}


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("name", ["mp4_json", "droid_raw"])
def test_frames_are_found_after_a_folder_was_renamed_and_after_a_copy_came_and_went(tmp_path, name, size):
    (example, *_), config = getattr(examples, name)().values(), tiniest_config(name, episodes_per_unit=size)
    monday, tuesday, backup = (tmp_path / "in" / day for day in ("monday", "tuesday", "backup"))
    example.write(monday, range(3))
    first = read_all(encode(config, tmp_path / "in", tmp_path / "cache")[0])
    assert len(first) == 3
    monday.rename(tuesday)
    renamed, result = encode(config, tmp_path / "in", tmp_path / "cache")
    assert result.num_encoded == 0
    shutil.copytree(tuesday, backup)
    for entry in renamed.cached.manifest.entries:
        there = DigestTable().find_unit(entry.unit_digest)
        DigestTable().digest_unit([backup / file.relative_to(tuesday) for file in there])
    shutil.rmtree(backup)
    found = read_all(renamed)
    assert found.keys() == first.keys(), "a cache keeps the first names"
    for key in first:
        np.testing.assert_array_equal(found[key], first[key])


def write_two_days(folder):
    """Recordings of one name in two folders, so that only their order tells them apart."""
    (example,) = examples.mp4_json().values()
    for seed, day in enumerate(("monday", "tuesday")):
        example.write(folder / day, [seed])
        for file in sorted((folder / day).iterdir()):
            file.rename(file.with_stem("ep00"))
    example.write(folder / "tuesday", [2])


def test_recordings_of_one_name_in_a_joined_unit_are_told_apart_by_their_order_when_names_moved_on(tmp_path):
    config, folder = tiniest_config("mp4_json", episodes_per_unit=64), tmp_path / "in"
    write_two_days(folder)
    dataset, result = encode(config, folder, tmp_path / "cache")
    assert len(result.manifest.entries) == 1
    first = read_all(dataset)
    assert not np.array_equal(first["monday/ep00"], first["tuesday/ep00"])
    (folder / "tuesday").rename(folder / "wednesday")
    (folder / "monday").rename(folder / "tuesday")
    moved, result = encode(config, folder, tmp_path / "cache")
    assert result.num_encoded == 0 and len(result.manifest.entries) == 1
    for key, frames in read_all(moved).items():
        np.testing.assert_array_equal(frames, first[key])


def test_where_a_skipped_recording_has_the_name_the_whole_key_decides_and_nothing_is_guessed():
    left = ["monday/ep00", "monday/ep01"]
    assert take_key("tuesday/ep00", left, ["sunday/ep00"]) is None and len(left) == 2
    assert take_key("tuesday/ep01", left, ["sunday/ep00"]) == "monday/ep01" and left == []
    left = ["monday/ep00", "monday/ep01"]
    assert take_key("monday/ep00", left, ["sunday/ep00"]) == "monday/ep00" and left == ["monday/ep01"]
