"""Probes, on rows that are made and on a tiny cache.

Claims:
- rows that hold an action tell it (R2 near 1), rows of noise do not, and the interval says so; shuffled labels give chance; what is in
  a product of two numbers is found by the quadratic head alone;
- scores and intervals equal scikit-learn's on rows that are drawn again; the baseline is what the training mean and the majority get;
- what is told of a held-out row does not depend on the others, and the regularisation is not chosen within an episode;
- on a cache whose tokens are waves of the yaw the yaw is found; labels that the data lack are named;
- rows stay short whatever N and D are, and lose nothing where they need not be shortened.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, mean_squared_error

from jepa_cache.evaluation import probes
from jepa_cache.evaluation.metrics import draw_episodes
from jepa_cache.evaluation.probes import (
    CLASSIFICATION,
    R2,
    Rows,
    estimate,
    measure_probe,
    run_probes,
    step_features,
    tell_label,
    tell_numbers,
)
from jepa_cache.store.controls import publish_controls
from jepa_cache.store.recipe import canonical_json
from tests.caches import make_cache, make_config
from tests.evaluation.evaluations import evaluation_of, read_rows

SETTINGS = make_config("evaluate.num_bootstrap=100").evaluate
PER_EPISODE = 30


def split(features, targets, num_train=8) -> list[Rows]:
    """The first episodes as training rows, the others as held-out ones."""
    keys = np.array([f"episode-{row // PER_EPISODE:02}" for row in range(len(features))])
    cut = num_train * PER_EPISODE
    parts = slice(cut), slice(cut, None)
    return [Rows(features[part], {name: of[part] for name, of in targets.items()}, keys[part]) for part in parts]


def probe(features, targets, *, num_train=8):
    """Target and metric to the row of probes.csv, and the reasons of those without one."""
    scores, reasons = measure_probe("state", *split(features, targets, num_train), SETTINGS)
    rows = {(score.target, score.metric): (*estimate(score.drawn), score.baseline) for score in scores}
    names = ("value", "low", "high", "baseline")
    return {key: dict(zip(names, values, strict=True)) for key, values in rows.items()}, reasons


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- what is in the rows --------------------------------------------------------------------------------------------------


def test_what_the_rows_hold_is_told_and_noise_tells_nothing(rng):
    features = rng.normal(size=(18 * PER_EPISODE, 6)).astype(np.float32)
    jump = (features[:, 0] > 1.0).astype(int).astype(str)  # one in six
    targets = {"held": features @ rng.normal(size=(6, 1)) + 5.0, "absent": rng.normal(size=(len(features), 1))}
    targets |= {"turn": features[:, :1] * features[:, 1:2], "jump": jump, "shuffled": rng.permutation(jump)}
    rows, left_out = probe(features, targets, num_train=12)
    assert not left_out
    for metric in ("r2", "quadratic_r2"):
        assert rows["held", metric]["low"] > 0.95, metric
        assert -0.06 < rows["absent", metric]["low"] <= rows["absent", metric]["high"] < 0.05, metric
    assert rows["turn", "r2"]["high"] < 0.1 and rows["turn", "quadratic_r2"]["low"] > 0.9, "a product"
    assert rows["jump", "balanced_accuracy"]["low"] > 0.85
    shuffled = rows["shuffled", "balanced_accuracy"]
    assert 0.4 < shuffled["value"] < 0.6 and shuffled["low"] < 0.52 and shuffled["high"] > 0.48
    assert shuffled["baseline"] == 0.5


def test_targets_that_cannot_be_told_are_left_out_and_named(rng):
    features = rng.normal(size=(12 * PER_EPISODE, 3)).astype(np.float32)
    once = np.full(len(features), "0")
    once[:3] = "1"  # in one episode
    still = np.zeros((len(features), 1))
    later = still.copy()
    later[-5:] = 1.0
    early, early_number = np.where(np.arange(len(features)) % 7 == 0, "1", "0"), rng.normal(size=still.shape)
    early[8 * PER_EPISODE :], early_number[8 * PER_EPISODE :] = "0", 0
    targets = {"still": still, "later": later, "early": early_number, "once": once, "key": early}
    rows, left_out = probe(features, targets)
    assert not rows
    assert "never changes in the training" in left_out["still"] and "never changes in the training" in left_out["later"]
    assert "never changes in the held-out" in left_out["early"]
    assert "two training episodes" in left_out["once"] and "never changes in the held-out" in left_out["key"]


# --- scores ---------------------------------------------------------------------------------------------------------------


def test_scores_and_intervals_equal_those_of_rows_that_are_drawn_again(rng):
    features = rng.normal(size=(13 * PER_EPISODE, 5)).astype(np.float32)
    angle = features[:, :1] + 0.5 * rng.normal(size=(len(features), 1))
    label = np.select([features[:, 1] > 0.8, features[:, 1] < -0.5], ["a", "b"], "c")
    targets = {"yaw": np.concatenate([np.sin(angle), np.cos(angle)], axis=1), "slot": label}
    rows, _ = probe(features, targets)
    train, held_out = split(features, targets)
    numbers = train._replace(targets={"yaw": train.targets["yaw"]})
    told = {
        ("yaw", metric): tell_numbers(metric, numbers, held_out.features)["yaw"] for metric in ("r2", "quadratic_r2")
    }
    told["slot", "balanced_accuracy"] = tell_label(train, "slot", held_out.features)
    assert told.keys() == rows.keys()
    mean = train.targets["yaw"].mean(axis=0)
    skill = lambda true, said: 1 - mean_squared_error(true, said) / mean_squared_error(true, 0 * true + mean)  # noqa: E731
    places = [np.flatnonzero(held_out.episodes == name) for name in np.unique(held_out.episodes)]
    weights = draw_episodes(5, num_resamples=SETTINGS.num_bootstrap, seed=SETTINGS.seed).astype(int)
    again = [np.concatenate(np.repeat(np.array(places), weight, axis=0)) for weight in weights]
    for key, predicted in told.items():
        true, score = held_out.targets[key[0]], balanced_accuracy_score if key[0] == "slot" else skill
        drawn = [score(true[chosen], predicted[chosen]) for chosen in again]
        assert rows[key]["value"] == pytest.approx(score(true, predicted), abs=1e-9), key
        assert [rows[key]["low"], rows[key]["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9), key
    assert rows["yaw", "r2"]["baseline"] == 0
    assert rows["slot", "balanced_accuracy"]["baseline"] == pytest.approx(1 / 3)


# --- leaks ----------------------------------------------------------------------------------------------------------------


def test_regularisation_is_not_chosen_within_an_episode(rng):
    """Rows that tell the episode, and a target that is one number an episode: nothing carries over to another episode."""
    place, numbers = rng.normal(size=(8, 40)), rng.normal(size=(8, 1))
    features = np.repeat(place, PER_EPISODE, axis=0) + 0.01 * rng.normal(size=(8 * PER_EPISODE, 40))
    train, _ = split(features, {"x": np.repeat(numbers, PER_EPISODE, axis=0)})
    apart = train._replace(episodes=[f"{row}" for row in range(len(features))])
    spreads = [np.ptp(tell_numbers(R2, rows, features)["x"]) for rows in (train, apart)]
    assert spreads[0] < 0.5 * np.ptp(numbers) < 0.9 * np.ptp(numbers) < spreads[1], "the mean, or the numbers by heart"
    with pytest.raises(ValueError, match="left-out training episodes"):
        tell_numbers(R2, train._replace(episodes=["one"] * len(features)), features)


def test_no_fold_of_a_label_has_an_episode_on_both_sides(rng, monkeypatch):
    features = rng.normal(size=(8 * PER_EPISODE, 4))
    train, _ = split(features, {"x": (features[:, 0] > 0).astype(str)})
    folds, whole = [], probes.cross_val_predict
    monkeypatch.setattr(probes, "cross_val_predict", lambda *a, cv: folds.extend(cv) or whole(*a, cv=cv))
    assert not isinstance(tell_label(train, "x", features), str)
    assert len(folds) >= 3
    for rows, left_out in folds:
        assert not set(train.episodes[rows]) & set(train.episodes[left_out]) and len(rows) + len(left_out) == len(
            features
        )


def test_what_is_told_of_a_row_does_not_depend_on_the_other_held_out_rows(rng):
    features = rng.normal(size=(10 * PER_EPISODE, 4)).astype(np.float32)
    targets = {"x": features[:, :1] + rng.normal(size=(len(features), 1)), "y": (features[:, 1] > 0).astype(str)}
    train, held_out = split(features, targets)
    numbers, other = train._replace(targets={"x": targets["x"][: len(train.features)]}), held_out.features.copy()
    other[1:] = other[1:] * 50 + 7
    for metric in probes.PENALTIES:
        one, two = (tell_numbers(metric, numbers, rows)["x"] for rows in (held_out.features, other))
        assert one[0] == pytest.approx(two[0], abs=1e-9) and not np.allclose(one, two)
    one, two = (tell_label(train, "y", rows) for rows in (held_out.features, other))
    assert one[0] == two[0] and (one != two).any()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Eight episodes whose tokens are waves of the yaw, with controls that know how an episode ended."""
    cache = make_cache(tmp_path_factory.mktemp("cache"), num_steps=40)
    for part, entry in cache.dataset.manifest.stores:
        file = cache.root.controls(part.source_fingerprint, entry.unit_digest)
        store = cache.dataset.manifest.entries.index(entry)
        keys = [segment.episode for segment in cache.dataset.segments if segment.store == store]
        publish_controls(file, ((key, {"success": np.full(4, int(key[-1]) % 2 == 0)}) for key in keys))
    return cache


