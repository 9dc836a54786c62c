"""Claims: an episode is a success by the written rule alone, at its end; whatever goes wrong is named and is none; starts follow from a seed.

The simulator is a point in a box, drawn as a spot; that of MuJoCo is tested in tests/sample.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from jepa_cache.control import closed_loop
from jepa_cache.control.closed_loop import (
    TASKS,
    EpisodeError,
    Goal,
    build_no_motion,
    build_oracle,
    build_random_actions,
    build_readout_servo,
    draw_starts,
    find_goal,
    run_episode,
    summarize,
    wilson,
)

REACH, PUSH = TASKS["reach"], TASKS["push"]
WIDTH = 7


class Point:
    """Moves by the first three numbers of an action; the block follows where the point is nearer than 4.5 cm in x and y."""

    def __init__(self, **faults):
        self.faults = faults  # {"raises": step, "nan": step, "spoils": what is made of what a step gives}

    def reset(self, *, options):
        self.place = np.array(options["position"], float)
        self.block, self.number = np.array([*options["block"], 0.0]), 0
        return self.see(), {"block": self.block, "target": np.zeros(WIDTH)}

    def see(self):
        frame = np.zeros((8, 8, 3), np.uint8)
        # 16 bits of each axis, so that a readout is exact to 1e-4 m.
        high, low = np.divmod(np.clip(np.nan_to_num(self.place + 1) * 2**14, 0, 65535).astype(int), 256)
        frame[0, 0], frame[0, 1] = high, low
        return {"frame": frame, "state": np.array([*self.place, 0.0, 0.0, 0.0, 1.0])}

    def step(self, action):
        self.number += 1
        if self.faults.get("raises") == self.number:
            raise RuntimeError("the physics became unstable")
        for _ in range(10):
            self.place = self.place + action[:3] / 10
            gap = self.block[:2] - self.place[:2]
            if np.linalg.norm(gap) < 0.045:
                self.block = np.array([*(self.place[:2] + 0.045 * gap / np.linalg.norm(gap)), 0.0])
        if self.faults.get("nan") == self.number:
            self.place = self.place * np.nan
        if spoil := self.faults.get("spoils"):
            return spoil((self.see(), 0.0, False, False, {"block": self.block}))
        return self.see(), 0.0, False, False, {"block": self.block}


def read(frame):
    return (frame[0, 0].astype(int) * 256 + frame[0, 1]) / 2**14 - 1


def run(task, build, simulator=None, num_starts=20):
    simulator, episodes = simulator or Point(), []
    for start in draw_starts(task, num_starts, seed=1):
        goal = find_goal(Point(), task, start)
        episodes.append(run_episode(simulator, task, start, goal, build))
    return episodes


# 1. The rule


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_going_straight_to_the_true_goal_succeeds_and_standing_still_or_at_random_does_not(task):
    assert summarize(run(task, build_oracle(WIDTH)))["success"] == 1
    assert summarize(run(task, build_readout_servo(read, WIDTH)))["success"] == 1
    assert summarize(run(task, build_no_motion(WIDTH)))["success"] == 0
    assert summarize(run(task, build_random_actions(WIDTH, 0)))["success"] < 0.2


def test_the_end_counts_and_not_the_nearest_moment():
    def passes_by(goal):
        number = iter(range(100))
        way = lambda seen: goal.arm - seen["state"][:3]  # noqa: E731
        go = closed_loop.go_straight(way, WIDTH)
        return lambda seen: (
            go(seen) if next(number) < 6 else np.array([0, 0, 0.06 * (1 if goal.arm[2] < 0.2 else -1), 0, 0, 0, 0])
        )

    for episode in run(REACH, passes_by):
        assert min(episode.distances_m) < 0.05 < episode.final_m and not episode.success and not episode.failure
        assert len(episode.distances_m) == 1 + REACH.num_steps + closed_loop.NUM_STILL
        assert episode.final_m == episode.distances_m[-1]


@pytest.mark.parametrize(
    ("task", "start_m", "final_m", "expected"),
    [
        (REACH, 0.2, 0.0499, True),
        (REACH, 0.2, 0.05, False),
        (PUSH, 0.08, 0.0299, True),
        (PUSH, 0.08, 0.03, False),
        (PUSH, 0.05, 0.026, False),
        (REACH, 0.2, math.nan, False),
        (PUSH, math.inf, 0.01, False),
    ],
)
def test_success_is_what_the_rule_says(task, start_m, final_m, expected):
    assert task.succeeds(start_m, final_m) is expected


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda given: given[:3] + given[4:], "reset gives 2 values and step 5, not 4"),
        (lambda given: None, "what it gives cannot be read, TypeError"),
        (lambda given: ({"frame": given[0]["frame"]}, *given[1:]), "KeyError: 'state'"),
        (lambda given: ({**given[0], "state": np.zeros((1, 7))}, *given[1:]), r"a state is [3 or more]"),
        (lambda given: ({**given[0], "frame": np.zeros((8, 8, 3), np.uint8)}, *given[1:]), "one colour throughout"),
        (lambda given: ({**given[0], "frame": np.ones((4, 4, 3))}, *given[1:]), "not uint8"),
        (lambda given: (*given[:4], {}), "KeyError: 'block'"),
        (lambda given: ({**given[0], "state": given[0]["state"] + 3}, *given[1:]), "state outside the workspace"),
        (lambda given: (*given[:2], True, *given[3:]), "it ended the episode after 1 steps"),
    ],
)
def test_what_a_simulator_shows_amiss_is_the_failure_of_an_episode_and_no_goal(spoil, named):
    (start,) = draw_starts(PUSH, 1, seed=1)
    with pytest.raises(EpisodeError) as error:
        find_goal(Point(spoils=spoil), PUSH, start)
    assert named in str(error.value)
    episode = run_episode(Point(spoils=spoil), PUSH, start, find_goal(Point(), PUSH, start), build_no_motion(WIDTH))
    assert named in episode.failure and not episode.success


def test_a_policy_that_gives_no_numbers_is_named_and_a_task_without_steps_refused():
    (episode,) = run(REACH, lambda goal: lambda observation: "left", num_starts=1)
    assert "policy: ValueError" in episode.failure
    with pytest.raises(ValueError, match="num_steps of a task is at least 1; got 0"):
        replace(REACH, num_steps=0)


def test_seconds_are_those_of_the_calls_that_plan():
    timed = replace(run(REACH, build_no_motion(WIDTH))[0], seconds=[1.0, 0.0, 0.0, 3.0, 0.0])
    assert summarize([timed], replan_every=3)["seconds_per_plan"] == 2 and summarize([timed])["seconds_per_plan"] == 0.8


# 2. What goes wrong


@pytest.mark.parametrize(
    ("faults", "named"),
    [
        ({"raises": 4}, "simulator: RuntimeError: the physics became unstable"),
        ({"nan": 10}, "state outside the workspace: [nan"),
    ],
)
def test_a_failure_is_named_and_never_a_success(faults, named):
    episodes = run(REACH, build_oracle(WIDTH), Point(**faults))
    assert all(named in episode.failure and not episode.success for episode in episodes)
    assert all(math.isnan(episode.final_m) and not episode.closer_than_half for episode in episodes)
    figures = summarize([*episodes, *run(REACH, build_oracle(WIDTH))])
    assert figures["success"] == 0.5 and figures["num_failures"] == 20 and named in figures["failures"][0]
    assert figures["num_starts"] == 40 and figures["final_distance_m"] < 0.01, "distances are those of whole episodes"


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (np.zeros((8, 8, 3), np.uint8), "one colour throughout"),
        (np.eye(8, dtype=np.uint8), "not uint8 [height, width, 3] but uint8 [8, 8]"),
        (np.arange(300, dtype=np.uint8).reshape(10, 10, 3), "goal picture: [10, 10, 3], the camera gives [8, 8, 3]"),
        (None, "NoneType"),
    ],
)
def test_a_damaged_goal_picture_is_named_and_never_a_success(frame, named):
    (start,) = draw_starts(REACH, 1, seed=1)
    place = np.array(start.goal["position"])
    episode = run_episode(Point(), REACH, start, Goal(frame, place, place), build_oracle(WIDTH))
    assert named in episode.failure and not episode.success


# 3. Starts and shares


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_starts_follow_from_their_seed_and_number_and_lie_in_the_box(task):
    many = draw_starts(task, 60, seed=1, look=3)
    for ours, theirs in zip(many[40:], draw_starts(task, 20, seed=1, first=40, look=3), strict=True):
        assert str(ours) == str(theirs) and ours.options["look"] == ours.goal["look"] == 3
    seen = {str(start) for start in many}
    assert len(seen) == 60 and not seen & {str(start) for start in draw_starts(task, 60, seed=0, look=3)}
    low, high = np.array(task.box_m)
    for start in many:
        ends = np.array([start.options["position"], start.goal["position"] + start.way.sum(axis=0)])
        assert ((low <= ends) & (ends <= high)).all()
        assert np.linalg.norm(ends[1] - ends[0]) > 0.1


@pytest.mark.parametrize(
    ("won", "trials", "expected"), [(39, 40, (0.871, 0.996)), (77, 80, (0.895, 0.987)), (0, 40, (0.0, 0.088))]
)
def test_wilson_intervals_are_the_published_ones(won, trials, expected):
    assert np.abs(np.array(wilson(won, trials)) - expected).max() < 1e-3
    assert np.abs(np.array(wilson(trials - won, trials))[::-1] + wilson(won, trials) - 1).max() < 1e-12
