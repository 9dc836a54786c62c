"""What the errors of held-out windows say: figures with intervals and tests for metrics.json, tables against the step, and slices."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import zero_actions
from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.data.ablations import SHUFFLED, ZERO, positions_of
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.metrics import MEASURES, bootstrap_mean, episode_means, paired_p_value
from jepa_cache.evaluation.verdict import OTHERS
from jepa_cache.evaluation.windows import COPY_LAST, MEAN, MODEL, PREDICTIONS, READOUT, WindowErrors, mean_of_steps

RATIOS = (COPY_LAST, SHUFFLED, ZERO)
EVERY_STEP = (COPY_LAST, MEAN, SHUFFLED)  # whose gain is given at each open-loop step, not at the last one alone
TEACHER_FORCING, OPEN_LOOP = "teacher_forcing", "open_loop"
GAP, GAIN, RATIO = "gap_l1", "gain_percent", "ratio_l1"
ALL_STEPS = 0

Row = dict[str, str | int | float | None]


class Figure(NamedTuple):
    """One row of the long table that metrics.json, the step tables, the curves and the verdict are made from.

    The measure is of `metrics.MEASURES`; or, against the model: GAP, the L1 of this prediction less the model's, per episode and over
    the windows and steps that both exist for (above 0 the model is better); GAIN, the gap in per cent of that L1; RATIO.
    """

    prediction: str  # of `windows.PREDICTIONS`
    mode: str  # `TEACHER_FORCING` or `OPEN_LOOP`
    step: int  # from 1; `ALL_STEPS` for the mean over the steps
    measure: str
    mean: float | None  # over episodes; None where fewer than two episodes have it
    low: float | None  # ends of the 95 % interval
    high: float | None
    p: float | None = None  # of the paired test, for gaps and gains


def flat_name(figure: Figure) -> str | None:
    """The name of a figure in metrics.json; None for those that stand in the step tables alone."""
    prediction, mode, step, measure = figure[:4]
    at = f"_step{step}" if step else ""
    against = {GAP: f"gap_{prediction}{at}", GAIN: f"gain_{prediction}{at}_percent", RATIO: f"ratio_{prediction}"}
    if measure in against:
        return against[measure]
    if step and (mode == TEACHER_FORCING or prediction != MODEL):
        return None
    if prediction == MODEL:
        return f"{'rollout' if mode == OPEN_LOOP else mode}_{measure}{at}"
    return f"rollout_{prediction}_{measure}" if mode == OPEN_LOOP else f"{prediction}_{measure}"


def build_figures(errors: WindowErrors, settings: EvaluateConfig) -> list[Figure]:
    """Compute the long table: means over episodes with 95 % intervals, and gaps, gains and paired tests against the model."""
    resampling = {"num_resamples": settings.num_bootstrap, "seed": settings.seed}
    figures: list[Figure] = []

    def per_episode(of_windows: np.ndarray) -> np.ndarray:
        values = episode_means(of_windows, errors.episodes)
        return values[np.isfinite(values)]

    def put(prediction: str, mode: str, step: int, measure: str, of_windows: np.ndarray) -> None:
        values = per_episode(of_windows)
        estimate = bootstrap_mean(values, **resampling) if len(values) >= 2 else (None, None, None)
        figures.append(Figure(prediction, mode, step, measure, *estimate))

    def compare(prediction: str, mode: str, step: int, other: np.ndarray, model: np.ndarray) -> None:
        gaps = per_episode(mean_of_steps(other - model))
        if len(gaps) < 2:
            return
        gain = bootstrap_mean(gaps, per_episode(mean_of_steps(other)), **resampling)
        p = paired_p_value(gaps, seed=settings.seed)
        figures.append(Figure(prediction, mode, step, GAP, *bootstrap_mean(gaps, **resampling), p))
        figures.append(Figure(prediction, mode, step, GAIN, *(100 * value for value in gain), p))
        if prediction in RATIOS and step == ALL_STEPS:
            figures.append(Figure(prediction, mode, step, RATIO, 1 - gain.mean, None, None))

    for mode, by_measure in ((TEACHER_FORCING, errors.teacher_forced), (OPEN_LOOP, errors.open_loop)):
        for measure in MEASURES:
            by_prediction = by_measure.get(measure, {})
            for name, values in by_prediction.items():
                if not np.isfinite(values).any():
                    continue
                if name == MODEL or measure == "l1":
                    put(name, mode, ALL_STEPS, measure, mean_of_steps(values))
                for step in range(values.shape[1]) if mode == OPEN_LOOP or measure == "l1" else ():
                    put(name, mode, step + 1, measure, values[:, step])
    one_step, rolled = errors.teacher_forced["l1"], errors.open_loop["l1"]
    for name in PREDICTIONS[1:]:
        compare(name, TEACHER_FORCING, ALL_STEPS, one_step[name], one_step[MODEL])
        for step in range(settings.horizon):
            if name in EVERY_STEP or step + 1 == settings.horizon:
                at = slice(step, step + 1)
                compare(name, OPEN_LOOP, step + 1, rolled[name][:, at], rolled[MODEL][:, at])
    return figures


def measure_above(errors: WindowErrors, settings: EvaluateConfig) -> tuple[dict[str, dict[str, Any]], list[Row]]:
    """By how many per cent the error one step ahead of each in `OTHERS` lies above that with the true actions: of tokens (L1), and read out (squared).

    Returns:
        Sections of metrics.json: `above`, `above_ci`, `above_p` and `above_episodes` (in how many, of how many); and the rows of above.csv,
        None where not measured.
    """
    sections: dict[str, dict[str, Any]] = {f"above{end}": {} for end in ("", "_ci", "_p", "_episodes")}
    rows: list[Row] = []
    for name, words in OTHERS.items():
        rows.append({"against": words})
        for through, measure in (("tokens", "l1"), (READOUT, READOUT)):
            column, episodes = f"{through}_percent", f"{through}_episodes_above"
            rows[-1] |= dict.fromkeys((column, f"{column}_low", f"{column}_high", episodes))
            if measure not in errors.teacher_forced:
                continue
            other, true = (errors.teacher_forced[measure][which] for which in (name, MODEL))
            per_episode = (episode_means(mean_of_steps(values), errors.episodes) for values in (other - true, true))
            gaps, wholes = (values[np.isfinite(values)] for values in per_episode)
            if len(gaps) < 2 or not wholes.mean() > 0:
                continue
            resampling = {"num_resamples": settings.num_bootstrap, "seed": settings.seed}
            percent, low, high = (100 * value for value in bootstrap_mean(gaps, wholes, **resampling))
            num_above = int((gaps > 0).sum())
            rows[-1] |= {column: percent, f"{column}_low": low, f"{column}_high": high}
            rows[-1][episodes] = f"{num_above} of {len(gaps)}"
            found = percent, [low, high], paired_p_value(gaps, seed=settings.seed), [num_above, len(gaps)]
            for section, value in zip(sections.values(), found, strict=True):
                section[f"{through}_{name}_percent"] = value
    return sections, rows


def summarize(figures: Sequence[Figure], errors: WindowErrors, dataset: CachedDataset) -> dict[str, Any]:
    """The content of metrics.json: flat names to means (`val`), 95 % intervals (`val_ci`) and p values of the gaps (`p_value`)."""
    named = {name: figure for figure in figures if figure.mean is not None and (name := flat_name(figure))}
    return {
        "encoder_trained": dataset.manifest.encoder_trained,
        "comparable": dataset.manifest.comparable,
        "mode": dataset.manifest.mode,
        "num_episodes": len(set(errors.episodes)),
        "num_windows": len(errors.episodes),
        "num_fitted_steps": errors.num_fitted_steps,
        "val": {name: figure.mean for name, figure in named.items()},
        "val_ci": {name: [figure.low, figure.high] for name, figure in named.items() if figure.low is not None},
        "p_value": {name: figure.p for name, figure in named.items() if figure.measure == GAP},
    }


def step_table(figures: Sequence[Figure], mode: str, *, first_column: str = "horizon") -> list[dict[str, float | None]]:
    """L1: one row per step with the columns `<prediction>`, `<prediction>_low`, `<prediction>_high`.

    The step of teacher forcing is the number of true steps seen before the predicted one.
    """
    rows: dict[int, dict[str, float | None]] = {}
    for figure in figures:
        if (figure.mode, figure.measure) == (mode, "l1") and figure.step != ALL_STEPS:
            row = rows.setdefault(figure.step, {first_column: figure.step})
            name = figure.prediction
            row |= {name: figure.mean, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return list(rows.values())


NUM_WORST = 10
THIRDS = ("low", "middle", "high")


def describe_windows(evaluation: EvaluationContext, errors: WindowErrors) -> list[dict[str, Any]]:
    """What is known of each measured window beside its errors.

    `gui` says whether a screen was open at any step, `first_step` counts from the first cached one of the episode in this view,
    `action_size` is the mean absolute scaled distance of the actions from doing nothing.
    """
    dataset, scale = evaluation.dataset, evaluation.scaler.actions.apply
    parts = [part for part, _ in dataset.manifest.stores]
    first_rows, facts = first_cached_rows(dataset.segments), []

    @functools.cache
    def recorded(store: int) -> tuple[np.ndarray, np.ndarray, Mapping[str, float]]:
        steps = dataset.steps(store)
        gui, frames = (steps.column(name).to_numpy(zero_copy_only=False) for name in ("gui", "frame"))
        return gui, frames, dataset.step_hz[store]

    for window, episode in zip(errors.chosen.windows, errors.episodes, strict=True):
        rows, part = window.rows(errors.chosen.index.num_steps), parts[window.store]
        gui, frames, rates = recorded(window.store)
        actions = dataset.controls(window.store, window.step_length)[0][rows][:-1]
        spacing = np.median(np.diff(frames[rows])) / window.step_length
        facts.append(
            {
                "episode": episode,
                "dataset": part.dataset,
                "camera": part.camera or "",
                "phase": str(part.phase),
                "gui": "open" if gui[rows].any() else "closed",
                "first_step": window.start - first_rows[window.store, episode],
                # Steps of a segment are evenly spaced frames, `rate` of them a second: time = frame number / spacing / rate.
                "start_s": float(frames[window.start] / spacing / rates[episode]),
                "action_size": np.abs(scale(actions) - scale(zero_actions(actions, dataset.space))).mean(),
            }
        )
    return facts


def slice_table(facts: Sequence[dict[str, Any]], errors: WindowErrors, settings: EvaluateConfig) -> list[Row]:
    """One row per value of every slice that has several: teacher-forced L1 and the gap to shuffled actions.

    Token motion is the error of copying the last step. Interval ends are None where a row has fewer than two episodes.
    """
    one_step = errors.one_step
    figures = {"l1": one_step[MODEL], "gap_shuffled": one_step[SHUFFLED] - one_step[MODEL]}
    slices = {name: [fact[name] for fact in facts] for name in ("episode", "dataset", "camera", "phase", "gui")}
    sizes = np.array([fact["action_size"] for fact in facts])
    for name, values in (("token_motion", one_step[COPY_LAST]), ("action_size", sizes)):
        # By rank; equal values fall together, so a constant is one slice.
        slices[name] = [THIRDS[third] for third in np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)]
    rows: list[Row] = []
    for name, values in slices.items():
        positions = positions_of(values)
        # In the order of their size; where values repeat, a third may be empty.
        known = [third for third in THIRDS if third in positions] or sorted(positions)
        for value in known if len(known) > 1 else ():
            chosen = positions[value]
            episodes = [facts[position]["episode"] for position in chosen]
            row: Row = {"slice": name, "value": value, "num_windows": len(episodes), "num_episodes": len(set(episodes))}
            for figure, of_windows in figures.items():
                means = episode_means(of_windows[chosen], episodes)
                mean, low, high = float(means.mean()), None, None
                if len(means) > 1:
                    mean, low, high = bootstrap_mean(means, num_resamples=settings.num_bootstrap, seed=settings.seed)
                row |= {figure: mean, f"{figure}_low": low, f"{figure}_high": high}
            rows.append(row)
    return rows


def worst_table(facts: Sequence[dict[str, Any]], errors: WindowErrors) -> list[Row]:
    """The ten windows with the largest teacher-forced L1, the worst first, so that one can look at them."""
    model, copied = errors.one_step[MODEL], errors.one_step[COPY_LAST]
    return [
        {"rank": rank, **{name: facts[place][name] for name in ("episode", "first_step")}}
        | {"start_s": round(facts[place]["start_s"], 3), "camera": facts[place]["camera"]}
        | {"l1": float(model[place]), "copy_last_l1": float(copied[place])}
        for rank, place in enumerate(np.argsort(-model, kind="stable")[:NUM_WORST], start=1)
    ]
