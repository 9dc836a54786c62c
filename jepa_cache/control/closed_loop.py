"""Episodes in a world that answers: where a policy ends, by rules that are written once, beside policies that need no world model.

A simulator is passed in and follows gymnasium: `reset(options=...)` gives an observation and info, `step(action)` these with a reward and two
flags. An observation is {"frame": uint8 [h, w, 3], "state": [S]} whose first three numbers are the end effector's place (m);
info["block"] is that of a block. `sample.robot.RobotWorld` is one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

Observation = Mapping[str, np.ndarray]
Policy = Callable[[Observation], np.ndarray]
"""The next action [A] of an observation; made anew for each episode."""

NUM_STILL = 2  # steps without a command at the end of an episode, and of the way to a goal: what moves comes to rest
STEP_M = 0.06  # largest translation of a step along each axis, of the policies without a world model
CLOSER_SHARE = 0.5  # of the distance at the start
MARGIN_M = 0.05  # by which a place may lie outside a task's box: what the arm overshoots, and no more

# Of a push, m: behind the middle of the block, over the table, and how far the closed gripper goes, so that the block moves by some 8 cm; the first
# and last are more where the gripper is wide (along y).
BEHIND_M, WIDER_M, HEIGHT_M, PUSH_M, PUSH_STEPS = 0.065, 0.045, 0.04, 0.105, 3


class Simulator(Protocol):
    """A world by gymnasium's conventions, with the options of `sample.robot.RobotWorld.reset`."""

    def reset(self, *, options: dict[str, Any]) -> tuple[Observation, Mapping[str, Any]]:
        """Begin an episode."""

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, Mapping[str, Any]]:
        """Carry out an action."""


class Start(NamedTuple):
    """One drawn beginning with its goal: the goal picture is taken after `way` is carried out from `goal`."""

    options: dict[str, Any]  # of the simulator's reset, where the episode begins
    goal: dict[str, Any]  # where the way to the goal picture begins
    way: np.ndarray  # [steps, 3] m


class Goal(NamedTuple):
    """What is to be reached."""

    frame: np.ndarray  # uint8 [h, w, 3]
    arm: np.ndarray  # [3] m, of the end effector
    place: np.ndarray  # [3] m, of what the task measures


@dataclass(frozen=True)
class Task:
    """What is asked of a policy, and when it has done it."""

    name: str
    thing: str  # whose place counts: "end effector" or "block"
    within_m: float
    num_steps: int  # budget
    draw: Callable[[np.random.Generator, Task], Start]
    needs_closer: bool = False  # whether the distance must be halved as well
    # Lowest and highest x, y, z (m) of the end effector; a state outside ends the episode.
    box_m: tuple[tuple[float, float, float], ...] = ((0.32, -0.25, 0.03), (0.62, 0.25, 0.35))

    def __post_init__(self) -> None:
        """Refuse a task without steps."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps of a task is at least 1; got {self.num_steps}")

    @property
    def rule(self) -> str:
        """When an episode counts as a success, in words."""
        half = f" and below {CLOSER_SHARE:.0%} of where it was at the start" if self.needs_closer else ""
        return (
            f"{self.thing} less than {100 * self.within_m:g} cm from where the goal picture has it{half}, measured at the end: after "
            f"{self.num_steps} actions and {NUM_STILL} still steps"
        )

    def succeeds(self, start_m: float, final_m: float) -> bool:
        """Whether an episode that began and ended at these distances from its goal is a success; never where one is not finite."""
        halved = final_m < CLOSER_SHARE * start_m if self.needs_closer else True
        return bool(math.isfinite(start_m) and final_m < self.within_m and halved)


def draw_reach(rng: np.random.Generator, task: Task) -> Start:
    """Two places of the box 12 to 28 cm apart, and a block near neither."""
    while True:
        begin, end = rng.uniform(*task.box_m, (2, 3))
        block = rng.uniform((0.38, -0.20), (0.60, 0.20))
        clear = min(np.hypot(*(place[:2] - block)) for place in (begin, end)) > 0.12
        if clear and 0.12 < np.linalg.norm(begin - end) < 0.28:
            break
    return Start({"position": begin, "block": block}, {"position": end, "block": block}, np.zeros((0, 3)))


def draw_push(rng: np.random.Generator, task: Task) -> Start:
    """A closed gripper low behind a block, which a straight way pushes by some 8 cm, at most 15 degrees from the normal of one of its faces."""
    low, high = np.array(task.box_m)[:, :2] + np.array([[0.01], [-0.01]])
    while True:
        block = rng.uniform((0.38, -0.20), (0.60, 0.20))
        angle = rng.integers(4) * np.pi / 2 + rng.uniform(-np.pi / 12, np.pi / 12)
        direction = np.array([np.cos(angle), np.sin(angle)])
        wider_m = WIDER_M * direction[1] ** 2
        begin, push_m = block - (BEHIND_M + wider_m) * direction, PUSH_M + wider_m
        ends = np.array([begin, begin + push_m * direction])
        if (ends > low).all() and (ends < high).all():
            break
    options = {"position": np.array([*begin, HEIGHT_M]), "block": block, "gripper": 1.0}
    return Start(options, options, np.tile(np.array([*direction, 0.0]) * push_m / PUSH_STEPS, (PUSH_STEPS, 1)))


TASKS = {
    task.name: task
    for task in (
        Task("reach", "end effector", 0.05, 8, draw_reach),
        Task("push", "block", 0.03, 8, draw_push, needs_closer=True),
    )
}


def draw_starts(task: Task, num_starts: int, seed: int, *, first: int = 0, **options: Any) -> list[Start]:
    """Starts number `first` and on of a set, that of `seed`; each is the same however many are drawn. `options` go to every reset."""
    drawn = [task.draw(np.random.default_rng([seed, 0xAC7, first + number]), task) for number in range(num_starts)]
    return [start._replace(options=start.options | options, goal=start.goal | options) for start in drawn]


class EpisodeError(Exception):
    """An episode that cannot be judged, and why."""


@dataclass
class Episode:
    """What happened from one start."""

    start_m: float = math.nan  # distance from the goal at the start
    final_m: float = math.nan  # and at the end; nan where there was a failure
    success: bool = False
    failure: str = ""  # why nothing can be said
    seconds: list[float] = field(default_factory=list)  # that each call of the policy took
    distances_m: list[float] = field(default_factory=list)  # after each step, from that at the start on
    frames: list[np.ndarray] = field(default_factory=list)  # seen at these times, where they are kept

    @property
    def closer_than_half(self) -> bool:
        """Whether it ended nearer to its goal than half of the distance at the start."""
        return self.final_m < CLOSER_SHARE * self.start_m


class Seen(NamedTuple):
    """What a simulator shows, once it can be judged."""

    observation: Observation
    info: Mapping[str, Any]
    place: np.ndarray  # [3] m, of what the task measures
    ended: bool  # whether the simulator ended the episode


def find_goal(simulator: Simulator, task: Task, start: Start) -> Goal:
    """Carry out the way to a start's goal and look; raises `EpisodeError` where the simulator fails or the picture is damaged."""
    seen = _look(task, "goal picture", simulator.reset, options=dict(start.goal))
    width = len(seen.info["target"]) if "target" in seen.info else 7
    moves = [*start.way, *np.zeros((NUM_STILL, 3))]
    for number, move in enumerate(moves, start=1):
        seen = _look(task, "goal picture", simulator.step, np.array([*move, *np.zeros(width - 3)]))
        _check_end(seen, number, len(moves))
    return Goal(seen.observation["frame"], np.array(seen.observation["state"][:3], np.float64), seen.place)


