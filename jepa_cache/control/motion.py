"""What a plan may move in an action space, as the space's `motion` says, within the limits of the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from jepa_cache.actions import ACTION_SPACES, RECORDED, ActionSpace
from jepa_cache.data.recorded import Recorded

GRIPPER_DEAD_ZONE = 0.25
BEYOND_SHARE = 0.05  # of the recorded range of a place, by which a plan may lead out of it
# Of its limit: a column whose deviation in training was smaller hardly moved, so nobody knows what it does. A closed gripper that settles
# while it pushes has half a hundredth of its limit, one that grasps a tenth.
STILL_SHARE = 0.02
LIMITS = {"max_step_m": 0.05, "max_rotation_rad": 0.0, "max_turn_deg": 30.0, "reach": 1.0}
"""What holds where nothing else is said."""
WITHOUT = (("max_rotation_rad", 0.0), ("reach", 1.0))  # what every space can do


@dataclass(frozen=True)
class Motion:
    """The part of an action space that a planner searches.

    K searched numbers an action; the rest of an action follows from them, or is 0, or stays as it was.
    """

    names: tuple[str, ...]  # of the K numbers
    columns: np.ndarray  # [K] of the action
    low: np.ndarray  # [K] float64, ends of what is searched
    high: np.ndarray
    step_low: np.ndarray  # [K] float64, ends of what is carried out in one step; narrower where a plan spans several
    step_high: np.ndarray
    first_std: np.ndarray  # [K] float64, of the first samples, around the middle
    gripper: np.ndarray  # [K] bool
    dead_zone: np.ndarray  # [K] float64; smaller results of a plan become 0
    complete: Callable[[np.ndarray], np.ndarray]  # actions [.., A] with the searched columns set -> whole actions
    integrate: Callable[[np.ndarray, np.ndarray], np.ndarray]  # states [.., S], actions [.., A] -> states [.., S]
    # The one number of a state that ends somewhere, the column of an action that moves it, and where it ends.
    bounded: tuple[int, int, float, float] | None
    adds: bool  # as of `MotionRule`
    still: np.ndarray  # [A] float64, of columns that are not searched, where nothing else is said
    # Searched number that moves a place: that state's column, and where the place may end.
    places: dict[int, tuple[int, float, float]]

    @property
    def middle(self) -> np.ndarray:
        """[K] of what is searched; zeros where limits are sizes."""
        return (self.low + self.high) / 2

    def find_limits(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends [K] of what is searched from a state [S] by one action: `low` and `high`, less what leads to places that training never saw.

        There a predictor guesses, and a search finds the guess that pleases it best.
        """
        low, high = self.low.copy(), self.high.copy()
        for number, (column, least, largest) in self.places.items():
            ends = np.clip((least - state[column], largest - state[column]), self.low[number], self.high[number])
            low[number], high[number] = ends
        return low, high

    def actions(self, searched: np.ndarray, base: np.ndarray) -> np.ndarray:
        """Whole actions [.., A] float64 of searched numbers [.., K]; `base` [A] holds where nothing is searched."""
        actions = np.broadcast_to(base, (*searched.shape[:-1], len(base))).astype(np.float64)
        actions[..., self.columns] = searched
        return self.complete(actions)

    def carried_out(self, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """What is left of actions [.., A] in states [.., S], which end at their bounds; `integrate` leads to the same states."""
        if self.bounded is None:
            return actions
        at, column, low, high = self.bounded
        actions, before = actions.copy(), states[..., at]
        after = before + actions[..., column]
        ends = np.clip(after, low, high)
        actions[..., column] = np.where(after == ends, actions[..., column], ends - before)
        return self.complete(actions)


def build_motion(
    space: ActionSpace,
    *,
    max_step_m: float | None = None,
    max_rotation_rad: float | None = None,
    max_turn_deg: float | None = None,
    reach: float | None = None,
    recorded: Recorded | None = None,
    fixed: tuple[str, ...] = (),
    within: Mapping[str, tuple[float, float]] | None = None,
    defaults: Mapping[str, float] | None = None,
) -> Motion:
    """What a plan may move in an action space in one step; `fixed` names columns that stay as they are (commands) or 0 (changes).

    `within` narrows searched columns to (low, high) in one step, in every space: the only limits that vectors have beside the recorded
    range. A limit that is given and that no column obeys is refused; those of `defaults` (of a planner's settings, else `LIMITS`) hold
    where they can.

    With a `reach` above 1 one planned action may span that many steps: for predictors that were trained on mixed step lengths. What is
    carried out at once stays within the limits of one step. A gripper and commands do not reach further.

    With such a reach, and where training is known (`recorded`), one action leads to no place outside of those seen in training.

    Columns that hardly moved in the training episodes (`recorded`) are not searched: what the predictor says of them is a guess.

    Poses: dx, dy, dz and the gripper, each axis up to `max_step_m` (a box) and 0.75; rotations only where
    `max_rotation_rad` is above 0, as the released planner has none. View: dyaw and dpitch, with the mouse counts that they take;
    keys stay as they were. Vectors: all columns, within the quantiles of the actions that are `recorded`, by which states follow too.

    Raises:
        ValueError: A limit is out of range or limits nothing, `fixed` or `within` names a column that nothing searches, the space or the
            weights do not say where an action leads, or nothing is left to search.

    Source: V-JEPA 2-AC, arXiv 2506.09985, and the planner published with it.
    """
    asked = {
        "max_step_m": max_step_m,
        "max_rotation_rad": max_rotation_rad,
        "max_turn_deg": max_turn_deg,
        "reach": reach,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    limits = {**LIMITS, **(defaults or {}), **given}
    max_step_m, max_rotation_rad, max_turn_deg, reach = (limits[name] for name in asked)
    if not (
        0 < max_step_m < np.inf and 0 < max_turn_deg <= 180 and 0 <= max_rotation_rad <= np.pi and 1 <= reach < np.inf
    ):
        raise ValueError(
            "max_step_m and max_turn_deg must be above 0 and max_rotation_rad not below 0, turns at most half a circle (180, pi), and reach at "
            f"least 1; got {max_step_m}, {max_turn_deg}, {max_rotation_rad} and {reach}. Name columns in `fixed` to keep them still"
        )
    if (rule := space.motion) is None:
        raise ValueError(
            f"action space {space.name!r} does not say where an action leads, so nothing can be planned in it; known are "
            f"{', '.join(name for name, other in ACTION_SPACES.items() if other.motion)} and vectors"
        )
    if rule.integrate is None and recorded is None:
        raise ValueError(
            f"in action space {space.name!r} only the recordings tell how far actions go and where they lead, and these weights do not say it: "
            "an older version wrote them. Train again (a finished training only writes its outputs anew), or give a `motion` of your own"
        )
    obeyed = {one.limit for one in rule.searched} | ({"reach"} if rule.adds else set())
    idle = [pair for pair in given.items() if pair[0] not in obeyed and pair not in WITHOUT]
    if idle:
        raise ValueError(
            f"a limit must limit something, but no column of action space {space.name!r} obeys {', '.join(f'{it[0]}={it[1]:g}' for it in idle)} "
            "(an argument of build_motion, or plan.* in params.yaml). Leave it away; to narrow the search, keep columns still with build_motion's "
            f"fixed=, or give their range in one step, as in within={{{rule.searched[0].column!r}: (-0.1, 0.1)}}"
        )
    most = {"max_rotation_rad": np.pi, "max_turn_deg": 180.0}
    searched = {one.column: one for one in rule.searched if limits.get(one.limit, one.limit)}
    if unknown := [name for name in fixed if name not in searched]:
        raise ValueError(f"only searched columns can be fixed ({', '.join(searched)}); got {', '.join(unknown)}")
    names = [column.name for column in space.actions]
    moved = {
        name: _has_moved(names.index(name), limits.get(one.limit, one.limit), recorded)
        for name, one in searched.items()
    }
    searched = {name: one for name, one in searched.items() if name not in fixed and moved[name]}
    if not searched:
        hardly = ", ".join(name for name, one in moved.items() if not one)
        raise ValueError(
            f"nothing is left to search: {', '.join(fixed) or 'nothing'} is fixed, and in the training episodes {hardly or 'nothing'} hardly "
            "moved. Record episodes in which the actions move, or fix less"
        )
    columns = np.array([names.index(name) for name in searched], np.int64)
    gripper = np.array([one.gripper for one in searched.values()], bool)
    if rule.integrate is None:
        low, high = np.array(recorded.action_low)[columns], np.array(recorded.action_high)[columns]
    else:
        high = np.array([limits.get(one.limit, one.limit) for one in searched.values()], np.float64)
        low = -high
    for name, (floor, ceiling) in (within or {}).items():
        if name not in searched:
            raise ValueError(f"`within` takes columns that are searched ({', '.join(searched)}); got {name}")
        number = list(searched).index(name)
        ends = max(low[number], floor), min(high[number], ceiling)
        if not (floor < ceiling and ends[0] < ends[1]):
            raise ValueError(
                f"`within` is (low, high) and meets what may be searched; got {(floor, ceiling)} for {name}, which goes from "
                f"{low[number]:g} to {high[number]:g} in one step"
            )
        low[number], high[number] = ends
    factor = np.where(gripper | (not rule.adds), 1.0, reach)
    end = np.array([most.get(one.limit, np.inf) for one in searched.values()])
    widest = np.maximum(np.minimum(low, low * factor), -end), np.minimum(np.maximum(high, high * factor), end)
    still = np.zeros(len(names))
    # A command stays in the middle of what was recorded, a change that is always the same goes on.
    if rule.integrate is None:
        for name, one in moved.items():
            column = names.index(name)
            if not one or not rule.adds:
                still[column] = (recorded.action_low[column] + recorded.action_high[column]) / 2
    states, places, bounded = [column.name for column in space.states], {}, None
    if rule.bounded:
        state, action, least, largest = rule.bounded
        bounded = states.index(state), names.index(action), least, largest
    if recorded is not None and rule.adds and reach > 1:
        for number, name in enumerate(searched):
            if name.removeprefix("d") in space.positions:
                column = states.index(name.removeprefix("d"))
                lowest, highest = recorded.state_low[column], recorded.state_high[column]
                margin = BEYOND_SHARE * (highest - lowest)
                places[number] = column, lowest - margin, highest + margin
    return Motion(
        names=tuple(searched),
        columns=columns,
        low=widest[0],
        high=widest[1],
        step_low=low,
        step_high=high,
        first_std=np.where(gripper, 1.0, (widest[1] - widest[0]) / 2),
        gripper=gripper,
        dead_zone=np.where(gripper, GRIPPER_DEAD_ZONE, 0.0),
        complete=partial(complete_actions, space),
        integrate=rule.integrate or recorded.follow,
        bounded=bounded,
        adds=rule.adds,
        still=still,
        places=places,
    )


def _has_moved(column: int, limit: str | float, recorded: Recorded | None) -> bool:
    """Whether training saw an action column move, by its limit in one step or, for `RECORDED` ones, by its own range."""
    if recorded is None:
        return True
    if limit == RECORDED:
        low, high = recorded.action_low[column], recorded.action_high[column]
        return high - low > 1e-6 * max(abs(low), abs(high))
    return not recorded.action_std or recorded.action_std[column] > STILL_SHARE * limit


def complete_actions(space: ActionSpace, actions: np.ndarray) -> np.ndarray:
    """Set the columns of actions [.., A] that follow from others, in place; a space without motion has none."""
    names = [column.name for column in space.actions]
    for column, (source, size) in (space.motion.follows if space.motion else {}).items():
        actions[..., names.index(column)] = actions[..., names.index(source)] / size
    return actions
