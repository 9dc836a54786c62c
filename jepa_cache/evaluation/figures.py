"""What the errors of held-out windows say: figures with intervals and tests for metrics.json, tables against the step, and slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import zero_actions
from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.data.ablations import SHUFFLED, ZERO, positions_of
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.metrics import bootstrap_mean, bootstrap_ratio, episode_means, paired_p_value
from jepa_cache.evaluation.windows import COPY_LAST, MEAN, MODEL, PREDICTIONS, WindowErrors, mean_of_steps

RATIOS = (COPY_LAST, SHUFFLED, ZERO)
EVERY_STEP = (COPY_LAST, MEAN, SHUFFLED)  # whose gain is given at each open-loop step, not at the last one alone
TEACHER_FORCING, OPEN_LOOP = "teacher_forcing", "open_loop"
GAP, GAIN, RATIO = "gap_l1", "gain_percent", "ratio_l1"
ALL_STEPS = 0


class Figure(NamedTuple):
    """One row of the long table that metrics.json, the step tables, the curves and the verdict are made from.

    Attributes:
        prediction: Of `windows.PREDICTIONS`.
        mode: `TEACHER_FORCING` or `OPEN_LOOP`.
        step: From 1; `ALL_STEPS` for the mean over the steps.
        measure: Of `metrics.MEASURES`; or, against the model: GAP, the L1 of this prediction less the model's, per episode and over
            the windows and steps that both exist for (above 0 the model is better); GAIN, the gap in per cent of that L1; RATIO.
        mean: Over episodes; None where fewer than two episodes have it.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Of the paired test, for gaps and gains.
    """

    prediction: str
    mode: str
    step: int
    measure: str
    mean: float | None
    low: float | None
    high: float | None
    p: float | None = None


def gap_name(prediction: str, step: int = ALL_STEPS) -> str:
    """The name in metrics.json of a gap: one step ahead from true steps, or at an open-loop step."""
    return f"gap_{prediction}_step{step}" if step else f"gap_{prediction}"


def gain_name(prediction: str, step: int = ALL_STEPS) -> str:
    """The name in metrics.json of a gain, as `gap_name`."""
    return f"gain_{prediction}_step{step}_percent" if step else f"gain_{prediction}_percent"


def flat_name(figure: Figure) -> str | None:
    """The name of a figure in metrics.json; None for those that stand in the step tables alone."""
    prediction, mode, step, measure = figure[:4]
    if measure == GAP:
        return gap_name(prediction, step)
    if measure == GAIN:
        return gain_name(prediction, step)
    if measure == RATIO:
        return f"ratio_{prediction}"
    if step and (mode == TEACHER_FORCING or prediction != MODEL):
        return None
    if prediction == MODEL:
        name = f"rollout_{measure}" if mode == OPEN_LOOP else f"teacher_forcing_{measure}"
        return f"{name}_step{step}" if step else name
    return f"rollout_{prediction}_{measure}" if mode == OPEN_LOOP else f"{prediction}_{measure}"


def build_figures(errors: WindowErrors, settings: EvaluateConfig) -> list[Figure]:
    """Work out the long table: means over episodes with 95 % intervals, and gaps, gains and paired tests against the model."""
    resampling = {"num_resamples": settings.num_bootstrap, "seed": settings.seed}
    figures: list[Figure] = []

    def per_episode(per_window: np.ndarray) -> np.ndarray:
        values = episode_means(per_window, errors.episodes)
        return values[np.isfinite(values)]

    def put(prediction: str, mode: str, step: int, measure: str, per_window: np.ndarray) -> None:
        values = per_episode(per_window)
        estimate = bootstrap_mean(values, **resampling) if len(values) >= 2 else (None, None, None)
        figures.append(Figure(prediction, mode, step, measure, *estimate))

    def compare(prediction: str, mode: str, step: int, other: np.ndarray, model: np.ndarray) -> None:
        gaps = per_episode(mean_of_steps(other - model))
        if len(gaps) < 2:
            return
        whole = per_episode(mean_of_steps(np.where(np.isfinite(model), other, np.nan)))
        gain, p = bootstrap_ratio(gaps, whole, **resampling), paired_p_value(gaps, seed=settings.seed)
        figures.append(Figure(prediction, mode, step, GAP, *bootstrap_mean(gaps, **resampling), p))
        figures.append(Figure(prediction, mode, step, GAIN, *(100 * value for value in gain), p))
        if prediction in RATIOS and step == ALL_STEPS:
            figures.append(Figure(prediction, mode, step, RATIO, 1 - gain.mean, None, None))

    for mode, by_measure in ((TEACHER_FORCING, errors.teacher_forced), (OPEN_LOOP, errors.open_loop)):
        for measure, by_prediction in by_measure.items():
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


def step_table(
    figures: Sequence[Figure], mode: str, measure: str = "l1", *, first_column: str = "horizon"
) -> list[dict[str, float | None]]:
    """One row per step with the columns `<prediction>`, `<prediction>_low`, `<prediction>_high`.

    Args:
        figures: The long table.
        mode: `OPEN_LOOP`, or `TEACHER_FORCING`, whose step is the number of true steps seen before the predicted one.
        measure: Of `metrics.MEASURES`.
        first_column: Name of the step's number, from 1.
    """
    rows: dict[int, dict[str, float | None]] = {}
    for figure in figures:
        if (figure.mode, figure.measure) == (mode, measure) and figure.step != ALL_STEPS:
            row = rows.setdefault(figure.step, {first_column: figure.step})
            name = figure.prediction
            row |= {name: figure.mean, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return list(rows.values())


NUM_WORST = 10
THIRDS = ("low", "middle", "high")

Row = dict[str, str | int | float | None]


class WindowFacts(NamedTuple):
    """What is known of each held-out window, beside its errors: [windows] each.

    Attributes:
        episode: Key.
        dataset: Preset that it is of.
        camera: Name, "" where the source has one view.
        phase: First sampled frame of its recording.
        gui: Whether a screen was open at any of its steps.
        first_step: Its first step, counted from the first cached one of the episode in this view.
        start_s: Time of that step in the recording.
        action_size: Mean absolute scaled distance of its actions from doing nothing.
    """

    episode: list[str]
    dataset: list[str]
    camera: list[str]
    phase: list[int]
    gui: np.ndarray
    first_step: list[int]
    start_s: list[float]
    action_size: np.ndarray


def describe_windows(evaluation: EvaluationContext, errors: WindowErrors) -> WindowFacts:
    """Gather what slices and names of the measured windows are made of."""
    dataset, scale = evaluation.dataset, evaluation.scaler.actions.apply
    num_steps = errors.chosen.index.num_steps
    parts = [part for part, _ in dataset.manifest.stores]
    first_rows = first_cached_rows(dataset.segments)
    windows = errors.chosen.windows
    tables = {store: dataset.steps(store) for store in {window.store for window in windows}}
    gui = {store: table.column("gui").to_numpy(zero_copy_only=False) for store, table in tables.items()}
    rates = {store: dataset.step_hz(store) for store in tables}
    frames = {store: table.column("frame").to_numpy() for store, table in tables.items()}
    facts = WindowFacts(errors.episodes, [], [], [], np.zeros(len(windows), bool), [], [], np.zeros(len(windows)))
    for place, (window, episode) in enumerate(zip(windows, errors.episodes, strict=True)):
        rows, part = slice(window.start, window.start + num_steps), parts[window.store]
        actions = dataset.controls(window.store)[0][rows][:-1]
        facts.dataset.append(part.dataset)
        facts.camera.append(part.camera or "")
        facts.phase.append(part.phase)
        facts.gui[place] = gui[window.store][rows].any()
        facts.first_step.append(window.start - first_rows[window.store, episode])
        # The steps of a segment are evenly spaced frames, `rate` of them a second, so frame number / spacing / rate is the time.
        shown = frames[window.store][rows]
        facts.start_s.append(float(shown[0] / np.median(np.diff(shown)) / rates[window.store][episode]))
        facts.action_size[place] = np.abs(scale(actions) - scale(zero_actions(actions, dataset.space))).mean()
    return facts


def slice_table(facts: WindowFacts, errors: WindowErrors, settings: EvaluateConfig) -> list[Row]:
    """One row per value of every slice that has several: teacher-forced L1 and the gap to shuffled actions.

    Slices: episode, dataset, camera, phase, gui, and thirds of the windows by how much their tokens change (error of copying
    the last step) and by the size of their actions. Interval ends are None where a row has fewer than two episodes.
    """
    model, gap = errors.one_step[MODEL], errors.one_step[SHUFFLED] - errors.one_step[MODEL]
    slices: dict[str, list[str]] = {
        "episode": facts.episode,
        "dataset": facts.dataset,
        "camera": facts.camera,
        "phase": [str(phase) for phase in facts.phase],
        "gui": ["open" if is_open else "closed" for is_open in facts.gui],
        "token_motion": _thirds(errors.one_step[COPY_LAST]),
        "action_size": _thirds(facts.action_size),
    }
    rows: list[Row] = []
    for name, values in slices.items():
        positions = positions_of(values)
        # In the order of their size; where values repeat, a third may be empty.
        known = [third for third in THIRDS if third in positions] or sorted(positions)
        for value in known if len(known) > 1 else ():
            chosen = positions[value]
            episodes = [facts.episode[position] for position in chosen]
            row: Row = {"slice": name, "value": value, "num_windows": len(episodes), "num_episodes": len(set(episodes))}
            rows.append(
                row
                | _estimate("l1", model[chosen], episodes, settings)
                | _estimate("gap_shuffled", gap[chosen], episodes, settings)
            )
    return rows


def _thirds(values: np.ndarray) -> list[str]:
    """Each window's third by rank; equal values fall together, so a constant is one slice."""
    ends = np.quantile(values, [1 / 3, 2 / 3])
    return [THIRDS[int(np.searchsorted(ends, value))] for value in values]


def _estimate(
    name: str, values: np.ndarray, episodes: list[str], settings: EvaluateConfig
) -> Mapping[str, float | None]:
    means = episode_means(values, episodes)
    if len(means) < 2:
        return {name: float(means.mean()), f"{name}_low": None, f"{name}_high": None}
    estimate = bootstrap_mean(means, num_resamples=settings.num_bootstrap, seed=settings.seed)
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def worst_table(facts: WindowFacts, errors: WindowErrors) -> list[Row]:
    """The ten windows with the largest teacher-forced L1, the worst first, so that one can look at them."""
    model, copied = errors.one_step[MODEL], errors.one_step[COPY_LAST]
    return [
        {
            "rank": rank + 1,
            "episode": facts.episode[place],
            "first_step": facts.first_step[place],
            "start_s": round(facts.start_s[place], 3),
            "camera": facts.camera[place],
            "l1": float(model[place]),
            "copy_last_l1": float(copied[place]),
        }
        for rank, place in enumerate(np.argsort(-model, kind="stable")[:NUM_WORST])
    ]
