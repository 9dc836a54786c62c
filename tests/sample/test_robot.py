"""Claims about the simulated robot.

1. `reset` puts the arm where it is told, exactly; pictures show the arm and the block there, from every camera.
2. One step carries out the difference of poses that it is given: translation, rotation, gripper; its rows are the way.
3. What is cut is named, what cannot be done is refused, and a scene that blows up is an error.
4. Seeds and looks decide states and pixels; a look does not outlast its episode.
5. What is not installed is named with what to type.
6. torch for GPUs may be used after a picture was drawn.
"""

import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jepa_cache.poses import rotation_angle
from jepa_cache.sample import robot
from jepa_cache.sample.looks import PLAIN, draw_look
from jepa_cache.sample.robot import CAMERAS, DOWN_RAD, WORKSPACE_M, RobotWorld
from tests.robot_worlds import needs_robot

pytestmark = needs_robot
STILL = np.zeros(7)


@pytest.fixture(scope="module")
def world():
    made = RobotWorld(size=128)
    yield made
    made.close()


def moved(**columns):
    names = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    return np.array([columns.get(name, 0.0) for name in names])


def find_red(frame):
    """Row and column of the middle of what is red in a frame, and its number of pixels."""
    red = (frame[..., 0] > 2.5 * frame[..., 1].astype(float)) & (frame[..., 0] > 60)
    return (*np.argwhere(red).mean(axis=0), red.sum()) if red.any() else (None, None, 0)


# 1. Reset


def test_the_arm_stands_within_a_millimetre_of_any_place_in_the_workspace_pointing_down(world):
    corners = np.array(np.meshgrid(*WORKSPACE_M.T)).reshape(3, -1).T
    for position in [*corners, *np.random.default_rng(0).uniform(*WORKSPACE_M, (8, 3))]:
        block = (0.4, 0.0) if abs(position[1]) > 0.1 else (0.4, 0.3)
        observation, info = world.reset(options={"position": position, "block": block})
        assert np.abs(observation["state"][:3] - position).max() < 1e-3
        assert rotation_angle(observation["state"][3:6], np.array(DOWN_RAD)) < 1e-3
        assert observation["state"][6] < 0.02
        assert np.abs(info["block"][:2] - block).max() < 1e-3


def test_pictures_show_the_block_where_it_lies_and_the_arm_where_it_stands(world):
    frame = world.reset(options={"position": (0.35, -0.2, 0.3), "block": (0.5, 0.1)})[0]["frame"]
    assert frame.shape == (128, 128, 3) and frame.dtype == np.uint8
    row, column, num_pixels = find_red(frame)
    assert 15 < num_pixels < 400
    # The camera looks at the robot from the left: what is nearer to it is lower in the picture.
    nearer = find_red(world.reset(options={"position": (0.35, -0.2, 0.3), "block": (0.6, 0.2)})[0]["frame"])
    assert nearer[0] > row + 5
    away = world.reset(options={"position": (0.6, -0.2, 0.1), "block": (0.5, 0.1)})[0]["frame"]
    assert (np.abs(away.astype(int) - frame).max(axis=-1) > 30).mean() > 0.02
    assert np.abs(np.subtract(find_red(away)[:2], (row, column))).max() < 1
    views = [world.render(camera) for camera in CAMERAS]
    assert np.array_equal(views[0], away) and all(view.std() > 10 for view in views[:2])
    assert not any(np.array_equal(views[0], view) for view in views[1:])


# 2. Steps


def test_one_step_moves_the_measured_pose_by_the_action(world):
    rng = np.random.default_rng(3)
    before = world.reset(options={"position": (0.47, 0.0, 0.19), "block": (0.4, 0.3)})[0]["state"]
    for _ in range(12):
        action = moved(x=0, y=0, z=0, rz=rng.uniform(-0.1, 0.1))
        action[:3] = np.clip(before[:3] + rng.uniform(-0.06, 0.06, 3), *WORKSPACE_M) - before[:3]
        after, reward, terminated, truncated, info = world.step(action)
        assert np.abs(after["state"][:3] - before[:3] - action[:3]).max() < 6e-3, "two steps' errors of 3 mm"
        assert rotation_angle(after["state"][3:6], info["target"][3:6]) < 0.02
        assert np.abs(info["rows"][0] - before).max() < 1e-9 and info["rows"].shape == (3, 7)
        assert (reward, terminated, truncated) == (0.0, False, False)
        before = after["state"]


def test_a_rotation_is_about_the_axes_of_the_base(world):
    world.reset(options={"position": (0.47, 0.0, 0.19), "block": (0.4, 0.3)})
    world.step(moved(rz=0.4))
    state = world.step(moved(rx=0.2))[0]["state"]
    wanted = (
        Rotation.from_euler("xyz", (0.2, 0, 0))
        * Rotation.from_euler("xyz", (0, 0, 0.4))
        * Rotation.from_euler("xyz", DOWN_RAD)
    )
    assert rotation_angle(state[3:6], wanted.as_euler("xyz")) < 0.03


def test_the_gripper_closes_and_opens_and_a_closed_one_pushes_the_block(world):
    world.reset(options={"position": (0.4, 0.0, 0.04), "block": (0.47, 0.0), "gripper": 1.0})
    assert world.state()[6] > 0.9
    for _ in range(3):
        info = world.step(moved(x=0.04))[-1]
    assert 0.05 < info["block"][0] - 0.47 < 0.12 and abs(info["block"][1]) < 0.02
    for _ in range(3):
        opened = world.step(moved(gripper=-0.4))[0]["state"]
    assert opened[6] < 0.15


