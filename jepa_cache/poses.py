"""Robot arms: differences, integration and change of frame of end-effector poses, and openpi's rule for when an arm rests.

A pose is [.., 7]: x, y, z (m), extrinsic xyz Euler angles (rad), gripper (0 open, 1 closed). Everything is float64. Euler
angles are never subtracted: the first one of a gripper that points down lies at +-pi and jumps by 2 pi.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

POSE_CONTROLS = ("x_m", "y_m", "z_m", "rx_rad", "ry_rad", "rz_rad", "gripper")
"""A measured pose in the robot's base frame: metres, extrinsic xyz Euler angles in radians, gripper 0 open to 1 closed."""
COMMAND_CONTROLS = tuple(f"command_{name}" for name in POSE_CONTROLS)
"""The absolute pose that a row commands, in the form of POSE_CONTROLS."""
CAMERA_CONTROLS = tuple(f"ext_{name}" for name in POSE_CONTROLS[:6])
"""The camera's pose in the base frame."""
JOINT_VELOCITY_CONTROLS = tuple(f"command_joint{joint}_rad_s" for joint in range(1, 8))
"""Columns of an episode's controls that the rule looks at."""
IDLE_TOLERANCE = 1e-3  # rad/s, change of a commanded joint velocity from one row to the next
# openpi's numbers: so many idle rows in a row are a rest; so many of what remains are kept, about 1 s at 15 Hz.
MIN_IDLE_ROWS, MIN_KEPT_ROWS = 7, 16
_EPISODE_PATH = re.compile(r"([^/]+/(?:success|failure)/[^/]+/[^/]+)/")
_RANGES = TypeAdapter(dict[str, list[tuple[NonNegativeInt, NonNegativeInt]]])


def pose_actions(states: np.ndarray) -> np.ndarray:
    """Differences [T-1, 7] between successive poses [T, 7]; row t leads from t to t+1.

    They are translation (m), Euler angles of `R[t+1] R[t]^T` (rad, base frame) and gripper difference.

    Source: V-JEPA 2-AC, arXiv 2506.09985.
    """
    states = _check_poses(states)
    turns = _to_matrices(states[:, 3:6])
    actions = np.diff(states, axis=0)
    if len(actions):
        # One by one: a stack of products may differ in the last bit, which is what decides between +pi and -pi.
        actions[:, 3:6] = _to_euler(np.stack([after @ before.T for before, after in itertools.pairwise(turns)]))
    return actions


def compose_pose_actions(actions: np.ndarray) -> np.ndarray:
    """One action [.., 7] for k in a row, [.., k, 7]: what `pose_actions` gives for the first and the last of their k + 1 poses."""
    joined = actions.sum(axis=-2)
    turns = _to_matrices(actions[..., 3:6].reshape(-1, 3)).reshape(*actions.shape[:-1], 3, 3)
    turn = functools.reduce(
        lambda before, step: turns[..., step, :, :] @ before, range(1, turns.shape[-3]), turns[..., 0, :, :]
    )
    joined[..., 3:6] = _to_euler(turn.reshape(-1, 3, 3)).reshape(joined[..., 3:6].shape)
    return joined


def invert_pose_actions(actions: np.ndarray) -> np.ndarray:
    """The actions [.., 7] that lead back: `integrate_pose` with an action and then with its inverse changes no pose."""
    inverse = -actions
    turns = _to_matrices(actions[..., 3:6].reshape(-1, 3)).transpose(0, 2, 1)
    inverse[..., 3:6] = _to_euler(turns).reshape(inverse[..., 3:6].shape)
    return inverse


def commanded_actions(states: np.ndarray, commands: np.ndarray) -> np.ndarray:
    """How far commanded poses [T, 7] lie from measured ones in one frame; rotations: `R_command R_state^T`."""
    actions = commands - states
    if len(actions):
        actions[:, 3:6] = _to_euler(_to_matrices(commands[:, 3:6]) @ _to_matrices(states[:, 3:6]).transpose(0, 2, 1))
    return actions


