"""Claims: the scaler holds mean and deviation of the continuous columns over the training rows only, and survives JSON bit for bit.

A number that is not finite gives no scaler; its episode is named.
"""

import dataclasses
import itertools
import json
from contextlib import nullcontext

import numpy as np
import pytest

from jepa_cache.config.schema import ScalerConfig
from jepa_cache.data.dataset import TRAIN, VAL
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.scaler import check_scaler, fit_scaler, read_scaler, scaler_from_json, write_scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.store.recipe import canonical_json
from tests.data.conftest import SPLIT

STANDARD = ScalerConfig(actions="standard", states="standard")


def rows_of(dataset, segments):
    """Actions and states of segments, row by row, float64."""
    actions, states = [], []
    for segment in segments:
        all_actions, all_states = dataset.controls(segment.store)
        actions += [all_actions[step] for step in range(segment.start, segment.stop - 1)]
        states += [all_states[step] for step in range(segment.start, segment.stop)]
    return np.array(actions, np.float64), np.array(states, np.float64)


def test_means_and_deviations_are_numpy_s_over_the_training_rows_of_continuous_columns(dataset):
    segments = dataset.segments_of(TRAIN, SPLIT)
    held_out = dataset.segments_of(VAL, SPLIT)
    assert len({segment.store for segment in segments}) > 1
    assert held_out and {s.episode for s in held_out}.isdisjoint(s.episode for s in segments)
    scaler = fit_scaler(dataset, segments, STANDARD)
    actions, states = rows_of(dataset, segments)
    assert scaler.num_train_steps == len(states)
    for fitted, rows, columns in (
        (scaler.actions, actions, dataset.space.actions),
        (scaler.states, states, dataset.space.states),
    ):
        for number, column in enumerate(columns):
            if column.kind == "continuous":
                # Rounding of a mean updated store by store.
                assert fitted.mean[number] == pytest.approx(rows[:, number].mean(), rel=1e-10, abs=1e-12)
                assert fitted.scale[number] == pytest.approx(rows[:, number].std(), rel=1e-10)
                assert fitted.scale[number] > 0.1
            else:
                assert (fitted.mean[number], fitted.scale[number]) == (0.0, 1.0)


@pytest.mark.parametrize(("array", "column", "value"), [(0, "mouse_dx", np.inf), (1, "pitch", np.nan)])
def test_a_number_that_is_not_finite_is_named_with_its_episode_column_and_step(encoded, array, column, value):
    dataset = encoded.open()
    segment = dataset.segments_of(TRAIN, SPLIT)[-1]
    columns = [it.name for it in (dataset.space.actions, dataset.space.states)[array]]
    dataset.controls(segment.store)[array][segment.start + 3, columns.index(column)] = value
    with pytest.raises(ValueError, match=rf"episode '{segment.episode}', step 3: {column} is {value:g}, .*encode\.py"):
        fit_scaler(dataset, dataset.segments_of(TRAIN, SPLIT), STANDARD)
    dataset.close()


def test_a_column_that_never_changes_is_moved_but_not_divided_by_zero(encoded):
    dataset = encoded.open()
    for store in range(3):
        dataset.controls(store)[1][:, 1] = 7.0
    scaler = fit_scaler(dataset, dataset.segments, STANDARD)
    assert (scaler.states.mean[1], scaler.states.scale[1]) == (7.0, 1.0)
    dataset.close()


def test_json_gives_back_the_same_scaler_and_the_same_bytes(dataset, tmp_path):
    scaler = fit_scaler(dataset, dataset.segments_of(TRAIN, SPLIT), STANDARD)
    write_scaler(scaler, tmp_path / "scaler.json")
    assert read_scaler(tmp_path / "scaler.json") == scaler == scaler_from_json(scaler.to_json())
    again = fit_scaler(dataset, dataset.segments_of(TRAIN, SPLIT), STANDARD)
    assert canonical_json(again.to_json()) == (tmp_path / "scaler.json").read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"actions": {}}'])
