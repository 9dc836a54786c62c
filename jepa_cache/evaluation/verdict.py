"""The verdict in words: what the figures of one evaluation say, and no more than they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jepa_cache.evaluation.figures import ALL_STEPS, gain_name, gap_name

MARGIN_PERCENT = 0.5
"""Gains below this are treated as no gain, even when significant."""

SIGNIFICANCE = 0.05
MIN_EPISODES = 6
"""With fewer no paired test can reach 0.05, so no answer is `yes`."""

YES, NO, UNCLEAR = "yes", "no", "unclear"
BASELINE_WORDS = {
    "copy_last": "copying the last step",
    "mean": "the training mean",
    "extrapolation": "a straight line through the last two steps",
    "regression": "a linear regression on actions and states",
}


class Gain(NamedTuple):
    """The model against one other prediction: per cent of the other's error, interval ends, p value, all over episodes."""

    percent: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return _sized(self.percent, "", self.low, self.high)


def _sized(percent: float, word: str, low: float, high: float) -> str:
    mean, first, last = (f"{round(value, 1) + 0.0:.1f}" for value in (percent, low, high))  # + 0.0: no -0.0
    return f"{mean} %{word} [{first}, {last}]"


def find_gain(metrics: Mapping[str, Any], name: str, step: int = ALL_STEPS) -> Gain | None:
    """The gain over a baseline or ablation, None where it was not measured.

    Args:
        metrics: As `figures.summarize` gives them.
        name: Of the other prediction.
        step: Open-loop step, or `ALL_STEPS` for one step ahead from true steps.
    """
    key = gain_name(name, step)
    if key not in metrics["val"]:
        return None
    return Gain(metrics["val"][key], *metrics["val_ci"][key], metrics["p_value"][gap_name(name, step)])


def judge(gain: Gain, num_episodes: int) -> str:
    """`yes`, `no` or `unclear`: is the gain above the margin?

    Yes, when the whole interval lies above the margin and the paired test says so; no, when the whole interval lies below
    it, which a tiny gain does and a loss; else unclear.
    """
    if gain.high < MARGIN_PERCENT:
        return NO
    if gain.low > MARGIN_PERCENT and num_episodes >= MIN_EPISODES and gain.p < SIGNIFICANCE:
        return YES
    return UNCLEAR


def explain(gain: Gain, num_episodes: int, better: str, other: str) -> str:
    """The answer with its reason.

    Args:
        gain: To be judged.
        num_episodes: Held-out ones.
        better: What is better if the gain is above 0, such as "true actions".
        other: What it is compared with.
    """
    answer = judge(gain, num_episodes)
    size = _sized(gain.percent, " lower", gain.low, gain.high)
    if round(gain.percent, 1) < 0:
        size = _sized(-gain.percent, " higher", -gain.high, -gain.low)
    told = f"{answer}, error of {better} {size} than that of {other}"
    if answer == YES:
        return f"{told} (p {gain.p:.2g})"
    if answer == NO:
        return told if gain.high < 0 else f"{told}: below {MARGIN_PERCENT} %, as good as none"
    if num_episodes < MIN_EPISODES:
        return f"{told}, but {num_episodes} held-out episodes are too few to tell ({MIN_EPISODES} are needed)"
    if gain.low > MARGIN_PERCENT:
        return f"{told}, but the paired test does not confirm it (p {gain.p:.2g})"
    return f"{told}: the interval reaches from below {MARGIN_PERCENT} % to above it"