def evaluation(cache, *overrides):
    settings = make_config(*overrides).evaluate
    return replace(evaluation_of(cache, torch.nn.Linear(1, 1)), config=replace(cache.config, evaluate=settings))


# --- a cache --------------------------------------------------------------------------------------------------------------


def test_the_yaw_is_found_in_tokens_that_are_waves_of_it_by_the_probes_that_are_named(cache, tmp_path):
    one = run_probes(evaluation(cache, "evaluate.probes=[inverse_dynamics]"), tmp_path)["probe"]
    assert {name.partition("_")[0] for name in one} == {"inverse"}
    sections = run_probes(evaluation(cache), tmp_path)
    canonical_json(sections)  # no NaN
    found, notes = sections["probe"], sections["probe_notes"]
    assert found["state_yaw_r2"] > 0.9
    assert found["state_pitch_r2"] < 0.2, "the tokens do not know the pitch"
    assert found["inverse_dynamics_dyaw_quadratic_r2"] > 0.5 > found["anticipation_dyaw_quadratic_r2"]
    assert "no label here" in notes["classification camera"] and "no label here" in notes["classification dataset"]
    assert "no label here" in notes["classification gui"]
    assert {name.partition("_")[0] for name in found} == {"inverse", "state", "anticipation", "classification"}
    for name, value in found.items():
        low, high = sections["probe_ci"][name]
        assert low <= value <= high, name
    rows = read_rows(tmp_path / "measurements/probes.csv")
    assert list(rows[0]) == ["probe", "target", "metric", "value", "low", "high", "baseline"]
    table = {(row["probe"], row["target"], row["metric"]): float(row["value"]) for row in rows}
    assert table["state", "yaw", "r2"] == found["state_yaw_r2"]
    mean = np.mean([value for (name, _, metric), value in table.items() if (name, metric) == ("state", "r2")])
    assert found["state_r2"] == pytest.approx(mean)
    assert found["classification_success_balanced_accuracy"] == table[CLASSIFICATION, "success", "balanced_accuracy"]


# --- rows -----------------------------------------------------------------------------------------------------------------


def test_small_steps_are_kept_whole_and_large_ones_shortened_alike_every_time(rng):
    reps = torch.from_numpy(rng.normal(size=(2, 3, 4, 5)).astype(np.float32))
    np.testing.assert_array_equal(
        step_features(reps, (2, 2), width=20), reps.permute(0, 1, 3, 2).reshape(2, 3, 20).numpy()
    )
    large = torch.from_numpy(rng.normal(size=(1, 2, 256, 1408)).astype(np.float32))
    rows = []
    for _ in range(2):
        rows.append(step_features(large, (16, 16), width=64))
        probes._projection.cache_clear()
    assert rows[0].shape == (1, 2, 64)
    np.testing.assert_array_equal(*rows)
    cells = step_features(large, (16, 16), width=10**6)
    assert cells.shape == (1, 2, 16 * 1408)
    np.testing.assert_allclose(cells.reshape(1, 2, 1408, 16).mean(axis=-1), large.mean(dim=2).numpy(), atol=1e-5)
