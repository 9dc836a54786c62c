"""What a plan promises, beside the reference implementation's results (tests/test_golden.py).

Claims:
- the samples of a pass of the predictor do not change a plan;
- the search finds the action after which a world that is known sees its goal;
- a search that keeps its best sample ends where the energy is least, past a wide basin that is less deep;
- one large displacement leads to no place that training never saw, and back from outside;
- fixed columns stay 0, limits hold, the gripper closes when asked to, and the returned states are where the actions lead;
- the actions of a plan are what is carried out: they end where the state does, and lead where the search's own lead;
- views: the mouse follows the turn, yaw wraps and pitch stops at straight up and down;
- columns that are not searched, wrong shapes, limits, energies that are not finite and a gripper that cannot close are refused.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jepa_cache.actions import get_action_space
from jepa_cache.control.motion import build_motion
from jepa_cache.control.planner import SETTINGS, Context, PlannerSettings, plan_actions
from jepa_cache.data.recorded import Recorded
from jepa_cache.predictor.rollout import LatentModel, as_reps
from tests.predictor.makers import build_lively

POSE = get_action_space("pose7")
QUICK = PlannerSettings(horizon=2, num_samples=12, num_elites=4, num_rounds=2, mean_momentum=0.15, std_momentum=0.15)


def make_world(num_context=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    predictor = build_lively().float().eval()
    tokens = as_reps(torch.randn(num_context + 1, 4, 8, generator=generator), True)
    numbers = np.random.default_rng(seed)
    states = numbers.uniform(-0.3, 0.3, (num_context, 7)) + np.array([0, 0, 0, 0, 0, 0, 0.5])
    actions = numbers.uniform(-0.05, 0.05, (num_context - 1, 7))
    return LatentModel(predictor), Context(tokens[:-1], actions, states), tokens[-1]


def test_the_samples_of_a_pass_do_not_change_a_plan():
    model, context, goal = make_world()
    one, other = (plan_actions(model, context, goal, build_motion(POSE), QUICK, batch_size=size) for size in (None, 5))
    np.testing.assert_allclose(one.energies, other.energies, atol=1e-5)
    np.testing.assert_allclose(one.actions, other.actions, atol=1e-5)


def test_the_search_finds_the_action_after_which_a_known_world_sees_its_goal():
    def known(tokens, actions, states, past, num_kept_steps):
        """Tokens that show where the hand is after the action."""
        place = (states + actions)[..., None, :3].expand(*tokens.shape[:3], 3)
        return SimpleNamespace(tokens=place, past=past)

    context = Context(torch.zeros(1, 4, 3), np.zeros((0, 7)), np.zeros((1, 7)))
    target = torch.tensor([0.03, -0.02, 0.04])
    settings = PlannerSettings(1, 200, 10, 12, 0.15, 0.15)
    plan = plan_actions(
        LatentModel(known, False), context, target.expand(4, 3), build_motion(POSE), settings, base_action=np.zeros(7)
    )
    np.testing.assert_allclose(plan.actions[0, :3], target, atol=2e-3)
    assert not plan.actions[0, 3:6].any() and plan.energies[-1].mean() < plan.energies[0].mean()


@pytest.mark.parametrize("seed", range(5))
def test_a_search_that_keeps_its_best_ends_in_the_deepest_basin_however_narrow(seed):
    def landscape(tokens, actions, states, past, num_kept_steps):
        """A wide basin at a corner and a narrow, deeper one about where the search begins."""
        wide = 0.5 + (actions[..., :3] - 0.2).norm(dim=-1)
        narrow = 60 * actions[..., :3].norm(dim=-1)
        depth = torch.minimum(wide, narrow)[..., None, None].expand(*tokens.shape)
        return SimpleNamespace(tokens=depth, past=past)

    context = Context(torch.zeros(1, 1, 1), np.zeros((0, 7)), np.zeros((1, 7)))
    found = {
        keeps: plan_actions(
            LatentModel(landscape, False),
            context,
            torch.zeros(1, 1),
            build_motion(POSE, max_step_m=0.06, reach=4.0, fixed=("dgripper",)),
            replace(SETTINGS["jump"], keeps_best=keeps),
            seed=seed,
        )
        for keeps in (True, False)
    }
    assert np.linalg.norm(found[True].found[0, :3]) < 0.005
    assert np.linalg.norm(found[False].found[0, :3]) > 0.3, "the landscape misleads a mean"
    assert found[True].energies.min() <= found[False].energies.min()


@pytest.mark.parametrize("place", [[0.5, 0.0, 0.2], [0.61, 0.24, 0.04], [0.9, -0.5, 0.2]])
def test_one_large_displacement_leads_to_no_place_that_training_never_saw(place):
    low, high = (0.3, -0.25, 0.0, 3.0, 0.0, 0.0, 0.0), (0.6, 0.25, 0.4, 3.1, 0.1, 0.1, 1.0)
    recorded = Recorded((-0.05,) * 7, (0.05,) * 7, low, high)
    motion = build_motion(POSE, max_step_m=0.06, reach=4.0, recorded=recorded)
    state = np.array([*place, 3.05, 0.0, 0.0, 0.5])
    least, largest = motion.find_limits(state)
    assert (least <= largest).all() and (motion.low <= least).all() and (largest <= motion.high).all()
    margin = 0.05 * np.subtract(high, low)[:3]
    bounds = np.subtract(low[:3], margin), np.add(high[:3], margin)
    for ends in (least, largest):
        inside = (bounds[0] - 1e-9 <= state[:3] + ends[:3]) & (state[:3] + ends[:3] <= bounds[1] + 1e-9)
        nearer = np.abs(state[:3] + ends[:3] - np.clip(state[:3], *bounds)) <= np.abs(
            state[:3] - np.clip(state[:3], *bounds)
        )
        assert (inside | nearer).all()
    one_step = build_motion(POSE, max_step_m=0.06, recorded=recorded)
    np.testing.assert_array_equal(one_step.find_limits(state), [one_step.low, one_step.high], "published searches stay")


def test_limits_hold_fixed_columns_stay_and_the_gripper_closes_when_asked_to():
    model, context, goal = make_world()
    motion = build_motion(POSE, max_step_m=0.075, max_rotation_rad=0.1, fixed=("dy",))
    assert len(motion.names) == 6 and len(build_motion(POSE).names) == 4
    plan = plan_actions(model, context, goal, motion, replace(QUICK, close_gripper_from=1))
    assert (np.abs(plan.actions[:, :3]) <= 0.075).all() and (np.abs(plan.actions[:, 3:6]) <= 0.1).all()
    assert not plan.actions[:, 1].any() and plan.actions[:, 3:6].any()
    assert plan.found[1, 6] > 0.9 and plan.states[2, 6] == 1 and abs(plan.found[0, 6]) <= 0.75
    late = [plan_actions(model, context, goal, motion, replace(QUICK, close_gripper_from=step)) for step in (None, 2)]
    np.testing.assert_array_equal(late[0].actions, late[1].actions, "after the last step it stays open")
    np.testing.assert_allclose(plan.states[1], motion.integrate(plan.states[0], plan.actions[0]))
    np.testing.assert_allclose(plan.states[0], context.states[-1])


@pytest.mark.parametrize("gripper", [0.0, 1.0, 0.3])
def test_a_gripper_that_is_open_or_closed_is_not_told_to_go_further(gripper):
    model, context, goal = make_world()
    context.states[-1, 6] = gripper
    plan = plan_actions(model, context, goal, build_motion(POSE), replace(QUICK, horizon=6))
    np.testing.assert_allclose(np.diff(plan.states[:, 6]), plan.actions[:, 6], atol=1e-12)
    np.testing.assert_array_equal(plan.actions[:, :6], plan.found[:, :6])
    for before, action, after in zip(plan.states[:-1], plan.actions, plan.states[1:], strict=True):
        np.testing.assert_allclose(build_motion(POSE).integrate(before, action), after, atol=1e-12)
    assert not np.array_equal(plan.actions, plan.found), "six random steps of up to 0.75 reach an end"


@pytest.mark.parametrize("name", ["vpt13", "vpt25"])
def test_in_a_view_what_is_carried_out_ends_straight_up_with_the_mouse_that_it_takes(name):
    space = get_action_space(name)
    motion, columns = build_motion(space), [column.name for column in space.actions]
    actions = motion.actions(np.array([[15.0, -6.0], [15.0, -1.0]]), np.zeros(len(columns)))
    states = np.array([[170.0, -88.0], [0.0, -30.0]])
    carried = motion.carried_out(states, actions)
    np.testing.assert_allclose(carried[:, motion.columns], [[15.0, -2.0], [15.0, -1.0]])
    after = motion.integrate(states, actions)
    np.testing.assert_allclose(after, [[-175.0, -90.0], [15.0, -31.0]])  # yaw wraps, and pitch stops
    np.testing.assert_array_equal(motion.integrate(states, carried), after)
    if name == "vpt13":
        assert actions[0, columns.index("mouse_dx")] == pytest.approx(100.0)
        assert actions[0, columns.index("mouse_dy")] == pytest.approx(-40.0)
        assert carried[0, columns.index("mouse_dy")] == pytest.approx(-2.0 / 0.15)


def test_what_cannot_be_planned_is_refused():
    limits = [("max_step_m", 0.0), ("max_step_m", np.nan), ("max_step_m", np.inf), ("max_turn_deg", 181.0)]
    for name, wrong in [*limits, ("max_turn_deg", -1.0), ("max_rotation_rad", 3.2), ("max_rotation_rad", -0.1)]:
        with pytest.raises(ValueError, match="must be above 0 and max_rotation_rad not below 0"):
            build_motion(POSE, **{name: wrong})
    with pytest.raises(ValueError, match=r"only searched columns can be fixed .*got drx"):
        build_motion(POSE, fixed=("drx",))
    settings = [("num_elites", 13, "elites"), ("close_gripper_from", -1, "counts steps of the plan from 0; got -1")]
    for key in ("mean_momentum", "std_momentum", "gripper_mean_momentum", "gripper_std_momentum"):
        settings += [(key, wrong, f"{key} is the share of the old value") for wrong in (5.0, 1.0, -0.1, np.nan)]
    for key, wrong, words in settings:
        with pytest.raises(ValueError, match=words):
            replace(QUICK, **{key: wrong})
    model, context, goal = make_world()
    empty = {"tokens": context.tokens[:0], "actions": np.zeros((0, 7)), "states": context.states[:0]}
    changes = [{"actions": np.zeros((3, 7))}, {"tokens": context.tokens.flatten(0, 1)}, {"states": context.states[0]}]
    cases = [(context._replace(**change), goal) for change in (*changes, {"actions": np.zeros(0)}, empty)]
    cases += [(context, torch.zeros(shape)) for shape in ((3, 8), (1, 4, 8), (4, 1))]
    for wrong, aim in cases:
        with pytest.raises(ValueError, match=r"a context of C >= 1 steps is tokens \[C, N, E\]"):
            plan_actions(model, wrong, aim, build_motion(POSE), QUICK)
    goal = goal.clone()
    goal[0, 0] = np.nan
    with pytest.raises(ValueError, match="round 0 has 12 energies of 12 that are not finite"):
        plan_actions(model, context, goal, build_motion(POSE), QUICK)
    still = build_motion(POSE, fixed=("dgripper",))
    with pytest.raises(ValueError, match=r"no gripper is searched \(dx, dy, dz\)"):
        plan_actions(model, context, goal, still, replace(QUICK, close_gripper_from=0))
