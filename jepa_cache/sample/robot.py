"""A simulated Franka Panda with a Robotiq 2F-85 gripper, DROID's arm and gripper, and a block on its table.

Read first; `looks.py` says what a scene looks like, `robot_episodes.py` writes recordings of it. MuJoCo is imported inside functions:
the extra `sim` brings it, the models are files of the gym-hil package, of which no code is run (MuJoCo Menagerie: Apache-2.0, BSD-2).

A pose is DROID's: [7] x, y, z (m, base frame) of the point between the finger tips, extrinsic xyz Euler angles (rad;
DOWN_RAD where the gripper points down), gripper 0 open to 1 closed. An action is the difference of two poses a fifth of a second apart, the
rotation as in `poses.integrate_pose`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import weakref
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from jepa_cache.config.paths import require
from jepa_cache.poses import POSE_CONTROLS
from jepa_cache.sample.looks import NUM_DISTRACTORS, PLAIN, Look, draw_look

STEP_HZ = 5
ROWS_PER_STEP = 3  # 15 Hz, as DROID records
WORKSPACE_M = np.array([[0.32, -0.25, 0.03], [0.62, 0.25, 0.35]])
"""Lowest and highest x, y, z of the commanded pose."""
BLOCK_AREA_M = np.array([[0.38, -0.20], [0.60, 0.20]])
"""Where a block lies at first unless told otherwise: x, y."""
MAX_STEP_M, MAX_STEP_RAD = 0.10, 0.5
"""Largest translation along an axis and rotation about an axis that the arm carries out within one step."""
CAMERAS = ("exterior_1", "exterior_2", "wrist")
BLOCK_SIDE_M = 0.05
MAX_SIZE = 4096  # pixels; software renderers draw no larger

_TABLE_M = np.array([[0.30, -0.35], [0.75, 0.35]])  # where a block may be put

_HOME_RAD = np.array((0, 0.195, 0, -2.43, 0, 2.62, 0.785))  # gym-hil's; the gripper points down
# Down, leaning by 6 degrees: at exactly pi the first angle would jump between pi and -pi, as DROID's seldom does.
DOWN_RAD = (np.pi - 0.1, 0.0, 0.0)
_DOWN = Rotation.from_euler("xyz", DOWN_RAD)
_SUBSTEPS, _TORQUE_EVERY = 30, 5  # of physics a row: 2.2 ms each; the controller runs at 90 Hz
_STIFFNESS, _POSTURE_STIFFNESS = 1000.0, 0.5  # 1/s^2, critically damped
_RAMP_S = 0.19  # of each fifth of a second the commanded pose moves: steps end within 3 mm of it
_CELL_M = 0.008  # finer parts of the visual meshes are merged: at 256 pixels not seen, frames take half the time
# Eye, target and field of view; the exterior ones as DROID's stand, left and right of the table.
_EYES = {"exterior_1": ((1.0, 0.62, 0.62), 48.0), "exterior_2": ((1.0, -0.62, 0.62), 48.0)}
_TARGET_M = (0.45, 0.0, 0.17)
_INSTALL_GL = "apt-get install libosmesa6 (or libegl1 libgl1-mesa-dri)"


class BlockedError(ValueError):
    """A block was to lie where the gripper is."""


def import_mujoco() -> Any:
    """The mujoco module, with a software renderer chosen where $MUJOCO_GL names none; a ValueError says what to install."""
    if not os.environ.get("MUJOCO_GL"):
        # osmesa first: it draws the same picture everywhere. Recent Mesa releases have egl only.
        found = next((name for name, library in (("osmesa", "OSMesa"), ("egl", "EGL")) if find_library(library)), None)
        if found is None:
            raise ValueError(f"no OpenGL library to render with was found; {_INSTALL_GL}")
        os.environ["MUJOCO_GL"] = found
    # torch for GPUs loads triton when an optimiser is made. Its LLVM and that of Mesa, which draws, live together only in this order:
    # after Mesa's the process ends with a segmentation fault.
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton")
    require("mujoco", "sim", "the simulated robot")
    import mujoco

    return mujoco


def find_assets() -> Path:
    """The folder with gym-hil's scene.xml; a ValueError says how to get it."""
    spec = importlib.util.find_spec("gym_hil")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the robot's model files are missing; python -m pip install --no-deps gym-hil==0.1.14")
    return Path(spec.submodule_search_locations[0]) / "assets"


