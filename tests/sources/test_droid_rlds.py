"""Claims of sources/droid_rlds.py and _tfrecords.py.

Every step of a TFDS directory becomes a frame with its row, without TensorFlow and without touching other cameras; other
robots are read by a key map; damage is named and costs no more than it must; nothing hostile is run or allocated.
"""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jepa_cache.actions import get_action_space
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.poses import CAMERA_CONTROLS, COMMAND_CONTROLS, POSE_CONTROLS
from jepa_cache.sources import build_source
from jepa_cache.sources.parsers.tfrecords import MAX_RECORD_BYTES, iter_records, mask_crc32c
from tests.droid_makers import (
    CAMERAS,
    REAL_BRIDGE,
    REAL_DROID,
    decode,
    droid_features,
    frame_record,
    make_episode,
    read_real,
    to_example,
    to_jpeg,
    write_tfds,
)

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
    return write_tfds(root, droid_features((48, 64), extras=False), [examples[:2], examples[2:]])


@pytest.fixture
def copy(tmp_path, examples):
    return write_tfds(tmp_path / "1.0.0", droid_features((48, 64), extras=False), [examples])


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
        assert episode.controls["success"].dtype == bool and episode.controls["idle"].dtype == np.float32
        assert 0 < episode.controls["idle"].sum() < len(source.poses)


@pytest.mark.parametrize("camera", CAMERAS)
def test_frames_are_the_pictures_of_the_chosen_camera(folder, images, camera):
    episode = read(folder, camera=camera)[0]
    assert episode.video.frames == tuple(images[0][camera])
    with open_video(episode.video) as video:
        assert video.decoder == "pillow"
        assert video.read(np.array([0, 19])).shape == (2, 48, 64, 3)


def test_other_cameras_may_hold_anything(tmp_path, recorded, images):
    broken = {**images[0], "wrist": [b"no picture"] * 20, "exterior_2": [b""] * 20}
    folder = write_tfds(tmp_path / "1", droid_features((48, 64), extras=False), [[to_example(recorded[0], broken)]])
    (episode,) = read(folder)
    assert isinstance(episode, Episode)
    (skipped,) = read(folder, camera="wrist")
    assert "no JPEG or PNG" in skipped.reason


def test_extrinsics_of_1_0_1_are_optional_and_belong_to_the_camera(tmp_path, folder, recorded, images):
    extrinsics = {
        name: np.arange(6) / 10 + i for i, name in enumerate(("wrist_cam", "exterior_cam_1", "exterior_cam_2"))
    }
    example = to_example(recorded[0], images[0], extrinsics=extrinsics)
    newer = write_tfds(tmp_path / "1.0.1", droid_features((48, 64), extras=True), [[example]], name="droid_101")
    for camera, name in (("exterior_1", "exterior_cam_1"), ("exterior_2", "exterior_cam_2")):
        (episode,) = read(newer, camera=camera)
        np.testing.assert_array_equal(
            stack(episode, CAMERA_CONTROLS), np.tile(extrinsics[name].astype(np.float32), (20, 1))
        )
    get_action_space("pose7_camera").aggregate(episode.controls, np.arange(0, 20, 4))
    assert "ext_x_m" not in read(newer, camera="wrist")[0].controls
    assert "ext_x_m" not in read(folder)[0].controls


@pytest.mark.skipif(not REAL_DROID.exists(), reason="no real recordings in ../shared/data/droid")
def test_real_episodes_follow_the_official_action_rule_over_their_jumps_of_2_pi(tmp_path):
    real = [episode.thin(3) for episode in read_real(3)]
    examples = [to_example(episode, to_images(episode)) for episode in real]
    folder = write_tfds(tmp_path / "1.0.0", droid_features((192, 320), extras=False), [examples])
    episodes = read(folder, native_hz=5.0)
    assert sum(int((np.abs(np.diff(episode.poses[:, 3])) > np.pi).sum()) for episode in real) > 0, "no jump to test"
    for episode, source in zip(episodes, real, strict=True):
        anchors = np.arange(0, len(source.poses), 2)
        poses = source.poses[anchors]
        rotations = Rotation.from_euler("xyz", poses[:, 3:6])
        expected = np.diff(poses, axis=0)
        expected[:, 3:6] = (rotations[1:] * rotations[:-1].inv()).as_euler("xyz")
        result = get_action_space("pose7").aggregate(episode.controls, anchors)
        np.testing.assert_allclose(result.actions, expected, atol=1e-6)  # float32
        assert np.abs(result.actions[:, 3:6]).max() < 1.0
        commanded = get_action_space("droid_command7").aggregate(episode.controls, anchors).actions
        assert np.abs(commanded[:, :6]).max() < 1.0, "commands lead by a fraction of a second, never by a turn"
        with open_video(episode.video) as video:
            assert video.read(np.array([0, episode.num_video_frames - 1])).shape == (2, 192, 320, 3)


