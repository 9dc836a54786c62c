"""Action spaces: how native-rate controls become one action between two steps and one state at each step.

An anchor is the control row that a step's frame shows; frame and state come BEFORE that row acts. The action between the
anchors a and b is the aggregate of ALL native rows a to b-1: sums of movement, rotation differences on the circle or in
SO(3), OR of keys and buttons, the slot at a. Actions and states are raw; scaling happens when the cache is read.

An entry of `ACTION_SPACES` is all that a new space needs: with `motion`, planning works in it too, and with `joined` and
`inverse`, steps that lie further apart and steps that go back in time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from jepa_cache.config.parsing import nearest
from jepa_cache.poses import (
    POSE_SPACES,
    compose_pose_actions,
    integrate_pose,
    invert_pose_actions,
    pose_distances,
    read_controls,
)

VPT_KEYS = (
    *("ESC", "back", "drop", "forward"),
    *(f"hotbar.{slot}" for slot in range(1, 10)),
    *("inventory", "jump", "left", "right", "sneak", "sprint", "swapHands"),
)
VPT_BUTTONS = (*VPT_KEYS, "attack", "use", "pickItem")
"""The 20 keyboard keys and 3 mouse buttons of VPT by their official names, in the order of `vpt36`."""

MAX_ANGLE_DEG = 1e9
"""Float64 knows an angle of that size to 1e-7 degrees; far beyond it a view has lost where on the circle it lies."""
CAMERA_DEG_PER_COUNT = 0.15
"""360 / 2400: the turn of one mouse count outside a GUI; holds in 99.9 % of such steps of 64 VPT logs, within 0.01 degrees."""


class Column(NamedTuple):
    """One number of an action or state; `kind` is "continuous", "binary" or "onehot" (only the first is ever scaled)."""

    name: str
    unit: str
    kind: str


class StepControls(NamedTuple):
    """Of n steps: `actions` [n-1, A] float32, row i leads from step i to i+1; `states` [n, S] float32, at the steps."""

    actions: np.ndarray
    states: np.ndarray


RECORDED = "recorded"


class Searched(NamedTuple):
    """An action column that a planner searches.

    `limit` is its largest size in one step, or the argument of `control.motion.build_motion` that holds it, or RECORDED: within the
    range of recorded actions. What opens or closes a `gripper` has wide first samples and momenta of its own, and small results
    become 0.
    """

    column: str
    limit: str | float
    gripper: bool = False


@dataclass(frozen=True)
class MotionRule:
    """What a planner searches in a space, and where an action leads.

    Attributes:
        searched: The columns to search; one whose limit is set to 0 is not.
        integrate: States [.., S] and actions [.., A], unscaled, to the states [.., S] after them; None where only the recordings can
            tell (`data.recorded`).
        bounded: The state's number that ends somewhere, the action column that moves it, and its ends; None where nothing is known to.
        distances: States [.., S] reached and true to named distances [..], the chief one first.
        follows: Columns that a searched one decides, as column: (searched column, its size per unit of this one).
        holds: Whether columns that are neither searched nor follow stay as they were (keys, slot); else they are 0.
        adds: Whether actions are changes, so that those of several steps add up to one; else each is a command that replaces the last.
        map_axes: Columns that an energy map shows before any other.
    """

    searched: tuple[Searched, ...]
    integrate: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    bounded: tuple[str, str, float, float] | None
    distances: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    follows: Mapping[str, tuple[str, float]]
    holds: bool = False
    adds: bool = True
    map_axes: tuple[str, ...] = ()


Rule: TypeAlias = Callable[[Mapping[str, np.ndarray], np.ndarray], tuple[np.ndarray, np.ndarray]]
Change: TypeAlias = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ActionSpace:
    """A named rule from controls to actions and states.

    `rule` takes checked controls and anchors to actions [n-1, A] and states [n, S]; it raises ValueError for controls that are unknown
    (NaN, slot -1) at an anchor.
    """

    name: str  # as in `encode.action_space`
    version: int  # raised when the numbers of the rule change; part of the cache key of actions
    actions: tuple[Column, ...]
    states: tuple[Column, ...]
    required: tuple[str, ...]  # the control columns that the rule reads
    rule: Rule
    motion: MotionRule | None = None  # None where nothing says where an action leads, so that nothing can be planned
    # Actions [.., k, A] of k steps in a row to the one [.., A]; None where states decide it too.
    joined: Change | None = None
    inverse: Change | None = None  # actions [.., A] to those that lead back; None where there are none
    positions: tuple[str, ...] = ()  # states that say where the body or the view is, and that its pictures may show

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
        fitting = [space.name for space in ACTION_SPACES.values() if set(space.required) <= set(controls)]
        rules = (vector[1],) if vector else VECTOR_RULES
        fitting += [found for rule in rules if (found := fit_vector(rule, controls)) is not None]
        wanted = " or ".join(fitting) if fitting else f"a space of what they hold: {', '.join(sorted(controls))}"
        return reason, f"set encode.action_space to {wanted} (docs/action_spaces.md)"

    def compose(self, actions: np.ndarray) -> np.ndarray:
        """The one action [.., A] that leads as far as k actions in a row, unscaled [.., k, A]; float64.

        It is what `aggregate` gives for the first and the last of their k + 1 anchors: sums, rotations one after the other, angles on
        the circle, keys that any of them holds, the slot of the first; `vector_last`: the last command.

        Raises:
            ValueError: The space's actions depend on the states between them.
        """
        if self.joined is None:
            raise ValueError(
                f"actions of {self.name} over several steps do not follow from those of its steps alone (a command is seen from the state at "
                "its own step); set train.step_lengths and evaluate.step_length to 1, or encode.action_space to a space whose steps add up, "
                "such as pose7"
            )
        return self.joined(self._check_actions(actions))

    def invert(self, actions: np.ndarray) -> np.ndarray:
        """The actions [.., A] that lead back to where unscaled actions [.., A] began; float64.

        Raises:
            ValueError: The space has none.
        """
        if self.inverse is None:
            kinds = Counter(column.kind for column in self.actions)
            what = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            raise ValueError(
                f"actions of {self.name} have no inverse: its columns are {what}, and only changes that add up can be undone (no key, "
                "slot or command); set train.time_reversal to false"
            )
        return self.inverse(self._check_actions(actions))

    def named(self, names: Mapping[str, str]) -> ActionSpace:
        """The same space for whoever shows it: in place of a unit a column has what the data set calls it, as in `"gripper.pos" as recorded`."""

        def name(columns: tuple[Column, ...]) -> tuple[Column, ...]:
            # In quotes, because a unit that begins with deg or rad means an angle.
            told = {it.name: f'"{names[it.name]}" as recorded' for it in columns if it.name in names}
            return tuple(it._replace(unit=told.get(it.name, it.unit)) for it in columns)

        return replace(self, actions=name(self.actions), states=name(self.states))

    def _check_actions(self, actions: np.ndarray) -> np.ndarray:
        actions = np.asarray(actions, np.float64)
        if actions.shape[-1] != len(self.actions):
            raise ValueError(f"actions of {self.name} have {len(self.actions)} columns; got shape {actions.shape}")
        return actions

    def aggregate(self, controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> StepControls:
        """Make the actions and states of the steps at some anchors: [n] integer rows of the controls [M], non-decreasing.

        Raises:
            ValueError: Other anchors, controls that are missing, unknown or not finite where they are read, or an action or state that
                float32 does not hold; the tick, the column and the value are named.
        """
        if (misfit := self.find_misfit(controls)) is not None:
            raise ValueError("; ".join(misfit))
        anchors, num_ticks = np.asarray(anchors), len(controls[self.required[0]])
        if anchors.ndim != 1 or len(anchors) == 0 or not np.issubdtype(anchors.dtype, np.integer):
            raise ValueError(f"anchors must be a non-empty 1-D integer array; got {anchors.dtype} {anchors.shape}")
        if np.any(np.diff(anchors) < 0) or anchors[0] < 0 or anchors[-1] >= num_ticks:
            raise ValueError(
                f"anchors must not decrease and must lie in [0, {num_ticks}); got {anchors.min()} to {anchors.max()}"
            )
        anchors = anchors.astype(np.int64)
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
    """Look up an action space; docs/action_spaces.md describes them all.

    `vector_last<A>x<S>` and `vector_sum<A>x<S>` (e.g. `vector_last7x14`) are built from their names: the columns action_0 to
    action_<A-1> and state_0 to state_<S-1> of any robot or game. `last`: the command of the last row before the next step, for
    absolute commands (target positions, velocities). `sum`: the sum over all rows of the step, for commands that are changes.
    A setting without numbers is one that `fit_vector` completes.

    Raises:
        ValueError: An unknown name; the nearest known one is named.
    """
    if (match := VECTOR_NAME.fullmatch(name)) is not None:
        return _build_vector(name, match[1], int(match[2]), int(match[3]))
    if name in VECTOR_RULES:
        raise ValueError(
            f"{name} takes its columns from recordings, and here are none; add their numbers, as in {name}7x14"
        )
    if name not in ACTION_SPACES:
        hint = nearest(name, [*ACTION_SPACES, "vector_last<A>x<S>", "vector_sum<A>x<S>"])
        raise ValueError(f"there is no action space {name!r}{hint}")
    return ACTION_SPACES[name]


def fit_vector(rule: str, controls: Collection[str]) -> str | None:
    """The space of a rule (`vector_last`, `vector_sum`) that has a column for each numbered control; None without actions or states."""
    numbered = Counter(match[1] for name in controls if (match := NUMBERED.fullmatch(name)))
    return f"{rule}{numbered['action']}x{numbered['state']}" if len(numbered) == 2 else None


def is_space(setting: str, name: str) -> bool:
    """Whether `encode.action_space` means the space of a cache: by its name, or by the rule of a vector space."""
    vector = VECTOR_NAME.fullmatch(name)
    return setting in (name, vector[1] if vector else name)


def zero_actions(actions: np.ndarray, space: ActionSpace) -> np.ndarray:
    """Raw actions [..., A] of somebody who does nothing: zeros, with the one-hot slot kept. A baseline, to be scaled afterwards."""
    if actions.shape[-1] != len(space.actions):
        raise ValueError(f"actions of {space.name} have {len(space.actions)} columns; got shape {actions.shape}")
    kept = np.array([column.kind == "onehot" for column in space.actions])
    return np.where(kept, actions, 0).astype(actions.dtype)


def wrap_degrees(angles_deg: np.ndarray) -> np.ndarray:
    """Map angles to (-180, 180] degrees; any shape, float64."""
    return angles_deg - 360.0 * np.ceil((angles_deg - 180.0) / 360.0)


def _join_columns(actions: np.ndarray, columns: Sequence[Column]) -> np.ndarray:
    """[.., k, A] to [.., A]: sums of what is continuous, with turns of the view on the circle, keys held at any time, the first slot."""
    kinds = np.array([column.kind for column in columns])
    joined = np.where(kinds == "binary", actions.max(axis=-2), actions.sum(axis=-2))
    joined[..., kinds == "onehot"] = actions[..., 0, kinds == "onehot"]
    yaw = np.array([column.name == "dyaw" for column in columns])
    joined[..., yaw] = _to_float32_degrees(joined[..., yaw])
    return joined


def _sum_steps(column: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """[n-1] float64 sums over the rows anchors[i] to anchors[i+1] - 1, each of its own rows alone.

    Differences of running sums would lose every later step behind one huge value.
    """
    sums = np.add.reduceat(column[: anchors[-1] + 1], anchors, dtype=np.float64)[:-1]
    return np.where(np.diff(anchors) > 0, sums, 0.0)  # reduceat gives the row itself where a step has none


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
    yaw_deg, pitch_deg = read_controls(controls, ("yaw_deg", "pitch_deg"), anchors, limit=MAX_ANGLE_DEG).T
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
    if rule == "vector_sum":
        columns = [_sum_steps(controls[name], anchors) for name in actions]
    else:
        # Where two steps show the same row (video faster than the rows) the command before it is still in force.
        rows = np.maximum(anchors[1:] - 1, 0)
        columns = [controls[name][rows].astype(np.float64) for name in actions]
    return np.stack(columns, axis=1), np.stack([controls[name][anchors] for name in states], axis=1)


def _build_vector(name: str, rule: str, num_actions: int, num_states: int) -> ActionSpace:
    unit = {"vector_sum": "as recorded, summed over the step", "vector_last": "as recorded, last row of the step"}[rule]
    read = {
        "actions": tuple(f"action_{index}" for index in range(num_actions)),
        "states": tuple(f"state_{index}" for index in range(num_states)),
    }
    return ActionSpace(
        name,
        1,
        tuple(Column(column, unit, "continuous") for column in read["actions"]),
        tuple(Column(column, "as recorded", "continuous") for column in read["states"]),
        (*read["actions"], *read["states"]),
        partial(_aggregate_vector, rule=rule, **read),
        MotionRule(
            tuple(Searched(column, RECORDED) for column in read["actions"]),
            integrate=None,
            bounded=None,
            distances=lambda reached, true: {"state": np.linalg.norm(np.asarray(reached, np.float64) - true, axis=-1)},
            follows={},
            holds=rule == "vector_last",
            adds=rule == "vector_sum",
        ),
        joined=partial(np.sum, axis=-2) if rule == "vector_sum" else partial(np.take, indices=-1, axis=-2),
        inverse=np.negative if rule == "vector_sum" else None,
        positions=read["states"],
    )


VECTOR_RULES = ("vector_last", "vector_sum")
VECTOR_NAME = re.compile(r"(vector_last|vector_sum)([1-9][0-9]{0,2})x([1-9][0-9]{0,2})")
NUMBERED = re.compile(r"(action|state)_[0-9]+")
"""Generic spaces are built from their names, so that a manifest's name alone is enough to read a cache."""