def describe_verdict(metrics: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Answers to the questions that users ask: {question: {"answer": "yes|no|unclear", "words": a sentence}}.

    Each rests on one comparison that is named beforehand, so no correction for several tests is made:

    - `actions`: does the predictor need the true actions? Teacher forcing, against actions of another episode.
    - `actions_rollout`: the same at the last open-loop step.
    - `timing`: does it use those of the right step? Against the next and the previous ones, the nearer of the two.
    - `copying`: is it better than copying the last step?
    - `baselines`: is it better than the strongest of all baselines?
    - `horizon`: how many open-loop steps does it beat both copying and the training mean, counted from the first?
    - `limits`: what the figures cannot say; `none` or `some`.

    Args:
        metrics: As `figures.summarize` gives them, with `settings`.
    """
    count, last = metrics["num_episodes"], metrics["settings"]["horizon"]
    questions: dict[str, tuple[str, str]] = {}

    def ask(question: str, title: str, gain: Gain | None, better: str, other: str) -> None:
        if gain is None:
            questions[question] = (
                UNCLEAR,
                f"{title}: unclear, fewer than two episodes hold a window to measure it on (another step's actions need a step beside the "
                "window); raise evaluate.windows_per_episode, or add recordings",
            )
        else:
            questions[question] = judge(gain, count), f"{title}: {explain(gain, count, better, other)}"

    shuffled = "another episode's"
    ask("actions", "uses its actions", find_gain(metrics, "shuffled_actions"), "true actions", shuffled)
    ask(
        "actions_rollout",
        f"uses its actions in open loop, step {last}",
        find_gain(metrics, "shuffled_actions", last),
        "true actions",
        shuffled,
    )
    shifts = {"the next step's": find_gain(metrics, "next_actions"), "the previous step's": None}
    shifts["the previous step's"] = find_gain(metrics, "previous_actions")
    nearer = min((name for name in shifts if shifts[name]), key=lambda name: shifts[name].percent, default=None)
    ask("timing", "uses those of the right step", shifts.get(nearer), "true actions", str(nearer))
    ask("copying", "better than copying", find_gain(metrics, "copy_last"), "the predictor", BASELINE_WORDS["copy_last"])
    gains = {name: gain for name in BASELINE_WORDS if (gain := find_gain(metrics, name))}
    strongest = min(gains, key=lambda name: gains[name].percent)
    ask("baselines", "better than every baseline", gains[strongest], "the predictor", BASELINE_WORDS[strongest])
    questions["horizon"] = _describe_horizon(metrics)
    relative = "" if metrics["encoder_trained"] else " (relative: the encoder is untrained)"
    verdict = {name: {"answer": answer, "words": words + relative} for name, (answer, words) in questions.items()}
    return verdict | {"limits": _describe_limits(metrics)}


def _describe_horizon(metrics: Mapping[str, Any]) -> tuple[str, str]:
    """Steps are tested in order and the count ends at the first that fails, which keeps the error rate of one test."""
    settings, count = metrics["settings"], metrics["num_episodes"]
    title, both = "sees ahead", "both copying the last step and the training mean"
    reached, answer = 0, YES
    for step in range(1, settings["horizon"] + 1):
        gains = [find_gain(metrics, name, step) for name in ("copy_last", "mean")]
        answers = {judge(gain, count) for gain in gains if gain is not None}
        answer = NO if NO in answers else UNCLEAR if UNCLEAR in answers or None in gains else YES
        if answer != YES:
            break
        reached = step
    if not reached:
        few = f"; {count} held-out episodes are too few ({MIN_EPISODES} are needed)" if count < MIN_EPISODES else ""
        reason = f"it is not shown to beat {both} at the first open-loop step{few}"
        return answer, f"{title}: {answer}, {reason}"
    seconds = f"{reached / settings['step_hz']:.2g} s"
    end = "all that were measured" if reached == settings["horizon"] else f"of {settings['horizon']} measured"
    return YES, f"{title}: yes, it beats {both} for {reached} open-loop steps ({end}; {seconds})"


def _describe_limits(metrics: Mapping[str, Any]) -> dict[str, str]:
    limits = []
    if not metrics["encoder_trained"]:
        limits.append(
            "the encoder has random weights, so these figures show that the path works, nothing about the world"
        )
    if not metrics["comparable"]:
        limits.append(
            "clip mode: early steps have seen later frames, so figures are not comparable with frame or tubelet mode, and "
            "an advantage of true actions may be seen in the tokens already"
        )
    if metrics["num_episodes"] < MIN_EPISODES:
        limits.append(
            f"only {metrics['num_episodes']} held-out episodes: intervals over so few are too narrow, and no answer is yes; "
            "raise split.val_share or add recordings"
        )
    return {
        "answer": "some" if limits else "none",
        "words": "limits: " + ("; ".join(limits) or "none that this report knows"),
    }
