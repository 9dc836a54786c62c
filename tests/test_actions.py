"""Claims of actions.py.

An action aggregates ALL ticks between two anchors, so splitting a step never changes the total; angles are differences on the
circle or in SO(3), never of wrapped numbers; a key held on any tick counts; a step has the ticks that are its own and no others,
whatever numbers stand there; what a recording does not hold is an error and never a zero; a new space is one entry. Actions of
several steps compose to the aggregate over all of them, and an inverse leads back; a space without one says why.
"""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_cache.actions import (
    ACTION_SPACES,
    VPT25_NAMES,
    VPT_BUTTONS,
    ActionSpace,
    Column,
    MotionRule,
    Searched,
    get_action_space,
    wrap_degrees,
    zero_actions,
)
from jepa_cache.control.motion import build_motion
from jepa_cache.control.planner import follow_actions
from jepa_cache.poses import (
    CAMERA_CONTROLS,
    COMMAND_CONTROLS,
    POSE_CONTROLS,
    commanded_actions,
    integrate_pose,
    pose_actions,
    poses_in_camera_frame,
    rotation_angle,
)

NUM_TICKS = 60


def _make_controls(seed=0, num_ticks=NUM_TICKS):
    rng = np.random.default_rng(seed)
    dx, dy = rng.integers(-800, 800, num_ticks) / 2, rng.integers(-100, 100, num_ticks) / 2
    controls = {
        "mouse_dx": dx,
        "mouse_dy": dy,
        "yaw_deg": 170 + np.concatenate(([0], np.cumsum(0.15 * dx)[:-1])),
        "pitch_deg": rng.uniform(-90, 90, num_ticks),
        "hotbar": rng.integers(0, 9, num_ticks).astype(np.int8),
        **{name: rng.random(num_ticks) < 0.15 for name in VPT_BUTTONS},
    }
    poses = rng.uniform(-3, 3, (num_ticks, 7))
    poses[:, 4] /= 2
    poses[:, 6] = rng.random(num_ticks)
    commands = poses + rng.normal(0, 0.05, poses.shape)
    cameras = rng.uniform(-1.5, 1.5, (num_ticks, 6))
    return {
        **controls,
        **{f"action_{index}": np.round(dx * 0.1) / 8 + index for index in range(4)},
        **{f"state_{index}": dy for index in range(2)},
        **dict(zip(POSE_CONTROLS, poses.T, strict=True)),
        **dict(zip(COMMAND_CONTROLS, commands.T, strict=True)),
        **dict(zip(CAMERA_CONTROLS, cameras.T, strict=True)),
    }


SPACES = [*ACTION_SPACES, "vector_sum4x2", "vector_last4x2"]


@pytest.mark.parametrize("name", SPACES)
def test_shapes_follow_the_columns_and_what_is_missing_or_no_anchor_is_refused(name):
    space, controls = get_action_space(name), _make_controls()
    actions, states = space.aggregate(controls, np.array([0, 4, 8, 11]))
    assert (actions.shape, states.shape) == ((3, len(space.actions)), (4, len(space.states)))
    assert actions.dtype == states.dtype == np.float32
    assert len({column.name for column in space.actions}) == len(space.actions)
    for required in space.required:
        with pytest.raises(ValueError, match=required):
            space.aggregate({k: v for k, v in controls.items() if k != required}, np.array([0, 1]))
    for anchors in ([], [3, 2], [-1, 2], [0, NUM_TICKS], [0.0, 1.0], [[0, 1]]):
        with pytest.raises(ValueError, match="anchors must"):
            space.aggregate(controls, np.array(anchors))


def test_vpt36_has_its_columns_in_the_documented_order():
    names = [column.name for column in get_action_space("vpt36").actions]
    assert names[:4] == ["mouse_dx", "mouse_dy", "dyaw", "dpitch"]
    assert names[4:9] == ["ESC", "back", "drop", "forward", "hotbar.1"]
    assert names[16:27] == ["hotbar.9", *names[17:24], "attack", "use", "pickItem"]
    assert names[17:24] == ["inventory", "jump", "left", "right", "sneak", "sprint", "swapHands"]
    assert names[27:] == [f"slot.{slot}" for slot in range(1, 10)]