def test_a_missing_or_damaged_file_is_named_with_the_command_that_makes_it(tmp_path, content):
    path = tmp_path / "scaler.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"scaler\.json.*fit_scaler\.py"):
        read_scaler(path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("scale", [2.0], "36 names, 36 means and 1 scales"),
        ("scale", [-1.0] * 36, r"actions\.scale\.0: .*greater than 0, got '-1"),
        ("mean", [float("nan")] * 36, r"actions\.mean\.0: .*finite number"),
        ("mean", 0.0, r"actions\.mean: .*got '0\.0'"),
        ("names", [None] * 36, "valid string"),
    ],
)
def test_numbers_that_no_fit_gives_are_refused_by_column(dataset, tmp_path, key, value, said):
    document = fit_scaler(dataset, dataset.segments, STANDARD).to_json()
    document["actions"] = {**document["actions"], key: value}
    (tmp_path / "scaler.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"scaler\.json is no scaler \(.*{said}.*fit_scaler\.py"):
        read_scaler(tmp_path / "scaler.json")


def test_a_scaler_of_other_columns_actions_or_segments_is_refused(dataset):
    segments = dataset.segments_of(TRAIN, SPLIT)
    scaler, index = fit_scaler(dataset, segments, STANDARD), WindowIndex(dataset.segments, 4)
    columns = dataclasses.replace(scaler, states=dataclasses.replace(scaler.states, names=scaler.states.names[::-1]))
    with pytest.raises(ValueError, match=r"the scaler has the state columns .*fit_scaler\.py"):
        WindowLoader(dataset, index, columns)
    with pytest.raises(ValueError, match=r"fitted for action recipe 0{32}.*fit_scaler\.py"):
        WindowLoader(dataset, index, dataclasses.replace(scaler, action_fingerprint="0" * 32))
    check_scaler(scaler, dataset, segments[::-1], STANDARD)
    for others in (segments[1:], [segments[0]._replace(start=segments[0].start + 1), *segments[1:]]):
        with pytest.raises(ValueError, match=r"other segments.*fit_scaler\.py"):
            check_scaler(scaler, dataset, others, STANDARD)


@pytest.mark.parametrize(
    "fitted", [("standard", "standard"), ("standard", "none"), ("none", "standard"), ("none", "none")]
)
def test_a_scaler_that_was_fitted_by_another_rule_is_refused(dataset, fitted):
    segments = dataset.segments_of(TRAIN, SPLIT)
    scaler = fit_scaler(dataset, segments, ScalerConfig(*fitted))
    for rules in itertools.product(("standard", "none"), repeat=2):
        wrong = [name for name, one, other in zip(("actions", "states"), fitted, rules, strict=True) if one != other]
        with pytest.raises(ValueError, match=rf"scaler\.{wrong[0]}=.*fit_scaler\.py") if wrong else nullcontext():
            check_scaler(scaler, dataset, segments, ScalerConfig(*rules))


def test_a_fit_of_columns_that_are_always_0_is_one_by_the_standard_rule(dataset, monkeypatch):
    segments, read = dataset.segments_of(TRAIN, SPLIT), dataset.controls_of
    monkeypatch.setattr(dataset, "controls_of", lambda run: tuple(np.zeros_like(rows) for rows in read(run)))
    scaler = fit_scaler(dataset, segments, STANDARD)
    assert set(scaler.states.mean) == {0.0} and set(scaler.states.scale) == {1.0}
    check_scaler(scaler, dataset, segments, STANDARD)


def test_no_training_row_is_refused(dataset):
    with pytest.raises(ValueError, match="every one is held out"):
        fit_scaler(dataset, [], STANDARD)
    single = [dataset.segments[0]._replace(stop=dataset.segments[0].start + 1)]
    with pytest.raises(ValueError, match="two steps"):
        fit_scaler(dataset, single, STANDARD)