def integrate_pose(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Apply one action [..., 7] to each pose [..., 7]: the inverse of `pose_actions`, with the gripper kept in [0, 1].

    What follows a pose in its row (the camera's, which stands still) stays.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (pose update of its planner).
    """
    states, actions = np.asarray(states, np.float64), np.asarray(actions, np.float64)
    if states.shape[:-1] != actions.shape[:-1] or states.shape[-1] < 7 or actions.shape[-1:] != (7,):
        raise ValueError(f"states must be [..., 7 or more], actions [..., 7]; got {states.shape} and {actions.shape}")
    after = states.copy()
    after[..., :7] += actions
    turns = (_to_matrices(poses[..., 3:6].reshape(-1, 3)) for poses in (actions, states))
    after[..., 3:6] = _to_euler(next(turns) @ next(turns)).reshape(after[..., 3:6].shape)
    after[..., 6] = np.clip(after[..., 6], 0.0, 1.0)
    return after


def rotation_angle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Angle in radians, 0 to pi, of the rotation between two attitudes, [..., 3] extrinsic xyz Euler angles in radians each."""
    one, other = np.broadcast_arrays(np.asarray(one, np.float64), np.asarray(other, np.float64))
    between = _to_matrices(one.reshape(-1, 3)) @ _to_matrices(other.reshape(-1, 3)).transpose(0, 2, 1)
    # |R - 1| (Frobenius) is 2 sqrt(2) sin(angle / 2): exact for small angles, where the trace is not.
    half = np.linalg.norm(between - np.eye(3), axis=(1, 2)) / (2 * np.sqrt(2))
    return (2 * np.arcsin(np.clip(half, 0, 1))).reshape(one.shape[:-1])


def pose_distances(reached: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """How far poses [.., 7] lie apart: position_m (Euclidean), rotation_rad (of the rotation between them), gripper."""
    return {
        "position_m": np.linalg.norm(reached[..., :3] - true[..., :3], axis=-1),
        "rotation_rad": rotation_angle(reached[..., 3:6], true[..., 3:6]),
        "gripper": np.abs(reached[..., 6] - true[..., 6]),
    }


def poses_in_camera_frame(states: np.ndarray, extrinsics: np.ndarray) -> np.ndarray:
    """Express poses [T, 7] as seen from the camera at the poses [T, 6], all in the base frame: `inverse(extrinsics[t]) @ pose[t]`.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (its option `camera_frame`).
    """
    states, extrinsics = _check_poses(states), np.asarray(extrinsics, np.float64)
    if extrinsics.shape != (len(states), 6):
        raise ValueError(f"extrinsics must be [{len(states)}, 6], one camera pose per state; got {extrinsics.shape}")
    seen = states.copy()
    if len(states):
        places = np.linalg.inv(_to_transforms(extrinsics)) @ _to_transforms(states)
        seen[:, :3] = places[:, :3, 3]
        seen[:, 3:6] = _to_euler(places[:, :3, :3])
    return seen


def describe_pose7(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions [n-1, 7] and states [n, 7] of the action space `pose7`, float64; needs POSE_CONTROLS."""
    poses = _read_poses(controls, POSE_CONTROLS, anchors)
    return pose_actions(poses), poses


def describe_pose7_camera(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `describe_pose7`, of the poses in the camera's frame at each anchor; needs CAMERA_CONTROLS as well."""
    cameras = _read_poses(controls, CAMERA_CONTROLS, anchors)
    seen = poses_in_camera_frame(_read_poses(controls, POSE_CONTROLS, anchors), cameras)
    return pose_actions(seen), seen


def describe_pose7_extrinsics(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `describe_pose7`, with the camera's pose behind the hand's: states [n, 13]; needs CAMERA_CONTROLS as well."""
    actions, poses = describe_pose7(controls, anchors)
    return actions, np.concatenate([poses, _read_poses(controls, CAMERA_CONTROLS, anchors)], axis=1)


def describe_droid_command7(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Commands [n-1, 7] as seen from the measured poses [n, 7], float64; needs COMMAND_CONTROLS as well.

    Of the rows between two anchors the last one's command counts: absolute commands replace each other. Two steps may show
    one row (a video faster than the rows); no command lies between them, and the action is 0.
    """
    poses = _read_poses(controls, POSE_CONTROLS, anchors)
    moves = np.diff(anchors) > 0
    actions = np.zeros((len(anchors) - 1, 7))
    commands = _read_poses(controls, COMMAND_CONTROLS, anchors[1:][moves] - 1)
    actions[moves] = commanded_actions(poses[:-1][moves], commands)
    return actions, poses


def _read_poses(controls: Mapping[str, np.ndarray], names: Sequence[str], rows: np.ndarray) -> np.ndarray:
    return read_controls(controls, names, rows, limit=float(np.finfo(np.float32).max))


def read_controls(
    controls: Mapping[str, np.ndarray], names: Sequence[str], rows: np.ndarray, *, limit: float
) -> np.ndarray:
    """[n, len(names)] float64 of some controls at some rows; refused where one is no number of size `limit` at most."""
    values = np.stack([controls[name][rows] for name in names], axis=1).astype(np.float64)
    usable = np.abs(values) <= limit
    if not usable.all():
        row, column = np.argwhere(~usable)[0]
        raise ValueError(
            f"the recording holds no usable {names[column]} at tick {rows[row]} ({values[row, column]:g}; the action space needs it at "
            f"every step, and a number up to {limit:.2g})"
        )
    return values


def _check_poses(states: np.ndarray) -> np.ndarray:
    states = np.asarray(states, np.float64)
    if states.ndim != 2 or states.shape[1] != 7:
        raise ValueError(f"states must be [T, 7]; got {states.shape}")
    return states


# Rotations are multiplied as matrices, as the official code does. Quaternions are as exact, but where a turn by pi or a middle
# angle of pi / 2 leaves a choice of Euler angles they choose others: +pi for -pi in one of three such steps.
# SciPy's rotations take half a second to import, which `jepa-cache status` need not pay.


def _to_matrices(euler_rad: np.ndarray) -> np.ndarray:
    """[n, 3, 3] of extrinsic xyz Euler angles [n, 3]."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", euler_rad).as_matrix()


def _to_euler(matrices: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(matrices).as_euler("xyz")


def _to_transforms(poses: np.ndarray) -> np.ndarray:
    """[n, 4, 4] of positions and Euler angles [n, 6 or more]."""
    transforms = np.tile(np.eye(4), (len(poses), 1, 1))
    transforms[:, :3, :3] = _to_matrices(poses[:, 3:6])
    transforms[:, :3, 3] = poses[:, :3]
    return transforms


POSE_SPACES: Mapping[str, tuple[Callable, tuple[str, ...]]] = {
    "pose7": (describe_pose7, POSE_CONTROLS),
    "pose7_camera": (describe_pose7_camera, (*POSE_CONTROLS, *CAMERA_CONTROLS)),
    "pose7_extrinsics": (describe_pose7_extrinsics, (*POSE_CONTROLS, *CAMERA_CONTROLS)),
    "droid_command7": (describe_droid_command7, (*POSE_CONTROLS, *COMMAND_CONTROLS)),
}
"""The action spaces made of poses: how actions and states come about, and the controls they need."""


def find_episode_key(path: str) -> str | None:
    """`<lab>/<success or failure>/<date>/<episode>` from a path of the raw release; None where the path has no such part.

    RLDS and raw recordings of one episode thus have one key, and a list of ranges fits both.
    """
    matches = _EPISODE_PATH.findall(path)
    return matches[-1] if matches else None


def find_idle_rows(joint_velocity_commands: np.ndarray) -> np.ndarray:
    """Rows [M] bool in which the command [M, 7] rad/s stays as it was: every joint's velocity changes by less than 1e-3 rad/s.

    The change of the command counts, not its size. Row 0 has nothing before it and is not idle; nor is a row at a NaN.

    Source: openpi, `compute_droid_nonidle_ranges`.
    """
    commands = np.asarray(joint_velocity_commands, np.float64)
    still = (np.abs(np.diff(commands, axis=0)) < IDLE_TOLERANCE).all(axis=1)
    return np.concatenate((np.zeros(min(1, len(commands)), bool), still))


def idle_ranges(joint_velocity_commands: np.ndarray, *, cut_end: int = 10) -> list[tuple[int, int]]:
    """What openpi keeps of an episode with commands [M, 7] rad/s at 15 Hz: runs of 16 rows and more, after runs of 7 and more idle rows are gone.

    `cut_end` rows are taken from the end of each kept run, whose chunks of 16 actions would reach into the rest; a
    world model needs no chunk: 0 keeps them. Gives ranges [start, end), ascending, without those that the cut leaves empty.

    Source: openpi, `compute_droid_nonidle_ranges`.
    """
    idle = find_idle_rows(joint_velocity_commands)
    kept = np.ones(len(idle), bool)
    for start, end in _find_runs(idle):
        if end - start >= MIN_IDLE_ROWS:
            kept[start:end] = False
    runs = [(start, end) for start, end in _find_runs(kept) if end - start >= MIN_KEPT_ROWS]
    return [(start, end - cut_end) for start, end in runs if end - cut_end > start]


def read_ranges(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Read a published list of kept ranges: JSON of `"<recording folder>--<file path>": [[start, end], ...]`.

    Gives ranges [start, end) of 15 Hz rows by the episode's key `<lab>/<outcome>/<date>/<episode>`; by the name as it stands
    where it has no such part.
    """
    try:
        listed = _RANGES.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ValueError(
            f"{path} is no JSON that maps names of episodes to ranges [start, end]: {fault['msg']}"
            + (f"; got {str(fault['input'])[:80]} at {'.'.join(map(str, fault['loc']))}" if fault["loc"] else "")
        ) from error
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name, pairs in listed.items():
        key = find_episode_key(name) or name
        if key in ranges:
            raise ValueError(f"{path} lists the episode {key!r} twice")
        if backwards := [pair for pair in pairs if pair[0] > pair[1]]:
            raise ValueError(f"{path}: a range ends where it starts or later; got {list(backwards[0])} for {name!r}")
        ranges[key] = pairs
    return ranges


def _find_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