def test_an_action_takes_every_tick_from_its_anchor_to_the_one_before_the_next():
    controls, anchors = _make_controls(), np.array([3, 7, 20])
    actions = get_action_space("vpt36").aggregate(controls, anchors).actions
    for row, (a, b) in enumerate(itertools.pairwise(anchors)):
        assert actions[row, 0] == controls["mouse_dx"][a:b].sum()
        assert actions[row, 1] == controls["mouse_dy"][a:b].sum()
        turns = [controls[name][b] - controls[name][a] for name in ("yaw_deg", "pitch_deg")]
        assert actions[row, 2:4] == pytest.approx([wrap_degrees(turns[0]), turns[1]], abs=1e-4)
        np.testing.assert_array_equal(actions[row, 4:27], [controls[name][a:b].any() for name in VPT_BUTTONS])
        np.testing.assert_array_equal(actions[row, 27:], np.arange(9) == controls["hotbar"][a])


@pytest.mark.parametrize("value", [1e18, -1e30, 3.4e38])
@pytest.mark.parametrize("name", SPACES)
def test_one_huge_value_leaves_every_step_that_does_not_hold_it_exact(name, value):
    space, anchors = get_action_space(name), np.arange(1, NUM_TICKS, 4)
    controls = _make_controls()
    whole = space.aggregate(controls, anchors)
    far = [row for row in range(len(anchors) - 1) if not anchors[row] <= 25 <= anchors[row + 1]]
    for column in set(space.required) - {"hotbar", "yaw_deg", "pitch_deg", *VPT_BUTTONS}:
        changed = controls[column].copy()
        changed[25] = value
        actions, states = space.aggregate({**controls, column: changed}, anchors)
        np.testing.assert_array_equal(actions[far], whole.actions[far], err_msg=column)
        np.testing.assert_array_equal(states[anchors != 25], whole.states[anchors != 25], err_msg=column)


@pytest.mark.parametrize("value", [1e39, -1e300, np.inf, np.nan])
@pytest.mark.parametrize("name", SPACES)
def test_a_number_that_float32_does_not_hold_is_named_with_its_tick_and_column(name, value):
    space, anchors = get_action_space(name), np.arange(1, NUM_TICKS, 4)
    controls = _make_controls()
    for column in set(space.required) - {"hotbar", *VPT_BUTTONS}:
        row = 24 if "command" in column or (name.startswith("vector_last") and "action" in column) else 25
        changed = controls[column].copy()
        changed[row] = value
        with pytest.raises(ValueError, match=r"tick 2[145] \(") as caught:
            space.aggregate({**controls, column: changed}, anchors)
        words = rf"holds no usable {column} at .*\({re.escape(f'{value:g}')};"
        assert re.search(words, str(caught.value)), column


@settings(max_examples=100, deadline=None)
@given(start=st.floats(-2000, 2000), turn=st.floats(-179, 179))
def test_yaw_differences_do_not_depend_on_where_the_circle_is_cut(start, turn):
    controls = _make_controls(num_ticks=2)
    results = []
    for yaw in (np.array([start, start + turn]), wrap_degrees(np.array([start, start + turn]))):
        results.append(get_action_space("vpt13").aggregate({**controls, "yaw_deg": yaw}, np.array([0, 1])))
    assert abs(results[0].actions[0, 2] - turn) < 1e-3
    np.testing.assert_allclose(results[0].actions, results[1].actions, atol=1e-3)
    assert (results[0].states[:, 0] > -180).all() and (results[0].states[:, 0] <= 180).all()


def test_angles_are_wrapped_to_minus_180_excluded_180_included_in_float32_too():
    for angle, expected in ((180, 180), (-180, 180), (540, 180), (-181, 179), (181, -179), (0, 0)):
        assert wrap_degrees(np.array([float(angle)]))[0] == expected
    controls = {**_make_controls(num_ticks=2), "yaw_deg": np.array([-180 + 1e-9, 180 + 1e-9])}
    assert get_action_space("vpt13").aggregate(controls, np.array([0, 1])).states[:, 0].tolist() == [180, 180]