def run_episode(
    simulator: Simulator,
    task: Task,
    start: Start,
    goal: Goal,
    build_policy: Callable[[Goal], Policy],
    *,
    keep_frames: bool = False,
) -> Episode:
    """One episode: `task.num_steps` actions of a policy, then still steps, then the distance of the thing from the goal's place.

    Whatever keeps it from its end is its `failure`, and it is no success: an error of the simulator or the policy, a damaged goal picture,
    a state outside the task's box, an episode that the simulator ends before the budget is used up.
    """
    episode = Episode()
    try:
        check_frame("goal picture", goal.frame)
        seen = _look(task, "live picture", simulator.reset, options=dict(start.options))
        _note(episode, goal, seen, keep_frames)
        policy = _carry_out(build_policy, goal, what="policy")
        num_steps = task.num_steps + NUM_STILL
        for number in range(num_steps):
            if number < task.num_steps:
                began, observation = time.perf_counter(), seen.observation
                action = _carry_out(lambda: np.asarray(policy(observation), np.float64), what="policy")  # noqa: B023
                episode.seconds.append(time.perf_counter() - began)
            else:
                action = np.zeros_like(action)
            seen = _look(task, "live picture", simulator.step, action)
            _note(episode, goal, seen, keep_frames)
            _check_end(seen, number + 1, num_steps)
    except EpisodeError as failure:
        return replace(episode, failure=str(failure))
    start_m, final_m = episode.distances_m[0], episode.distances_m[-1]
    return replace(episode, start_m=start_m, final_m=final_m, success=task.succeeds(start_m, final_m))


