"""The verdict in words: what the figures of one evaluation say, and no more than they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jepa_cache.data.windows import LEAST_FOR_YES

MARGIN_PERCENT = 0.5
"""Gains below this are treated as no gain, even when significant."""

SIGNIFICANCE = 0.05

YES, NO, UNCLEAR = "yes", "no", "unclear"
BASELINE_WORDS = {
    "copy_last": "copying the last step",
    "mean": "the training mean",
    "extrapolation": "a straight line through the last two steps",
    "regression": "a linear regression on actions and states",
    "no_actions": "a linear model without actions",
}
OTHERS = {
    "shuffled_actions": "another episode's actions",
    "zero_actions": "zero actions",
    "no_actions": BASELINE_WORDS["no_actions"],
    "copy_last": "copying",
}
"""What the error with the true actions is held against, above all; an answer rests on the first two."""
SHIFT_WORDS = {"next_actions": "the next step's", "previous_actions": "the previous step's"}
UNTRAINED = "the encoder is untrained (random weights, or plain pixels), so these figures say nothing of a trained one"
NOT_MEASURED = (
    "unclear, fewer than two episodes hold a window to measure it on (another step's actions need a step beside the window); "
    "raise evaluate.windows_per_episode, or add recordings"
)
FEW_VECTORS = 256  # of a half: four for each of the 64 components that a Fréchet distance is taken in at most
CLIP = "clip mode: early steps have seen later frames, so figures are not comparable with frame or tubelet mode"


class Gain(NamedTuple):
    """The model against one other prediction: per cent of the other's error, interval ends, p value, all over episodes."""

    percent: float
    low: float
    high: float
    p: float

    def __format__(self, word: str) -> str:
        mean, low, high = (f"{round(value, 1) + 0.0:.1f}" for value in self[:3])  # + 0.0: no -0.0
        return f"{mean} %{word} [{low}, {high}]"


def find_gain(metrics: Mapping[str, Any], name: str) -> Gain | None:
    """The gain over a baseline or ablation, one step ahead or at open-loop step k (`<name>_step<k>`); None where not measured."""
    key = f"gain_{name}_percent"
    if key not in metrics["val"]:
        return None
    return Gain(metrics["val"][key], *metrics["val_ci"][key], metrics["p_value"][f"gap_{name}"])


def compare(gain: Gain) -> str:
    """The gain in words: its size and `lower`, or for a loss `higher`."""
    if round(gain.percent, 1) < 0:
        return f"{Gain(-gain.percent, -gain.high, -gain.low, gain.p): higher}"
    return f"{gain: lower}"


def weakest(gains: Mapping[str, Gain], num_episodes: int) -> str:
    """The first that says no, else that leaves it open, else the first: a yes is of all of them."""
    return min(gains, key=lambda name: (NO, UNCLEAR, YES).index(judge(gains[name], num_episodes)))


def judge(gain: Gain, num_episodes: int) -> str:
    """`yes`, `no` or `unclear`: is the gain above the margin?

    Yes, when the whole interval lies above the margin and the paired test says so; no, when the whole interval lies below
    it, which a tiny gain does and a loss; else unclear.
    """
    if gain.high < MARGIN_PERCENT:
        return NO
    if gain.low > MARGIN_PERCENT and num_episodes >= LEAST_FOR_YES and gain.p < SIGNIFICANCE:
        return YES
    return UNCLEAR


def explain(gain: Gain, num_episodes: int, better: str, other: str) -> str:
    """The answer with its reason; `better` is better than `other` if the gain is above 0."""
    answer = judge(gain, num_episodes)
    told = f"{answer}, error of {better} {compare(gain)} than that of {other}"
    if answer == YES:
        return f"{told} (p {gain.p:.2g})"
    if answer == NO:
        return told if gain.high < 0 else f"{told}: below {MARGIN_PERCENT} %, as good as none"
    if num_episodes < LEAST_FOR_YES:
        return f"{told}, but {num_episodes} held-out episodes are too few to tell ({LEAST_FOR_YES} are needed)"
    if gain.low > MARGIN_PERCENT:
        return f"{told}, but the paired test does not confirm it (p {gain.p:.2g})"
    return f"{told}: the interval reaches from below {MARGIN_PERCENT} % to above it"