class RobotWorld:
    """The simulator, by gymnasium's conventions (`reset`, `step`), without a task: the reward is 0 and no episode ends.

    An observation is {"frame": uint8 [size, size, 3], "state": float64 [7]}. The same seeds, options and actions give the same
    states and pixels on one machine. One thread at a time.

    Cost of one core: 2 s to make, then 15 ms of physics and 25 ms of rendering a step at 256 pixels.
    """

    def __init__(
        self, size: int = 256, seed: int = 0, look: Look | int | None = None, camera: str = "exterior_1"
    ) -> None:
        """Make a world.

        Args:
            size: Height and width of the frames in pixels.
            seed: Of the poses and blocks that `reset` draws.
            look: Of every episode whose `reset` names none: a Look, the seed of a random one, or None for the plain one.
            camera: The one that `observation["frame"]` shows, of CAMERAS.
        """
        if camera not in CAMERAS:
            raise ValueError(f"camera must be one of {', '.join(CAMERAS)}; got {camera!r}")
        if not 1 <= size <= MAX_SIZE or seed < 0:
            raise ValueError(f"size must be 1 to {MAX_SIZE} pixels and seed at least 0; got size {size}, seed {seed}")
        if not isinstance(look, Look | None):
            draw_look(look)  # before seconds of work
        self.size, self.camera, self.look = size, camera, look
        self._mujoco = mujoco = import_mujoco()
        self._model = model = _build_model(mujoco, size)
        self._data = mujoco.MjData(model)
        self._renderer = mujoco.Renderer(model, size, size)
        self._close = weakref.finalize(self, self._renderer.close)  # also at exit, while OpenGL is still there
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0  # twice as quick
        joints = [model.joint(f"joint{number}") for number in range(1, 8)]
        self._dofs = np.array([joint.dofadr[0] for joint in joints])
        self._angles = np.array([joint.qposadr[0] for joint in joints])
        self._limits_rad = np.array([joint.range for joint in joints]).T
        self._motors = np.array([model.actuator(f"actuator{number}").id for number in range(1, 8)])
        self._fingers = model.actuator("fingers_actuator").id
        self._site = model.site("pinch").id
        self._materials = model.mat_rgba.copy()
        self._rng = np.random.default_rng(seed)
        self._place_m, self._attitude, self._grip = np.zeros(3), _DOWN, 0.0  # the commanded pose
        self._num_steps: int | None = None  # since the reset; None before the first one

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Put the arm at rest at a pose, gripper down, and the block on the table; gives the observation and info.

        Args:
            seed: Of the poses and blocks drawn from now on.
            options: `position` xyz (m) of the arm, `block` xy (m), `gripper` 0 to 1, `look` (as of the class); what is
                absent is drawn (position, block), open (gripper) or the class's (look).

        Raises:
            ValueError: An unknown option, a position outside the workspace or out of reach, or a block inside the gripper (`BlockedError`).
        """
        options = dict(options or {})
        if unknown := set(options) - {"position", "block", "gripper", "look"}:
            raise ValueError(f"reset knows the options position, block, gripper and look; got {sorted(unknown)}")
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._mujoco.mj_resetData(self._model, self._data)
        self._wear(options.get("look", self.look))
        position = options.get("position", self._rng.uniform(*WORKSPACE_M))
        position = _check_place("position", position, WORKSPACE_M)
        gripper = float(options.get("gripper", 0.0))
        if not 0 <= gripper <= 1:
            raise ValueError(f"the option gripper must be 0 (open) to 1 (closed); got {gripper:g}")
        self._place_m, self._attitude, self._grip = position, _DOWN, gripper
        arm_rad = self._solve()
        for _ in range(100):
            block = options.get("block", self._rng.uniform(*BLOCK_AREA_M))
            if self._settle(arm_rad, _check_place("block", block, _TABLE_M)):
                break
            if "block" in options:
                raise BlockedError(
                    f"a block at {np.round(block, 3).tolist()} m would lie in the gripper at {position.tolist()} m"
                )
        self._num_steps = 0
        return self._observe(), self._describe(np.repeat(self.state()[None], ROWS_PER_STEP, axis=0), ())

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Command the pose that lies `action` [7] from the one commanded before, for a fifth of a second.

        Actions are cut at MAX_STEP_M and MAX_STEP_RAD and poses at WORKSPACE_M; `info["clipped"]` names the columns. `info` also has
        `rows` [3, 7], the poses at 15 Hz from the step's start on, `target` [7], `block` xyz (m), `num_steps` since the reset.

        Raises:
            ValueError: An action of another shape, or with a NaN or infinity; or the world was never reset.
            RuntimeError: The physics became unstable.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action must be 7 finite numbers ({', '.join(POSE_CONTROLS)}); got {action.tolist()}")
        if self._num_steps is None:
            raise ValueError("the world has no episode yet: call reset() before the first step")
        before, grip, attitude = self._place_m, self._grip, self._attitude
        limits = np.array([MAX_STEP_M] * 3 + [MAX_STEP_RAD] * 3)
        taken = np.clip(action[:6], -limits, limits)
        self._place_m = np.clip(before + taken[:3], *WORKSPACE_M)
        self._grip = float(np.clip(grip + action[6], 0, 1))
        turn = Rotation.from_euler("xyz", taken[3:]).as_rotvec()
        move = np.concatenate((self._place_m - before, turn))
        got = [*move[:3], *taken[3:], self._grip - grip]
        clipped = tuple(name for name, cut in zip(POSE_CONTROLS, np.abs(got - action) > 1e-9, strict=True) if cut)
        rows, num_ticks = [], ROWS_PER_STEP * _SUBSTEPS
        for tick in range(num_ticks):
            if tick % _SUBSTEPS == 0:
                rows.append(self.state())
            if tick % _TORQUE_EVERY == 0:
                share, speed, acceleration = _minimum_jerk((tick + _TORQUE_EVERY / 2) / num_ticks)
                self._attitude = Rotation.from_rotvec(share * turn) * attitude
                self._drive(before + share * move[:3], speed * move, acceleration * move)
                self._data.ctrl[self._fingers] = 255 * (grip + share * (self._grip - grip))
            self._mujoco.mj_step(self._model, self._data)
        # MuJoCo puts a scene that has blown up back to its start, and says no more.
        if (self._data.warning.number > 0).any():
            raise RuntimeError(
                f"the physics became unstable in step {self._num_steps}, action {action.tolist()}; reset the world"
            )
        self._num_steps += 1
        return self._observe(), 0.0, False, False, self._describe(np.array(rows), clipped)

    def state(self) -> np.ndarray:
        """The measured pose [7] now."""
        euler = Rotation.from_matrix(self._data.site_xmat[self._site].reshape(3, 3)).as_euler("xyz")
        gripper = float(self._data.joint("right_driver_joint").qpos[0]) / 0.8  # the joint's range
        return np.array([*self._data.site_xpos[self._site], *euler, np.clip(gripper, 0.0, 1.0)])

    def block(self) -> np.ndarray:
        """Where the block's centre is now: x, y, z (m)."""
        return self._data.joint("block").qpos[:3].copy()

    def render(self, camera: str | None = None) -> np.ndarray:
        """The picture uint8 [size, size, 3] of a camera of CAMERAS now; None: the observation's."""
        self._renderer.update_scene(self._data, camera=camera or self.camera)
        return self._renderer.render().copy()

    def close(self) -> None:
        """Give the renderer's memory back."""
        self._close()

    def _observe(self) -> dict[str, np.ndarray]:
        return {"frame": self.render(), "state": self.state()}

    def _describe(self, rows: np.ndarray, clipped: tuple[str, ...]) -> dict[str, Any]:
        target = np.array([*self._place_m, *self._attitude.as_euler("xyz"), self._grip])
        return {"clipped": clipped, "rows": rows, "target": target, "block": self.block(), "num_steps": self._num_steps}

    def _wear(self, look: Look | int | None) -> None:
        """Give the scene a look."""
        look = PLAIN if look is None else look if isinstance(look, Look) else draw_look(look)
        model, mujoco = self._model, self._mujoco
        model.mat_rgba[:] = self._materials
        model.mat_rgba[:, :3] *= look.arm_tint
        model.mat_rgba[model.material("grid").id, :3] = look.floor_rgb
        model.geom("table").rgba[:3] = look.table_rgb
        model.vis.headlight.ambient[:] = look.ambient_rgb
        model.vis.headlight.diffuse[:] = look.headlight_rgb
        model.light_dir[0], model.light_diffuse[0] = look.light_direction, look.light_rgb
        for name, (eye, field_deg) in _EYES.items():
            camera = model.camera(name).id
            model.cam_pos[camera] = np.add(eye, look.eye_shift_m)
            model.cam_quat[camera] = _look_at(mujoco, model.cam_pos[camera], np.add(_TARGET_M, look.target_shift_m))
            model.cam_fovy[camera] = field_deg + look.field_shift_deg
        for index in range(NUM_DISTRACTORS):
            geom = model.geom(f"distractor_{index}")
            geom.rgba[3] = index < len(look.distractors)
            if index < len(look.distractors):
                thing = look.distractors[index]
                geom.pos[:], geom.size[:], geom.rgba[:3] = thing.place_m, thing.size_m, thing.rgb

    def _solve(self) -> np.ndarray:
        """Joint angles [7] rad at which the arm stands at the commanded pose within 10 um, near home (damped least squares)."""
        mujoco, model, data = self._mujoco, self._model, self._data
        data.qpos[self._angles] = _HOME_RAD
        for _ in range(200):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            error = self._error(self._place_m)
            if np.linalg.norm(error) < 1e-5:
                return data.qpos[self._angles].copy()
            jacobian = self._jacobian()
            back = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-6 * np.eye(6))
            rest = 0.1 * (_HOME_RAD - data.qpos[self._angles])
            move = back @ error + (np.eye(7) - back @ jacobian) @ rest
            data.qpos[self._angles] = np.clip(data.qpos[self._angles] + np.clip(move, -0.3, 0.3), *self._limits_rad)
        raise ValueError(f"the arm does not reach {self._place_m.tolist()} m with its gripper down")

    def _settle(self, arm_rad: np.ndarray, block_m: np.ndarray) -> bool:
        """Hold the arm until gripper and block rest; False where the block was touched."""
        data = self._data
        data.joint("block").qpos[:] = (*block_m, BLOCK_SIDE_M / 2, 1, 0, 0, 0)
        data.ctrl[self._fingers] = 255 * self._grip
        for _ in range(5 * _SUBSTEPS):
            data.qpos[self._angles], data.qvel[self._dofs] = arm_rad, 0
            self._mujoco.mj_step(self._model, data)
        data.qpos[self._angles], data.qvel[:] = arm_rad, 0
        self._mujoco.mj_forward(self._model, data)
        return bool(np.abs(self.block() - (*block_m, BLOCK_SIDE_M / 2)).max() < 1e-3)

    def _drive(self, place_m: np.ndarray, velocity: np.ndarray, acceleration: np.ndarray) -> None:
        """Set the motors' torques: operational-space control, with the home posture in its null space and gravity compensated.

        Source: O. Khatib, A unified approach for motion and force control of robot manipulators (1987). The damping of the inverse
        is small: a coarse pseudo-inverse takes whole directions for singular.
        """
        mujoco, model, data = self._mujoco, self._model, self._data
        jacobian, speed = self._jacobian(), data.qvel[self._dofs]
        whole = np.zeros((model.nv, model.nv))
        mujoco.mj_fullM(model, whole, data.qM)
        inverse = np.linalg.inv(whole[np.ix_(self._dofs, self._dofs)])
        inertia = np.linalg.inv(jacobian @ inverse @ jacobian.T + 1e-6 * np.eye(6))
        wanted = acceleration + _STIFFNESS * self._error(place_m)
        wanted += 2 * np.sqrt(_STIFFNESS) * (velocity - jacobian @ speed)
        torque = jacobian.T @ (inertia @ wanted)
        posture = _POSTURE_STIFFNESS * (_HOME_RAD - data.qpos[self._angles]) - 2 * np.sqrt(_POSTURE_STIFFNESS) * speed
        torque += posture - jacobian.T @ (inertia @ (jacobian @ (inverse @ posture)))
        data.ctrl[self._motors] = torque + data.qfrc_bias[self._dofs]

    def _jacobian(self) -> np.ndarray:
        jacobian = np.zeros((6, self._model.nv))
        self._mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._site)
        return jacobian[:, self._dofs]

    def _error(self, place_m: np.ndarray) -> np.ndarray:
        """[6]: what is missing to a place (m) and to the commanded attitude (rotation vector, rad)."""
        # MuJoCo's own functions: scipy's took as long as the physics.
        mujoco, measured, turn, missing = self._mujoco, np.zeros(4), np.zeros(4), np.zeros(6)
        mujoco.mju_mat2Quat(measured, self._data.site_xmat[self._site])
        measured[1:] *= -1
        mujoco.mju_mulQuat(turn, np.roll(self._attitude.as_quat(), 1), measured)
        mujoco.mju_quat2Vel(missing[3:], turn, 1.0)
        missing[:3] = place_m - self._data.site_xpos[self._site]
        return missing


