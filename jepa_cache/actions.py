"""Action spaces: how native-rate controls become one action between two steps and one state at each step.

An anchor is the control row that a step's frame shows; frame and state come BEFORE that row acts. The action between the
anchors a and b is the aggregate of ALL native rows a to b-1: sums of movement, rotation differences on the circle or in
SO(3), OR of keys and buttons, the slot at a. Actions and states are raw; scaling happens when the cache is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from jepa_cache.config.parsing import nearest

VPT_KEYS = (
    *("ESC", "back", "drop", "forward"),
    *(f"hotbar.{slot}" for slot in range(1, 10)),
    *("inventory", "jump", "left", "right", "sneak", "sprint", "swapHands"),
)
VPT_BUTTONS = (*VPT_KEYS, "attack", "use", "pickItem")
"""The 20 keyboard keys and 3 mouse buttons of VPT by their official names, in the order of `vpt36`."""

POSE_CONTROLS = ("x_m", "y_m", "z_m", "rx_rad", "ry_rad", "rz_rad", "gripper")


class Column(NamedTuple):
    """One number of an action or state; `kind` is "continuous", "binary" or "onehot" (only the first is ever scaled)."""

    name: str
    unit: str
    kind: str


class StepControls(NamedTuple):
    """Of n steps: `actions` [n-1, A] float32, row i leads from step i to i+1; `states` [n, S] float32, at the steps."""

    actions: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class ActionSpace:
    """A named rule from controls to actions and states.

    Attributes:
        name: As in `encode.action_space`.
        version: Raised when the numbers of the rule change; part of the cache key of actions.
        actions: The A action columns, in order.
        states: The S state columns, in order.
        required: The control columns that `aggregate` reads.
        aggregate: `(controls, anchors)` to StepControls. `controls`: name to [M]; `anchors`: [n] integer rows of the
            controls, non-decreasing, within [0, M). Raises ValueError for other anchors and for controls that are missing
            or unknown (NaN, slot -1) at an anchor.
    """

    name: str
    version: int
    actions: tuple[Column, ...]
    states: tuple[Column, ...]
    required: tuple[str, ...]
    aggregate: Callable[[Mapping[str, np.ndarray], np.ndarray], StepControls]


def get_action_space(name: str) -> ActionSpace:
    """Look up an action space.

    - `vpt13`: A = 13, S = 2. mouse_dx, mouse_dy (mouse counts, summed), dyaw, dpitch (degrees, yaw on the circle in
      (-180, 180]), then the hotbar slot at the step as 9 one-hot columns.
    - `vpt36`: A = 36, S = 2. The first four of `vpt13`, then 20 keys, 3 mouse buttons (1 where held on any tick of the
      step), then the 9 one-hot columns.
    - `pose7`: A = 7, S = 7. Difference of x, y, z (m), rotation difference in the base frame as extrinsic xyz Euler angles
      (rad), difference of the gripper (0 open, 1 closed).

    The state of the VPT spaces is yaw in (-180, 180] and pitch, degrees; that of `pose7` the pose itself.

    Raises:
        ValueError: An unknown name; the nearest known one is named.
    """
    if name not in ACTION_SPACES:
        raise ValueError(f"there is no action space {name!r}{nearest(name, list(ACTION_SPACES))}")
    return ACTION_SPACES[name]


def zero_actions(actions: np.ndarray, space: ActionSpace) -> np.ndarray:
    """Actions of somebody who does nothing: raw zeros, with the one-hot slot kept. A baseline, to be scaled afterwards.

    Takes and returns raw actions [..., A] of `space`, as a copy.

    Raises:
        ValueError: The last axis is not A.
    """
    if actions.shape[-1] != len(space.actions):
        raise ValueError(f"actions of {space.name} have {len(space.actions)} columns; got shape {actions.shape}")
    kept = np.array([column.kind == "onehot" for column in space.actions])
    return np.where(kept, actions, 0).astype(actions.dtype)


def wrap_degrees(angles_deg: np.ndarray) -> np.ndarray:
    """Map angles to (-180, 180] degrees; any shape, float64."""
    return angles_deg - 360.0 * np.ceil((angles_deg - 180.0) / 360.0)


def pose_actions(states: np.ndarray) -> np.ndarray:
    """Differences between successive poses; never of Euler angles, which jump by 2 pi.

    Args:
        states: [T, 7]: x, y, z (m), extrinsic xyz Euler angles (rad), gripper in [0, 1].

    Returns:
        [T-1, 7] float64: translation (m), Euler angles of `R[t+1] R[t]^T` (rad, base frame), gripper difference; row t
        leads from t to t+1.

    Raises:
        ValueError: Another shape.

    Source: V-JEPA 2-AC, arXiv 2506.09985.
    """
    states = _check_poses(states)
    rotations = _rotations(states[:, 3:6])
    actions = np.diff(states, axis=0)
    if len(actions):
        actions[:, 3:6] = (rotations[1:] * rotations[:-1].inv()).as_euler("xyz")
    return actions


def integrate_pose(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Apply one action to each pose: the inverse of `pose_actions`, with the gripper kept in [0, 1].

    Args:
        states: [..., 7] poses as in `pose_actions`.
        actions: [..., 7] of the same shape.

    Returns:
        [..., 7] float64, the poses after the actions.

    Raises:
        ValueError: The shapes differ or the last axis is not 7.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (pose update of its planner).
    """
    states, actions = np.asarray(states, np.float64), np.asarray(actions, np.float64)
    if states.shape != actions.shape or states.shape[-1:] != (7,):
        raise ValueError(f"states and actions must both be [..., 7]; got {states.shape} and {actions.shape}")
    after = states + actions
    turned = _rotations(actions[..., 3:6].reshape(-1, 3)) * _rotations(states[..., 3:6].reshape(-1, 3))
    after[..., 3:6] = turned.as_euler("xyz").reshape(after[..., 3:6].shape)
    after[..., 6] = np.clip(after[..., 6], 0.0, 1.0)
    return after


