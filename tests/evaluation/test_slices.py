"""Slices of held-out windows.

Claims:
- every slice in which windows differ has one row for each value, over its own windows, episodes counted once;
- a slice in which all are alike is left out, and one episode has no interval.
"""

import numpy as np
import pytest

from jepa_cache.data.ablations import SHUFFLED
from jepa_cache.evaluation.figures import slice_table, worst_table
from jepa_cache.evaluation.windows import COPY_LAST, MODEL, WindowErrors
from tests.caches import make_config

EPISODES = ["a", "a", "a", "b", "b", "c"]
ERRORS = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 8.0])


def make_errors(copied: np.ndarray = 2 * ERRORS) -> WindowErrors:
    """Six windows of two predicted steps."""
    errors = {MODEL: ERRORS, SHUFFLED: ERRORS + 1, COPY_LAST: copied}
    l1 = {name: np.stack([values, values], axis=1) for name, values in errors.items()}
    return WindowErrors(EPISODES, {"l1": l1}, {"l1": l1}, chosen=None, num_fitted_steps=0)


def make_facts(**changes) -> list[dict]:
    columns = {
        "episode": EPISODES,
        "dataset": ["vpt"] * 6,
        "camera": ["left", "right", "left", "right", "left", "left"],
        "phase": ["0", "0", "0", "1", "1", "1"],
        "gui": ["open", *["closed"] * 5],
        "first_step": [0, 5, 9, 0, 5, 0],
        "start_s": [0.0, 1.0, 1.8, 0.0, 1.0, 0.0],
        "action_size": [1.0] * 6,
    } | changes
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], dict]:
    rows = slice_table(make_facts(), make_errors(), make_config().evaluate)
    return {(row["slice"], row["value"]): row for row in rows}


def test_each_value_has_a_row_over_its_own_windows(table):
    left, right = table["camera", "left"], table["camera", "right"]
    assert (left["num_windows"], left["num_episodes"], left["l1"]) == (4, 3, pytest.approx((2 + 6 + 8) / 3))
    assert (right["num_windows"], right["num_episodes"], right["l1"]) == (2, 2, pytest.approx((2 + 4) / 2))
    assert left["l1_low"] <= left["l1"] <= left["l1_high"] and left["gap_shuffled"] == pytest.approx(1)
    assert table["phase", "1"]["l1"] == pytest.approx((5 + 8) / 2)
    assert [table["token_motion", name]["num_windows"] for name in ("low", "middle", "high")] == [2, 2, 2]
    assert {key[0] for key in table} == {"episode", "camera", "phase", "gui", "token_motion"}, "not where all are alike"
    row = table["gui", "open"]
    assert row["l1"] == 1 and row["l1_low"] is None and row["gap_shuffled_high"] is None, "one episode has no interval"


def test_data_sets_of_a_mixture_are_apart():
    facts = make_facts(dataset=["vpt"] * 3 + ["other"] * 3)
    rows = {row["value"]: row["l1"] for row in slice_table(facts, make_errors(), make_config().evaluate)}
    assert rows["vpt"] == pytest.approx(2) and rows["other"] == pytest.approx((5 + 8) / 2)


def test_the_worst_windows_come_first_with_their_camera():
    rows = worst_table(make_facts(), make_errors())
    assert [(row["rank"], row["l1"]) for row in rows] == list(enumerate(sorted(ERRORS, reverse=True), start=1))
    assert (rows[1]["episode"], rows[1]["first_step"], rows[1]["start_s"], rows[1]["camera"]) == ("b", 5, 1.0, "left")


def test_a_third_that_no_window_falls_into_has_no_row():
    # Recordings that are copies of each other: errors repeat, and one third is empty.
    errors = make_errors(np.array([1.0, 1, 1, 1, 1, 2]))
    rows = [row for row in slice_table(make_facts(), errors, make_config().evaluate) if row["slice"] == "token_motion"]
    assert [(row["value"], row["num_windows"]) for row in rows] == [("low", 5), ("high", 1)]
