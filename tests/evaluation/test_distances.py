"""Distances of predicted and true tokens, on made vectors and on a tiny cache.

Claims:
- every episode is in both halves, and no more than 20 groups are made;
- predictions that are the truth lie exactly at the floor; a shift of all of them adds its square; means in place of tokens are
  near in mean and far in distribution;
- the pooled vectors are those of the files, and truth and prediction are taken at the same places;
- too few windows are refused; the table and the metrics agree.
"""

import csv
from dataclasses import replace

import numpy as np
import pytest

from jepa_cache.data.windows import WindowIndex, spread_windows
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.distances import (
    COPY_LAST,
    KINDS,
    MAX_GROUPS,
    MODEL,
    TRUE,
    Vectors,
    collect_vectors,
    deal_windows,
    measure_distances,
    write_distances,
)
from jepa_cache.predictor.rollout import LatentModel
from tests.caches import GRID, WIDTH, make_cache
from tests.evaluation.test_energy import Oracle, a_predictor


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), "evaluate.windows_per_episode=8")


def evaluation_of(cache, predictor, **evaluate) -> EvaluationContext:
    config = replace(cache.config, evaluate=replace(cache.config.evaluate, **evaluate))
    return EvaluationContext(LatentModel(predictor), config, cache.dataset, cache.scaler, 5)


def made(change, num_windows: int = 240, width: int = 3) -> Vectors:
    """Independent normal vectors of ten episodes, and predictions that are changed ones."""
    rng = np.random.default_rng(0)
    groups, halves = deal_windows([f"episode-{number % 10}" for number in range(num_windows)])
    true = rng.normal(size=(num_windows, 2, 1, width)).astype(np.float32)
    values = {TRUE: true, MODEL: change(true), COPY_LAST: true}
    return Vectors(groups, halves, values, rng.normal(size=(400, width)).astype(np.float32))


def test_every_episode_is_in_both_halves():
    episodes = [f"episode-{number // 5:02}" for number in range(150)]
    groups, halves = deal_windows(episodes)
    assert len(set(groups)) == MAX_GROUPS and set(groups) == set(range(MAX_GROUPS))
    for name in set(episodes):
        own = [position for position, episode in enumerate(episodes) if episode == name]
        assert sorted(np.bincount(halves[own])) == [2, 3] and len(set(groups[own])) == 1
    assert abs(halves.mean() - 0.5) < 0.01
    with pytest.raises(ValueError, match="two held-out episodes"):
        deal_windows(["one", "one"])


def test_true_predictions_lie_at_the_floor_and_a_shift_adds_its_square():
    same, shifted = measure_distances(made(lambda z: z)), measure_distances(made(lambda z: z + np.float32(2)))
    for step in range(2):
        assert same.frechet[MODEL][step] == same.frechet[TRUE][step]
        assert same.mmd[MODEL][step] == same.mmd[TRUE][step]
        gain = shifted.frechet[MODEL][step].mean - same.frechet[TRUE][step].mean
        assert gain == pytest.approx(3 * 2**2, abs=1e-3)  # both ways: what is linear in the shift cancels
        assert same.mmd[TRUE][step].low < 0 < same.mmd[TRUE][step].high < shifted.mmd[MODEL][step].low
        assert 0 <= same.frechet[TRUE][step].low <= same.frechet[TRUE][step].mean < 0.2
    assert same.num_dims == 3 and same.kept_variance == pytest.approx(1) and same.num_vectors == 120


def test_hedged_predictions_are_near_in_mean_and_far_in_distribution():
    hedged = measure_distances(made(lambda z: z * np.float32(0.1)))
    # Per axis about (1 - 0.1)^2.
    assert hedged.frechet[MODEL][0].mean == pytest.approx(3 * 0.9**2, rel=0.15)
    assert hedged.mmd[MODEL][0].low > hedged.mmd[TRUE][0].high


def test_components_are_fewer_where_vectors_are_few():
    few = measure_distances(made(lambda z: z, num_windows=40, width=12))
    assert few.num_dims == 20 // 4 and 0 < few.kept_variance < 1
    with pytest.raises(ValueError, match=r"raise evaluate\.windows_per_episode"):
        measure_distances(made(lambda z: z, num_windows=6))


def test_vectors_are_those_of_the_files_and_of_the_same_places(cache):
    evaluation = evaluation_of(cache, Oracle(cache.scaler))
    context, horizon = evaluation.config.evaluate.num_context_steps, evaluation.config.evaluate.horizon
    index = WindowIndex(evaluation.held_out_segments(), context + horizon)
    numbers, found = spread_windows(index, 8), collect_vectors(evaluation)
    for row, number in enumerate(numbers):
        window = index[number]
        tokens = np.empty((context + horizon, GRID[0] * GRID[1], WIDTH), np.float16)
        cache.dataset.read_tokens(window.store, window.start, tokens)
        h = tokens.astype(np.float64)
        h = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-5)
        pooled = found["pooled"].values
        assert pooled[TRUE][row, :, 0] == pytest.approx(h[context:].mean(axis=1), abs=1e-4)
        assert pooled[COPY_LAST][row, :, 0] == pytest.approx(
            np.tile(h[context - 1].mean(axis=0), (horizon, 1)), abs=1e-4
        )
        single = found["token"].values[TRUE][row]
        assert np.abs(single[:, :, None] - h[context:, None]).max(axis=-1).min(axis=-1).max() < 1e-3  # each is a token
    for kind in KINDS:  # an oracle foresees every step, so prediction and truth agree place by place
        assert found[kind].values[MODEL] == pytest.approx(found[kind].values[TRUE], abs=0.01)
    other = collect_vectors(evaluation_of(cache, Oracle(cache.scaler), batch_size=5))
    assert other["token"].values[TRUE] == pytest.approx(found["token"].values[TRUE])


def test_the_table_holds_every_step_and_agrees_with_the_metrics(cache, tmp_path):
    sections = write_distances(evaluation_of(cache, a_predictor()), tmp_path)
    with (tmp_path / "measurements/distance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["horizon"] for row in rows] == ["1", "2", "3", "4"]
    for name, (low, high) in sections["distance_ci"].items():
        column, _, step = name.rpartition("_step")
        row = rows[int(step) - 1]
        assert float(row[column]) == sections["distance"][name]
        assert (float(row[f"{column}_low"]), float(row[f"{column}_high"])) == (low, high) and low <= high
    assert {"frechet_token_step1", "mmd_pooled_copy_last_step4", "frechet_pooled_floor_step4"} <= set(
        sections["distance"]
    )
    assert sections["distance"]["frechet_token_step1"] > sections["distance_ci"]["frechet_token_floor_step1"][1]


def test_one_window_an_episode_is_too_few_and_that_is_said(cache, tmp_path, capsys):
    sections = write_distances(evaluation_of(cache, a_predictor(), windows_per_episode=1), tmp_path)
    assert sections == {"distance": {"num_windows": 3}, "distance_ci": {}} and not list(tmp_path.iterdir())
    assert "no distances of distributions: " in (said := capsys.readouterr().err) and "got 3 windows" in said