def poses_in_camera_frame(states: np.ndarray, extrinsics: np.ndarray) -> np.ndarray:
    """Express poses as seen from a camera: `inverse(extrinsics[t]) @ pose[t]`.

    Args:
        states: [T, 7] poses as in `pose_actions`, in the robot's base frame.
        extrinsics: [T, 6] camera poses in the base frame: x, y, z (m), extrinsic xyz Euler angles (rad).

    Returns:
        [T, 7] float64; the gripper is unchanged.

    Raises:
        ValueError: Other shapes.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (its option `camera_frame`).
    """
    states, extrinsics = _check_poses(states), np.asarray(extrinsics, np.float64)
    if extrinsics.shape != (len(states), 6):
        raise ValueError(f"extrinsics must be [{len(states)}, 6], one camera pose per state; got {extrinsics.shape}")
    to_camera = _rotations(extrinsics[:, 3:6]).inv()
    seen = states.copy()
    if len(states):
        seen[:, :3] = to_camera.apply(states[:, :3] - extrinsics[:, :3])
        seen[:, 3:6] = (to_camera * _rotations(states[:, 3:6])).as_euler("xyz")
    return seen


def _check_poses(states: np.ndarray) -> np.ndarray:
    states = np.asarray(states, np.float64)
    if states.ndim != 2 or states.shape[1] != 7:
        raise ValueError(f"states must be [T, 7]; got {states.shape}")
    return states


def _rotations(euler_rad: np.ndarray) -> Rotation:
    return Rotation.from_euler("xyz", euler_rad)


def _select(controls: Mapping[str, np.ndarray], anchors: np.ndarray, required: tuple[str, ...]) -> np.ndarray:
    """Check that the controls are there and the anchors usable; return the anchors as int64."""
    missing = [name for name in required if name not in controls]
    if missing:
        raise ValueError(
            f"the controls lack {', '.join(missing)}, which this action space needs; choose another encode.action_space "
            f"(the controls hold {', '.join(controls)})"
        )
    anchors = np.asarray(anchors)
    num_ticks = len(controls[required[0]])
    if anchors.ndim != 1 or len(anchors) == 0 or not np.issubdtype(anchors.dtype, np.integer):
        raise ValueError(f"anchors must be a non-empty 1-D integer array; got {anchors.dtype} {anchors.shape}")
    if np.any(np.diff(anchors) < 0) or anchors[0] < 0 or anchors[-1] >= num_ticks:
        raise ValueError(
            f"anchors must not decrease and must lie in [0, {num_ticks}); got {anchors.min()} to {anchors.max()}"
        )
    return anchors.astype(np.int64)


