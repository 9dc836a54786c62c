"""What the errors of held-out windows say: figures with intervals and tests for metrics.json, tables against the step, and slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.actions import zero_actions
from jepa_cache.config.schema import Config, EvaluateConfig
from jepa_cache.data.ablations import SHUFFLED, ZERO, positions_of
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.metrics import Estimate, bootstrap_mean, bootstrap_ratio, episode_means, paired_p_value
from jepa_cache.evaluation.windows import COPY_LAST, MEAN, MODEL, PREDICTIONS, WindowErrors, mean_of_steps

RATIOS = (COPY_LAST, SHUFFLED, ZERO)
EVERY_STEP = (COPY_LAST, MEAN, SHUFFLED)  # whose gain is given at each open-loop step, not at the last one alone


def summarize(errors: WindowErrors, config: Config, dataset: CachedDataset) -> dict[str, Any]:
    """The content of metrics.json: means over episodes, 95 % intervals over episodes beside them, and paired tests.

    A gap is the error of a baseline or control minus the model's, per episode and over the windows and steps that both
    exist for: above 0 the model is better. A gain is the gap in per cent of that error. What fewer than two episodes have is
    left out.
    """
    return {
        "encoder_trained": dataset.manifest.encoder_trained,
        "comparable": dataset.manifest.comparable,
        "mode": dataset.manifest.mode,
        "num_episodes": len(set(errors.episodes)),
        "num_windows": len(errors.episodes),
        "num_fitted_steps": errors.num_fitted_steps,
        **Figures(errors, config.evaluate).sections(),
    }


class Figures:
    """Collects the figures of one evaluation: sections `val`, `val_ci` and `p_value`."""

    def __init__(self, errors: WindowErrors, settings: EvaluateConfig) -> None:
        """Work everything out."""
        self._episodes, self._settings = errors.episodes, settings
        self._estimates: dict[str, Estimate] = {}
        self._ratios: dict[str, float] = {}
        self._p_values: dict[str, float] = {}
        for measure, of in errors.teacher_forced.items():
            self._add_mean(f"teacher_forcing_{measure}", mean_of_steps(of[MODEL]))
        for measure, of in errors.open_loop.items():
            self._add_mean(f"rollout_{measure}", of[MODEL].mean(axis=1))
            for step in range(settings.horizon):
                self._add_mean(f"rollout_{measure}_step{step + 1}", of[MODEL][:, step])
        for name in PREDICTIONS[1:]:
            one_step, horizon = errors.teacher_forced["l1"], errors.open_loop["l1"]
            self._add_mean(f"{name}_l1", mean_of_steps(one_step[name]))
            self._add_mean(f"rollout_{name}_l1", mean_of_steps(horizon[name]))
            self._compare(name, "", one_step[name], one_step[MODEL])
            for step in range(settings.horizon):
                if name in EVERY_STEP or step + 1 == settings.horizon:
                    at = slice(step, step + 1)
                    self._compare(name, f"_step{step + 1}", horizon[name][:, at], horizon[MODEL][:, at])

    def sections(self) -> dict[str, dict[str, Any]]:
        """Numbers, interval ends and p values by name."""
        return {
            "val": {name: value.mean for name, value in self._estimates.items()} | self._ratios,
            "val_ci": {name: [value.low, value.high] for name, value in self._estimates.items()},
            "p_value": self._p_values,
        }

    def _add_mean(self, name: str, per_window: np.ndarray) -> None:
        values = self._per_episode(per_window)
        if len(values) >= 2:
            self._estimates[name] = bootstrap_mean(values, **self._resampling)

    def _compare(self, name: str, where: str, other: np.ndarray, model: np.ndarray) -> None:
        """Compare errors [windows, steps] with the model's, on the windows and steps that both exist for."""
        gaps = self._per_episode(mean_of_steps(other - model))
        if len(gaps) < 2:
            return
        errors = self._per_episode(mean_of_steps(np.where(np.isfinite(model), other, np.nan)))
        self._estimates[f"gap_{name}{where}"] = bootstrap_mean(gaps, **self._resampling)
        gain = bootstrap_ratio(gaps, errors, **self._resampling)
        self._estimates[f"gain_{name}{where}_percent"] = Estimate(*(100 * value for value in gain))
        self._p_values[f"gap_{name}{where}"] = paired_p_value(gaps, seed=self._settings.seed)
        if name in RATIOS and not where:
            self._ratios[f"ratio_{name}"] = 1 - gain.mean

    def _per_episode(self, per_window: np.ndarray) -> np.ndarray:
        values = episode_means(per_window, self._episodes)
        return values[np.isfinite(values)]

    @property
    def _resampling(self) -> dict[str, int]:
        return {"num_resamples": self._settings.num_bootstrap, "seed": self._settings.seed}


def step_table(
    values: Mapping[str, np.ndarray], episodes: list[str], settings: EvaluateConfig, *, first_column: str
) -> list[dict[str, float]]:
    """One row per step: the mean over episodes of every prediction and its interval ends.

    Args:
        values: Prediction to [windows, steps]; NaN where it does not exist.
        episodes: Of the windows.
        settings: Of the resampling.
        first_column: Name of the step's number, from 1.

    Returns:
        Rows with the columns `<prediction>`, `<prediction>_low`, `<prediction>_high`; a prediction that no step has is left
        out, and where fewer than two episodes have it its cells are None.
    """
    steps = next(iter(values.values())).shape[1]
    rows: list[dict[str, float]] = [{first_column: step + 1} for step in range(steps)]
    for name, of in values.items():
        if not np.isfinite(of).any():
            continue
        for step, row in enumerate(rows):
            per_episode = episode_means(of[:, step], episodes)
            per_episode = per_episode[np.isfinite(per_episode)]
            estimate: tuple = (None, None, None)
            if len(per_episode) >= 2:
                estimate = bootstrap_mean(per_episode, num_resamples=settings.num_bootstrap, seed=settings.seed)
            row.update(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
    return rows


def horizon_table(errors: WindowErrors, config: Config, measure: str = "l1") -> list[dict[str, float]]:
    """One row per open-loop step, see `step_table`."""
    return step_table(errors.open_loop[measure], errors.episodes, config.evaluate, first_column="horizon")


def position_table(errors: WindowErrors, config: Config) -> list[dict[str, float]]:
    """One row per teacher-forced position, that is, true steps seen before the predicted one; L1, see `step_table`."""
    return step_table(errors.teacher_forced["l1"], errors.episodes, config.evaluate, first_column="num_seen")


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
