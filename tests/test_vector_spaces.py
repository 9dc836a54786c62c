"""Claims: a vector space is what its name says: its widths, and the last command or the sum over the rows of each step."""

import numpy as np
import pytest

from jepa_cache.actions import get_action_space


def make_controls(num_rows=20, num_actions=3, num_states=2):
    rng = np.random.default_rng(0)
    names = [*(f"action_{i}" for i in range(num_actions)), *(f"state_{i}" for i in range(num_states))]
    return {name: rng.integers(-8, 9, num_rows) / 4 for name in names}


def test_the_name_gives_rule_and_widths():
    space = get_action_space("vector_last7x14")
    assert (space.name, len(space.actions), len(space.states)) == ("vector_last7x14", 7, 14)
    assert space.required == (*(f"action_{i}" for i in range(7)), *(f"state_{i}" for i in range(14)))
    assert {column.kind for column in (*space.actions, *space.states)} == {"continuous"}


@pytest.mark.parametrize(
    "name", ["vector_last0x2", "vector_last2", "vector_lst2x2", "vector_sum2x0", "vector_sum2x99999", "vector_last2x2 "]
)
def test_other_names_are_refused_and_the_form_is_told(name):
    with pytest.raises(ValueError, match=r"vector_(last|sum)<A>x<S>"):
        get_action_space(name)


def test_sums_are_over_all_rows_of_a_step_and_add_up():
    controls, space = make_controls(), get_action_space("vector_sum3x2")
    actions, states = space.aggregate(controls, np.array([2, 5, 6, 13]))
    for column in range(3):
        rows = controls[f"action_{column}"]
        assert actions[:, column].tolist() == [rows[2:5].sum(), rows[5:6].sum(), rows[6:13].sum()]
    assert states[:, 1].tolist() == controls["state_1"][[2, 5, 6, 13]].tolist()
    whole = space.aggregate(controls, np.array([2, 13])).actions
    assert np.array_equal(actions.sum(axis=0, keepdims=True), whole)


def test_last_is_the_row_before_the_next_step():
    controls = make_controls()
    actions, _ = get_action_space("vector_last3x2").aggregate(controls, np.array([0, 4, 4, 9]))
    assert actions[:, 2].tolist() == controls["action_2"][[3, 3, 8]].tolist()


def test_two_steps_on_the_first_row_have_its_command():
    controls = make_controls()
    actions, _ = get_action_space("vector_last3x2").aggregate(controls, np.array([0, 0]))
    assert actions[0, 0] == controls["action_0"][0]


@pytest.mark.parametrize("name", ["vector_sum3x2", "vector_last3x2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_number_that_float32_does_not_hold_is_an_error(name, value):
    controls = make_controls()
    controls["action_1"][8] = value
    with pytest.raises(ValueError, match="no usable action_1"):
        get_action_space(name).aggregate(controls, np.array([0, 9, 12]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vector_sum4x2", r"needs the controls action_3, which .* set encode\.action_space to vector_sum3x2 "),
        ("vector_last2x1", r"has no column for action_2, state_1 .* set encode\.action_space to vector_last3x2 "),
    ],
)
def test_controls_of_another_width_are_refused_by_name_with_the_space_that_fits(name, words):
    with pytest.raises(ValueError, match=words):
        get_action_space(name).aggregate(make_controls(), np.array([0, 9]))
