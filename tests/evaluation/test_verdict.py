"""The verdict in words.

Claims:
- the answer follows from interval, test and number of episodes, and nothing else; a gain that is sure but tiny is no success;
- few episodes, an untrained encoder and clip mode are said in words;
- the steps seen ahead are counted from the first and end at the first that fails.
"""

import pytest

from jepa_cache.evaluation.verdict import Gain, describe_verdict, explain, judge

NAMES = ("copy_last", "mean", "extrapolation", "regression", "shuffled_actions", "zero_actions", "permuted_actions")
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


def answers(metrics: dict) -> dict[str, str]:
    return {name: verdict["answer"] for name, verdict in describe_verdict(metrics).items()}


def test_good_figures_get_good_answers():
    found = answers(make_metrics())
    assert found.pop("limits") == "none" and set(found.values()) == {"yes"}


def test_the_strongest_baseline_and_the_nearer_step_are_those_that_count():
    tiny, worse = (0.1, 0.0, 0.2, 0.03), (-3.0, -4.0, -2.0, 0.002)
    verdict = describe_verdict(make_metrics(gains={"regression": worse, "previous_actions": tiny}))
    assert verdict["baselines"]["answer"] == "no" and "linear regression" in verdict["baselines"]["words"]
    assert verdict["timing"]["answer"] == "no" and "the previous step's" in verdict["timing"]["words"]
    assert verdict["copying"]["answer"] == verdict["actions"]["answer"] == "yes"


@pytest.mark.parametrize(
    ("failing", "answer", "words"),
    [
        ("mean_step3", "yes", "for 2 open-loop steps (of 3 measured; 0.4 s)"),
        ("copy_last_step2", "yes", "for 1 open-loop steps (of 3 measured; 0.2 s)"),
        ("mean_step1", "no", "not shown to beat both copying the last step and the training mean at the first"),
    ],
)
def test_the_steps_seen_ahead_end_at_the_first_that_fails(failing, answer, words):
    verdict = describe_verdict(make_metrics(gains={failing: (0.0, -1.0, 0.4, 0.9)}))["horizon"]
    assert verdict["answer"] == answer and words in verdict["words"], verdict


def test_what_was_not_measured_is_unclear():
    verdict = describe_verdict(make_metrics(gains=dict.fromkeys(SHIFTED)))
    assert verdict["timing"]["answer"] == "unclear" and "fewer than two episodes" in verdict["timing"]["words"]
    assert "raise evaluate.windows_per_episode" in verdict["timing"]["words"]


def test_few_episodes_an_untrained_encoder_and_clip_mode_are_said():
    few, untrained, clip = (
        describe_verdict(make_metrics(**changes))
        for changes in ({"num_episodes": 5}, {"encoder_trained": False}, {"comparable": False})
    )
    assert "yes" not in {verdict["answer"] for verdict in few.values()}
    assert "only 5 held-out episodes" in few["limits"]["words"]
    assert all("untrained" in answer["words"] for name, answer in untrained.items() if name != "limits")
    assert "nothing about the world" in untrained["limits"]["words"]
    assert clip["limits"]["answer"] == "some" and "not comparable" in clip["limits"]["words"]