@pytest.mark.skipif(not REAL_BRIDGE.exists(), reason="no real recordings in ../shared/data/other")
def test_the_real_bridge_directory_is_read_by_a_key_map():
    episodes = read(REAL_BRIDGE, **BRIDGE)
    assert len(episodes) == 25 == len({episode.key for episode in episodes})
    for episode in episodes:
        assert set(episode.controls) == set(POSE_CONTROLS)
        assert (episode.num_video_frames, episode.fps) == (10, 5.0)
        with open_video(episode.video) as video:
            frames = video.read(np.arange(10))
        assert frames.shape == (10, 64, 64, 3) and len({frame.tobytes() for frame in frames}) > 5
    get_action_space("pose7").aggregate(episodes[0].controls, np.arange(10))
    as_recorded = read(REAL_BRIDGE, **{**BRIDGE, "gripper_one_is": "closed"})[0].controls
    np.testing.assert_array_equal(episodes[0].controls["gripper"], 1 - as_recorded["gripper"])
    np.testing.assert_array_equal(episodes[0].controls["z_m"], as_recorded["z_m"])


def test_tensorflow_is_never_imported(folder):
    code = (
        "import sys; from pathlib import Path; from jepa_cache.sources import build_source\n"
        "source = build_source('droid_rlds', {})\n"
        f"units = source.list_units([{str(folder)!r}], Path('.'))\n"
    )
    code += "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules\n"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).returncode == 0
    read(folder)
    assert "tensorflow" not in sys.modules


def test_a_unit_is_a_shard_with_the_features_and_others_do_not_change_it(folder, tmp_path, capsys):
    source = build_source("droid_rlds", {})
    units = source.list_units(["droid_100"], folder.parents[1])
    assert [[path.name for path in unit.files] for unit in units] == [
        [f"r2d2_faceblur-train.tfrecord-0000{index}-of-00002", "features.json"] for index in range(2)
    ]
    assert not capsys.readouterr().out
    (one,) = source.list_units([str(units[1].files[0])], tmp_path)
    assert one == units[1]
    assert "holds 1 of the 2 tfrecord shards" in capsys.readouterr().out
    assert [episode.key for episode in source.iter_episodes(one)] == ["ILIAD/success/2023-04-21/made-2"]


def test_inputs_without_shards_are_refused(folder, tmp_path):
    source = build_source("droid_rlds", {"split": "val"})
    with pytest.raises(ValueError, match="its splits are train"):
        source.list_units([str(folder)], tmp_path)
    lone = tmp_path / "x-train.tfrecord-00000-of-00001"
    lone.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no features\.json"):
        build_source("droid_rlds", {}).list_units([str(lone)], tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"camera": "wirst"}, "did you mean 'wrist'"),
        ({"gripper_one_is": "up"}, "closed or open"),
        ({"native_hz": 0.0}, "positive"),
        ({"camara": "wrist"}, "did you mean 'camera'"),
        ({"cameras": {"exterior_1": "episode_metadata/file_path"}}, "cameras are features of steps/"),
        ({"success": "steps/is_last"}, "of the episode; got 'steps/is_last'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_source("droid_rlds", options)


def test_a_feature_that_is_not_there_names_the_nearest(folder):
    with pytest.raises(ValueError, match="did you mean 'steps/observation/cartesian_position'"):
        read(folder, pose=["steps/observation/cartesian_positon"])


def test_all_features_that_are_not_there_are_named_at_once_with_those_that_are(folder):
    with pytest.raises(
        ValueError,
        match=r"no feature 'steps/zz'.*, 'episode_metadata/qq' .*; it has .*steps/observation/wrist_image_left",
    ):
        read(folder, command=[], pose=["steps/zz"], episode_key=["episode_metadata/qq"])


def test_the_recipe_knows_its_camera_and_nothing_of_the_others(folder):
    one, other = (build_source("droid_rlds", {"camera": camera}).recipe for camera in ("exterior_1", "wrist"))
    assert one != other and one["cameras"] == "steps/observation/exterior_image_1_left"
    assert json.loads(json.dumps(one)) == one


def tf_example(data):
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(data)


def only_shard(folder):
    (path,) = folder.glob("*.tfrecord-*")
    return path, path.read_bytes()


def first_end(data):
    return 16 + struct.unpack_from("<Q", data)[0]


def test_a_flipped_bit_costs_one_episode(copy):
    path, data = only_shard(copy)
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    first, *others = read(copy)
    assert isinstance(first, Skipped) and "record 0 does not match its checksum" in first.reason
    assert [type(result) for result in others] == [Episode, Episode]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 1000])
