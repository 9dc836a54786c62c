"""Action spaces: how native-rate controls become one action between two steps and one state at each step.

An anchor is the control row that a step's frame shows; frame and state come BEFORE that row acts. The action between the
anchors a and b is the aggregate of ALL native rows a to b-1: sums of movement, rotation differences on the circle or in
SO(3), OR of keys and buttons, the slot at a. Actions and states are raw; scaling happens when the cache is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from jepa_cache.config.parsing import nearest
from jepa_cache.poses import POSE_SPACES
from jepa_cache.vpt_actions import build_vpt25

VPT_KEYS = (
    *("ESC", "back", "drop", "forward"),
    *(f"hotbar.{slot}" for slot in range(1, 10)),
    *("inventory", "jump", "left", "right", "sneak", "sprint", "swapHands"),
)
VPT_BUTTONS = (*VPT_KEYS, "attack", "use", "pickItem")
"""The 20 keyboard keys and 3 mouse buttons of VPT by their official names, in the order of `vpt36`."""

MAX_ANGLE_DEG = 1e9
"""Float64 knows an angle of that size to 1e-7 degrees; far beyond it a view has lost where on the circle it lies."""


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
        required: The control columns that the rule reads.
        rule: `(controls, anchors)`, checked, to actions [n-1, A] and states [n, S]. Raises ValueError for controls that are unknown
            (NaN, slot -1) at an anchor.
    """

    name: str
    version: int
    actions: tuple[Column, ...]
    states: tuple[Column, ...]
    required: tuple[str, ...]
    rule: Callable[[Mapping[str, np.ndarray], np.ndarray], tuple[np.ndarray, np.ndarray]]

    def find_misfit(self, controls: Collection[str]) -> tuple[str, str] | None:
        """Why recordings with these control columns do not fit, and the setting that does; None where they fit.

        Surplus columns do not fit a vector space: they would be dropped, and a gripper is the last column as a rule.
        """
        vector = VECTOR_NAME.fullmatch(self.name)
        missing = [name for name in self.required if name not in controls]
        surplus = [name for name in controls if vector and NUMBERED.fullmatch(name) and name not in self.required]
        if missing:
            reason = f"the space needs the controls {', '.join(missing)}, which are not recorded"
        elif surplus:
            reason = f"the space has no column for {', '.join(surplus)} of the recording, which would be dropped"
        else:
            return None
        fitting = list_action_spaces(controls)
        if vector:
            fitting = [
                name for name in fitting if not name.startswith("vector_") or name.startswith(f"vector_{vector[1]}")
            ]
        wanted = " or ".join(fitting) if fitting else f"a space of what they hold: {', '.join(sorted(controls))}"
        return reason, f"set encode.action_space to {wanted} (docs/action_spaces.md)"

    def aggregate(self, controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> StepControls:
        """Make the actions and states of the steps at some anchors.

        Args:
            controls: Name to [M].
            anchors: [n] integer rows of the controls, non-decreasing, within [0, M).

        Raises:
            ValueError: Other anchors, controls that are missing, unknown or not finite where they are read, or an action or state that
                float32 does not hold; the tick, the column and the value are named.
        """
        if (misfit := self.find_misfit(controls)) is not None:
            raise ValueError("; ".join(misfit))
        anchors = _check_anchors(anchors, len(controls[self.required[0]]))
        with np.errstate(over="ignore", invalid="ignore"):  # What is not finite afterwards is an error below.
            exact = self.rule(controls, anchors)
            result = StepControls(*(values.astype(np.float32) for values in exact))
        for name in ("states", "actions"):
            bad = np.argwhere(~np.isfinite(getattr(result, name)))
            if len(bad):
                step, column = bad[0]
                value = getattr(StepControls(*exact), name)[step, column]
                raise ValueError(
                    f"the recording holds no usable {getattr(self, name)[column].name} at the step of tick {anchors[step]} ({value:g}; "
                    "float32 holds up to 3.4e+38)"
                )
        return result


def get_action_space(name: str) -> ActionSpace:
    """Look up an action space.

    - `vpt13`: A = 13, S = 2. mouse_dx, mouse_dy (mouse counts, summed), dyaw, dpitch (degrees, yaw on the circle in
      (-180, 180]), then the hotbar slot at the step as 9 one-hot columns.
    - `vpt36`: A = 36, S = 2. The first four of `vpt13`, then 20 keys, 3 mouse buttons (1 where held on any tick of the
      step), then the 9 one-hot columns.
    - `pose7`: A = 7, S = 7. Difference of x, y, z (m), rotation difference in the base frame as extrinsic xyz Euler angles
      (rad), difference of the gripper (0 open, 1 closed).
    - `pose7_camera`: A = 7, S = 7. `pose7` of the poses as the camera sees them: `inverse(camera pose) @ pose` at each step.
    - `droid_command7`: A = 7, S = 7. The pose that the last row before the next step commands, as seen from the measured pose
      at the step: difference of x, y, z (m), rotation difference in the base frame (rad), difference of the gripper. An
      absolute command replaces the ones before it, so the last one stands for all; 0 where a step has no row of its own.
    - `vector_last<A>x<S>`, `vector_sum<A>x<S>` (e.g. `vector_last7x14`): the columns action_0 to action_<A-1> and state_0 to
      state_<S-1> of any robot or game. `last`: the command of the last row before the next step, for absolute commands
      (target positions, velocities). `sum`: the sum over all rows of the step, for commands that are changes.

    The state of the VPT spaces is yaw in (-180, 180] and pitch, degrees; that of `pose7` and `droid_command7` the pose
    itself, that of `pose7_camera` the pose in the camera's frame.

    Raises:
        ValueError: An unknown name; the nearest known one is named.
    """
    if (match := VECTOR_NAME.fullmatch(name)) is not None:
        return _build_vector(name, match[1], int(match[2]), int(match[3]))
    if name not in ACTION_SPACES:
        hint = nearest(name, [*ACTION_SPACES, "vector_last<A>x<S>", "vector_sum<A>x<S>"])
        raise ValueError(f"there is no action space {name!r}{hint}")
    return ACTION_SPACES[name]


def list_action_spaces(controls: Collection[str]) -> list[str]:
    """Names of the action spaces that a recording with these control columns allows."""
    fitting = [space.name for space in ACTION_SPACES.values() if set(space.required) <= set(controls)]
    numbered = Counter(match[1] for name in controls if (match := NUMBERED.fullmatch(name)))
    if len(numbered) == 2:
        fitting += [f"vector_{rule}{numbered['action']}x{numbered['state']}" for rule in ("last", "sum")]
    return fitting


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


def _check_anchors(anchors: np.ndarray, num_ticks: int) -> np.ndarray:
    """The anchors as int64, when they are usable."""
    anchors = np.asarray(anchors)
    if anchors.ndim != 1 or len(anchors) == 0 or not np.issubdtype(anchors.dtype, np.integer):
        raise ValueError(f"anchors must be a non-empty 1-D integer array; got {anchors.dtype} {anchors.shape}")
    if np.any(np.diff(anchors) < 0) or anchors[0] < 0 or anchors[-1] >= num_ticks:
        raise ValueError(
            f"anchors must not decrease and must lie in [0, {num_ticks}); got {anchors.min()} to {anchors.max()}"
        )
    return anchors.astype(np.int64)


def _sum_steps(column: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """[n-1] float64 sums over the rows anchors[i] to anchors[i+1] - 1, each of its own rows alone.

    Differences of running sums would lose every later step behind one huge value.
    """
    sums = np.add.reduceat(column[: anchors[-1] + 1], anchors, dtype=np.float64)[:-1]
    return np.where(np.diff(anchors) > 0, sums, 0.0)  # reduceat gives the row itself where a step has none


def _read_view(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Yaw (unwrapped) and pitch at the anchors, [n] float64 degrees each."""
    view = controls["yaw_deg"][anchors].astype(np.float64), controls["pitch_deg"][anchors].astype(np.float64)
    for name, angles in zip(("yaw", "pitch"), view, strict=True):
        usable = np.abs(angles) <= MAX_ANGLE_DEG
        if not usable.all():
            step = usable.argmin()
            raise ValueError(
                f"the recording holds no usable {name} at tick {anchors[step]} ({angles[step]:g}; the VPT action spaces need it at "
                f"every step, up to {MAX_ANGLE_DEG:g} degrees)"
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


def _aggregate_vpt(
    controls: Mapping[str, np.ndarray], anchors: np.ndarray, buttons: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    yaw_deg, pitch_deg = _read_view(controls, anchors)
    columns = [
        _sum_steps(controls["mouse_dx"], anchors),
        _sum_steps(controls["mouse_dy"], anchors),
        _to_float32_degrees(np.diff(yaw_deg)),
        np.diff(pitch_deg),
        *(_sum_steps(controls[name], anchors) > 0 for name in buttons),
        *_read_slots(controls, anchors[:-1]).T,
    ]
    return np.stack(columns, axis=1), np.stack([_to_float32_degrees(yaw_deg), pitch_deg], axis=1)


def _aggregate_vector(
    controls: Mapping[str, np.ndarray],
    anchors: np.ndarray,
    rule: str,
    actions: tuple[str, ...],
    states: tuple[str, ...],
) -> tuple[np.ndarray, np.ndarray]:
    if rule == "sum":
        columns = [_sum_steps(controls[name], anchors) for name in actions]
    else:
        # Where two steps show the same row (video faster than the rows) the command before it is still in force.
        rows = np.maximum(anchors[1:] - 1, 0)
        columns = [controls[name][rows].astype(np.float64) for name in actions]
    return np.stack(columns, axis=1), np.stack([controls[name][anchors] for name in states], axis=1)


def _build_vector(name: str, rule: str, num_actions: int, num_states: int) -> ActionSpace:
    unit = {"sum": "as recorded, summed over the step", "last": "as recorded, last row of the step"}[rule]
    actions = tuple(Column(f"action_{index}", unit, "continuous") for index in range(num_actions))
    states = tuple(Column(f"state_{index}", "as recorded", "continuous") for index in range(num_states))
    read = {
        "actions": tuple(column.name for column in actions),
        "states": tuple(column.name for column in states),
    }
    return ActionSpace(
        name, 1, actions, states, (*read["actions"], *read["states"]), partial(_aggregate_vector, rule=rule, **read)
    )


VECTOR_NAME = re.compile(r"vector_(last|sum)([1-9][0-9]{0,2})x([1-9][0-9]{0,2})")
NUMBERED = re.compile(r"(action|state)_[0-9]+")
"""Generic spaces are built from their names, so that a manifest's name alone is enough to read a cache."""

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

ACTION_SPACES: dict[str, ActionSpace] = {
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
        *(
            ActionSpace(name, 2, _POSE_ACTIONS, _POSE_STATES, required, describe)
            for name, (describe, required) in POSE_SPACES.items()
        ),
    )
}
"""Every action space of a fixed width by its name; a new one is a function and an entry here."""
ACTION_SPACES["vpt25"] = build_vpt25(ACTION_SPACES["vpt36"])
