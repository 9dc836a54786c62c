"""Where the predictor is good and bad: errors by episode, camera, data set, open screen and motion, and the worst windows by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jepa_cache.actions import zero_actions
from jepa_cache.config.schema import EvaluateConfig
from jepa_cache.data.ablations import SHUFFLED, positions_of
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.metrics import bootstrap_mean, episode_means
from jepa_cache.evaluation.windows import COPY_LAST, MODEL, WindowErrors

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
