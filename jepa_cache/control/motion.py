"""What a plan may move, and where a state is after an action: end-effector poses and the Minecraft view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jepa_cache.actions import ActionSpace, wrap_degrees
from jepa_cache.poses import integrate_pose, rotation_angle
from jepa_cache.vpt_actions import CAMERA_DEG_PER_COUNT

GRIPPER_LIMIT = 0.75
GRIPPER_DEAD_ZONE = 0.25
POSE_SPACES = ("pose7", "pose7_camera", "droid_command7")
VIEW_SPACES = ("vpt13", "vpt36", "vpt25")


class Bound(NamedTuple):
    """The one number of a state that ends somewhere, and the column of an action that moves it."""

    state: int
    action: int
    low: float
    high: float


@dataclass(frozen=True)
class Motion:
    """The part of an action space that a planner searches.

    K searched numbers an action; the rest of an action follows from them, or is 0, or stays as it was.
    """

    names: tuple[str, ...]  # of the K numbers
    columns: np.ndarray  # [K] of the action
    limit: np.ndarray  # [K] float64, largest size of each number
    first_std: np.ndarray  # [K] float64, of the first samples
    gripper: np.ndarray  # [K] bool
    dead_zone: np.ndarray  # [K] float64; smaller results of a plan become 0
    complete: Callable[[np.ndarray], np.ndarray]  # actions [.., A] with the searched columns set -> whole actions
    integrate: Callable[[np.ndarray, np.ndarray], np.ndarray]  # states [.., S], actions [.., A] -> states [.., S]
    bounded: Bound

    def actions(self, searched: np.ndarray, base: np.ndarray) -> np.ndarray:
        """Whole actions.

        Args:
            searched: [.., K].
            base: [A], what holds where nothing is searched.

        Returns:
            [.., A] float64.
        """
        actions = np.broadcast_to(base, (*searched.shape[:-1], len(base))).astype(np.float64)
        actions[..., self.columns] = searched
        return self.complete(actions)

    def carried_out(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """What is left of actions [.., A] in states [.., S], which end at their bounds; `integrate` leads to the same states."""
        at, column, low, high = self.bounded
        actions, before = actions.copy(), states[..., at]
        after = before + actions[..., column]
        ends = np.clip(after, low, high)
        actions[..., column] = np.where(after == ends, actions[..., column], ends - before)
        return self.complete(actions)


def build_motion(
    space: ActionSpace,
    *,
    max_step_m: float = 0.05,
    max_rotation_rad: float = 0.0,
    max_turn_deg: float = 30.0,
    fixed: tuple[str, ...] = (),
) -> Motion:
    """What a plan may move in an action space.

    Poses: dx, dy, dz and the gripper, each axis up to `max_step_m` (a box) and 0.75; rotations only where
    `max_rotation_rad` is above 0. View: dyaw and dpitch, with the mouse counts that they take; keys stay as they were.

    Args:
        space: The cache's.
        max_step_m: Largest translation of one step along each axis.
        max_rotation_rad: Largest rotation of one step about each axis, at most pi; 0 leaves rotations out, as the released planner.
        max_turn_deg: Largest turn of the view in one step, at most 180.
        fixed: Names of columns that stay 0.

    Raises:
        ValueError: The space says nothing of where an action leads, a fixed column is not searched, or a limit is not above 0.

    Source: V-JEPA 2-AC, arXiv 2506.09985, and the planner published with it.
    """
    if not (0 < max_step_m < np.inf and 0 < max_turn_deg <= 180 and 0 <= max_rotation_rad <= np.pi):
        raise ValueError(
            "max_step_m and max_turn_deg must be above 0 and max_rotation_rad not below 0, turns at most half a circle (180, pi); got "
            f"{max_step_m}, {max_turn_deg} and {max_rotation_rad}. Name columns in `fixed` to keep them still"
        )
    names = [column.name for column in space.actions]
    if space.name in POSE_SPACES:
        searched = [0, 1, 2, *([3, 4, 5] if max_rotation_rad > 0 else []), 6]
        limit = np.array([max_step_m] * 3 + [max_rotation_rad] * 3 + [GRIPPER_LIMIT])[searched]
        gripper = np.array(searched) == 6
        motion = Motion(
            names=tuple(names[column] for column in searched),
            columns=np.array(searched),
            limit=limit,
            first_std=np.where(gripper, 1.0, limit),
            gripper=gripper,
            dead_zone=np.where(gripper, GRIPPER_DEAD_ZONE, 0.0),
            complete=lambda actions: actions,
            integrate=integrate_pose,
            bounded=Bound(6, 6, 0.0, 1.0),
        )
    elif space.name in VIEW_SPACES:
        motion = _view_motion(names, max_turn_deg)
    else:
        raise ValueError(
            f"action space {space.name!r} does not say where an action leads, so nothing can be planned in it; known are "
            f"{', '.join((*POSE_SPACES, *VIEW_SPACES))}"
        )
    unknown = [name for name in fixed if name not in motion.names]
    if unknown:
        raise ValueError(f"only searched columns can be fixed ({', '.join(motion.names)}); got {', '.join(unknown)}")
    kept = np.array([name not in fixed for name in motion.names])
    return replace(
        motion,
        names=tuple(name for name in motion.names if name not in fixed),
        **{key: getattr(motion, key)[kept] for key in ("columns", "limit", "first_std", "gripper", "dead_zone")},
    )


def end_distances(space: str, reached: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """How far states lie apart, the chief distance first.

    Args:
        space: Action space that the planner knows.
        reached: [..., S] unscaled states.
        true: [..., S].

    Returns:
        Poses: position_m (Euclidean), rotation_rad (angle of the rotation between them), gripper (absolute). Views: camera_deg (angle
        between the directions of view), yaw_deg (on the circle), pitch_deg.
    """
    if space in POSE_SPACES:
        return {
            "position_m": np.linalg.norm(reached[..., :3] - true[..., :3], axis=-1),
            "rotation_rad": rotation_angle(reached[..., 3:6], true[..., 3:6]),
            "gripper": np.abs(reached[..., 6] - true[..., 6]),
        }
    directions = []
    for states in (reached, true):
        yaw, pitch = np.radians(states[..., 0]), np.radians(states[..., 1])
        directions.append(np.stack([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)], axis=-1))
    # By the half chord: exact for small angles, where the cosine is not.
    chord = np.linalg.norm(directions[0] - directions[1], axis=-1)
    return {
        "camera_deg": np.degrees(2 * np.arcsin(np.clip(chord / 2, 0, 1))),
        "yaw_deg": np.abs(wrap_degrees(reached[..., 0] - true[..., 0])),
        "pitch_deg": np.abs(reached[..., 1] - true[..., 1]),
    }


def _view_motion(names: list[str], max_turn_deg: float) -> Motion:
    camera = ("cameraX", "cameraY") if "cameraX" in names else ("dyaw", "dpitch")
    columns = np.array([names.index(name) for name in camera])
    mouse = [names.index(name) for name in ("mouse_dx", "mouse_dy") if name in names]

    def complete(actions: np.ndarray) -> np.ndarray:
        if mouse:
            actions[..., mouse] = actions[..., columns] / CAMERA_DEG_PER_COUNT
        return actions

    def integrate(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        after = np.asarray(states, np.float64) + actions[..., columns]
        after[..., 0] = wrap_degrees(after[..., 0])
        after[..., 1] = np.clip(after[..., 1], -90.0, 90.0)
        return after

    return Motion(
        names=camera,
        columns=columns,
        limit=np.full(2, max_turn_deg),
        first_std=np.full(2, max_turn_deg),
        gripper=np.zeros(2, bool),
        dead_zone=np.zeros(2),
        complete=complete,
        integrate=integrate,
        bounded=Bound(1, int(columns[1]), -90.0, 90.0),
    )