# 3. Limits


def test_what_is_cut_from_an_action_is_named(world):
    world.reset(options={"position": (0.6, 0.0, 0.2), "block": (0.4, 0.3)})
    assert world.step(moved(x=0.01, y=0.05))[-1]["clipped"] == ()
    info = world.step(moved(x=0.05, y=0.3, gripper=-0.2))[-1]
    assert info["clipped"] == ("x_m", "y_m", "gripper")
    assert np.allclose(info["target"][:3], (0.62, 0.15, 0.2))
    assert np.abs(world.state()[:3] - info["target"][:3]).max() < 6e-3


@pytest.mark.parametrize("action", [np.full(7, np.nan), np.zeros(6), np.array([0, 0, np.inf, 0, 0, 0, 0])])
def test_an_action_that_is_none_is_refused_and_changes_nothing(world, action):
    world.reset(seed=0)
    before = world.state()
    with pytest.raises(ValueError, match="an action must be 7 finite numbers"):
        world.step(action)
    assert np.array_equal(world.state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": (0.9, 0, 0.2)}, r"position must lie between .* got \[0.9"),
        ({"position": (0.5, 0, np.nan)}, "position must lie between"),
        ({"position": (0.5, 0)}, "position must lie between"),
        ({"block": (0.5, 0.6)}, "block must lie between"),
        ({"position": (0.5, 0, 0.04), "block": (0.5, 0.03)}, "would lie in the gripper"),
        ({"gripper": 2}, "gripper must be 0"),
        ({"pose": 1}, r"options position, block, gripper and look; got \['pose'\]"),
    ],
)
def test_a_start_that_cannot_be_is_refused(world, options, message):
    with pytest.raises(ValueError, match=message):
        world.reset(options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be 1 to 4096 pixels and seed at least 0; got size 0, seed 0"),
        ({"seed": -1}, "got size 256, seed -1"),
        ({"look": -1}, "a look is the seed of one, an integer from 0 up, or None for the plain one; got -1"),
        ({"look": 0.5}, "got 0.5"),
    ],
)
def test_a_world_that_cannot_be_is_refused_before_it_is_made(options, message, monkeypatch):
    monkeypatch.setattr(robot, "import_mujoco", None)
    with pytest.raises(ValueError, match=re.escape(message)):
        RobotWorld(**options)


def test_a_step_before_the_first_reset_is_refused():
    world = RobotWorld(size=8)
    with pytest.raises(ValueError, match=r"no episode yet: call reset\(\) before the first step"):
        world.step(STILL)
    world.close()


def test_physics_that_blows_up_is_an_error(world):
    world.reset(seed=0)
    world._data.qvel[:] = 1e30
    with pytest.raises(RuntimeError, match="became unstable in step 0"):
        world.step(STILL)
    assert np.isfinite(world.reset(seed=0)[0]["state"]).all()


# 4. Seeds and looks


def test_the_same_seed_gives_the_same_states_and_pixels_in_another_world(world):
    def play(one):
        frames, states = [], []
        observation, info = one.reset(seed=7, options={"look": 3})
        for step in range(4):
            frames.append(observation["frame"])
            states.append(np.concatenate((observation["state"], info["block"])))
            observation, *_, info = one.step(moved(x=0.03, z=-0.02 * step))
        return np.array(frames), np.array(states)

    first = play(world)
    world.reset(seed=8, options={"look": 4})
    other = RobotWorld(size=128, look=5)
    for again in (play(world), play(other)):
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    other.close()
    drawn = world.reset(seed=7)[0]["state"]
    assert np.abs(drawn - world.reset(seed=8)[0]["state"]).max() > 0.01


def test_looks_differ_by_seed_are_seen_and_leave_with_their_episode(world):
    place = {"position": (0.45, 0.0, 0.3), "block": (0.5, 0.1)}
    plain = world.reset(options=place)[0]
    seen = [world.reset(options={**place, "look": seed})[0]["frame"].astype(int) for seed in range(6)]
    for index, frame in enumerate(seen):
        assert np.abs(frame - plain["frame"]).mean() > 8
        assert all(np.abs(frame - other).mean() > 4 for other in seen[:index])
        assert find_red(frame)[2] > 10 or index  # a red thing may lie beside it
        assert 20 < frame.mean() < 220, "neither dark nor glaring"
    again = world.reset(options=place)[0]
    assert np.array_equal(again["frame"], plain["frame"]) and np.array_equal(again["state"], plain["state"])
    assert np.array_equal(world.reset(options={**place, "look": PLAIN})[0]["frame"], plain["frame"])
    assert draw_look(3) == draw_look(3) != draw_look(4)


# 5. What is missing


def test_missing_models_and_graphics_are_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr(robot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model files are missing; python -m pip install --no-deps gym-hil==0\.1\.14"):
        robot.find_assets()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(robot, "find_library", lambda name: None)
    with pytest.raises(ValueError, match=r"no OpenGL library .* apt-get install libosmesa6"):
        robot.import_mujoco()


# 6. Beside torch


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; it comes with torch for GPUs")
def test_triton_which_torch_loads_late_does_not_end_a_process_that_has_drawn_a_picture():
    script = "from jepa_cache.sample.robot import RobotWorld; w = RobotWorld(32); w.reset(seed=0); import triton; w.close(); print('ended')"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "ended\n"), ran.stderr[-500:]