def test_a_slot_that_the_recording_lacks_at_an_anchor_is_an_error():
    controls, aggregate = _make_controls(), get_action_space("vpt13").aggregate
    controls["hotbar"][8] = -1
    aggregate(controls, np.array([0, 4, 12]))
    with pytest.raises(ValueError, match="no hotbar slot at tick 8"):
        aggregate(controls, np.array([0, 4, 8, 12]))


def test_zero_actions_keep_the_slot_and_nothing_else():
    space = get_action_space("vpt36")
    actions = space.aggregate(_make_controls(), np.arange(0, 40, 4)).actions
    zeros = zero_actions(actions, space)
    np.testing.assert_array_equal(zeros[:, 27:], actions[:, 27:])
    assert not zeros[:, :27].any() and actions[:, :27].any() and zeros.dtype == np.float32
    with pytest.raises(ValueError, match="36 columns"):
        zero_actions(actions[:, :13], space)


def _same_actions(space, one, other):
    """Whether actions [n, A] are one: Euler angles as rotations, as a turn by pi has two."""
    if space.name.startswith("pose7"):
        assert rotation_angle(one[:, 3:6], other[:, 3:6]).max() < 1e-5
        one, other = np.delete(one, (3, 4, 5), axis=1), np.delete(other, (3, 4, 5), axis=1)
    return np.allclose(one, other, rtol=1e-6, atol=2e-4)  # of up to 16 float32 sums of 400 counts


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("name", sorted({*SPACES} - {"droid_command7"}))
@given(st.integers(1, 16), st.integers(0, 5), st.integers(0, 100))
def test_actions_of_steps_in_a_row_compose_to_the_aggregate_over_all_of_them(name, apart, first, seed):
    space, controls = get_action_space(name), _make_controls(seed)
    steps = space.aggregate(controls, np.arange(first, NUM_TICKS, 3)).actions
    runs = np.stack([steps[start : start + apart] for start in range(0, len(steps) - apart + 1)])
    composed = space.compose(runs)
    assert composed.dtype == np.float64
    for begin in range(min(apart, len(runs))):
        expected = space.aggregate(controls, np.arange(first, NUM_TICKS, 3)[begin::apart]).actions
        assert _same_actions(space, composed[begin::apart], expected.astype(np.float64))


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("name", ["pose7", "pose7_camera", "vector_sum4x2"])
@given(st.integers(0, 100))
def test_an_inverse_leads_back_and_that_of_several_actions_is_theirs_in_reversed_order(name, seed):
    space, rng = get_action_space(name), np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (9, 4, len(space.actions)))
    inverse = space.invert(actions)
    forth = space.invert(space.compose(actions))
    back = space.compose(inverse[:, ::-1])
    assert _same_actions(space, forth, back) and _same_actions(space, space.invert(forth), space.compose(actions))
    if space.motion.integrate is not None:  # of vectors only the recordings say it
        states = rng.uniform(-1, 1, (9, 4, 7))
        states[..., 6] = 0.5
        actions[..., 6] /= 2
        returned = space.motion.integrate(space.motion.integrate(states, actions), space.invert(actions))
        assert np.allclose(np.delete(returned, (3, 4, 5), -1), np.delete(states, (3, 4, 5), -1))
        assert rotation_angle(returned[..., 3:6], states[..., 3:6]).max() < 1e-6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vpt36", r"4 continuous, 23 binary, 9 onehot.*time_reversal"),
        ("vpt13", r"4 continuous, 9 onehot"),
        ("vpt25", r"23 binary, 2 continuous"),
        ("vector_last4x2", r"4 continuous.*command"),
        ("droid_command7", r"no inverse"),
    ],
)
def test_a_space_without_inverse_names_its_kinds_of_columns(name, said):
    space = get_action_space(name)
    with pytest.raises(ValueError, match=said):
        space.invert(np.zeros((2, len(space.actions))))


def test_commands_seen_from_measured_poses_do_not_compose_and_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"droid_command7.*step_lengths.*pose7"):
        get_action_space("droid_command7").compose(np.zeros((2, 3, 7)))
    with pytest.raises(ValueError, match="7 columns"):
        get_action_space("pose7").compose(np.zeros((2, 3, 6)))


