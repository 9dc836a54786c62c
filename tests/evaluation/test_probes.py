"""Probes, on rows that are made and on a tiny cache.

Claims:
- rows that hold an action tell it (R2 near 1), rows of noise do not, and the interval says so; shuffled labels give chance; what is in
  a product of two numbers is found by the quadratic head alone;
- scores and intervals equal scikit-learn's on rows that are drawn again; the baseline is what the training mean and the majority get;
- held-out episodes never change a fitted head, and the regularisation is not chosen within an episode;
- on a cache whose tokens are waves of the yaw the yaw is found; labels that the data lack are named;
- rows stay short whatever N and D are, and lose nothing where they need not be shortened.
"""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, mean_squared_error

from jepa_cache.config.parsing import ConfigError
from jepa_cache.evaluation import probe_heads
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.probe_heads import (
    RIDGE_PENALTIES,
    StepFeatures,
    draw_episodes,
    fit_label,
    fit_linear,
    read_sample,
)
from jepa_cache.evaluation.probes import (
    CLASSIFICATION,
    INVERSE_DYNAMICS,
    Targets,
    fit_heads,
    measure_probes,
    run_probes,
    score_heads,
    summarize_probes,
)
from jepa_cache.predictor.rollout import LatentModel
from jepa_cache.store.controls import ControlsWriter
from jepa_cache.store.recipe import canonical_json
from tests.caches import make_cache, make_config

SETTINGS = make_config("evaluate.num_bootstrap=300").evaluate
PER_EPISODE = 30


def episodes(count, name):
    return [f"{name}-{number}" for number in np.repeat(np.arange(count), PER_EPISODE)]


