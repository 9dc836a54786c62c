"""Claims of sources/droid_raw.py, _droid_folders.py, _droid_rows.py and _hdf5.py.

Frames meet their rows whatever the counts and rates are; each camera is found by the metadata; what is missing is named; no
file outside the episode is read, and no stated size is believed.
"""

import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.cli.data import index_droid
from jepa_cache.data.filters import NO_FILTER, keep_ticks
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.poses import CAMERA_CONTROLS, COMMAND_CONTROLS, POSE_CONTROLS, pose_actions
from jepa_cache.sources import build_source
from tests.droid_makers import REAL_DROID, SERIALS, decode, make_episode, read_real, write_raw
from tests.makers import make_video

needs_real = pytest.mark.skipif(not REAL_DROID.exists(), reason="no real recordings in ../shared/data/droid")


def read(root, **options):
    source = build_source("droid_raw", {"camera": "exterior_1", **options})
    return [result for unit in source.list_units([str(root)], root) for result in source.iter_episodes(unit)]


def read_one(root, **options):
    (result,) = read(root, **options)
    return result


def stack(episode, names):
    return np.stack([episode.controls[name] for name in names], axis=1)


@pytest.fixture(scope="module")
def recorded():
    return make_episode(0, 24)


@pytest.fixture
def folder(tmp_path, recorded):
    return write_raw(tmp_path / "droid", recorded)


def edit_metadata(folder, **changes):
    (path,) = folder.glob("metadata_*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_trajectory(folder):
    return h5py.File(folder / "trajectory.h5", "a")


def test_an_episode_has_its_rows_and_a_frame_for_each(tmp_path, folder, recorded):
    episode = read_one(tmp_path)
    assert episode.key == "ILIAD/success/2023-04-21/made-0"
    np.testing.assert_array_equal(stack(episode, POSE_CONTROLS), recorded.poses)
    np.testing.assert_array_equal(stack(episode, COMMAND_CONTROLS), recorded.commands)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(24))
    assert (episode.fps, episode.num_video_frames, episode.notes) == (15.0, 24, ())
    assert episode.controls["success"].all() and episode.controls["idle"].dtype == np.float32


@needs_real
def test_real_episodes_at_5_hz_lie_on_every_third_15_hz_row(tmp_path):
    real = read_real()
    for episode in real:
        write_raw(tmp_path, episode)
    episodes = {episode.key.rpartition("/")[2]: episode for episode in read(tmp_path)}
    assert len(episodes) == 9
    for source in real:
        episode = episodes[source.name]
        split, _, number = source.name.partition("-")
        data = json.loads((REAL_DROID / "annotation" / split / f"{number}.json").read_text())
        np.testing.assert_array_equal(episode.frame_ticks, 3 * np.arange(data["video_length"]))
        np.testing.assert_array_equal(stack(episode, POSE_CONTROLS)[episode.frame_ticks], data["states"])
        assert episode.fps == 5.0 and (episode.controls["success"] == bool(data["success"])).all()
        anchors = episode.frame_ticks[::2]
        result = get_action_space("pose7").aggregate(episode.controls, anchors)
        np.testing.assert_allclose(result.actions, pose_actions(np.array(data["states"])[::2]), atol=1e-6)
        assert np.abs(result.actions[:, 3:6]).max() < 1.0, "no jump of 2 pi"


@needs_real
@pytest.mark.parametrize("surplus", [1, -1])
def test_real_thinned_episodes_with_one_row_more_or_less_than_frames_are_aligned_at_the_start(tmp_path, surplus):
    sources = []
    for source in read_real(3):
        thin = source.thin(3)
        extra = {
            name: np.concatenate((getattr(thin, name), getattr(thin, name)[-1:]))[: len(thin.poses) + surplus]
            for name in ("poses", "commands", "joint_velocities")
        }
        sources.append(replace(thin, **extra))
        write_raw(tmp_path, sources[-1])
    for episode, source in zip(sorted(read(tmp_path), key=lambda item: item.key), sources, strict=True):
        num_used = min(episode.num_video_frames, len(source.poses))
        np.testing.assert_array_equal(episode.frame_ticks, np.arange(num_used))
        what = "rows come after the last frame" if surplus > 0 else "frames are not used"
        assert any(f"the last 1 {what}" in note for note in episode.notes), episode.notes


