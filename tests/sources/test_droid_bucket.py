"""Claims: a TFDS directory in a bucket is read like its copy on disk, is known by the same digests."""

import numpy as np
import pytest

from jepa_cache.encoding.units import digest_units
from jepa_cache.media.remote import downloads_folder
from jepa_cache.sources import build_source
from tests.droid_makers import CAMERAS, decode, droid_features, make_episode, to_example, to_jpeg, write_tfds
from tests.media.fake_bucket import serve

PLACE = "robotics/droid_100/1.0.0"
URL = f"gs://data/{PLACE}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    examples = []
    for seed in range(3):
        episode = make_episode(seed, 12)
        pictures = [to_jpeg(frame) for frame in decode(episode.videos["exterior_1"])]
        examples.append(to_example(episode, dict.fromkeys(CAMERAS, pictures)))
    root = tmp_path_factory.mktemp("rlds") / "1.0.0"
    return write_tfds(root, droid_features((48, 64), extras=False), [examples[:2], examples[2:]])


@pytest.fixture
def bucket(folder):
    with serve() as running:
        running.files = {f"data/{PLACE}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        running.files[f"data/{PLACE}-copy/other"] = b"x"
        yield running


def read(units, source):
    return [episode for unit in units for episode in source.iter_episodes(unit)]


def test_a_directory_in_a_bucket_gives_the_episodes_and_digests_of_its_copy(bucket, folder, tmp_path):
    source = build_source("droid_rlds", {})
    local, remote = source.list_units([str(folder)], tmp_path), source.list_units([URL], tmp_path)
    assert [digest for _, digest in digest_units(local).units] == [digest for _, digest in digest_units(remote).units]
    assert [unit.num_bytes for unit in local] == [unit.num_bytes for unit in remote]
    for one, other in zip(read(local, source), read(remote, source), strict=True):
        assert (one.key, one.video) == (other.key, other.video)
        assert all(np.array_equal(column, other.controls[name]) for name, column in one.controls.items())
    shards = [key for key in bucket.files if "tfrecord" in key]
    assert [len(bucket.gets(key)) for key in shards] == [1, 1]


def test_listing_fetches_no_shard(bucket, tmp_path):
    units = build_source("droid_rlds", {}).list_units([URL], tmp_path)
    assert [[file.name for file in unit.files] for unit in units] == [
        [f"r2d2_faceblur-train.tfrecord-0000{index}-of-00002", "features.json"] for index in range(2)
    ]
    assert not downloads_folder().exists()


@pytest.mark.parametrize("last", ["*-00001-of-*", "r2d2_faceblur-train.tfrecord-{00001..00001}-of-00002"])
def test_some_shards_are_named_by_glob_or_range(bucket, tmp_path, capsys, last):
    source = build_source("droid_rlds", {})
    (episode,) = read(source.list_units([f"{URL}/{last}"], tmp_path), source)
    assert episode.key.endswith("made-2")
    assert "holds 1 of the 2 tfrecord shards" in capsys.readouterr().out


def test_what_is_no_bucket_or_not_there_is_named_with_the_way_out(bucket, tmp_path):
    source = build_source("droid_rlds", {})
    with pytest.raises(ValueError, match=r"gsutil -m cp -r gs://data/robotics/droid_1 DIR"):
        source.list_units(["gs://data/robotics/droid_1"], tmp_path)
    with pytest.raises(ValueError, match="only gs://bucket/folder is read"):
        source.list_units(["s3://data/droid"], tmp_path)
    del bucket.files[f"data/{PLACE}/features.json"]
    with pytest.raises(ValueError, match=r"no features\.json"):
        source.list_units([URL], tmp_path)