def _sum_steps(column: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """[n-1] float64 sums over the rows anchors[i] to anchors[i+1] - 1, by prefix sums (exact for mouse counts)."""
    return np.diff(np.concatenate(([0.0], np.cumsum(column, dtype=np.float64)))[anchors])


def _read_view(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Yaw (unwrapped) and pitch at the anchors, [n] float64 degrees each."""
    view = controls["yaw_deg"][anchors].astype(np.float64), controls["pitch_deg"][anchors].astype(np.float64)
    for name, angles in zip(("yaw", "pitch"), view, strict=True):
        if not np.isfinite(angles).all():
            row = anchors[np.isnan(angles).argmax()]
            raise ValueError(
                f"the recording holds no {name} at tick {row}; the VPT action spaces need it at every step"
            )
    return view


def _read_slots(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> np.ndarray:
    """[n, 9] float64 one-hot of the hotbar slot at the anchors."""
    slots = controls["hotbar"][anchors].astype(np.int64)
    if np.any(slots < 0):
        row = anchors[np.argmax(slots < 0)]
        raise ValueError(
            f"the recording holds no hotbar slot at tick {row} (VPT recorders before 6.11 wrote none); "
            "the VPT action spaces need it at every step"
        )
    return np.eye(9)[slots]


def _to_float32_degrees(angles_deg: np.ndarray) -> np.ndarray:
    """Wrap to (-180, 180] after rounding to float32 as well: -180 + 1e-9 would become -180."""
    wrapped = wrap_degrees(angles_deg).astype(np.float32)
    wrapped[wrapped == -180.0] = 180.0
    return wrapped


def _aggregate_vpt(controls: Mapping[str, np.ndarray], anchors: np.ndarray, buttons: tuple[str, ...]) -> StepControls:
    anchors = _select(controls, anchors, (*VPT_REQUIRED, *buttons))
    yaw_deg, pitch_deg = _read_view(controls, anchors)
    columns = [
        _sum_steps(controls["mouse_dx"], anchors),
        _sum_steps(controls["mouse_dy"], anchors),
        _to_float32_degrees(np.diff(yaw_deg)),
        np.diff(pitch_deg),
        *(_sum_steps(controls[name], anchors) > 0 for name in buttons),
        *_read_slots(controls, anchors[:-1]).T,
    ]
    states = np.stack([_to_float32_degrees(yaw_deg), pitch_deg], axis=1)
    return StepControls(np.stack(columns, axis=1).astype(np.float32), states.astype(np.float32))


def _aggregate_pose7(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> StepControls:
    anchors = _select(controls, anchors, POSE_CONTROLS)
    poses = np.stack([controls[name][anchors] for name in POSE_CONTROLS], axis=1).astype(np.float64)
    if not np.isfinite(poses).all():
        row, column = np.argwhere(~np.isfinite(poses))[0]
        raise ValueError(f"the recording holds no {POSE_CONTROLS[column]} at tick {anchors[row]}; pose7 needs it")
    return StepControls(pose_actions(poses).astype(np.float32), poses.astype(np.float32))


VPT_REQUIRED = ("mouse_dx", "mouse_dy", "yaw_deg", "pitch_deg", "hotbar")
# Minecraft turns by 0.15 degrees a count outside a GUI; inside one the mouse moves the cursor, and dyaw stays 0.
_MOUSE_UNITS = {"mouse_dx": "mouse counts", "mouse_dy": "mouse counts", "dyaw": "deg", "dpitch": "deg"}
_MOUSE = tuple(Column(name, unit, "continuous") for name, unit in _MOUSE_UNITS.items())
_SLOTS = tuple(Column(f"slot.{slot}", "1 if selected at the step", "onehot") for slot in range(1, 10))
_HELD = tuple(Column(name, "1 if held on any tick of the step", "binary") for name in VPT_BUTTONS)
_VIEW = (Column("yaw", "deg in (-180, 180]", "continuous"), Column("pitch", "deg, positive down", "continuous"))
_POSE_UNITS = ("m", "m", "m", "rad", "rad", "rad", "0 open, 1 closed")

_POSE = tuple(zip(("x", "y", "z", "rx", "ry", "rz", "gripper"), _POSE_UNITS, strict=True))
_POSE_STATES = tuple(Column(name, unit, "continuous") for name, unit in _POSE)
_POSE_ACTIONS = tuple(Column(f"d{name}", unit, "continuous") for name, unit in _POSE)

ACTION_SPACES: Mapping[str, ActionSpace] = {
    space.name: space
    for space in (
        ActionSpace("vpt13", 1, (*_MOUSE, *_SLOTS), _VIEW, VPT_REQUIRED, partial(_aggregate_vpt, buttons=())),
        ActionSpace(
            "vpt36",
            1,
            (*_MOUSE, *_HELD, *_SLOTS),
            _VIEW,
            (*VPT_REQUIRED, *VPT_BUTTONS),
            partial(_aggregate_vpt, buttons=VPT_BUTTONS),
        ),
        ActionSpace("pose7", 1, _POSE_ACTIONS, _POSE_STATES, POSE_CONTROLS, _aggregate_pose7),
    )
}
"""Every action space by its name; a new one is a function and an entry here."""