def test_a_shard_that_was_cut_off_says_so_and_gives_what_is_whole(copy, cut):
    path, data = only_shard(copy)
    path.write_bytes(data[:-cut])
    results = read(copy)
    assert [type(result) for result in results[:2]] == [Episode, Episode]
    assert any("cut off" in result.reason for result in results[2:])


@pytest.mark.parametrize("content", [lambda data: data[: first_end(data)], lambda data: data[: first_end(data) + 20]])
def test_each_listed_record_that_a_short_shard_lacks_is_one_loss(copy, content):
    path, data = only_shard(copy)
    path.write_bytes(content(data))
    episode, *skipped = read(copy)
    assert isinstance(episode, Episode) and [loss.key for loss in skipped] == [f"{path.name}#1", f"{path.name}#2"]
    assert "dataset_info.json lists 3 records" in skipped[-1].reason


@pytest.mark.parametrize("length", [MAX_RECORD_BYTES + 1, 1 << 62, 10_000_000])
def test_a_monstrous_length_is_refused_before_anything_is_read(copy, length):
    path, data = only_shard(copy)
    end = first_end(data)
    header = struct.pack("<Q", length)
    path.write_bytes(data[:end] + header + struct.pack("<I", mask_crc32c(header)) + data[end + 12 :])
    episode, problem, *_ = read(copy)
    assert isinstance(episode, Episode) and f"states a length of {length} bytes" in problem.reason


def test_a_record_beyond_what_protobuf_takes_is_refused_even_where_the_file_is_as_long(copy):
    path, data = only_shard(copy)
    header = struct.pack("<Q", MAX_RECORD_BYTES + 1)
    with path.open("wb") as file:
        file.write(data[: first_end(data)] + header + struct.pack("<I", mask_crc32c(header)))
        file.truncate(MAX_RECORD_BYTES + (1 << 20))  # sparse: takes no disk
    episode, problem, _ = read(copy)
    assert isinstance(episode, Episode) and f"no record is longer than {MAX_RECORD_BYTES}" in problem.reason


def test_features_that_nobody_asked_for_are_not_decoded(tmp_path, monkeypatch, examples):
    import zlib

    import tensorflow_datasets as tfds

    features = droid_features((48, 64), extras=False)
    step = dict(features["steps"].feature)
    step["action"] = tfds.features.Tensor(shape=(7,), dtype=np.float64, encoding="zlib")
    metadata = features["episode_metadata"]
    features = tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})
    folder = write_tfds(tmp_path / "1", features, [examples[:1]])

    def refuse(*_):
        raise AssertionError("a compressed feature was decoded")

    monkeypatch.setattr(zlib, "decompress", refuse)
    (episode,) = read(folder)
    assert isinstance(episode, Episode)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a record file, really", "damaged from its first byte"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
    ],
)
def test_what_is_no_tfrecord_file_at_all_loses_every_listed_record_and_says_what_it_is(copy, content, words):
    path, _ = only_shard(copy)
    path.write_bytes(content)
    skipped = read(copy)
    assert [loss.key for loss in skipped] == [f"{path.name}#{index}" for index in range(3)]
    assert "no TFRecord file" in skipped[0].reason and words in skipped[0].reason


