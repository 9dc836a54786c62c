"""Claims of sources/droid_raw.py.

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
from jepa_cache.data.filters import NO_FILTER, keep_ticks
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.video import open_video
from jepa_cache.poses import CAMERA_CONTROLS, COMMAND_CONTROLS, POSE_CONTROLS, pose_actions
from jepa_cache.sources import build_source
from tests.droid_makers import REAL_DROID, SERIALS, decode, make_episode, read_real, write_raw
from tests.makers import make_video


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
    assert episode.controls["success"].all()
    marked = np.arange(24) % 5 == 4
    np.testing.assert_array_equal(episode.controls["skip_action"], marked)
    assert not keep_ticks(episode.controls, replace(NO_FILTER, drop_skipped_actions=True))[marked].any()
    write_raw(tmp_path / "failed", replace(recorded, success=False))
    assert not read_one(tmp_path / "failed").controls["success"].any()


@pytest.mark.skipif(not REAL_DROID.exists(), reason="no real recordings in ../shared/data/droid")
def test_real_episodes_at_5_hz_lie_on_every_third_15_hz_row(tmp_path):
    real = read_real()
    for episode in real:
        write_raw(tmp_path / "full", episode)
    episodes = {episode.key.rpartition("/")[2]: episode for episode in read(tmp_path / "full")}
    assert len(episodes) == 9
    for source in real:
        episode = episodes[source.name]
        split, _, number = source.name.partition("-")
        data = json.loads((REAL_DROID / "annotation" / split / f"{number}.json").read_text())
        np.testing.assert_array_equal(episode.frame_ticks, 3 * np.arange(data["video_length"]))
        np.testing.assert_array_equal(stack(episode, POSE_CONTROLS)[episode.frame_ticks], data["states"])
        assert episode.fps == 5.0 and (episode.controls["success"] == bool(data["success"])).all()
        result = get_action_space("pose7").aggregate(episode.controls, episode.frame_ticks[::2])
        np.testing.assert_allclose(result.actions, pose_actions(np.array(data["states"])[::2]), atol=1e-6)
        assert np.abs(result.actions[:, 3:6]).max() < 1.0, "no jump of 2 pi"


@pytest.mark.parametrize(
    ("num_frames", "fps", "ticks", "note"),
    [
        (25, 15, range(24), "25 frames, 24 rows"),
        (22, 15, range(22), "22 frames, 24 rows"),
        (9, 5, range(0, 24, 3), "placed on the 15 Hz rows by time"),
        (25, 5, range(24), "with a frame per row"),
        (23, 5, range(23), "23 frames, 24 rows: the last 1 rows come after the last frame"),
        (48, 30, [row for row in range(24) for _ in range(2)][:47], "placed on the 15 Hz rows by time"),
    ],
)
def test_frames_meet_their_rows_whatever_the_counts_and_rates_are(tmp_path, num_frames, fps, ticks, note):
    write_raw(tmp_path, make_episode(1, 24, num_frames=num_frames, fps=fps))
    episode = read_one(tmp_path)
    assert (episode.num_video_frames, episode.fps) == (num_frames, fps)
    if fps == 30:
        assert len(episode.frame_ticks) >= 46 and set(np.diff(episode.frame_ticks)) == {0, 1}
    else:
        assert episode.frame_ticks.tolist() == list(ticks)
    assert any(note in text for text in episode.notes)


@pytest.mark.parametrize("camera", ["exterior_1", "exterior_2", "wrist", "left"])
def test_each_camera_is_its_own_video_with_its_own_pose(tmp_path, folder, camera):
    serials = {**SERIALS, "left": SERIALS["exterior_2"]}
    episode = read_one(tmp_path, camera=camera)
    assert episode.video.name == f"{serials[camera]}.mp4"
    index = list(SERIALS.values()).index(serials[camera])
    np.testing.assert_allclose(stack(episode, CAMERA_CONTROLS)[0], [0.1 * index, 0.4, 0.3, -2.0, 0.1, 0.2 * index])


def test_two_views_side_by_side_are_told_by_their_width_never_by_their_name(tmp_path, recorded):
    wide = make_video(24, fps=15, size=(32, 112))
    name = f"{SERIALS['exterior_1']}-stereo.mp4"
    folder = write_raw(tmp_path, replace(recorded, videos={**recorded.videos, "exterior_1": wide}), stereo=True)
    assert (folder / "recordings" / "MP4" / name).exists()
    episode = read_one(tmp_path)
    assert "side by side" in episode.notes[0]
    with open_video(episode.video) as video:
        np.testing.assert_array_equal(video.read(np.array([3]))[0], decode(wide)[3][:, :56])
    single = read_one(tmp_path, camera="wrist")
    assert single.video.name.endswith("-stereo.mp4") and single.notes == ()


def first_json(folder):
    return next(folder.glob("*.json"))


def first_video(folder):
    return folder / "recordings/MP4" / f"{SERIALS['exterior_1']}.mp4"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder / "recordings"), "the video of the camera 'exterior_1' is missing"),
        (lambda folder: first_json(folder).unlink(), "no metadata"),
        (lambda folder: first_json(folder).write_text("["), "no JSON"),
        (lambda folder: first_json(folder).write_text(" " * 2_000_000), "longer than 1048576 bytes"),
        (lambda folder: edit_metadata(folder, ext1_mp4_path=None, ext1_cam_serial=None), "serial number: exterior_2"),
        (lambda folder: (folder / "trajectory.h5").write_bytes(b"nothing"), "cannot be opened as HDF5"),
        (lambda folder: first_video(folder).write_bytes(b"nothing"), "the video cannot be opened"),
        (lambda folder: first_video(folder).write_bytes(make_video(10, fps=60)), "neither frame by row nor by time"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_other_episodes_go_on(tmp_path, folder, damage, reason):
    write_raw(tmp_path / "droid", make_episode(2, 20), lab="TRI")
    damage(folder)
    results = {type(result): result for result in read(tmp_path)}
    assert reason in results[Skipped].reason and "made-0" in results[Skipped].key
    assert results[Episode].key == "TRI/success/2023-04-21/made-2"


@pytest.mark.parametrize("name", ["../../../../secret.mp4", "/etc/secret.mp4", "recordings/MP4/../secret.mp4", ".."])
def test_metadata_cannot_name_a_video_outside_the_episode(tmp_path, folder, name):
    video = next((folder / "recordings/MP4").glob("*.mp4"))
    for outside in (tmp_path, folder, folder.parent, folder / "recordings"):
        shutil.copy(video, outside / "secret.mp4")
    edit_metadata(folder, ext1_mp4_path=name)
    assert isinstance(read_one(tmp_path), Skipped)


def test_the_minimum_that_the_official_loader_needs_is_enough_and_an_episode_keeps_its_name_where_it_is_moved(
    tmp_path, folder
):
    metadata = first_json(folder).read_text()
    edit_metadata(folder, hdf5_path=None, uuid=None)
    assert read_one(tmp_path).key == "ILIAD/success/2023-04-21/made-0", "by its folders"
    first_json(folder).write_text(metadata)
    folder = folder.rename(tmp_path / "elsewhere")
    assert read_one(tmp_path).key == "ILIAD/success/2023-04-21/made-0"
    edit_metadata(folder, hdf5_path=None)
    assert read_one(tmp_path).key == "ILIAD+abc+made-0"
    first_json(folder).unlink()
    (folder / "info.json").write_text(json.dumps({"left_mp4_path": f"x/recordings/MP4/{SERIALS['wrist']}.mp4"}))
    with edit_trajectory(folder) as file:
        del file["action"], file["observation/timestamp"]
    episode = read_one(tmp_path, camera="left")
    assert set(episode.controls) == {*POSE_CONTROLS, *CAMERA_CONTROLS} and episode.key == "elsewhere"
    (folder / "info.json").write_text(json.dumps({"ext1_cam_serial": "1"}))
    assert "left_mp4_path; cameras with a serial number: exterior_1" in read_one(tmp_path, camera="left").reason


def make_layout():
    layout = h5py.VirtualLayout((24,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", (24,))
    return layout


GRIPPER = "observation/robot_state/gripper_position"
GROUP = "observation/robot_state"
SKIPS = "observation/timestamp/skip_action"


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        (GRIPPER, lambda file: file.__setitem__(GRIPPER, h5py.ExternalLink("other.h5", "x")), "external link"),
        (GROUP, lambda file: file.__setitem__(GROUP, h5py.ExternalLink("other.h5", "/")), "external link"),
        (GRIPPER, lambda file: file.__setitem__(GRIPPER, h5py.SoftLink("/action/gripper_position")), "is a soft"),
        (GRIPPER, lambda file: file.create_dataset(GRIPPER, (24,), "f8", external=[("x.bin", 0, 192)]), "lie outside"),
        (GRIPPER, lambda file: file.create_virtual_dataset(GRIPPER, make_layout()), "lie outside"),
        (GRIPPER, lambda file: file.create_dataset(GRIPPER, (10**12,), "f8", chunks=(1000,)), "numbers at once"),
        (GRIPPER, lambda file: file.create_dataset(GRIPPER, (24, 3), "f8"), r"must be [M, 1]"),
        (GRIPPER, lambda file: file.create_dataset(GRIPPER, data=[b"x"] * 24), "no numeric array"),
        (GRIPPER, lambda file: file.create_dataset(GRIPPER, (23,), "f8"), "24 cartesian positions and 23 gripper"),
        (GRIPPER, lambda file: None, "has no observation/robot_state"),
        (SKIPS, lambda file: file.create_dataset(SKIPS, (23,), "f8"), "arrays of one length"),
    ],
)
def test_arrays_elsewhere_of_monstrous_size_or_of_another_form_are_refused(tmp_path, folder, name, make, reason):
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.zeros(24)
    (folder / "x.bin").write_bytes(bytes(192))
    with edit_trajectory(folder) as file:
        del file[name]
        make(file)
    assert reason in read_one(tmp_path).reason


def test_a_unit_is_the_files_of_one_episode_and_camera_and_circles_are_searched_once(tmp_path, folder):
    source = build_source("droid_raw", {"camera": "wrist"})
    before = source.list_units(["droid"], tmp_path)
    write_raw(tmp_path / "droid", make_episode(2, 12))
    (folder.parent / "again").symlink_to(tmp_path, target_is_directory=True)
    after = source.list_units(["droid"], tmp_path)
    assert [path.suffix for path in before[0].files] == [".h5", ".json", ".mp4"]
    assert before[0].files[-1].name == f"{SERIALS['wrist']}.mp4"
    assert before[0] in after and len(after) == 2


def test_a_list_of_episode_folders_is_read_as_the_official_training_takes_it(tmp_path):
    root = tmp_path / "with a space"
    folders = [write_raw(root, make_episode(seed, 12)) for seed in range(3)]
    listed = root / "list.txt"
    listed.write_text(f'"{folders[0]}" 0\n\n{folders[2].relative_to(root)} 1\n')
    assert [episode.key[-6:] for episode in read(listed)] == ["made-0", "made-2"]
    listed.write_text(f'"{folders[0]}"\n{tmp_path / "nowhere"}\n')
    with pytest.raises(ValueError, match=r"1 hold no trajectory\.h5 \(first: .*nowhere"):
        read(listed)
