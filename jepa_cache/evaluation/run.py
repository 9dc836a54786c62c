"""Evaluation as a whole: held-out windows through the predictor, errors per episode, metrics with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.actions import zero_actions
from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config, EvaluateConfig
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.loader import Batch, WindowLoader, to_device
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex, spread_windows
from jepa_cache.evaluation.baselines import choose_donors, training_mean
from jepa_cache.evaluation.metrics import bootstrap_mean, cosine_similarity, episode_means, l1_error
from jepa_cache.evaluation.subject import Subject
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import as_reps, open_loop, teacher_forcing

MODEL, COPY_LAST, MEAN, SHUFFLED, ZERO = "model", "copy_last", "mean", "shuffled_actions", "zero_actions"
PREDICTIONS = (MODEL, COPY_LAST, MEAN, SHUFFLED, ZERO)
CONTROLS = (COPY_LAST, SHUFFLED, ZERO)


@dataclass(frozen=True)
class WindowErrors:
    """Errors of every held-out window.

    Attributes:
        episodes: Key of each window's episode.
        one_step: Prediction name to [windows], teacher-forced L1 over the window.
        horizon: Prediction name to [windows, K], open-loop L1.
        cosine: "one_step" to [windows] and "horizon" to [windows, K], of the model.
        index: Windows by number.
        numbers: Window numbers in the index.
    """

    episodes: list[str]
    one_step: dict[str, np.ndarray]
    horizon: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]
    index: WindowIndex
    numbers: list[int]


@torch.no_grad()
def measure_windows(subject: Subject) -> WindowErrors:
    """Run the predictor and all controls over windows spread evenly over the held-out episodes.

    In open loop the recorded states of the predicted steps are given, as in the training rollout; only tokens are fed
    back. The controls differ from the model in their actions alone. Teacher forcing is measured over as many steps as a
    training window has, from the start of each window.

    Raises:
        ValueError: When fewer than two episodes with a long enough segment are held out.
    """
    config, dataset, scaler = subject.config, subject.dataset, subject.scaler
    normalize_reps, window_steps = subject.normalize_reps, subject.window_steps
    torch.set_num_threads(default_num_threads())
    settings, device = config.evaluate, subject.device
    num_steps = max(window_steps, settings.num_context_steps + settings.horizon)
    index = WindowIndex(subject.held_out_segments(), num_steps)
    numbers = spread_windows(index, settings.windows_per_episode)
    episodes = [index.segments[index[number].segment].episode for number in numbers]
    donors = choose_donors(episodes, seed=settings.seed)
    mean = training_mean(
        dataset, subject.training_segments(), scaler, num_steps=num_steps, normalize_reps=normalize_reps
    ).to(device)
    loader = WindowLoader(dataset, index, scaler)
    parts: dict[str, list[np.ndarray]] = {}
    starts = range(0, len(numbers), settings.batch_size)
    chunks = [numbers[start : start + settings.batch_size] for start in starts]
    batches = tqdm(loader.iterate(chunks), total=len(chunks), desc="evaluating", unit="batch", dynamic_ncols=True)
    for start, batch in zip(starts, batches, strict=True):
        given = [numbers[donor] for donor in donors[start : start + len(batch.numbers)]]
        actions = {
            MODEL: batch.actions,
            SHUFFLED: loader.read(given).actions,
            ZERO: _zero_actions(dataset, scaler, index, batch),
        }
        h = as_reps(to_device(batch, device).tokens, normalize_reps)
        on_device = {name: given.to(device) for name, given in actions.items()}
        errors = _batch_errors(
            subject.predictor, h, on_device, batch.states.to(device), mean, settings, window_steps, normalize_reps
        )
        for name, values in errors.items():
            parts.setdefault(name, []).append(values.cpu().numpy())
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return WindowErrors(
        episodes=episodes,
        one_step={name: joined[f"one_step/{name}"] for name in PREDICTIONS},
        horizon={name: joined[f"horizon/{name}"] for name in PREDICTIONS},
        cosine={name: joined[f"cosine/{name}"] for name in ("one_step", "horizon")},
        index=index,
        numbers=numbers,
    )


def _batch_errors(
    predictor: ACPredictor,
    h: Tensor,
    actions: Mapping[str, Tensor],
    states: Tensor,
    mean: Tensor,
    settings: EvaluateConfig,
    window_steps: int,
    normalize_reps: bool,
) -> dict[str, Tensor]:
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    target, future = h[:, 1:window_steps], h[:, context:stop]
    errors = {
        f"one_step/{COPY_LAST}": l1_error(h[:, : window_steps - 1], target).mean(dim=1),
        f"one_step/{MEAN}": l1_error(mean.expand_as(target), target).mean(dim=1),
        f"horizon/{COPY_LAST}": l1_error(h[:, context - 1 : context].expand_as(future), future),
        f"horizon/{MEAN}": l1_error(mean.expand_as(future), future),
    }
    for name, given in actions.items():
        one_step = teacher_forcing(
            predictor, h[:, :window_steps], given[:, : window_steps - 1], states, normalize_reps=normalize_reps
        )
        rolled = open_loop(
            predictor,
            h[:, :context],
            given[:, : stop - 1],
            states[:, : stop - 1],
            settings.horizon,
            normalize_reps=normalize_reps,
        )
        errors[f"one_step/{name}"] = l1_error(one_step, target).mean(dim=1)
        errors[f"horizon/{name}"] = l1_error(rolled, future)
        if name == MODEL:
            errors["cosine/one_step"] = cosine_similarity(one_step, target).mean(dim=1)
            errors["cosine/horizon"] = cosine_similarity(rolled, future)
    return errors


def _zero_actions(dataset: CachedDataset, scaler: Scaler, index: WindowIndex, batch: Batch) -> Tensor:
    """Raw zeros before scaling, one-hot columns kept: [B, T-1, A]."""
    rows = []
    for number in batch.numbers:
        window = index[int(number)]
        actions, _ = dataset.controls(window.store)
        raw = actions[window.start : window.start + index.num_steps - 1]
        rows.append(scaler.actions.apply(zero_actions(raw, dataset.space)))
    return torch.from_numpy(np.stack(rows))


def summarize(errors: WindowErrors, config: Config, dataset: CachedDataset) -> dict[str, Any]:
    """The content of metrics.json: means over episodes, and 95 % intervals over episodes beside them.

    A gap is the control's error minus the model's, per episode: above 0 the model is better.
    """
    settings = config.evaluate
    values: dict[str, np.ndarray] = {}

    def put(name: str, per_window: np.ndarray) -> None:
        values[name] = episode_means(per_window, errors.episodes)

    put("teacher_forcing_l1", errors.one_step[MODEL])
    put("rollout_l1", errors.horizon[MODEL].mean(axis=1))
    put("teacher_forcing_cosine", errors.cosine["one_step"])
    put("rollout_cosine", errors.cosine["horizon"].mean(axis=1))
    for name in (COPY_LAST, MEAN, SHUFFLED, ZERO):
        put(f"{name}_l1", errors.one_step[name])
        put(f"rollout_{name}_l1", errors.horizon[name].mean(axis=1))
    for step in range(settings.horizon):
        put(f"rollout_l1_step{step + 1}", errors.horizon[MODEL][:, step])
        put(f"rollout_cosine_step{step + 1}", errors.cosine["horizon"][:, step])
    for name in CONTROLS:
        put(f"gap_{name}", errors.one_step[name] - errors.one_step[MODEL])
        put(f"gap_{name}_step{settings.horizon}", errors.horizon[name][:, -1] - errors.horizon[MODEL][:, -1])
    estimate: Callable[[np.ndarray], Any] = lambda v: bootstrap_mean(  # noqa: E731
        v, num_resamples=settings.num_bootstrap, seed=settings.seed
    )
    estimates = {name: estimate(per_episode) for name, per_episode in values.items()}
    model = estimates["teacher_forcing_l1"].mean
    return {
        "encoder_trained": dataset.manifest.encoder_trained,
        "comparable": dataset.manifest.comparable,
        "mode": dataset.manifest.mode,
        "num_episodes": len(set(errors.episodes)),
        "num_windows": len(errors.episodes),
        "val": {name: value.mean for name, value in estimates.items()}
        | {f"ratio_{name}": model / estimates[f"{name}_l1"].mean for name in CONTROLS},
        "val_ci": {name: [value.low, value.high] for name, value in estimates.items()},
    }


def horizon_table(errors: WindowErrors, config: Config) -> list[dict[str, float]]:
    """One row per open-loop step: L1 of the model and of every baseline and control, with interval ends."""
    rows = []
    for step in range(config.evaluate.horizon):
        row: dict[str, float] = {"horizon": step + 1}
        for name in PREDICTIONS:
            per_episode = episode_means(errors.horizon[name][:, step], errors.episodes)
            value = bootstrap_mean(per_episode, num_resamples=config.evaluate.num_bootstrap, seed=config.evaluate.seed)
            row |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        rows.append(row)
    return rows