@pytest.mark.parametrize("num_frames", [25, 23, 22, 10, 60])
def test_at_15_hz_both_begin_together_and_the_shorter_decides(tmp_path, num_frames):
    write_raw(tmp_path, make_episode(1, 24, num_frames=num_frames))
    episode = read_one(tmp_path)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(min(24, num_frames)))
    assert episode.num_video_frames == num_frames
    assert len(episode.notes) == 1 and f"{num_frames} frames, 24 rows" in episode.notes[0]


@pytest.mark.parametrize("num_frames", [7, 8, 9])
def test_at_5_hz_a_frame_too_many_or_too_few_moves_no_other(tmp_path, num_frames):
    write_raw(tmp_path, make_episode(1, 24, num_frames=num_frames, fps=5))
    np.testing.assert_array_equal(read_one(tmp_path).frame_ticks, 3 * np.arange(min(8, num_frames)))


@pytest.mark.parametrize("fps", [5, 10, 30, 60])
def test_a_frame_per_row_is_taken_as_such_at_any_rate(tmp_path, fps):
    write_raw(tmp_path, make_episode(1, 24, num_frames=25, fps=fps))
    episode = read_one(tmp_path)
    np.testing.assert_array_equal(episode.frame_ticks, np.arange(24))
    assert episode.fps == fps and "with a frame per row" in episode.notes[0]


def test_a_faster_video_shows_rows_more_than_once(tmp_path):
    write_raw(tmp_path, make_episode(1, 24, num_frames=48, fps=30))
    ticks = read_one(tmp_path).frame_ticks
    assert len(ticks) >= 46 and ticks[-1] == 23 and set(np.diff(ticks)) == {0, 1}


def test_frames_that_fit_neither_by_count_nor_by_time_are_not_placed(tmp_path):
    write_raw(tmp_path, make_episode(1, 60, num_frames=10, fps=5))
    assert "neither frame by row nor by time" in read_one(tmp_path).reason


@pytest.mark.parametrize("camera", ["exterior_1", "exterior_2", "wrist", "left"])
def test_each_camera_is_its_own_video_with_its_own_pose(tmp_path, folder, recorded, camera):
    serials = {**SERIALS, "left": SERIALS["exterior_2"]}
    episode = read_one(tmp_path, camera=camera)
    assert episode.video.name == f"{serials[camera]}.mp4"
    index = list(SERIALS.values()).index(serials[camera])
    np.testing.assert_allclose(stack(episode, CAMERA_CONTROLS)[0], [0.1 * index, 0.4, 0.3, -2.0, 0.1, 0.2 * index])
    result = get_action_space("pose7_camera").aggregate(episode.controls, np.arange(0, 24, 4))
    assert np.isfinite(result.actions).all()


@pytest.mark.parametrize("space", ["pose7", "droid_command7", "pose7_camera"])
def test_without_camera_poses_only_the_spaces_that_need_them_are_lost(tmp_path, folder, space):
    with edit_trajectory(folder) as file:
        del file["observation/camera_extrinsics"]
    episode = read_one(tmp_path)
    aggregate = get_action_space(space).aggregate
    if space == "pose7_camera":
        with pytest.raises(ValueError, match="ext_x_m"):
            aggregate(episode.controls, np.array([0, 4]))
    else:
        aggregate(episode.controls, np.array([0, 4]))


def test_two_views_side_by_side_are_told_by_their_width_and_the_left_one_is_used(tmp_path):
    videos = {"exterior_1": make_video(24, fps=15, size=(32, 112))}
    source = make_episode(0, 24)
    folder = write_raw(tmp_path, replace(source, videos={**source.videos, **videos}), stereo=True)
    assert (folder / "recordings" / "MP4" / f"{SERIALS['exterior_1']}-stereo.mp4").exists()
    episode = read_one(tmp_path)
    assert "side by side" in episode.notes[0]
    with open_video(episode.video) as video:
        np.testing.assert_array_equal(video.read(np.array([3]))[0], decode(videos["exterior_1"])[3][:, :56])


