"""Distances of predicted and true tokens, on sets with a known answer and on a tiny cache.

Claims:
- the Fréchet distance equals the formula for Gaussians by `sqrtm`; the jackknife's interval of a mean is Student's;
- every episode is in both halves, and no more than 20 groups are made;
- predictions that are the truth lie exactly at the floor; a shift of all adds its square; means in place of tokens are near in mean
  and far in distribution;
- the pooled vectors are those of the files, and truth and prediction are taken at the same places;
- too few windows are refused; the table and the metrics agree.
"""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import t

from jepa_cache.evaluation.context import choose_windows
from jepa_cache.evaluation.distances import (
    COPY_LAST,
    KINDS,
    MAX_GROUPS,
    MODEL,
    TRUE,
    Vectors,
    collect_vectors,
    deal_windows,
    frechet_distance,
    jackknife,
    measure_distances,
    write_distances,
)
from tests.caches import GRID, WIDTH
from tests.evaluation.evaluations import Oracle, a_predictor, evaluation_of, read_rows


def test_the_frechet_distance_is_the_formula_for_gaussians():
    rng = np.random.default_rng(0)
    one, other = (rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)) + rng.normal(size=5) for _ in range(2))
    first, second = np.cov(one.T), np.cov(other.T)
    shift = one.mean(axis=0) - other.mean(axis=0)
    expected = shift @ shift + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9), "covariances that do not commute"
    flat = rng.normal(size=(40, 3)) @ np.ones((3, 6))
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6), "without full rank"


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.random.default_rng(5).normal(size=9)
    reach = t.ppf(0.975, 8) * values.std(ddof=1) / 3
    found = jackknife(lambda kept: float(values[kept].mean()), np.arange(9))
    assert found == pytest.approx((values.mean(), values.mean() - reach, values.mean() + reach))


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
    assert set(groups) == set(range(MAX_GROUPS))
    for name in set(episodes):
        own = [position for position, episode in enumerate(episodes) if episode == name]
        assert sorted(np.bincount(halves[own])) == [2, 3] and len(set(groups[own])) == 1
    assert abs(halves.mean() - 0.5) < 0.01
    with pytest.raises(ValueError, match="two held-out episodes"):
        deal_windows(["one", "one"])


def test_true_predictions_lie_at_the_floor_a_shift_adds_its_square_and_means_are_far():
    (_, same), (_, shifted), (facts, means) = (
        measure_distances(made(change)) for change in (lambda z: z, lambda z: z + 2, np.zeros_like)
    )
    for step in range(2):
        distance, floor, far = same[""][step], same["_floor"][step], shifted[""][step]
        assert distance == floor and 0 <= floor.low <= floor.mean < 0.2
        assert far.mean - floor.mean == pytest.approx(3 * 2**2, abs=1e-3), "linear parts of the shift cancel"
        assert means[""][step].low > 2 > 10 * floor.mean
    assert facts["num_dims"] == 3 and facts["kept_variance"] == pytest.approx(1)
    few, _ = measure_distances(made(lambda z: z, num_windows=40, width=12))
    assert few["num_dims"] == 20 // 4 and 0 < few["kept_variance"] < 1, "components are fewer where vectors are few"
    with pytest.raises(ValueError, match=r"raise evaluate\.windows_per_episode"):
        measure_distances(made(lambda z: z, num_windows=6))


def test_vectors_are_those_of_the_files_at_the_same_places(cache):
    evaluation = evaluation_of(cache, Oracle(cache.scaler), windows_per_episode=8)
    context, horizon = evaluation.config.evaluate.num_context_steps, evaluation.config.evaluate.horizon
    chosen, found = choose_windows(evaluation.held_out_segments(), context + horizon, 8), collect_vectors(evaluation)
    pooled = found["pooled"].values
    for row, window in enumerate(chosen.windows):
        tokens = np.empty((context + horizon, GRID[0] * GRID[1], WIDTH), np.float16)
        cache.dataset.read_tokens(window.store, window.start, tokens)
        h = tokens.astype(np.float64)
        h = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-5)
        assert pooled[TRUE][row, :, 0] == pytest.approx(h[context:].mean(axis=1), abs=1e-4)
        copied = np.tile(h[context - 1].mean(axis=0), (horizon, 1))
        assert pooled[COPY_LAST][row, :, 0] == pytest.approx(copied, abs=1e-4)
        single = found["token"].values[TRUE][row]
        assert np.abs(single[:, :, None] - h[context:, None]).max(axis=-1).min(axis=-1).max() < 1e-3  # each is a token
    for kind in KINDS:  # an oracle foresees every step, so prediction and truth agree place by place
        assert found[kind].values[MODEL] == pytest.approx(found[kind].values[TRUE], abs=0.01)
    other = collect_vectors(evaluation_of(cache, Oracle(cache.scaler), batch_size=5, windows_per_episode=8))
    assert other["token"].values[TRUE] == pytest.approx(found["token"].values[TRUE])


def test_the_table_holds_every_step_and_agrees_with_the_metrics(cache, tmp_path):
    sections = write_distances(evaluation_of(cache, a_predictor(), windows_per_episode=8), tmp_path)
    rows = read_rows(tmp_path / "measurements/distance.csv")
    assert [row["horizon"] for row in rows] == ["1", "2", "3", "4"]
    section, intervals = sections["distance"], sections["distance_ci"]
    ends, steps = ("", "_copy_last", "_floor"), (1, 4)
    names = [f"frechet_{kind}{end}_step{step}" for kind in KINDS for end in ends for step in steps]
    assert set(intervals) == set(names) < set(section)
    for name in names:
        column, row = name[:-6], rows[int(name[-1]) - 1]
        assert float(row[column]) == section[name]
        assert [float(row[f"{column}_low"]), float(row[f"{column}_high"])] == intervals[name]
    assert section["frechet_token_step1"] > intervals["frechet_token_floor_step1"][1]


def test_one_window_an_episode_is_too_few_and_that_is_said(cache, tmp_path, capsys):
    sections = write_distances(evaluation_of(cache, a_predictor(), windows_per_episode=1), tmp_path)
    assert sections == {"distance": {"num_windows": 3}, "distance_ci": {}} and not list(tmp_path.iterdir())
    assert "no distances of distributions: " in (said := capsys.readouterr().err) and "got 3 windows" in said