def describe_verdict(metrics: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Answers to the questions that users ask: {question: {"answer": "yes|no|unclear", "words": a sentence}}.

    Each rests on one comparison that is named beforehand, so no correction for several tests is made:

    `actions` and `actions_rollout` (the last open-loop step) against another episode's actions and against zero actions, the weaker
    of the two; `readout` the same for errors read out as positions; `timing` against the neighbouring steps' (the nearer of the two),
    `copying`, `baselines` against the strongest, `horizon`: how many open-loop steps it beats both copying and the training mean, and
    `limits`: what the figures cannot say, `none` or `some`. What is worse than copying is told so wherever it is asked about actions.
    """
    last, count = metrics["settings"]["horizon"], metrics["num_episodes"]
    relative = "" if metrics["encoder_trained"] else " (relative: the encoder is untrained)"
    verdict = {}

    def put(question: str, answer: str, words: str) -> None:
        verdict[question] = {"answer": answer, "words": words + relative}

    at_last = f"_step{last}"
    wrong, copying = (
        {"shuffled_actions": "another episode's", "zero_actions": "zero actions"},
        {"copy_last": BASELINE_WORDS["copy_last"]},
    )
    for question, title, others, step in (
        ("actions", "uses its actions", wrong, ""),
        ("actions_rollout", f"uses its actions in open loop, step {last}", wrong, at_last),
        ("timing", "uses those of the right step", SHIFT_WORDS, ""),
        ("copying", "better than copying", copying, ""),
        ("baselines", "better than every baseline", BASELINE_WORDS, ""),
    ):
        gains = {words: gain for name, words in others.items() if (gain := find_gain(metrics, name + step))}
        answer, why = UNCLEAR, NOT_MEASURED
        about_actions = "copy_last" not in others
        if gains:
            words = weakest(gains, count) if others is wrong else min(gains, key=lambda words: gains[words].percent)
            gain, better = gains.pop(words), "true actions" if about_actions else "the predictor"
            answer, why = judge(gain, count), explain(gain, count, better, words)
            if others is wrong:
                why += "".join(f"; {compare(gain)} than that of {words}" for words, gain in gains.items())
        copied = find_gain(metrics, f"copy_last{step}")
        if about_actions and copied is not None and copied.percent < 0:
            why += f"; but worse than copying the last step, its error is {compare(copied)}"
        put(question, answer, f"{title}: {why}")
        if question == "actions" and "readout" in metrics:
            put("readout", *_describe_readout(metrics, count))
    put("horizon", *_describe_horizon(metrics))
    limits = list_limits(metrics)
    words = "limits: " + ("; ".join(limits) or "none that this report knows")
    return verdict | {"limits": {"answer": "some" if limits else "none", "words": words}}


def _describe_readout(metrics: Mapping[str, Any], count: int) -> tuple[str, str]:
    """By how many per cent errors lie above that with the true actions, in what a linear readout tells of the tokens."""
    found = {
        words: Gain(metrics["above"][key], *metrics["above_ci"][key], metrics["above_p"][key])
        for name, words in OTHERS.items()
        if (key := f"readout_{name}_percent") in metrics["above"]
    }
    scores = ", ".join(f"{name.removeprefix('r2_')} {value:.2f}" for name, value in metrics["readout"].items())
    title = "uses its actions, through a linear readout of positions"
    if not found:
        return UNCLEAR, f"{title}: unclear, {metrics['readout_notes']['columns']}"
    wrong = dict(list(found.items())[:2])
    answer = judge(wrong[weakest(wrong, count)], count)
    first, *others = (f"{words} {gain}" for words, gain in found.items())
    words = f"{title}: {answer}, error of {', '.join([f'{first} above that of true actions', *others])}"
    if found[OTHERS["copy_last"]].percent < 0:
        words += "; so it is worse than copying the last step"
    if answer != YES and count < LEAST_FOR_YES:
        words += f"; {count} held-out episodes are too few to tell ({LEAST_FOR_YES} are needed)"
    return answer, f"{words} (it {metrics['readout_notes']['columns']}; R2 on held-out episodes {scores})"


def _describe_horizon(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Steps are tested in order and the count ends at the first that fails, which keeps the error rate of one test."""
    settings, count = metrics["settings"], metrics["num_episodes"]
    title, both = "sees ahead", "both copying the last step and the training mean"
    reached, answer = 0, YES
    for step in range(1, settings["horizon"] + 1):
        gains = [find_gain(metrics, f"{name}_step{step}") for name in ("copy_last", "mean")]
        answers = {UNCLEAR if gain is None else judge(gain, count) for gain in gains}
        answer = next(known for known in (NO, UNCLEAR, YES) if known in answers)
        if answer != YES:
            break
        reached = step
    if not reached:
        few = f"; {count} held-out episodes are too few ({LEAST_FOR_YES} are needed)" if count < LEAST_FOR_YES else ""
        return answer, f"{title}: {answer}, it is not shown to beat {both} at the first open-loop step{few}"
    seconds = f"{reached / settings['step_hz']:.2g} s"
    end = "all that were measured" if reached == settings["horizon"] else f"of {settings['horizon']} measured"
    return YES, f"{title}: yes, it beats {both} for {reached} open-loop steps ({end}; {seconds})"


def list_limits(metrics: Mapping[str, Any]) -> list[str]:
    """What figures with `encoder_trained`, `comparable` and `num_episodes` cannot say, and distances where they were measured."""
    limits = []
    if not metrics["encoder_trained"]:
        limits.append(UNTRAINED)
    if not metrics["comparable"]:
        limits.append(f"{CLIP}, and an advantage of true actions may be seen in the tokens already")
    if metrics["num_episodes"] < LEAST_FOR_YES:
        limits.append(
            f"only {metrics['num_episodes']} held-out episodes: intervals over so few are too narrow, and no answer is yes; "
            "try another split.seed or add recordings"
        )
    distance = metrics.get("distance", {})
    if "num_dims_pooled" in distance and distance["num_vectors_pooled"] < FEW_VECTORS:
        limits.append(
            f"Fréchet distances of the mean tokens are of {distance['num_vectors_pooled']} vectors a half, so of {distance['num_dims_pooled']} "
            "components alone, and far too large: read them beside their floor and that of copying, never alone"
        )
    return limits
