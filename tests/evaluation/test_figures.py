"""Figures: what errors say about episodes, slices of the held-out windows, and the verdict in words (test_run.py recomputes the errors).

Claims:
- windows of one episode count as one;
- the interval covers a known mean at about the stated rate, needs two episodes, and is the same by seed;
- the paired test is scipy's, to the last bit;
- every slice in which windows differ has one row for each value, over its own windows, episodes counted once; one episode has no interval;
- an answer follows from interval, test and number of episodes, and nothing else; a gain that is sure but tiny is no success;
- actions are used only where another episode's and zero ones both do worse, and what is worse than copying is told so beside it;
- few episodes, an untrained encoder and clip mode are said in words; the steps seen ahead end at the first that fails.
"""

import numpy as np
import pytest
from scipy.stats import permutation_test

from jepa_cache.data.ablations import SHUFFLED
from jepa_cache.evaluation.figures import slice_table
from jepa_cache.evaluation.metrics import bootstrap_mean, episode_means, paired_p_value
from jepa_cache.evaluation.verdict import OTHERS, Gain, describe_verdict, explain, judge, list_limits
from jepa_cache.evaluation.windows import COPY_LAST, MODEL, WindowErrors
from tests.caches import make_config


def test_an_episode_counts_once_however_many_windows_it_has():
    values, episodes = np.array([1.0, 3.0, 10.0]), ["b", "b", "a"]
    assert episode_means(np.tile(values, 5), episodes * 5).tolist() == [10.0, 2.0]
    assert episode_means(values, episodes).tolist() == [10.0, 2.0]
    assert episode_means(np.stack([values, -values], axis=1), episodes).tolist() == [[10.0, -10.0], [2.0, -2.0]]
    values, episodes = np.array([1.0, np.nan, 3.0, np.nan]), ["a", "a", "b", "c"]  # NaN: a prediction does not exist
    assert np.array_equal(episode_means(values, episodes), [1.0, 3.0, np.nan], equal_nan=True)


def test_the_interval_covers_the_true_mean_at_about_the_stated_rate():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(600):
        low, high = bootstrap_mean(rng.gamma(2.0, 1.5, size=40), num_resamples=400, seed=trial)[1:]
        covered += low <= 3.0 <= high
    # 95 % less the known shortfall of percentiles on skewed data of 40; binomial deviation of the count is 1 %.
    assert 0.90 <= covered / 600 <= 0.97


def test_the_interval_is_the_same_by_seed_holds_the_mean_draws_both_parts_of_a_ratio_together_and_needs_two_episodes():
    values = np.random.default_rng(3).standard_normal(9)
    first, again, other = (bootstrap_mean(values, num_resamples=500, seed=seed) for seed in (2, 2, 3))
    assert first == again != other
    assert first.low < first.mean < first.high and first.mean == pytest.approx(values.mean())
    assert np.allclose(bootstrap_mean(0.2 * values**2, values**2, num_resamples=100, seed=0), 0.2)
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"at least two held-out episodes; got {count}"):
            bootstrap_mean(np.zeros(count), num_resamples=10, seed=0)


# Of few episodes all signs are tried, so five can never reject; of many as many are drawn.
@pytest.mark.parametrize("count", [4, 5, 6, 14, 90])
def test_the_paired_test_is_scipy_s(count):
    drawn = np.random.default_rng(count).standard_normal(count).round(1) + 0.1
    for gaps in (drawn, np.ones(count), np.zeros(count)):
        theirs = permutation_test(
            (gaps,), np.mean, permutation_type="samples", vectorized=True, n_resamples=8192, rng=3
        )
        assert paired_p_value(gaps, seed=3) == theirs.pvalue


# --- slices ---------------------------------------------------------------------------------------------------------------


EPISODES = ["a", "a", "a", "b", "b", "c"]
ERRORS = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 8.0])


def make_errors(copied: np.ndarray = 2 * ERRORS) -> WindowErrors:
    """Six windows of two predicted steps."""
    errors = {MODEL: ERRORS, SHUFFLED: ERRORS + 1, COPY_LAST: copied}
    l1 = {name: np.stack([values, values], axis=1) for name, values in errors.items()}
    return WindowErrors(EPISODES, {"l1": l1}, {"l1": l1}, chosen=None, num_fitted_steps=0)


