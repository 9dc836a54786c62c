"""Held-out windows through the predictor, the baselines and the action ablations: the error of every predicted step.

The baselines need no predictor: the last step, the training mean, a straight line, and a regression on actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.paths import default_num_threads
from jepa_cache.data.ablations import ABLATIONS, SHIFTED, action_ablations
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.data.loader import Batch, WindowLoader, to_device
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, choose_windows
from jepa_cache.evaluation.metrics import MEASURES
from jepa_cache.predictor.rollout import LatentModel

MODEL = "model"
COPY_LAST, MEAN, EXTRAPOLATION, REGRESSION = "copy_last", "mean", "extrapolation", "regression"
BASELINES = (COPY_LAST, MEAN, EXTRAPOLATION, REGRESSION)
PREDICTIONS = (MODEL, *BASELINES, *ABLATIONS)

PIECE_STEPS = 16
BATCH_SIZE = 8
RIDGE = 1e-3  # penalty for each training row, of inputs with deviations near 1
CPU = torch.device("cpu")


class Baselines(NamedTuple):
    """What was learned from the training episodes."""

    mean: Tensor  # [N, D] float32, of the tokens at each position
    change: Tensor  # [A+S+1, N, D] float32: the change of each token in one step is [actions, states, 1] @ change
    num_steps: int  # that they were fitted on


def fit_baselines(
    dataset: CachedDataset,
    segments: Sequence[Segment],
    scaler: Scaler,
    model: LatentModel,
    *,
    step_length: int = 1,
    device: torch.device = CPU,
) -> Baselines:
    """Mean over all steps and ridge regression over all pairs of steps `step_length` apart of the training episodes, in one pass.

    The regression has weights of its own for every channel of every token: h[t+1] - h[t] from the scaled action that leads
    from t to t+1, the scaled state at t, and 1. It sees no tokens.

    Cost: reads all tokens of the training episodes once (docs/evaluation_report.md has figures); memory [A+S+1, N, D] float64 (150 MB
    for 50 inputs at N=256, D=1408) and a batch of 136 steps, however many there are.
    """
    num_inputs = len(dataset.space.actions) + len(dataset.space.states) + 1
    shape = dataset.manifest.num_tokens, dataset.manifest.width
    exact = {"dtype": torch.float64, "device": device}
    total, num_steps = torch.zeros(shape, **exact), 0
    squares = torch.zeros(num_inputs, num_inputs, **exact)
    products = torch.zeros(num_inputs, shape[0] * shape[1], **exact)
    for length, alike in tqdm(
        _cut_pieces(segments, step_length).items(), desc="fitting baselines", delay=2, dynamic_ncols=True
    ):
        loader = WindowLoader(dataset, WindowIndex([piece for piece, _ in alike], length, (step_length,)), scaler)
        begins = torch.tensor([begins for _, begins in alike], device=device)
        numbers = range(len(alike))
        for batch in loader.iterate([numbers[first : first + BATCH_SIZE] for first in numbers[::BATCH_SIZE]]):
            is_first = begins[batch.numbers]
            batch = to_device(batch, device)
            reps = model.as_reps(batch.tokens)
            total += reps[:, 1:].sum(dim=(0, 1)) + reps[is_first, 0].sum(dim=0)
            num_steps += reps[:, 1:].shape[:2].numel() + int(is_first.sum())
            inputs = _inputs(batch.actions, batch.states[:, :-1]).flatten(0, 1)
            squares += inputs.T.double() @ inputs.double()
            products += inputs.T @ (reps[:, 1:] - reps[:, :-1]).flatten(0, 1).flatten(1)
    num_pairs = float(squares[-1, -1])
    if not num_pairs:
        raise ValueError(
            f"none of the {len(segments)} training segments has two steps, so there is nothing to fit baselines on"
        )
    penalty = torch.full((num_inputs,), RIDGE * num_pairs, **exact)
    penalty[-1] = 1e-9 * num_pairs  # the constant is not shrunk
    change = torch.linalg.solve(squares + penalty.diag(), products)
    return Baselines((total / num_steps).float(), change.float().unflatten(1, shape), num_steps)


def _cut_pieces(segments: Sequence[Segment], step_length: int) -> dict[int, list[tuple[Segment, bool]]]:
    """Segments in pieces by their number of steps, and whether each begins one: any other begins with the last step of the one before.

    Of every `step_length`-th step, from each of the first ones on. So every step is in one piece as another than that first one, and
    every pair of steps that far apart in one.
    """
    pieces: dict[int, list[tuple[Segment, bool]]] = {}
    for segment in segments:
        for begin in range(segment.start, min(segment.start + step_length, segment.stop)):
            rows = range(begin, segment.stop, step_length)
            for first in range(0, max(len(rows) - 1, 1), PIECE_STEPS):
                own = rows[first : first + PIECE_STEPS + 1]
                piece = segment._replace(start=own[0], stop=own[-1] + 1)
                pieces.setdefault(len(own), []).append((piece, first == 0))
    return pieces


def _inputs(actions: Tensor, states: Tensor) -> Tensor:
    """[B, T, A] and [B, T, S] to [B, T, A+S+1]."""
    return torch.cat([actions, states, torch.ones(*actions.shape[:2], 1, device=actions.device)], dim=-1)


@dataclass(frozen=True)
class WindowErrors:
    """Errors of every held-out window; NaN where a prediction does not exist, never for another reason."""

    episodes: list[str]  # key of each window's episode
    # Measure (`metrics.MEASURES`) to prediction (`PREDICTIONS`) to [windows, T-1], of steps 1 to T-1.
    teacher_forced: dict[str, dict[str, np.ndarray]]
    open_loop: dict[str, dict[str, np.ndarray]]  # the same to [windows, K], of the K steps after the context
    chosen: ChosenWindows
    num_fitted_steps: int  # training steps that the baselines `mean` and `regression` were fitted on: all there are

    @cached_property
    def one_step(self) -> dict[str, np.ndarray]:
        """Prediction to [windows], teacher-forced L1 over the steps of the window for which it exists."""
        return {name: mean_of_steps(values) for name, values in self.teacher_forced["l1"].items()}

    @property
    def horizon(self) -> dict[str, np.ndarray]:
        """Prediction to [windows, K], open-loop L1."""
        return self.open_loop["l1"]


def mean_of_steps(values: np.ndarray) -> np.ndarray:
    """[windows, steps] to [windows] float64: the mean over the steps that exist, NaN where none does."""
    exists = np.isfinite(values)
    sums = np.where(exists, values, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(exists.any(axis=1), sums / np.maximum(exists.sum(axis=1), 1), np.nan)


@torch.no_grad()
def measure_windows(evaluation: EvaluationContext) -> WindowErrors:
    """Run the predictor, all baselines and all action ablations over windows spread evenly over the held-out episodes.

    In open loop the recorded states of the predicted steps are given, as in the training rollout; only tokens are fed
    back. Teacher forcing is measured over as many steps as a training window has, from the start of each window.
    """
    torch.set_num_threads(default_num_threads())
    settings, dataset, scaler = evaluation.config.evaluate, evaluation.dataset, evaluation.scaler
    ahead = slice(settings.num_context_steps, settings.num_context_steps + settings.horizon)
    num_steps = max(evaluation.window_steps, ahead.stop)
    chosen = choose_windows(
        evaluation.held_out_segments(), num_steps, settings.windows_per_episode, step_length=settings.step_length
    )
    ablations = action_ablations(dataset, scaler, *chosen, seed=settings.seed)
    training, device = evaluation.training_segments(), evaluation.device
    apart = settings.step_length
    baselines = fit_baselines(dataset, training, scaler, evaluation.model, step_length=apart, device=device)
    forced, rolled = (
        {measure: {name: np.full((len(chosen.numbers), steps), np.nan) for name in PREDICTIONS} for measure in MEASURES}
        for steps in (evaluation.window_steps - 1, settings.horizon)
    )

    for measured, batch, h in evaluation.iter_windows(chosen, "evaluating"):
        replaced = {name: torch.from_numpy(values[measured]).to(device) for name, values in ablations.items()}
        for name, exists, one_step, open_loop in _predictions(evaluation, baselines, batch, h, replaced):
            true, rows = h[exists], np.arange(measured.start, measured.stop)[exists.cpu().numpy()]
            behind = slice(evaluation.window_steps - one_step.shape[1], evaluation.window_steps)
            for measure, error in MEASURES.items():
                for into, predicted, steps in ((forced, one_step, behind), (rolled, open_loop, ahead)):
                    if predicted is None:
                        continue
                    values = error(predicted, true[:, steps])
                    if not torch.isfinite(values).all():
                        raise ValueError(
                            f"a prediction on held-out windows of {dataset.manifest.dataset} holds NaN or infinity, so no error can be "
                            "measured; the training has diverged (see outputs/train/run/train.csv): lower train.lr or set train.clip_norm"
                        )
                    found = into[measure][name]
                    found[rows, found.shape[1] - values.shape[1] :] = values.cpu().numpy()
    return WindowErrors(chosen.episodes, forced, rolled, chosen=chosen, num_fitted_steps=baselines.num_steps)


def _predictions(
    evaluation: EvaluationContext, baselines: Baselines, batch: Batch, h: Tensor, replaced: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Everything in `PREDICTIONS` for one batch, one after the other, as each is as large as the tokens.

    Yields:
        Its name, the R windows that it exists for [B] bool, its last teacher-forced steps [R, up to T-1, N, D], and its open loop
        [R, K, N, D], or None where that does not exist.
    """
    settings, model, num_forced = evaluation.config.evaluate, evaluation.model, evaluation.window_steps - 1
    context, horizon = settings.num_context_steps, settings.horizon
    everything = torch.ones(len(h), dtype=torch.bool, device=h.device)
    past, last = h[:, :num_forced], h[:, context - 1]
    copied = last.unsqueeze(1).expand(-1, horizon, -1, -1)
    yield COPY_LAST, everything, past, copied
    yield MEAN, everything, baselines.mean.expand_as(past), baselines.mean.expand_as(copied)
    straight = [h[:, context - 2], last] if context >= 2 else []
    changes = torch.einsum("btp,pnd->btnd", _inputs(batch.actions, batch.states[:, :-1]), baselines.change)
    regressed = [last]
    for step in range(context - 1, context - 1 + horizon):
        regressed.append(model.as_reps(regressed[-1] + changes[:, step]))
        if straight:
            straight.append(model.as_reps(2 * straight[-1] - straight[-2]))
    rolled = torch.stack(straight[2:], dim=1) if straight else None
    yield EXTRAPOLATION, everything, model.as_reps(2 * past[:, 1:] - past[:, :-1]), rolled
    yield REGRESSION, everything, model.as_reps(past + changes[:, :num_forced]), torch.stack(regressed[1:], dim=1)
    counts = {"num_forced": num_forced, "num_context": context, "horizon": horizon}
    for name, actions in {MODEL: batch.actions, **replaced}.items():
        exists = everything
        if name in SHIFTED:  # windows without a neighbour have no such actions
            exists = torch.isfinite(actions).flatten(1).all(dim=1)
        if exists.any():
            both = model.both_ways(h[exists], actions[exists], batch.states[exists], **counts)
            yield name, exists, both.teacher_forced, both.open_loop
