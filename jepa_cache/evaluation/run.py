"""What the errors of held-out windows say: figures with intervals and tests for metrics.json, and tables against the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jepa_cache.config.schema import Config, EvaluateConfig
from jepa_cache.data.ablations import SHUFFLED, ZERO
from jepa_cache.data.cache import CachedDataset
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