def make_facts() -> list[dict]:
    columns = {
        "episode": EPISODES,
        "dataset": ["vpt"] * 3 + ["other"] * 3,
        "camera": ["left", "right", "left", "right", "left", "left"],
        "phase": ["0", "0", "0", "1", "1", "1"],
        "gui": ["open", *["closed"] * 5],
        "first_step": [0, 5, 9, 0, 5, 0],
        "start_s": [0.0, 1.0, 1.8, 0.0, 1.0, 0.0],
        "action_size": [1.0] * 6,
    }
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
    assert table["phase", "1"]["l1"] == table["dataset", "other"]["l1"] == pytest.approx((5 + 8) / 2)
    assert [table["token_motion", name]["num_windows"] for name in ("low", "middle", "high")] == [2, 2, 2]
    assert {key[0] for key in table} == {"episode", "dataset", "camera", "phase", "gui", "token_motion"}, (
        "not where all are alike"
    )
    row = table["gui", "open"]
    assert row["l1"] == 1 and row["l1_low"] is None and row["gap_shuffled_high"] is None, "one episode has no interval"


def test_a_third_that_no_window_falls_into_has_no_row():
    # Recordings that are copies of each other: errors repeat, and one third is empty.
    errors = make_errors(np.array([1.0, 1, 1, 1, 1, 2]))
    rows = [row for row in slice_table(make_facts(), errors, make_config().evaluate) if row["slice"] == "token_motion"]
    assert [(row["value"], row["num_windows"]) for row in rows] == [("low", 5), ("high", 1)]


# --- the verdict ----------------------------------------------------------------------------------------------------------


NAMES = (
    "copy_last",
    "mean",
    "extrapolation",
    "regression",
    "no_actions",
    "shuffled_actions",
    "zero_actions",
    "permuted_actions",
)
SHIFTED = ("next_actions", "previous_actions")
GOOD = (6.1, 5.2, 7.0, 0.002)


@pytest.mark.parametrize(
    ("gain", "num_episodes", "answer", "words"),
    [
        (GOOD, 10, "yes", "yes, error of true actions 6.1 % lower [5.2, 7.0] than that of others (p 0.002)"),
        ((0.3, 0.2, 0.4, 0.002), 10, "no", "below 0.5 %, as good as none"),
        ((0.0, 0.0, 0.0, 1.0), 10, "no", "below 0.5 %"),
        ((-6.1, -7.0, -5.2, 0.002), 10, "no", "error of true actions 6.1 % higher [5.2, 7.0] than that of others"),
        ((0.8, 0.3, 1.4, 0.01), 10, "unclear", "the interval reaches from below 0.5 % to above it"),
        ((2.0, -1.0, 5.0, 0.3), 10, "unclear", "the interval reaches"),
        ((6.1, 5.2, 7.0, 0.06), 10, "unclear", "the paired test does not confirm it (p 0.06)"),
        ((6.1, 5.2, 7.0, 0.0625), 5, "unclear", "5 held-out episodes are too few to tell (6 are needed)"),
        ((0.0, 0.0, 0.0, 1.0), 2, "no", "below 0.5 %"),
        ((-0.01, -0.02, 0.04, 0.5), 9, "no", "0.0 % lower [0.0, 0.0]"),
        ((-0.1, -0.3, 0.2, 0.5), 9, "no", "0.1 % higher [-0.2, 0.3] than that of others: below"),
    ],
)
def test_an_answer_follows_from_the_figures(gain, num_episodes, answer, words):
    assert judge(Gain(*gain), num_episodes) == answer
    told = explain(Gain(*gain), num_episodes, "true actions", "others")
    assert told.startswith(answer) and words in told, told


def make_metrics(num_episodes: int = 10, horizon: int = 3, gains: dict | None = None, **more) -> dict:
    """Metrics with the same good gain everywhere but where `gains` says otherwise; None leaves a figure out."""
    keys = [
        f"{name}{where}" for name in (*NAMES, *SHIFTED) for where in ("", *(f"_step{k}" for k in range(1, horizon + 1)))
    ]
    found = {key: value for key in keys if (value := (gains or {}).get(key, GOOD)) is not None}
    return {
        "val": {f"gain_{key}_percent": gain[0] for key, gain in found.items()},
        "val_ci": {f"gain_{key}_percent": list(gain[1:3]) for key, gain in found.items()},
        "p_value": {f"gap_{key}": gain[3] for key, gain in found.items()},
        "num_episodes": num_episodes,
        "encoder_trained": True,
        "comparable": True,
        "settings": {"horizon": horizon, "step_hz": 5.0},
        **more,
    }


def test_the_strongest_baseline_and_the_nearer_step_are_those_that_count():
    tiny, worse = (0.1, 0.0, 0.2, 0.03), (-3.0, -4.0, -2.0, 0.002)
    verdict = describe_verdict(make_metrics(gains={"regression": worse, "previous_actions": tiny}))
    assert verdict["baselines"]["answer"] == "no" and "linear regression" in verdict["baselines"]["words"]
    assert verdict["timing"]["answer"] == "no" and "the previous step's" in verdict["timing"]["words"]
    assert verdict["copying"]["answer"] == verdict["actions"]["answer"] == "yes"


