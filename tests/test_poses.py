"""Claims of poses.py: pose arithmetic is the reference's; openpi's rule gives the known ranges; lists of ranges are read and checked."""

import itertools
import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jepa_cache.poses import (
    find_episode_key,
    idle_ranges,
    integrate_pose,
    pose_actions,
    poses_in_camera_frame,
    read_ranges,
)
from tests.droid_makers import REAL_DROID


@pytest.mark.filterwarnings("ignore:Gimbal lock")
@pytest.mark.parametrize("kind", ["half turns", "gimbal lock", "wraparound"])
def test_angles_are_those_of_the_matrix_product_where_several_would_do(kind):
    """Official: R[t+1] @ R[t]^T, step by step. Bit for bit, for +pi and -pi are one turn and two numbers."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(200, 7))
    if kind == "half turns":
        states[:, 3:6] = rng.choice([0, np.pi / 2, -np.pi / 2, np.pi, -np.pi, np.pi / 4], size=(200, 3))
    elif kind == "gimbal lock":
        states[:, 4] = np.where(np.arange(200) % 2, np.pi / 2, -np.pi / 2)
    else:
        states[:, 3] = (np.cumsum(rng.normal(0, 0.1, 200)) + 2 * np.pi) % (2 * np.pi) - np.pi
    turns = [Rotation.from_euler("xyz", state[3:6]).as_matrix() for state in states]
    expected = [Rotation.from_matrix(after @ before.T).as_euler("xyz") for before, after in itertools.pairwise(turns)]
    np.testing.assert_array_equal(pose_actions(states)[:, 3:6], np.stack(expected))


def test_the_gripper_stays_within_its_range():
    state, action = np.zeros(7), np.zeros(7)
    action[6] = 1.7
    assert integrate_pose(state, action)[6] == 1 and integrate_pose(state, -action)[6] == 0


@pytest.mark.parametrize("shape", [(7,), (3, 6), (2, 3, 7)])
def test_poses_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[T, 7\]"):
        pose_actions(np.zeros(shape))
    with pytest.raises(ValueError, match="extrinsics must be"):
        poses_in_camera_frame(np.zeros((3, 7)), np.zeros((3, 7)))
    with pytest.raises(ValueError, match="must be"):
        integrate_pose(np.zeros(7), np.zeros(6))


KNOWN = {
    "train/0": [(22, 157)],
    "train/1": [(0, 28), (45, 256)],
    "train/2": [(0, 115), (132, 385)],
    "train/3": [(0, 29), (47, 116), (134, 229)],
    "train/4": [(0, 360)],
    "train/5": [(13, 167)],
    "train/6": [(8, 99)],
    "val/1799": [(13, 111)],
    "val/18599": [(0, 196)],
}


def make_commands(*runs, joint=2):
    """Commands [M, 7] of which one joint changes in the active rows, by the smallest step that counts."""
    active = np.concatenate([np.full(length, not idle) for length, idle in runs])
    commands = np.full((len(active), 7), 3.0)
    commands[:, joint] += np.cumsum(np.where(active, 0.0011, 0.0009 * (-1) ** np.arange(len(active))))
    return commands


@pytest.mark.skipif(not REAL_DROID.exists(), reason="no real recordings in ../shared/data/droid")
@pytest.mark.parametrize("name", KNOWN)
def test_the_rule_gives_the_known_ranges_on_real_episodes(name):
    data = json.loads((REAL_DROID / "annotation" / f"{name}.json").read_text())
    assert idle_ranges(np.array(data["action.joint_velocity"])) == KNOWN[name]


@pytest.mark.parametrize(
    ("runs", "cut_end", "expected"),
    [
        (((20, False), (6, True), (20, False)), 0, [(0, 46)]),
        (((20, False), (7, True), (20, False)), 0, [(0, 20), (27, 47)]),
        (((8, True), (15, False), (9, True)), 0, []),
        (((8, True), (16, False), (9, True)), 0, [(8, 24)]),  # row 0 is never idle, so seven are
        (((7, True), (16, False), (9, True)), 0, [(0, 23)]),
        (((20, False), (9, True), (30, False)), 10, [(0, 10), (29, 49)]),
        (((20, False), (9, True), (30, False)), 20, [(29, 39)]),
        (((0, False),), 10, []),
    ],
)
def test_seven_unchanged_commands_are_a_rest_and_sixteen_changing_ones_are_kept_less_the_cut(runs, cut_end, expected):
    for joint in range(7):
        assert idle_ranges(make_commands(*runs, joint=joint), cut_end=cut_end) == expected


def test_published_ranges_are_found_by_the_key_that_rlds_and_raw_episodes_have(tmp_path):
    folder = "/nfs/r2d2/ILIAD/success/2023-04-21/Fri_Apr_21"
    name = f"{folder}/recordings/MP4--{folder}/trajectory.h5"
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps({name: [[0, 28], [45, 256]], "other": []}))
    assert find_episode_key(name) == "ILIAD/success/2023-04-21/Fri_Apr_21"
    assert read_ranges(path) == {"ILIAD/success/2023-04-21/Fri_Apr_21": [(0, 28), (45, 256)], "other": []}


@pytest.mark.parametrize(
    "content", ["[1]", '{"a": [[3, 1]]}', '{"a": [[0, 1.5]]}', '{"a": [[-1, 2]]}', '{"a": 1}', "{", "[" * 100_000]
)
def test_what_is_no_list_of_ranges_is_refused(tmp_path, content):
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"ranges\.json"):
        read_ranges(path)


def test_an_episode_that_a_list_of_ranges_has_under_two_names_is_refused(tmp_path):
    names = [f"{root}/ILIAD/success/2023-04-21/Fri_Apr_21/recordings/MP4" for root in ("/nfs/r2d2", "/mnt/other")]
    assert len({find_episode_key(name) for name in names}) == 1
    (tmp_path / "ranges.json").write_text(json.dumps({name: [[0, 28]] for name in names}))
    with pytest.raises(ValueError, match=r"ranges\.json lists the episode 'ILIAD/success/2023-04-21/Fri_Apr_21' twice"):
        read_ranges(tmp_path / "ranges.json")
