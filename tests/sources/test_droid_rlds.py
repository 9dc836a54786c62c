"""Claims of sources/droid_rlds.py and tfrecords.py.

Every step of a TFDS directory becomes a frame with its row, without TensorFlow and without touching other cameras; a directory in a
bucket is read like its copy on disk; other robots are read by a key map; damage is named and costs no more than it must; nothing
hostile is run or allocated.
"""

import json
import struct
import sys

import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.encoding.units import UnitDigester
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.remote import downloads_folder
from jepa_cache.media.video import open_video
from jepa_cache.poses import CAMERA_CONTROLS, COMMAND_CONTROLS, POSE_CONTROLS
from jepa_cache.sources import build_source
from jepa_cache.sources.parsers.tfrecords import MAX_RECORD_BYTES, mask_crc32c
from tests.droid_makers import (
    CAMERAS,
    REAL_BRIDGE,
    decode,
    droid_features,
    frame_record,
    make_episode,
    to_example,
    to_jpeg,
    write_tfds,
)
from tests.media.fake_bucket import serve

BRIDGE = {
    "camera": "main",
    "cameras": {"main": "steps/observation/image_0"},
    "pose": ["steps/observation/state"],
    "command": [],
    "joint_velocity_command": None,
    "success": None,
    "episode_key": ["episode_metadata/file_path", "episode_metadata/episode_id"],
    "gripper_one_is": "open",
    "native_hz": 5.0,
}


def to_images(episode):
    return {camera: [to_jpeg(frame) for frame in decode(video)] for camera, video in episode.videos.items()}


def read(folder, **options):
    source = build_source("droid_rlds", options)
    return [result for unit in source.list_units([str(folder)], folder) for result in source.iter_episodes(unit)]


def stack(episode, names):
    return np.stack([episode.controls[name] for name in names], axis=1)


@pytest.fixture(scope="module")
def recorded():
    return [make_episode(seed, 20 + seed, success=seed != 1) for seed in range(3)]


@pytest.fixture(scope="module")
def images(recorded):
    return [to_images(episode) for episode in recorded]