def probe(features, targets, *, num_train=8):
    """Fit on the first episodes and score on the others: target and metric to the row of probes.csv."""
    cut = num_train * PER_EPISODE
    train = Targets(*({name: values[:cut] for name, values in part.items()} for part in targets))
    held_out = Targets(*({name: values[cut:] for name, values in part.items()} for part in targets))
    heads, unfitted = fit_heads(features[:cut], train, episodes(num_train, "train"))
    keys = episodes((len(features) - cut) // PER_EPISODE, "val")
    scores, unscored = score_heads(heads, features[cut:], held_out, keys, probe="state")
    probed = type("Probed", (), {"scores": scores, "notes": {}})
    rows, _ = summarize_probes(probed, SETTINGS)
    return {(row["target"], row["metric"]): row for row in rows}, unfitted | unscored


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- what is in the rows --------------------------------------------------------------------------------------------------


def test_an_action_that_the_rows_hold_is_told_and_noise_tells_nothing(rng):
    features = rng.normal(size=(14 * PER_EPISODE, 12)).astype(np.float32)
    held = features @ rng.normal(size=(12, 1)) + 5.0
    rows, left_out = probe(features, Targets({"held": held, "absent": rng.normal(size=held.shape)}, {}))
    assert not left_out
    for metric in ("r2", "quadratic_r2"):
        assert rows["held", metric]["low"] > 0.97, metric
        absent = rows["absent", metric]
        assert -0.05 < absent["value"] < 0.03 and absent["low"] <= 0.0 and absent["high"] > -0.01, metric


def test_what_is_in_a_product_is_found_by_the_quadratic_head_alone(rng):
    features = rng.normal(size=(16 * PER_EPISODE, 4)).astype(np.float32)
    rows, _ = probe(features, Targets({"turn": features[:, :1] * features[:, 1:2]}, {}), num_train=12)
    assert rows["turn", "r2"]["high"] < 0.1 and rows["turn", "quadratic_r2"]["low"] > 0.95


def test_labels_that_the_rows_hold_are_told_and_shuffled_ones_are_named_by_chance(rng):
    features = rng.normal(size=(14 * PER_EPISODE, 6)).astype(np.float32)
    jump = (features[:, 0] > 1.0).astype(int).astype(str)  # one in six
    rows, left_out = probe(features, Targets({}, {"jump": jump, "shuffled": rng.permutation(jump)}))
    assert not left_out
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
    early = np.where(np.arange(len(features)) % 7 == 0, "1", "0")
    early[8 * PER_EPISODE :] = "0"
    moving = rng.normal(size=still.shape)
    early_number = moving.copy()
    early_number[8 * PER_EPISODE :] = 0
    rows, left_out = probe(
        features, Targets({"still": still, "later": later, "early": early_number}, {"once": once, "key": early})
    )
    assert not rows
    assert "never changes in the training" in left_out["still"] and "never changes in the training" in left_out["later"]
    assert "never changes in the held-out" in left_out["early"]
    assert "two training episodes" in left_out["once"] and "always '0' in the held-out" in left_out["key"]


# --- scores ---------------------------------------------------------------------------------------------------------------


def test_scores_and_intervals_equal_those_of_rows_that_are_drawn_again(rng):
    features = rng.normal(size=(13 * PER_EPISODE, 5)).astype(np.float32)
    angle = features[:, :1] + 0.5 * rng.normal(size=(len(features), 1))
    numbers = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    label = np.select([features[:, 1] > 0.8, features[:, 1] < -0.5], ["a", "b"], "c")
    cut, keys = 8 * PER_EPISODE, np.array(episodes(5, "val"))
    rows, _ = probe(features, Targets({"yaw": numbers}, {"slot": label}))
    heads, _ = fit_heads(features[:cut], Targets({"yaw": numbers[:cut]}, {"slot": label[:cut]}), episodes(8, "train"))
    told = {
        ("yaw", "r2"): (numbers[cut:], heads.regressions["r2"].predict(features[cut:])),
        ("yaw", "quadratic_r2"): (numbers[cut:], heads.regressions["quadratic_r2"].predict(features[cut:])),
        ("slot", "balanced_accuracy"): (label[cut:], heads.labels["slot"].pipeline.predict(features[cut:])),
    }
    assert told.keys() == rows.keys()
    mean = numbers[:cut].mean(axis=0)
    skill = lambda true, said: 1 - mean_squared_error(true, said) / mean_squared_error(true, 0 * true + mean)  # noqa: E731
    weights = draw_episodes(5, num_resamples=SETTINGS.num_bootstrap, seed=SETTINGS.seed)
    for key, (true, predicted) in told.items():
        score = balanced_accuracy_score if key[0] == "slot" else skill
        drawn = []
        for weight in weights[1:].astype(int):
            again = np.concatenate([np.flatnonzero(keys == f"val-{e}") for e in np.repeat(np.arange(5), weight)])
            drawn.append(score(true[again], predicted[again]))
        assert rows[key]["value"] == pytest.approx(score(true, predicted), abs=1e-9), key
        assert [rows[key]["low"], rows[key]["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-9), key
    assert rows["yaw", "r2"]["baseline"] == 0
    assert rows["slot", "balanced_accuracy"]["baseline"] == pytest.approx(1 / 3)


def test_one_held_out_or_training_episode_is_too_few(rng):
    with pytest.raises(ValueError, match="at least two held-out episodes"):
        draw_episodes(1, num_resamples=10, seed=0)
    with pytest.raises(ValueError, match="left-out training episodes"):
        fit_linear(rng.normal(size=(9, 2)), {"x": rng.normal(size=(9, 1))}, ["one"] * 9)


# --- leaks ----------------------------------------------------------------------------------------------------------------


def test_regularisation_is_not_chosen_within_an_episode(rng):
    """Rows that tell the episode, and a target that is one number an episode: nothing carries over to another episode."""
    keys = episodes(8, "train")
    place, numbers = rng.normal(size=(8, 40)), rng.normal(size=(8, 1))
    features = np.repeat(place, PER_EPISODE, axis=0) + 0.01 * rng.normal(size=(len(keys), 40))
    target = np.repeat(numbers - numbers.mean(), PER_EPISODE, axis=0)
    assert fit_linear(features, {"x": target}, keys).penalties["x"] == RIDGE_PENALTIES[-1] * len(keys)
    assert fit_linear(features, {"x": target}, [f"{row}" for row in range(len(keys))]).penalties["x"] < len(keys)


def test_no_fold_of_a_label_has_an_episode_on_both_sides(rng, monkeypatch):
    keys = np.array(episodes(8, "train"))
    features = rng.normal(size=(len(keys), 4))
    folds = []
    whole = probe_heads.cross_val_predict
    monkeypatch.setattr(probe_heads, "cross_val_predict", lambda *a, cv: folds.extend(cv) or whole(*a, cv=cv))
    assert not isinstance(fit_label(features, (features[:, 0] > 0).astype(str), keys), str)
    assert len(folds) >= 3
    for train, left_out in folds:
        assert not set(keys[train]) & set(keys[left_out]) and len(train) + len(left_out) == len(keys)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Eight episodes whose tokens are waves of the yaw, with controls that know how an episode ended."""
    cache = make_cache(tmp_path_factory.mktemp("cache"), num_steps=40)
    for part, entry in cache.dataset.manifest.stores:
        file = cache.root.controls(part.source_fingerprint, entry.unit_digest)
        store = cache.dataset.manifest.entries.index(entry)
        with ControlsWriter(file) as writer:
            for segment in cache.dataset.segments:
                if segment.store == store:
                    writer.append(segment.episode, {"success": np.full(4, int(segment.episode[-1]) % 2 == 0)})
    return cache


def evaluation_of(cache, *overrides, dataset=None):
    config = replace(cache.config, evaluate=make_config(*overrides).evaluate)
    return EvaluationContext(LatentModel(torch.nn.Linear(1, 1)), config, dataset or cache.dataset, cache.scaler, 5)


class OtherHeldOut:
    """The data set with other tokens, actions and states in its held-out episodes."""

    def __init__(self, dataset, segments):
        self._dataset, self._segments = dataset, segments

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def read_tokens(self, store, start, out):
        self._dataset.read_tokens(store, start, out)
        for segment in self._segments:
            if segment.store == store and segment.start <= start < segment.stop:
                out.view(np.float16)[...] = out.view(np.float16)[..., ::-1] * 2 + 1

    def controls(self, store):
        actions, states = (values.copy() for values in self._dataset.controls(store))
        for segment in self._segments:
            if segment.store == store:
                actions[segment.start : segment.stop - 1, :2] += 50
                states[segment.start : segment.stop] *= 0.5
        return actions, states


def test_held_out_episodes_never_change_a_fitted_head(cache):
    other = OtherHeldOut(cache.dataset, evaluation_of(cache).held_out_segments())
    one, two = (measure_probes(evaluation_of(cache, dataset=dataset)) for dataset in (None, other))
    assert one.heads.keys() == two.heads.keys() and len(one.heads) == 4
    compared = 0
    for name, heads in one.heads.items():
        for metric, head in heads.regressions.items():
            again = two.heads[name].regressions[metric]
            weights = "coef_" if metric == "r2" else "dual_coef_"
            assert head.penalties == again.penalties
            np.testing.assert_array_equal(*(getattr(h.pipeline["head"], weights) for h in (head, again)))
            np.testing.assert_array_equal(head.pipeline["scale"].mean_, again.pipeline["scale"].mean_)
            compared += 1
        for label, head in heads.labels.items():
            again = two.heads[name].labels[label]
            np.testing.assert_array_equal(head.pipeline[-1].coef_, again.pipeline[-1].coef_)
            compared += 1
    assert compared >= 8
    assert any(
        not np.array_equal(a.sums[-2], b.sums[-2]) for a, b in zip(one.scores, two.scores, strict=True)
    )  # the held-out rows did change


# --- a cache --------------------------------------------------------------------------------------------------------------


def test_the_yaw_is_found_in_tokens_that_are_waves_of_it(cache, tmp_path):
    sections = run_probes(evaluation_of(cache), tmp_path)
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
    with (tmp_path / "measurements/probes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["probe", "target", "metric", "value", "low", "high", "baseline"]
    table = {(row["probe"], row["target"], row["metric"]): float(row["value"]) for row in rows}
    assert table["state", "yaw", "r2"] == found["state_yaw_r2"]
    mean = np.mean([value for (name, _, metric), value in table.items() if (name, metric) == ("state", "r2")])
    assert found["state_r2"] == pytest.approx(mean)
    assert found["classification_success_balanced_accuracy"] == table[CLASSIFICATION, "success", "balanced_accuracy"]


def test_only_the_probes_that_are_named_are_measured_and_an_unknown_name_is_refused(cache):
    probed = measure_probes(evaluation_of(cache, "evaluate.probes=[inverse_dynamics]"))
    assert {score.probe for score in probed.scores} == set(probed.heads) == {INVERSE_DYNAMICS}
    with pytest.raises(ConfigError, match=r"evaluate\.probes.*inverse_dynamics"):
        make_config("evaluate.probes=[inverse_dynamic]")


def test_the_predictor_sees_layer_normed_tokens_and_so_do_the_probes(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(StepFeatures, "__call__", lambda self, reps: seen.append(reps) or self._rows(reps))
    monkeypatch.setattr(
        StepFeatures, "_rows", lambda self, reps: np.zeros((*reps.shape[:2], self.width), np.float32), raising=False
    )
    evaluation = evaluation_of(cache)
    sample = read_sample(evaluation, evaluation.training_segments(), num_steps=2)
    reps = torch.cat(seen)
    assert reps.mean(dim=-1).abs().max() < 1e-3 and (reps.std(dim=-1, correction=0) - 1).abs().max() < 1e-2
    assert len(sample.features) == len(reps) == len(sample.actions) == len(sample.episodes)


# --- rows -----------------------------------------------------------------------------------------------------------------


def test_small_steps_are_kept_whole_and_large_ones_shortened_alike_every_time(rng):
    reps = torch.from_numpy(rng.normal(size=(2, 3, 4, 5)).astype(np.float32))
    np.testing.assert_array_equal(
        StepFeatures((2, 2), 5, width=20)(reps), reps.permute(0, 1, 3, 2).reshape(2, 3, 20).numpy()
    )
    large = torch.from_numpy(rng.normal(size=(1, 2, 256, 1408)).astype(np.float32))
    rows = [StepFeatures((16, 16), 1408, width=64)(large) for _ in range(2)]
    assert rows[0].shape == (1, 2, 64)
    np.testing.assert_array_equal(*rows)
    cells = StepFeatures((16, 16), 1408, width=10**6)(large)
    assert cells.shape == (1, 2, 16 * 1408)
    np.testing.assert_allclose(cells.reshape(1, 2, 1408, 16).mean(axis=-1), large.mean(dim=2).numpy(), atol=1e-5)