def test_the_checksum_is_the_masked_crc32c_of_the_format():
    # Published vector: crc32c of 32 zero bytes is 8a9136aa.
    crc = 0x8A9136AA
    assert mask_crc32c(bytes(32)) == (((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.skipif(not REAL_BRIDGE.exists(), reason="no real recordings in ../shared/data/other")
def test_the_records_of_a_file_that_tensorflow_wrote_pass_their_checksums():
    records = list(iter_records(next(REAL_BRIDGE.glob("*.tfrecord-*"))))
    assert len(records) == 25 and not any(record.problem for record in records)


def test_a_record_that_does_not_fit_the_features_is_skipped(copy):
    path, data = only_shard(copy)
    path.write_bytes(frame_record(b"\xff\xff\xff") + data[first_end(data) :])
    first, *others = read(copy)
    assert "does not fit features.json" in first.reason and len(others) == 2


def test_two_episodes_of_one_name_are_not_mixed_up(tmp_path, examples):
    folder = write_tfds(tmp_path / "1", droid_features((48, 64), extras=False), [[examples[0], examples[0]]])
    episode, skipped = read(folder)
    assert isinstance(episode, Episode) and "the same name" in skipped.reason


def test_features_of_different_lengths_are_not_brought_together(copy):
    path, data = only_shard(copy)
    end = first_end(data)
    example = tf_example(data[12 : end - 4])
    del example.features.feature["steps/observation/gripper_position"].float_list.value[-1]
    path.write_bytes(frame_record(example.SerializeToString()) + data[end:])
    first, *others = read(copy)
    assert isinstance(first, Skipped) and "different numbers of steps" in first.reason and len(others) == 2


def test_a_flag_of_success_counts_as_such_and_a_number_does_not(tmp_path, examples):
    import tensorflow_datasets as tfds

    features = droid_features((48, 64), extras=False)
    for kind, value in ((np.bool_, False), (np.int64, 1)):
        metadata = {**features["episode_metadata"], "done": tfds.features.Scalar(kind)}
        changed = tfds.features.FeaturesDict(
            {"steps": features["steps"], "episode_metadata": tfds.features.FeaturesDict(metadata)}
        )
        example = {**examples[0], "episode_metadata": {**examples[0]["episode_metadata"], "done": value}}
        folder = write_tfds(tmp_path / kind.__name__, changed, [[example]])
        (result,) = read(folder, success="episode_metadata/done")
        if kind is np.bool_:
            assert not result.controls["success"].any()
        else:
            assert "success must be a text, or true or false" in result.reason


def test_numbers_packed_into_bytes_are_read_like_others(tmp_path, examples):
    import tensorflow_datasets as tfds

    features = droid_features((48, 64), extras=False)
    step = dict(features["steps"].feature)
    packed = tfds.features.Tensor(shape=(6,), dtype=np.float64, encoding="bytes")
    step["observation"] = tfds.features.FeaturesDict({**step["observation"], "cartesian_position": packed})
    changed = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": features["episode_metadata"]}
    )
    (episode,) = read(write_tfds(tmp_path / "packed", changed, [examples[:1]]))
    expected = [row["observation"]["cartesian_position"][0] for row in examples[0]["steps"]]
    np.testing.assert_array_equal(episode.controls["x_m"], expected)  # float64, for once


def test_a_features_file_cannot_have_a_module_imported(copy, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    original = json.loads((copy / "features.json").read_text())
    for key in ("pythonClassName", "python_class_name", "type"):
        tree = json.loads(json.dumps(original))
        inner = tree["featuresDict"]["features"]["episode_metadata"]["featuresDict"]["features"]["file_path"]
        inner.pop("pythonClassName")
        inner[key] = "evil_module.Text"
        (copy / "features.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=r"names the class 'evil_module\.Text'"):
            read(copy)
    assert not (tmp_path / "ran").exists() and "evil_module" not in sys.modules


def test_a_compressed_array_is_refused(copy):
    tree = (copy / "features.json").read_text()
    assert '"encoding": "none"' in tree
    (copy / "features.json").write_text(tree.replace('"encoding": "none"', '"encoding": "zlib"'))
    with pytest.raises(ValueError, match="is stored compressed"):
        read(copy)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_broken_json_is_refused_with_its_name(copy, name):
    for content in ("{", "[" * 200_000):
        (copy / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            read(copy)