@pytest.fixture(scope="module")
def examples(recorded, images):
    return [to_example(*pair) for pair in zip(recorded, images, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, examples):
    root = tmp_path_factory.mktemp("rlds") / "droid_100" / "1.0.0"
    return write_tfds(root, droid_features((48, 64)), [examples[:2], examples[2:]])


@pytest.fixture
def copy(tmp_path, examples):
    return write_tfds(tmp_path / "1.0.0", droid_features((48, 64)), [examples])


def test_every_step_is_a_frame_with_its_row(folder, recorded):
    episodes = read(folder)
    assert [episode.key for episode in episodes] == [
        f"ILIAD/{'failure' if seed == 1 else 'success'}/2023-04-21/made-{seed}" for seed in range(3)
    ]
    for episode, source in zip(episodes, recorded, strict=True):
        # A tf.train.Example has no float64: float32 is all that a shard holds.
        np.testing.assert_array_equal(stack(episode, POSE_CONTROLS), source.poses.astype(np.float32))
        np.testing.assert_array_equal(stack(episode, COMMAND_CONTROLS), source.commands.astype(np.float32))
        np.testing.assert_array_equal(episode.frame_ticks, np.arange(len(source.poses)))
        assert episode.num_video_frames == len(source.poses) and episode.fps == 15.0
        assert (episode.controls["success"] == source.success).all()
        assert 0 < episode.controls["idle"].sum() < len(source.poses)
    turned = read(folder, gripper_one_is="open")[0].controls
    for names in (POSE_CONTROLS, COMMAND_CONTROLS):
        expected = stack(episodes[0], names)
        expected[:, -1] = 1 - expected[:, -1]
        np.testing.assert_array_equal(np.stack([turned[name] for name in names], axis=1), expected)


def test_frames_are_the_pictures_of_the_chosen_camera_and_others_may_hold_anything(tmp_path, folder, recorded, images):
    for camera in CAMERAS:
        assert read(folder, camera=camera)[0].video.frames == tuple(images[0][camera])
    broken = {**images[0], "wrist": [b"no picture"] * 20, "exterior_2": [b""] * 20}
    folder = write_tfds(tmp_path / "1", droid_features((48, 64)), [[to_example(recorded[0], broken)]])
    assert isinstance(read(folder)[0], Episode)
    assert "no JPEG or PNG" in read(folder, camera="wrist")[0].reason


def test_extrinsics_of_1_0_1_are_optional_and_belong_to_the_camera(tmp_path, folder, recorded, images):
    extrinsics = {
        name: np.arange(6) / 10 + i for i, name in enumerate(("wrist_cam", "exterior_cam_1", "exterior_cam_2"))
    }
    example = to_example(recorded[0], images[0], extrinsics=extrinsics)
    newer = write_tfds(tmp_path / "1.0.1", droid_features((48, 64), extras=True), [[example]])
    for camera, name in (("exterior_1", "exterior_cam_1"), ("exterior_2", "exterior_cam_2")):
        (episode,) = read(newer, camera=camera)
        np.testing.assert_array_equal(
            stack(episode, CAMERA_CONTROLS), np.tile(extrinsics[name].astype(np.float32), (20, 1))
        )
    get_action_space("pose7_camera").aggregate(episode.controls, np.arange(0, 20, 4))
    assert "ext_x_m" not in read(newer, camera="wrist")[0].controls
    assert "ext_x_m" not in read(folder)[0].controls


@pytest.mark.skipif(not REAL_BRIDGE.exists(), reason="no real recordings in ../shared/data/other")
def test_the_real_bridge_directory_is_read_by_a_key_map():
    episodes = read(REAL_BRIDGE, **BRIDGE)
    assert len(episodes) == 25 == len({episode.key for episode in episodes})
    assert {(tuple(it.controls), it.num_video_frames, it.fps) for it in episodes} == {(POSE_CONTROLS, 10, 5.0)}
    with open_video(episodes[0].video) as video:
        frames = video.read(np.arange(10))
    assert frames.shape == (10, 64, 64, 3) and len({frame.tobytes() for frame in frames}) > 5


PLACE = "robotics/droid_100/1.0.0"
URL = f"gs://data/{PLACE}"


@pytest.fixture
def bucket(folder):
    with serve() as running:
        running.files = {f"data/{PLACE}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        running.files[f"data/{PLACE}-copy/other"] = b"x"
        yield running


def test_a_directory_in_a_bucket_gives_the_episodes_and_digests_of_its_copy(bucket, folder, tmp_path, capsys):
    source = build_source("droid_rlds", {})
    local, remote = source.list_units([str(folder)], tmp_path), source.list_units([URL], tmp_path)
    assert not downloads_folder().exists() and not capsys.readouterr().out, (
        "listing fetches no shard, and none is missing"
    )
    assert [[file.name for file in unit.files] for unit in remote] == [
        [f"r2d2_faceblur-train.tfrecord-0000{index}-of-00002", "features.json"] for index in range(2)
    ]
    digests = [[unit.digest for unit in UnitDigester()(units).units] for units in (local, remote)]
    assert digests[0] == digests[1] and [unit.num_bytes for unit in local] == [unit.num_bytes for unit in remote]
    for here, there in zip(local, remote, strict=True):
        assert source.list_units([str(here.path)], tmp_path) == [here]
        for one, other in zip(source.iter_episodes(here), source.iter_episodes(there), strict=True):
            assert (one.key, one.video) == (other.key, other.video)
            assert all(np.array_equal(column, other.controls[name]) for name, column in one.controls.items())
    assert [len(bucket.gets(key)) for key in bucket.files if "tfrecord" in key] == [1, 1]
    assert "tensorflow" not in sys.modules
    capsys.readouterr()
    for last in ("*-00001-of-*", "r2d2_faceblur-train.tfrecord-{00001..00001}-of-00002"):
        assert source.list_units([f"{URL}/{last}"], tmp_path) == remote[1:]
        assert "holds 1 of the 2 tfrecord shards" in capsys.readouterr().out


def test_inputs_without_shards_are_refused_with_the_way_out(bucket, folder, tmp_path):
    source = build_source("droid_rlds", {})
    lone = tmp_path / "x-train.tfrecord-00000-of-00001"
    lone.write_bytes(b"")
    del bucket.files[f"data/{PLACE}/features.json"]
    for given, words in (
        ("gs://data/robotics/droid_1", r"gsutil -m cp -r gs://data/robotics/droid_1 DIR"),
        ("s3://data/droid", "only gs://bucket/folder is read"),
        (URL, r"features\.json: there is nothing there"),
        (str(lone), r"no features\.json"),
    ):
        with pytest.raises(ValueError, match=words):
            source.list_units([given], tmp_path)
    with pytest.raises(ValueError, match="its splits are train"):
        build_source("droid_rlds", {"split": "val"}).list_units([str(folder)], tmp_path)


def test_wrong_options_are_refused_with_the_nearest_names_and_the_recipe_knows_its_camera_alone(folder):
    near = r"no feature 'steps/observation/cartesian_positon'.*; did you mean 'steps/observation/cartesian_position'"
    far = r"no feature 'zz', 'e/qq'.*; known: .*steps/observation/wrist_image_left"
    for options, message in (
        ({"camera": "wirst"}, "did you mean 'wrist'"),
        ({"native_hz": 0.0}, "native_hz must be above 0"),
        ({"cameras": {"exterior_1": "episode_metadata/file_path"}}, "cameras are features of steps/"),
        ({"success": "steps/is_last"}, "of the episode; got 'steps/is_last'"),
        ({"pose": ["steps/observation/cartesian_positon"]}, near),
        ({"command": [], "pose": ["zz"], "episode_key": ["e/qq"]}, far),
    ):
        with pytest.raises(ValueError, match=message):
            read(folder, **options)
    one, other = (build_source("droid_rlds", {"camera": camera}).recipe for camera in ("exterior_1", "wrist"))
    assert one["cameras"] == "steps/observation/exterior_image_1_left" and other["extrinsics"] is None
    assert one["extrinsics"] == "episode_metadata/extrinsics_exterior_cam_1"


def first_end(data):
    return 16 + struct.unpack_from("<Q", data)[0]


def without_a_gripper_row(data):
    """The first record, with a row less of one of its features."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(data[12 : first_end(data) - 4])
    del example.features.feature["steps/observation/gripper_position"].float_list.value[-1]
    return frame_record(example.SerializeToString()) + data[first_end(data) :]


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def with_length(length):
    """The first record, and a second one of this length."""
    header = struct.pack("<Q", length)
    header += struct.pack("<I", mask_crc32c(header))
    return lambda data: data[: first_end(data)] + header + data[first_end(data) + 12 :]


CUT = {f"cut off by {cut}": (lambda data, cut=cut: data[:-cut], "EES", "cut off") for cut in (1, 4, 1000)}
LENGTHS = (MAX_RECORD_BYTES + 1, 10_000_000)
DAMAGE = {
    "a flipped bit": (lambda data: flip(data, 200), "SEE", "record 0 does not match"),
    "a flipped length": (lambda data: flip(data, first_end(data)), "ESS", "length of a record does not match"),
    **CUT,
    "one record only": (lambda data: data[: first_end(data)], "ESS", "dataset_info.json lists 3 records"),
    "one record and a bit": (lambda data: data[: first_end(data) + 20], "ESS", "cut off"),
    **{f"length {it}": (with_length(it), "ESS", f"states a length of {it} bytes") for it in LENGTHS},
    "text": (lambda data: b"not a record file, really", "SSS", "no TFRecord file: damaged from its first byte"),
    "a pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "SSS", "git lfs pull"),
    "no protobuf": (
        lambda data: frame_record(b"\xff" * 3) + data[first_end(data) :],
        "SEE",
        "does not fit features.json",
    ),
    "uneven": (without_a_gripper_row, "SEE", "different numbers of steps"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_costs_the_records_that_it_hits_and_each_listed_one_that_is_lost_is_one_loss(copy, kind):
    damage, kinds, words = DAMAGE[kind]
    (path,) = copy.glob("*.tfrecord-*")
    path.write_bytes(damage(path.read_bytes()))
    results = read(copy)
    assert "".join(type(result).__name__[0] for result in results) == kinds
    assert any(words in result.reason for result in results if isinstance(result, Skipped))
    assert kind == "uneven" or all(it.key.startswith(f"{path.name}#") for it in results if isinstance(it, Skipped))


def test_a_record_beyond_what_protobuf_takes_is_refused_even_where_the_file_is_as_long(copy):
    (path,) = copy.glob("*.tfrecord-*")
    data = path.read_bytes()
    with path.open("wb") as file:
        file.write(with_length(MAX_RECORD_BYTES + 1)(data))
        file.truncate(MAX_RECORD_BYTES + (1 << 20))  # sparse: takes no disk
    episode, problem, _ = read(copy)
    assert isinstance(episode, Episode) and f"no record is longer than {MAX_RECORD_BYTES}" in problem.reason


def test_the_checksum_is_the_masked_crc32c_of_the_format():
    crc = 0x8A9136AA  # the published vector: crc32c of 32 zero bytes
    assert mask_crc32c(bytes(32)) == (((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def test_two_episodes_of_one_name_are_not_mixed_up(tmp_path, examples):
    folder = write_tfds(tmp_path / "1", droid_features((48, 64)), [[examples[0], examples[0]]])
    episode, skipped = read(folder)
    assert isinstance(episode, Episode) and "the same name" in skipped.reason and skipped.key.endswith("#1")


def test_packed_numbers_are_read_unwanted_features_are_not_decoded_and_success_is_a_flag_or_text(
    tmp_path, monkeypatch, examples
):
    import zlib

    import tensorflow_datasets as tfds

    kinds = tfds.features
    features = droid_features((48, 64))
    step = dict(features["steps"].feature)
    step["action"] = kinds.Tensor(shape=(7,), dtype=np.float64, encoding="zlib")
    packed = kinds.Tensor(shape=(6,), dtype=np.float64, encoding="bytes")
    step["observation"] = kinds.FeaturesDict({**step["observation"], "cartesian_position": packed})
    flags = {"done": kinds.Scalar(np.bool_), "score": kinds.Scalar(np.int64)}
    metadata = {**features["episode_metadata"], **flags}
    changed = kinds.FeaturesDict({"steps": kinds.Dataset(step), "episode_metadata": kinds.FeaturesDict(metadata)})
    example = {**examples[0], "episode_metadata": {**examples[0]["episode_metadata"], "done": False, "score": 1}}
    folder = write_tfds(tmp_path / "packed", changed, [[example]])
    monkeypatch.setattr(zlib, "decompress", lambda *_: pytest.fail("a compressed feature was decoded"))
    (episode,) = read(folder, success="episode_metadata/done")
    expected = [row["observation"]["cartesian_position"][0] for row in examples[0]["steps"]]
    np.testing.assert_array_equal(episode.controls["x_m"], expected)  # float64, for once
    assert not episode.controls["success"].any()
    (skipped,) = read(folder, success="episode_metadata/score")
    assert "success must be a text, or true or false" in skipped.reason


def test_a_features_file_cannot_have_a_module_imported_or_fill_the_memory(copy, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = copy / "features.json"
    original = path.read_text()
    for key in ("pythonClassName", "python_class_name", "type"):
        tree = json.loads(original)
        inner = tree["featuresDict"]["features"]["episode_metadata"]["featuresDict"]["features"]["file_path"]
        inner.pop("pythonClassName")
        inner[key] = "evil_module.Text"
        path.write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=r"names the class 'evil_module\.Text'"):
            read(copy)
    assert not (tmp_path / "ran").exists() and "evil_module" not in sys.modules
    path.write_text(original.replace('"encoding": "none"', '"encoding": "zlib"'))
    with pytest.raises(ValueError, match="is stored compressed"):
        read(copy)
    for broken in (path, copy / "dataset_info.json"):
        for content in ("{", "[" * 200_000):
            broken.write_text(content)
            with pytest.raises(ValueError, match=broken.name):
                read(copy)
        path.write_text(original)