def _build_model(mujoco: Any, size: int) -> Any:
    """gym-hil's arm and block, with a table, a lamp, distractors and cameras of ours."""
    spec = mujoco.MjSpec.from_file(str(find_assets() / "scene.xml"))
    spec.option.timestep = 1 / (STEP_HZ * ROWS_PER_STEP * _SUBSTEPS)
    spec.visual.global_.offwidth = spec.visual.global_.offheight = size
    spec.visual.quality.offsamples = 0  # no antialiasing: more than twice as quick
    for light in list(spec.lights):
        spec.delete(light)
    world, kinds = spec.worldbody, mujoco.mjtGeom
    world.add_light(name="lamp", type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, castshadow=False)
    spec.geom("floor").pos = (0, 0, -0.6)
    spec.geom("floor").size[2] = 0.25  # of the squares it is drawn in; gym-hil's 1 cm takes half of a picture's time
    world.add_geom(name="table", type=kinds.mjGEOM_BOX, size=(0.6, 0.55, 0.02), pos=(0.3, 0, -0.02))
    spec.geom("block").size = [BLOCK_SIDE_M / 2] * 3
    spec.geom("block").rgba = (0.85, 0.1, 0.1, 1)
    shapes = (kinds.mjGEOM_BOX, kinds.mjGEOM_SPHERE, kinds.mjGEOM_CYLINDER, kinds.mjGEOM_CAPSULE)
    for index, shape in enumerate(shapes):
        world.add_geom(name=f"distractor_{index}", type=shape, size=[0.03] * 3, pos=[1] * 3, contype=0, conaffinity=0)
    for name in _EYES:
        world.add_camera(name=name)
    spec.camera("handcam_rgb").name = "wrist"
    model = spec.compile()
    _merge_small_faces(model)
    return model