def _drive(controls, anchors):
    """A car: speed and steering as commanded last; where it is and looks."""
    rows = anchors[1:] - 1
    actions = np.stack([controls["speed"][rows], controls["steer"][rows]], axis=1)
    return actions, np.stack([controls[name][anchors] for name in ("x", "y", "heading")], axis=1)


def _move(states, actions):
    x, y, heading = np.moveaxis(np.asarray(states, np.float64), -1, 0)
    heading = np.clip(heading + actions[..., 1], -1.0, 1.0)
    return np.stack([x + actions[..., 0] * np.cos(heading), y + actions[..., 0] * np.sin(heading), heading], axis=-1)


def test_a_new_space_is_one_entry_and_plans_too(monkeypatch):
    columns = [
        tuple(Column(name, "m or rad", "continuous") for name in names.split())
        for names in ("speed steer", "x y heading")
    ]
    car = ActionSpace(
        "car",
        1,
        *columns,
        ("speed", "steer", "x", "y", "heading"),
        _drive,
        MotionRule(
            searched=(Searched("speed", 2.0), Searched("steer", 0.3)),
            integrate=_move,
            bounded=("heading", "steer", -1.0, 1.0),
            distances=lambda reached, true: {"distance_m": np.linalg.norm((reached - true)[..., :2], axis=-1)},
            follows={},
        ),
    )
    monkeypatch.setitem(ACTION_SPACES, "car", car)
    space, rng = get_action_space("car"), np.random.default_rng(0)
    actions, states = space.aggregate({name: rng.random(9) for name in space.required}, np.array([0, 4, 8]))
    assert actions.shape == (2, 2) and states.shape == (3, 3)
    motion = build_motion(space, fixed=("speed",))
    assert motion.names == ("steer",) and (motion.low.tolist(), motion.high.tolist()) == ([-0.3], [0.3])
    whole = motion.actions(np.array([[0.3], [0.3]]), np.array([1.0, 0.0]))
    reached = follow_actions(np.array([0.0, 0.0, 0.9]), whole, motion)
    assert reached[-1, 2] == 1.0 and motion.carried_out(reached[:-1], whole)[:, 1] == pytest.approx([0.1, 0.0])
    assert space.motion.distances(reached[2], reached[1])["distance_m"] == pytest.approx(1.0)


def test_a_space_without_motion_cannot_plan_and_names_those_that_can():
    with pytest.raises(ValueError, match=r"'vpt13' does not say where an action leads.*vpt13, vpt36, vpt25, pose7"):
        build_motion(replace(get_action_space("vpt13"), motion=None))
    with pytest.raises(ValueError, match=r"'vector_last2x2' only the recordings tell .* Train again"):
        build_motion(get_action_space("vector_last2x2"))


VPT25 = get_action_space("vpt25")


def test_it_has_the_published_names_in_the_order_of_oasis():
    published = (
        "inventory ESC hotbar.1 hotbar.2 hotbar.3 hotbar.4 hotbar.5 hotbar.6 hotbar.7 hotbar.8 hotbar.9 forward back left "
        "right cameraX cameraY jump sneak sprint swapHands attack use pickItem drop"
    )
    assert " ".join(VPT25_NAMES) == published
    assert [column.kind for column in VPT25.actions].count("binary") == 23
    assert {(column.unit, column.kind) for column in VPT25.actions if "camera" in column.name} == {
        ("deg", "continuous")
    }


def test_the_camera_is_the_summed_mouse_in_degrees_right_and_down_unclipped():
    controls = {**_make_controls(), "mouse_dx": np.full(NUM_TICKS, 1095.0)}
    actions = VPT25.aggregate(controls, np.array([3, 5, 20])).actions
    assert actions[0, VPT25_NAMES.index("cameraX")] == pytest.approx(328.5)
    down = 0.15 * controls["mouse_dy"][5:20].sum()
    assert actions[1, VPT25_NAMES.index("cameraY")] == pytest.approx(down, rel=1e-6)


def test_a_press_lands_in_the_column_of_its_own_name_and_in_no_other():
    still = {key: column if "deg" in key else np.zeros_like(column) for key, column in _make_controls().items()}
    for name in VPT_BUTTONS:
        pressed = {**still, name: np.arange(NUM_TICKS) == 5}
        actions = VPT25.aggregate(pressed, np.array([0, 4, 8])).actions
        assert [VPT25_NAMES[column] for column in np.flatnonzero(actions[1])] == [name] and not actions[0].any()