def check_frame(name: str, frame: Any) -> None:
    """Refuse what is no picture of a scene: another type or shape, or one colour throughout."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        got = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise EpisodeError(f"{name}: not uint8 [height, width, 3] but {got}")
    if (frame == frame[0, 0]).all():
        raise EpisodeError(f"{name}: one colour throughout, {frame[0, 0].tolist()}")


def _note(episode: Episode, goal: Goal, seen: Seen, keep: bool) -> None:
    """Take the distance from the goal down."""
    frame = seen.observation["frame"]
    if frame.shape != goal.frame.shape:
        raise EpisodeError(f"goal picture: {list(goal.frame.shape)}, the camera gives {list(frame.shape)}")
    episode.distances_m.append(float(np.linalg.norm(seen.place - goal.place)))
    if keep:
        episode.frames.append(frame)


def _check_end(seen: Seen, number: int, num_steps: int) -> None:
    if seen.ended and number < num_steps:
        raise EpisodeError(f"simulator: it ended the episode after {number} steps")


def _look(task: Task, picture: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Seen:
    """What a simulator shows after `reset` or `step`; an `EpisodeError` where it fails, or shows what cannot be judged."""
    given = _carry_out(call, *arguments, **options)
    try:
        observation, *rest, info = given
        if len(rest) not in (0, 3):
            raise ValueError(f"reset gives 2 values and step 5, not {len(rest) + 2}")
        frame, state = observation["frame"], np.asarray(observation["state"], np.float64)
        place = np.array(info["block"] if task.thing == "block" else state[:3], np.float64)
        if state.ndim != 1 or len(state) < 3 or place.shape != (3,):
            raise ValueError(f"a state is [3 or more] and a place [3], not {list(state.shape)} and {list(place.shape)}")
    except Exception as error:
        raise EpisodeError(f"simulator: what it gives cannot be read, {type(error).__name__}: {error}") from error
    low, high = np.array(task.box_m)
    # Negated, so that a NaN lies outside.
    if not np.isfinite(state).all() or not ((low - MARGIN_M <= state[:3]) & (state[:3] <= high + MARGIN_M)).all():
        raise EpisodeError(f"state outside the workspace: {np.round(state, 3).tolist()}")
    if not np.isfinite(place).all():
        raise EpisodeError(f"simulator: the {task.thing} is at {place.tolist()}")
    check_frame(picture, frame)
    return Seen(observation, info, place, any(map(bool, rest[1:])))


def _carry_out(call: Callable[..., Any], *arguments: Any, what: str = "simulator", **options: Any) -> Any:
    """Call what is not ours; its errors, of whatever kind, end the episode and not the run."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        raise EpisodeError(f"{what}: {type(error).__name__}: {error}") from error


# Policies that need no world model.


def go_straight(find_way: Callable[[Observation], np.ndarray], width: int) -> Policy:
    """Go the way [3] m that is left, on a straight line, its longest axis cut to STEP_M."""

    def policy(observation: Observation) -> np.ndarray:
        way = find_way(observation)
        return np.array([*way * min(1.0, STEP_M / max(np.abs(way).max(), 1e-9)), *np.zeros(width - 3)])

    return policy


def build_oracle(width: int) -> Callable[[Goal], Policy]:
    """Straight to where the arm truly is in the goal picture."""
    return lambda goal: go_straight(lambda observation: goal.arm - observation["state"][:3], width)


def build_no_motion(width: int) -> Callable[[Goal], Policy]:
    """Never moves."""
    return lambda goal: lambda observation: np.zeros(width)


def build_random_actions(width: int, seed: int) -> Callable[[Goal], Policy]:
    """Normal translations of 4 cm, cut to STEP_M; the draws go on from episode to episode."""
    rng = np.random.default_rng([seed, 0xA1])
    draw = lambda: [*np.clip(rng.normal(0, 0.04, 3), -STEP_M, STEP_M), *np.zeros(width - 3)]  # noqa: E731
    return lambda goal: lambda observation: np.array(draw())


def build_readout_servo(read: Callable[[np.ndarray], np.ndarray], width: int) -> Callable[[Goal], Policy]:
    """No world model: straight from where a readout [h, w, 3] -> [3] m sees the arm in the live picture to where it sees it in the goal's."""

    def build(goal: Goal) -> Policy:
        end = read(goal.frame)
        return go_straight(lambda observation: end - read(observation["frame"]), width)

    return build


# Figures.


def wilson(num_successes: int, num_trials: int) -> list[float]:
    """95 % interval [low, high] of a share, Wilson's."""
    from scipy.stats import binomtest  # here: half a second

    return [float(end) for end in binomtest(num_successes, num_trials).proportion_ci(method="wilson")]


def summarize(episodes: Sequence[Episode], replan_every: int = 1) -> dict[str, Any]:
    """The figures of some episodes; failures count as no success, and are left out of the distances alone.

    `seconds_per_plan` is of the calls of the policy that plan, each `replan_every`-th.
    """
    count, ended = len(episodes), [episode for episode in episodes if not episode.failure]
    successes, seconds = (
        sum(episode.success for episode in episodes),
        [t for one in episodes for t in one.seconds[::replan_every]],
    )
    finals = [episode.final_m for episode in ended]
    return {
        "success": successes / count,
        "success_ci": wilson(successes, count),
        "closer_than_half": sum(episode.closer_than_half for episode in ended) / count,
        "final_distance_m": float(np.mean(finals)) if ended else None,
        "final_distance_median_m": float(np.median(finals)) if ended else None,
        "start_distance_m": float(np.mean([episode.start_m for episode in ended])) if ended else None,
        "num_starts": count,
        "num_failures": count - len(ended),
        "failures": sorted({episode.failure for episode in episodes if episode.failure})[:5],
        "seconds_per_plan": float(np.mean(seconds)) if seconds else None,
    }