def _merge_small_faces(model: Any) -> None:
    """Draw the arm with fewer faces: vertices in one cell of 8 mm become one, faces that vanish are dropped. Physics keeps all."""
    for mesh in range(model.nmesh):
        first, num_faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        start = model.mesh_vertadr[mesh]
        cells = np.floor(model.mesh_vert[start : start + model.mesh_vertnum[mesh]] / _CELL_M).astype(np.int64)
        _, chosen, cell_of = np.unique(cells @ (1, 1 << 20, 1 << 40), return_index=True, return_inverse=True)
        faces = chosen[cell_of][model.mesh_face[first : first + num_faces]]
        kept = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])
        last = first + kept.sum()
        model.mesh_face[first:last] = faces[kept]
        model.mesh_facenormal[first:last] = model.mesh_facenormal[first : first + num_faces][kept]
        model.mesh_facenum[mesh] = kept.sum()


def _minimum_jerk(time: float) -> tuple[float, float, float]:
    """Share of a way that is gone at a share of the step's time, its speed (1/s) and acceleration (1/s^2)."""
    u = min(1.0, time / STEP_HZ / _RAMP_S)
    share = u**3 * (10 - 15 * u + 6 * u**2)
    return share, 30 * u**2 * (1 - u) ** 2 / _RAMP_S, 60 * u * (1 - u) * (1 - 2 * u) / _RAMP_S**2


def _look_at(mujoco: Any, eye_m: np.ndarray, target_m: np.ndarray) -> np.ndarray:
    """Quaternion of a camera at a place that looks at another, upright."""
    back = (eye_m - target_m) / np.linalg.norm(eye_m - target_m)
    right = np.cross((0, 0, 1), back)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack((right, np.cross(back, right), back), axis=1).ravel())
    return quaternion


def _check_place(name: str, given: Any, box_m: np.ndarray) -> np.ndarray:
    place = np.asarray(given, np.float64)
    if place.shape != box_m[0].shape or not np.all((box_m[0] <= place) & (place <= box_m[1])):
        raise ValueError(
            f"the option {name} must lie between {box_m[0].tolist()} and {box_m[1].tolist()} m; got {place.tolist()}"
        )
    return place