READ = {f"readout_{name}_percent": (80.0, 55.0, 104.0, 0.002) for name in OTHERS}


def read_out(above: dict | None = None, columns: str = "reads x") -> dict:
    """Sections of an evaluation whose readout tells x; `above` as `READ` where it says otherwise."""
    found = READ | (above or {})
    return {
        "readout": {"r2_x": 0.7},
        "readout_notes": {"columns": columns},
        "above": {name: gain[0] for name, gain in found.items() if gain},
        "above_ci": {name: list(gain[1:3]) for name, gain in found.items() if gain},
        "above_p": {name: gain[3] for name, gain in found.items() if gain},
    }


@pytest.mark.parametrize("other", ["shuffled_actions", "zero_actions"])
@pytest.mark.parametrize(
    ("gain", "answer"),
    [((0.2, 0.1, 0.3, 0.01), "no"), ((4.0, -1.0, 9.0, 0.2), "unclear"), ((-3.0, -4.0, -2.0, 0.002), "no")],
)
def test_actions_are_used_only_where_another_episode_s_and_zero_actions_both_do_worse(other, gain, answer):
    verdict = describe_verdict(
        make_metrics(gains={other: gain, f"{other}_step3": gain}, **read_out({f"readout_{other}_percent": gain}))
    )
    for question in ("actions", "actions_rollout", "readout"):
        assert verdict[question]["answer"] == answer, verdict[question]
        assert "another episode's" in verdict[question]["words"] and "zero actions" in verdict[question]["words"]
    assert verdict["timing"]["answer"] == "yes"


def test_what_is_worse_than_copying_is_told_so_wherever_it_is_asked_about_actions():
    worse = (-7.3, -9.0, -5.0, 0.002)
    gains = {"copy_last": worse, "copy_last_step3": worse}
    verdict = describe_verdict(make_metrics(gains=gains, **read_out({"readout_copy_last_percent": worse})))
    for question in ("actions", "actions_rollout", "timing", "readout"):
        assert verdict[question]["answer"] == "yes" and "worse than copying the last step" in verdict[question]["words"]
    assert "its error is 7.3 % higher [5.0, 9.0]" in verdict["actions"]["words"]
    good = describe_verdict(make_metrics(**read_out()))
    assert not any("worse than copying" in judged["words"] for judged in good.values())
    assert "x 0.70" in good["readout"]["words"] and "zero actions 80.0 % [55.0, 104.0]" in good["readout"]["words"]


def test_where_nothing_can_be_read_the_reason_stands_in_place_of_a_gap():
    found = describe_verdict(make_metrics(**read_out(dict.fromkeys(READ), "nothing is read: R2 is about 0")))["readout"]
    assert found["answer"] == "unclear" and "nothing is read: R2 is about 0" in found["words"]


def test_the_steps_seen_ahead_end_at_the_first_that_fails():
    for failing, answer, words in (
        ("mean_step3", "yes", "for 2 open-loop steps (of 3 measured; 0.4 s)"),
        ("copy_last_step2", "yes", "for 1 open-loop steps (of 3 measured; 0.2 s)"),
        ("mean_step1", "no", "not shown to beat both copying the last step and the training mean at the first"),
    ):
        verdict = describe_verdict(make_metrics(gains={failing: (0.0, -1.0, 0.4, 0.9)}))["horizon"]
        assert verdict["answer"] == answer and words in verdict["words"], verdict


def test_few_episodes_an_untrained_encoder_and_clip_mode_are_said():
    few, untrained, clip = (
        describe_verdict(make_metrics(**changes))
        for changes in ({"num_episodes": 5}, {"encoder_trained": False}, {"comparable": False})
    )
    assert "yes" not in {verdict["answer"] for verdict in few.values()}
    assert "only 5 held-out episodes" in few["limits"]["words"]
    assert all("untrained" in answer["words"] for name, answer in untrained.items() if name != "limits")
    assert "nothing of a trained one" in untrained["limits"]["words"]
    assert clip["limits"]["answer"] == "some" and "not comparable" in clip["limits"]["words"]


def test_frechet_distances_of_few_vectors_are_a_limit_and_those_of_many_are_none():
    metrics = {"encoder_trained": True, "comparable": True, "num_episodes": 10}
    told = [
        list_limits(metrics | {"distance": {"num_vectors_pooled": count, "num_dims_pooled": min(64, count // 4)}})
        for count in (80, 256)
    ]
    assert "80 vectors a half, so of 20 components" in told[0][0] and told[1] == []
    assert list_limits(metrics | {"distance": {"num_windows": 3}}) == [], "none was measured"
