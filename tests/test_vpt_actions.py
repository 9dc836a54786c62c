"""Claims of vpt_actions.py: `vpt25` holds the 25 named columns, in degrees and presses, over all ticks of a step."""

import numpy as np
import pytest

from jepa_cache.actions import VPT_BUTTONS, get_action_space, zero_actions
from jepa_cache.vpt_actions import build_vpt25

NUM_TICKS = 60
SPACE = build_vpt25(get_action_space("vpt36"))
NAMES = [column.name for column in SPACE.actions]


def _make_controls(seed=0):
    rng = np.random.default_rng(seed)
    dx, dy = rng.integers(-2400, 2400, (2, NUM_TICKS)) / 2
    return {
        "mouse_dx": dx,
        "mouse_dy": dy,
        "yaw_deg": 170 + np.concatenate(([0], np.cumsum(0.15 * dx)[:-1])),
        "pitch_deg": rng.uniform(-90, 90, NUM_TICKS),
        "hotbar": rng.integers(0, 9, NUM_TICKS).astype(np.int8),
        **{name: rng.random(NUM_TICKS) < 0.15 for name in VPT_BUTTONS},
    }


def test_it_has_the_published_names_in_the_order_of_oasis():
    published = (
        "inventory ESC hotbar.1 hotbar.2 hotbar.3 hotbar.4 hotbar.5 hotbar.6 hotbar.7 hotbar.8 hotbar.9 forward back left "
        "right cameraX cameraY jump sneak sprint swapHands attack use pickItem drop"
    )
    assert " ".join(NAMES) == published
    assert [column.kind for column in SPACE.actions].count("binary") == 23
    assert {(column.unit, column.kind) for column in SPACE.actions if "camera" in column.name} == {
        ("deg", "continuous")
    }
    assert SPACE.name == "vpt25"


def test_the_camera_is_the_summed_mouse_in_degrees_right_and_down_unclipped():
    controls, anchors = _make_controls(), np.array([3, 7, 20])
    actions = SPACE.aggregate(controls, anchors).actions
    for row, (a, b) in enumerate([(3, 7), (7, 20)]):
        assert actions[row, NAMES.index("cameraX")] == pytest.approx(0.15 * controls["mouse_dx"][a:b].sum(), rel=1e-6)
        assert actions[row, NAMES.index("cameraY")] == pytest.approx(0.15 * controls["mouse_dy"][a:b].sum(), rel=1e-6)
    right = {**controls, "mouse_dx": np.full(NUM_TICKS, 1095.0)}
    assert SPACE.aggregate(right, np.array([0, 2])).actions[0, NAMES.index("cameraX")] == pytest.approx(328.5)


@pytest.mark.parametrize("name", VPT_BUTTONS)
def test_a_press_lands_in_the_column_of_its_own_name_and_in_no_other(name):
    controls = {key: column if "deg" in key else np.zeros_like(column) for key, column in _make_controls().items()}
    controls[name][5] = True
    actions = SPACE.aggregate(controls, np.array([0, 4, 8])).actions
    assert [NAMES[column] for column in np.flatnonzero(actions[1])] == [name] and not actions[0].any()


def test_states_are_those_of_the_other_vpt_spaces():
    controls, anchors = _make_controls(), np.array([0, 9, 30])
    states = SPACE.aggregate(controls, anchors).states
    np.testing.assert_array_equal(states, get_action_space("vpt36").aggregate(controls, anchors).states)
    assert states.shape == (3, 2) and states.dtype == np.float32


def test_recordings_without_a_slot_are_described():
    controls = {**_make_controls(), "hotbar": np.full(NUM_TICKS, -1, np.int8)}
    assert np.isfinite(SPACE.aggregate(controls, np.array([0, 9])).actions).all()
    without = {name: column for name, column in controls.items() if name != "hotbar"}
    assert "hotbar" not in SPACE.required and SPACE.aggregate(without, np.array([0, 9])).actions.shape == (1, 25)
    with pytest.raises(ValueError, match="no usable yaw"):
        SPACE.aggregate({**controls, "yaw_deg": np.full(NUM_TICKS, np.nan)}, np.array([0, 9]))


def test_doing_nothing_is_all_zeros():
    actions = SPACE.aggregate(_make_controls(), np.array([0, 9])).actions
    assert not zero_actions(actions, SPACE).any()