def test_a_single_view_is_never_cut_whatever_its_name_says(tmp_path, recorded):
    write_raw(tmp_path, recorded, stereo=True)
    with open_video(read_one(tmp_path).video) as video:
        assert video.info.width == 64


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder / "recordings"), "the video of the camera 'exterior_1' is missing"),
        (lambda folder: next(folder.glob("*.json")).unlink(), "no metadata"),
        (lambda folder: next(folder.glob("*.json")).write_text("{"), "no JSON"),
        (lambda folder: next(folder.glob("*.json")).write_text("[" * 99_999), "JSON"),
        (lambda folder: next(folder.glob("*.json")).write_text(" " * 2_000_000), "more than 1048576 bytes"),
        (
            lambda folder: edit_metadata(folder, ext1_mp4_path=None, ext1_cam_serial=None),
            "cameras with a serial number: exterior_2",
        ),
        (lambda folder: (folder / "trajectory.h5").write_bytes(b"nothing"), "cannot be opened as HDF5"),
        (
            lambda folder: (folder / "recordings/MP4" / f"{SERIALS['exterior_1']}.mp4").write_bytes(b"nothing"),
            "the video cannot be opened",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_other_episodes_go_on(tmp_path, folder, damage, reason):
    write_raw(tmp_path / "droid", make_episode(2, 20), lab="TRI")
    damage(folder)
    results = {type(result): result for result in read(tmp_path)}
    assert reason in results[Skipped].reason and "made-0" in results[Skipped].key
    assert results[Episode].key == "TRI/success/2023-04-21/made-2"


def test_a_missing_left_path_names_the_way_out(tmp_path, folder):
    edit_metadata(folder, left_mp4_path=None)
    assert "left_mp4_path; cameras with a serial number: exterior_1" in read_one(tmp_path, camera="left").reason


@pytest.mark.parametrize("name", ["../../../../secret.mp4", "/etc/secret.mp4", "recordings/MP4/../secret.mp4", ".."])
def test_metadata_cannot_name_a_video_outside_the_episode(tmp_path, folder, name):
    video = next((folder / "recordings/MP4").glob("*.mp4"))
    for place in (tmp_path, folder, folder.parent, folder / "recordings"):
        shutil.copy(video, place / "secret.mp4")
    edit_metadata(folder, ext1_mp4_path=name)
    assert isinstance(read_one(tmp_path), Skipped)


def test_the_name_of_an_episode_is_in_its_metadata_and_stays_where_it_is_moved(tmp_path, folder):
    moved = folder.rename(tmp_path / "elsewhere")
    assert read_one(moved).key == "ILIAD/success/2023-04-21/made-0"
    edit_metadata(moved, hdf5_path=None)
    assert read_one(moved).key == "ILIAD+abc+made-0"


def test_the_minimum_that_the_official_loader_needs_is_enough(tmp_path, folder):
    (path,) = folder.glob("*.json")
    path.unlink()
    (folder / "info.json").write_text(json.dumps({"left_mp4_path": f"x/recordings/MP4/{SERIALS['wrist']}.mp4"}))
    with edit_trajectory(folder) as file:
        del file["action"], file["observation/timestamp"]
    episode = read_one(tmp_path, camera="left")
    assert set(episode.controls) == {*POSE_CONTROLS, *CAMERA_CONTROLS, "success"}
    assert episode.key == "ILIAD/success/2023-04-21/made-0"


def test_skipped_actions_are_kept_apart_for_filters(tmp_path, folder):
    controls = read_one(tmp_path).controls
    marked = np.arange(24) % 5 == 4
    np.testing.assert_array_equal(controls["skip_action"], marked)
    assert not keep_ticks(controls, replace(NO_FILTER, drop_skipped_actions=True))[marked].any()
    assert not controls["idle"][marked].all()


def test_a_failure_is_no_success(tmp_path):
    write_raw(tmp_path, make_episode(0, 12, success=False))
    assert not read_one(tmp_path).controls["success"].any()


def replace_array(folder, name, make):
    with edit_trajectory(folder) as file:
        del file[name]
        make(file, name)


NAME = "observation/robot_state/gripper_position"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda file, name: file.__setitem__(name, h5py.ExternalLink("other.h5", "x")), "external link"),
        (lambda file, name: file.__setitem__(name, h5py.SoftLink("/action/gripper_position")), "soft or external"),
        (
            lambda file, name: file.create_dataset(name, (24,), "f8", external=[("outside.bin", 0, 192)]),
            "lie outside",
        ),
        (lambda file, name: file.create_virtual_dataset(name, make_layout()), "lie outside"),
        (lambda file, name: file.create_dataset(name, (10**12,), "f8", chunks=(1000,)), "states 1000000000000 numbers"),
        (
            lambda file, name: file.create_dataset(
                name, (24,), "f8", chunks=(10**8,), maxshape=(None,), compression="gzip"
            ),
            "numbers at once",
        ),
        (lambda file, name: file.create_dataset(name, (24, 3), "f8"), r"must be [M, 1]"),
        (lambda file, name: file.create_dataset(name, data=[b"x"] * 24), "must be numeric"),
        (lambda file, name: file.create_group(name), "is no array"),
        (lambda file, name: file.create_dataset(name, (23,), "f8"), "24 cartesian positions and 23 gripper"),
        (lambda file, name: None, "has no observation/robot_state"),
    ],
)
def test_arrays_elsewhere_of_monstrous_size_or_of_another_form_are_refused(tmp_path, folder, make, reason):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros(24)
    (folder / "outside.bin").write_bytes(bytes(192))
    replace_array(folder, NAME, make)
    assert reason in read_one(tmp_path).reason