_CAMERA_OF = {"cameraX": "mouse_dx", "cameraY": "mouse_dy"}
VPT25_NAMES = (
    *("inventory", "ESC"),
    *(f"hotbar.{slot}" for slot in range(1, 10)),
    *("forward", "back", "left", "right", "cameraX", "cameraY", "jump", "sneak", "sprint", "swapHands"),
    *("attack", "use", "pickItem", "drop"),
)


def _aggregate_vpt25(controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 25 columns of Oasis in its order: keys as in `vpt36`, the camera in degrees, 0.15 times the summed mouse counts.

    Other code gives these names other meanings: Oasis takes degrees through a mu-law to [-1, 1], and in its published files takes
    cameraX for pitch; Solaris puts the camera last, with cameraX for yaw in degrees, as here. Nothing is clipped here. Inside a GUI
    they are the cursor's movement on the same scale. No hotbar slot is needed, which recorders before 6.11 do not write.

    Source: column names of etched-ai/open-oasis and solaris-wm/solaris.
    """
    vpt36 = ACTION_SPACES["vpt36"]
    no_slots = np.zeros(len(controls["mouse_dx"]), np.int8)
    result = vpt36.aggregate({**controls, "hotbar": no_slots}, anchors)
    names = [column.name for column in vpt36.actions]
    taken = result.actions[:, [names.index(_CAMERA_OF.get(name, name)) for name in VPT25_NAMES]].astype(np.float64)
    return taken * [CAMERA_DEG_PER_COUNT if name in _CAMERA_OF else 1.0 for name in VPT25_NAMES], result.states


def _view_motion(
    actions: tuple[Column, ...], yaw: str, pitch: str, follows: Mapping[str, tuple[str, float]]
) -> MotionRule:
    """Of a Minecraft view, which two columns turn."""
    columns = [[column.name for column in actions].index(name) for name in (yaw, pitch)]

    def integrate(states: np.ndarray, moves: np.ndarray) -> np.ndarray:
        after = np.asarray(states, np.float64) + moves[..., columns]
        after[..., 0] = wrap_degrees(after[..., 0])
        after[..., 1] = np.clip(after[..., 1], -90.0, 90.0)
        return after

    searched = tuple(Searched(name, "max_turn_deg") for name in (yaw, pitch))
    return MotionRule(searched, integrate, ("pitch", pitch, -90.0, 90.0), _view_distances, follows, holds=True)


def _view_distances(reached: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """camera_deg (angle between the directions of view), yaw_deg (on the circle) and pitch_deg."""
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


VPT_REQUIRED = ("mouse_dx", "mouse_dy", "yaw_deg", "pitch_deg", "hotbar")
# Minecraft turns by 0.15 degrees a count outside a GUI; inside one the mouse moves the cursor, and dyaw stays 0.
_MOUSE_UNITS = {"mouse_dx": "mouse counts", "mouse_dy": "mouse counts", "dyaw": "deg", "dpitch": "deg"}
_MOUSE = tuple(Column(name, unit, "continuous") for name, unit in _MOUSE_UNITS.items())
_SLOTS = tuple(Column(f"slot.{slot}", "1 if selected at the step", "onehot") for slot in range(1, 10))
_HELD = tuple(Column(name, "1 if held on any tick of the step", "binary") for name in VPT_BUTTONS)
_VPT13, _VPT36 = (*_MOUSE, *_SLOTS), (*_MOUSE, *_HELD, *_SLOTS)
_BY_NAME = {column.name: column for column in _HELD} | {name: Column(name, "deg", "continuous") for name in _CAMERA_OF}
_VPT25 = tuple(_BY_NAME[name] for name in VPT25_NAMES)
_VIEW = (Column("yaw", "deg in (-180, 180]", "continuous"), Column("pitch", "deg, positive down", "continuous"))
# A planned turn is one of the mouse.
_COUNTS = {"mouse_dx": ("dyaw", CAMERA_DEG_PER_COUNT), "mouse_dy": ("dpitch", CAMERA_DEG_PER_COUNT)}

_POSE_UNITS = dict.fromkeys("xyz", "m") | dict.fromkeys(("rx", "ry", "rz"), "rad") | {"gripper": "0 open, 1 closed"}
_POSE_STATES = tuple(Column(name, unit, "continuous") for name, unit in _POSE_UNITS.items())
CAMERA_STATES = tuple(column._replace(name=f"camera_{column.name}") for column in _POSE_STATES[:6])
_POSE_ACTIONS = tuple(Column(f"d{name}", unit, "continuous") for name, unit in _POSE_UNITS.items())
_POSE_MOTION = MotionRule(
    searched=(
        *(Searched(name, "max_step_m") for name in ("dx", "dy", "dz")),
        *(Searched(name, "max_rotation_rad") for name in ("drx", "dry", "drz")),
        Searched("dgripper", 0.75, gripper=True),
    ),
    integrate=integrate_pose,
    bounded=("gripper", "dgripper", 0.0, 1.0),
    distances=pose_distances,
    follows={},
    map_axes=("dx", "dz"),  # as the published landscape has it: the hand's way along x and z
)

_VPT13_RULE, _VPT36_RULE = (partial(_aggregate_vpt, buttons=buttons) for buttons in ((), VPT_BUTTONS))
_VPT13_MOTION, _VPT36_MOTION = (_view_motion(columns, "dyaw", "dpitch", _COUNTS) for columns in (_VPT13, _VPT36))
_VPT13_JOINED, _VPT36_JOINED, _VPT25_JOINED = (
    partial(_join_columns, columns=columns) for columns in (_VPT13, _VPT36, _VPT25)
)
_VPT25_MOTION = _view_motion(_VPT25, "cameraX", "cameraY", {})
_SPACES = (
    *(  # Which way is yaw 0 no picture shows.
        ActionSpace(name, 1, columns, _VIEW, required, rule, motion, joined, positions=("pitch",))
        for name, columns, required, rule, motion, joined in (
            ("vpt13", _VPT13, VPT_REQUIRED, _VPT13_RULE, _VPT13_MOTION, _VPT13_JOINED),
            ("vpt36", _VPT36, (*VPT_REQUIRED, *VPT_BUTTONS), _VPT36_RULE, _VPT36_MOTION, _VPT36_JOINED),
            ("vpt25", _VPT25, (*VPT_REQUIRED[:4], *VPT_BUTTONS), _aggregate_vpt25, _VPT25_MOTION, _VPT25_JOINED),
        )
    ),
    *(
        ActionSpace(
            name,
            2,
            _POSE_ACTIONS,
            _POSE_STATES + (CAMERA_STATES if name == "pose7_extrinsics" else ()),
            required,
            describe,
            _POSE_MOTION,
            *changes,
            positions=tuple("xyz"),
        )
        for name, (describe, required) in POSE_SPACES.items()
        # A command lies where it lies whatever the arm did before: it does not follow from commands seen from other poses.
        for changes in ([] if name == "droid_command7" else [compose_pose_actions, invert_pose_actions],)
    ),
)
ACTION_SPACES: dict[str, ActionSpace] = {space.name: space for space in _SPACES}
"""Every action space of a fixed width by its name; a new one is a function and an entry here."""