def test_recordings_without_a_slot_are_described():
    controls = {**_make_controls(), "hotbar": np.full(NUM_TICKS, -1, np.int8)}
    assert np.isfinite(VPT25.aggregate(controls, np.array([0, 9])).actions).all()
    without = {name: column for name, column in controls.items() if name != "hotbar"}
    assert "hotbar" not in VPT25.required and VPT25.aggregate(without, np.array([0, 9])).actions.shape == (1, 25)
    with pytest.raises(ValueError, match="no usable yaw"):
        VPT25.aggregate({**controls, "yaw_deg": np.full(NUM_TICKS, np.nan)}, np.array([0, 9]))


@pytest.mark.parametrize(
    "name", ["vector_last0x2", "vector_last2", "vector_lst2x2", "vector_sum2x0", "vector_sum2x99999", "vector_last2x2 "]
)
def test_other_names_are_refused_with_the_form_or_the_nearest(name):
    with pytest.raises(ValueError, match="did you mean 'vpt36'"):
        get_action_space("vtp36")
    with pytest.raises(ValueError, match=r"vector_(last|sum)<A>x<S>"):
        get_action_space(name)


def test_vectors_sum_all_rows_of_a_step_or_take_the_last_before_the_next():
    controls, anchors = _make_controls(), np.array([2, 5, 6, 13])
    rows = controls["action_3"]
    sums, states = get_action_space("vector_sum4x2").aggregate(controls, anchors)
    assert sums[:, 3].tolist() == [rows[2:5].sum(), rows[5:6].sum(), rows[6:13].sum()]
    assert states[:, 1].tolist() == controls["state_1"][anchors].tolist()
    last = get_action_space("vector_last4x2").aggregate(controls, np.array([0, 4, 4, 9])).actions
    assert last[:, 3].tolist() == rows[[3, 3, 8]].tolist()
    first = get_action_space("vector_last4x2").aggregate(controls, np.array([0, 0])).actions
    assert first[0, 0] == controls["action_0"][0], "two steps on the first row have its command"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vector_sum5x2", r"needs the controls action_4, which .* set encode\.action_space to .*vector_sum4x2 "),
        ("vector_last3x1", r"has no column for action_3, state_1 .* set encode\.action_space to .*vector_last4x2 "),
    ],
)
def test_controls_of_another_width_are_refused_by_name_with_the_space_that_fits(name, words):
    with pytest.raises(ValueError, match=words):
        get_action_space(name).aggregate(_make_controls(), np.array([0, 9]))


def _stack(controls, names):
    return np.stack([controls[name] for name in names], axis=1)


def test_pose7_camera_is_pose7_of_the_poses_that_the_camera_sees():
    controls, anchors = _make_controls(), np.array([2, 9, 33])
    seen = poses_in_camera_frame(_stack(controls, POSE_CONTROLS)[anchors], _stack(controls, CAMERA_CONTROLS)[anchors])
    actions, states = get_action_space("pose7_camera").aggregate(controls, anchors)
    np.testing.assert_array_equal(states, seen.astype(np.float32))
    np.testing.assert_array_equal(actions, pose_actions(seen).astype(np.float32))


def test_droid_command7_leads_from_the_pose_at_a_step_to_the_last_pose_commanded_before_the_next():
    controls, anchors = _make_controls(), np.array([2, 9, 33])
    poses, commands = _stack(controls, POSE_CONTROLS), _stack(controls, COMMAND_CONTROLS)
    actions, states = get_action_space("droid_command7").aggregate(controls, anchors)
    np.testing.assert_array_equal(states, poses[anchors].astype(np.float32))
    # The inverse of the rule brings each pose to the command of row 8, then 32.
    reached = integrate_pose(poses[anchors[:-1]], actions.astype(np.float64))
    turn = commanded_actions(reached, commands[[8, 32]])
    np.testing.assert_allclose(turn[:, :6], 0, atol=1e-5)  # float32
    np.testing.assert_allclose(actions[:, 6], (commands[[8, 32], 6] - poses[anchors[:-1], 6]), atol=1e-6)