def make_layout():
    layout = h5py.VirtualLayout((24,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", (24,))
    return layout


def test_a_group_that_is_an_external_link_is_refused_too(tmp_path, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["cartesian_position"], other["gripper_position"] = np.zeros((24, 6)), np.zeros(24)
    replace_array(
        folder, "observation/robot_state", lambda file, name: file.__setitem__(name, h5py.ExternalLink("other.h5", "/"))
    )
    assert "external link" in read_one(tmp_path).reason


def test_a_unit_is_the_files_of_one_episode_and_camera(tmp_path, folder):
    source = build_source("droid_raw", {"camera": "wrist"})
    before = source.list_units(["droid"], tmp_path)
    write_raw(tmp_path / "droid", make_episode(2, 12))
    after = source.list_units(["droid"], tmp_path)
    assert [path.suffix for path in before[0].files] == [".h5", ".json", ".mp4"]
    assert before[0].files[-1].name == f"{SERIALS['wrist']}.mp4"
    assert before[0] in after and len(after) == 2


def test_the_index_lists_complete_episodes_and_the_source_reads_it(tmp_path, capsys):
    root = tmp_path / "with a space"
    folders = [write_raw(root, make_episode(seed, 12)) for seed in range(3)]
    next(folders[1].glob("*.json")).unlink()
    out = tmp_path / "lists" / "episodes.csv"
    index_droid(root, out)
    assert "listed 2 episodes" in capsys.readouterr().out
    episodes = read(out)
    assert [episode.key[-6:] for episode in episodes] == ["made-0", "made-2"]
    with pytest.raises(ValueError, match="--overwrite"):
        index_droid(root, out)
    index_droid(root, out, overwrite=True)


def test_a_list_as_the_official_training_takes_it_is_read(tmp_path, folder):
    other = write_raw(tmp_path / "droid", make_episode(2, 12))
    path = tmp_path / "list.txt"
    path.write_text(f"{folder} 0\n\n{other.relative_to(tmp_path)} 1\n")
    assert [episode.key[-6:] for episode in read(path)] == ["made-0", "made-2"]


def test_a_list_that_names_no_episode_is_refused(tmp_path, folder):
    path = tmp_path / "list.csv"
    path.write_text(f"{folder}\n{tmp_path / 'nowhere'}\n")
    with pytest.raises(ValueError, match=r"1 hold no trajectory\.h5 \(first: .*nowhere"):
        read(path)


@pytest.mark.parametrize("given", ["nowhere", "empty", "file.tar"])
def test_inputs_without_episodes_are_refused(tmp_path, given):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").touch()
    with pytest.raises(ValueError, match=r"finds no trajectory\.h5"):
        build_source("droid_raw", {}).list_units([given], tmp_path)


def test_folders_that_link_in_a_circle_are_searched_once(tmp_path, folder):
    (folder.parent / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"camera": "rist"}, "did you mean 'wrist'"),
        ({"cam": "wrist"}, "camera"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_source("droid_raw", options)
