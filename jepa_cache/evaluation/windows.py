"""Held-out windows through the predictor, the baselines and the action ablations: the error of every predicted step.

The baselines need no predictor: the last step, the training mean, a straight line, and a regression on actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.config.machine import default_num_threads
from jepa_cache.data.ablations import ABLATIONS, SHIFTED, action_ablations
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, choose_windows
from jepa_cache.evaluation.metrics import MEASURES
from jepa_cache.predictor.rollout import LatentModel

PIECE_STEPS = 16
BATCH_SIZE = 8
RIDGE = 1e-3  # penalty for each training row, of inputs with deviations near 1
CPU = torch.device("cpu")


class Baselines(NamedTuple):
    """What was learned from the training episodes.

    Attributes:
        mean: [N, D] float32, of the tokens at each position.
        change: [A+S+1, N, D] float32: the change of each token in one step is [actions, states, 1] @ change.
        num_steps: Steps that they were fitted on.
    """

    mean: Tensor
    change: Tensor
    num_steps: int


def fit_baselines(
    dataset: CachedDataset,
    segments: Sequence[Segment],
    scaler: Scaler,
    model: LatentModel,
    *,
    device: torch.device = CPU,
) -> Baselines:
    """Mean over all steps and ridge regression over all pairs of neighbouring steps of the training episodes, in one pass.

    The regression has weights of its own for every channel of every token: h[t+1] - h[t] from the scaled action that leads
    from t to t+1, the scaled state at t, and 1. It sees no tokens.

    Args:
        dataset: The cached features.
        segments: Of the training episodes.
        scaler: Of actions and states.
        model: Whose norm the tokens are given.
        device: Where to compute.

    Raises:
        ValueError: When no training segment holds two steps.

    Cost: reads all tokens of the training episodes once (docs/evaluation_report.md has figures); memory [A+S+1, N, D] float64 (150 MB
    for 50 inputs at N=256, D=1408) and a batch of 136 steps, however many there are.
    """
    num_inputs = len(dataset.space.actions) + len(dataset.space.states) + 1
    shape = dataset.manifest.num_tokens, dataset.manifest.width
    exact = {"dtype": torch.float64, "device": device}
    total, num_steps = torch.zeros(shape, **exact), 0
    squares = torch.zeros(num_inputs, num_inputs, **exact)
    products = torch.zeros(num_inputs, shape[0] * shape[1], **exact)
    pieces = _cut_pieces(segments)
    bar = tqdm(
        total=sum(map(len, pieces.values())), desc="fitting baselines", unit="piece", delay=2, dynamic_ncols=True
    )
    for length, alike in pieces.items():
        loader = WindowLoader(dataset, WindowIndex([piece for piece, _ in alike], length), scaler)
        starts = range(0, len(alike), BATCH_SIZE)
        for start, batch in zip(
            starts, loader.iterate([range(s, min(s + BATCH_SIZE, len(alike))) for s in starts]), strict=True
        ):
            batch = to_device(batch, device)
            reps = model.as_reps(batch.tokens)
            is_first = torch.tensor([first for _, first in alike[start : start + len(reps)]], device=device)
            total += reps[:, 1:].sum(dim=(0, 1)) + reps[is_first, 0].sum(dim=0)
            num_steps += reps[:, 1:].shape[:2].numel() + int(is_first.sum())
            inputs = _inputs(batch.actions, batch.states[:, :-1]).flatten(0, 1)
            squares += inputs.T.double() @ inputs.double()
            products += inputs.T @ (reps[:, 1:] - reps[:, :-1]).flatten(0, 1).flatten(1)
            bar.update(len(reps))
    bar.close()
    num_pairs = float(squares[-1, -1])
    if not num_pairs:
        raise ValueError(
            f"none of the {len(segments)} training segments has two steps, so there is nothing to fit baselines on"
        )
    penalty = torch.full((num_inputs,), RIDGE * num_pairs, **exact)
    penalty[-1] = 1e-9 * num_pairs  # the constant is not shrunk
    change = torch.linalg.solve(squares + penalty.diag(), products)
    return Baselines((total / num_steps).float(), change.float().unflatten(1, shape), num_steps)


def _cut_pieces(segments: Sequence[Segment]) -> dict[int, list[tuple[Segment, bool]]]:
    """Segments in pieces by length, and whether each begins its segment: any other begins with the last step of the one before.

    So every step is in one piece as another than that first one, and every pair of neighbours in one.
    """
    pieces: dict[int, list[tuple[Segment, bool]]] = {}
    for segment in segments:
        for start in range(segment.start, max(segment.stop - 1, segment.start + 1), PIECE_STEPS):
            piece = segment._replace(start=start, stop=min(start + PIECE_STEPS + 1, segment.stop))
            pieces.setdefault(piece.stop - start, []).append((piece, start == segment.start))
    return pieces


def _inputs(actions: Tensor, states: Tensor) -> Tensor:
    """[B, T, A] and [B, T, S] to [B, T, A+S+1]."""
    return torch.cat([actions, states, torch.ones(*actions.shape[:2], 1, device=actions.device)], dim=-1)


def regress_teacher_forced(
    baselines: Baselines, model: LatentModel, h: Tensor, actions: Tensor, states: Tensor
) -> Tensor:
    """Steps 1 to T-1 by the regression, each from the true one before it.

    Args:
        baselines: With the weights.
        model: Norms what comes out, as it does its own predictions.
        h: [B, T, N, D] true tokens.
        actions: [B, T-1, A] scaled.
        states: [B, T-1, S] scaled.

    Returns:
        [B, T-1, N, D].
    """
    change = torch.einsum("btp,pnd->btnd", _inputs(actions, states), baselines.change)
    return model.as_reps(h[:, :-1] + change)


def regress_open_loop(
    baselines: Baselines, model: LatentModel, last: Tensor, actions: Tensor, states: Tensor
) -> Tensor:
    """K steps by the regression, each from the one that it predicted before.

    Args:
        baselines: With the weights.
        model: Norms what comes out, as it does its own predictions.
        last: [B, N, D] last true step.
        actions: [B, K, A] scaled, the first one leads on from `last`.
        states: [B, K, S] scaled, the first one at `last`.

    Returns:
        [B, K, N, D].
    """
    changes = torch.einsum("btp,pnd->btnd", _inputs(actions, states), baselines.change)
    predicted = []
    for step in range(changes.shape[1]):
        last = model.as_reps(last + changes[:, step])
        predicted.append(last)
    return torch.stack(predicted, dim=1)


def extrapolate_teacher_forced(model: LatentModel, h: Tensor) -> Tensor:
    """Steps 2 to T-1 on a straight line through the two true ones before: 2 h[t] - h[t-1], [B, T, N, D] to [B, T-2, N, D]."""
    return model.as_reps(2 * h[:, 1:-1] - h[:, :-2])


def extrapolate_open_loop(model: LatentModel, before: Tensor, last: Tensor, horizon: int) -> Tensor:
    """K steps, each on a straight line through the two before it, which are predictions themselves after a while.

    Args:
        model: Norms each prediction.
        before: [B, N, D] last true step but one.
        last: [B, N, D] last true step.
        horizon: K.

    Returns:
        [B, K, N, D].
    """
    predicted = []
    for _ in range(horizon):
        before, last = last, model.as_reps(2 * last - before)
        predicted.append(last)
    return torch.stack(predicted, dim=1)


MODEL = "model"
COPY_LAST, MEAN, EXTRAPOLATION, REGRESSION = "copy_last", "mean", "extrapolation", "regression"
BASELINES = (COPY_LAST, MEAN, EXTRAPOLATION, REGRESSION)
PREDICTIONS = (MODEL, *BASELINES, *ABLATIONS)


@dataclass(frozen=True)
class WindowErrors:
    """Errors of every held-out window; NaN where a prediction does not exist, never for another reason.

    Attributes:
        episodes: Key of each window's episode.
        teacher_forced: Measure (`metrics.MEASURES`) to prediction (`PREDICTIONS`) to [windows, T-1], of steps 1 to T-1.
        open_loop: The same to [windows, K], of the K steps after the context.
        chosen: The windows.
        num_fitted_steps: Training steps that the baselines `mean` and `regression` were fitted on: all there are.
    """

    episodes: list[str]
    teacher_forced: dict[str, dict[str, np.ndarray]]
    open_loop: dict[str, dict[str, np.ndarray]]
    chosen: ChosenWindows
    num_fitted_steps: int

    @property
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


class Predicted(NamedTuple):
    """What one prediction says of the windows of a batch.

    Attributes:
        name: Of `PREDICTIONS`.
        rows: [R] windows of the batch that it exists for.
        first: Teacher-forced steps before this one do not exist.
        teacher_forced: [R, T-1-first, N, D].
        open_loop: [R, K, N, D], or None where it does not exist.
    """

    name: str
    rows: Tensor
    first: int
    teacher_forced: Tensor
    open_loop: Tensor | None


class _Given(NamedTuple):
    """A batch on the device: h [B, T, N, D] true tokens, scaled actions [B, T-1, A] and states [B, T, S]."""

    h: Tensor
    actions: Tensor
    states: Tensor


@torch.no_grad()
def measure_windows(evaluation: EvaluationContext) -> WindowErrors:
    """Run the predictor, all baselines and all action ablations over windows spread evenly over the held-out episodes.

    In open loop the recorded states of the predicted steps are given, as in the training rollout; only tokens are fed
    back. The ablations differ from the model in their actions alone. Teacher forcing is measured over as many steps as a
    training window has, from the start of each window.

    Raises:
        ValueError: When fewer than two episodes with a long enough segment are held out, or the predictor gives no numbers.
    """
    torch.set_num_threads(default_num_threads())
    settings, device = evaluation.config.evaluate, evaluation.device
    num_steps = max(evaluation.window_steps, settings.num_context_steps + settings.horizon)
    chosen = choose_windows(evaluation.held_out_segments(), num_steps, settings.windows_per_episode)
    ablations = action_ablations(evaluation.dataset, evaluation.scaler, *chosen, seed=settings.seed)
    baselines = fit_baselines(
        evaluation.dataset,
        evaluation.training_segments(),
        evaluation.scaler,
        evaluation.model,
        device=device,
    )
    shapes = {"teacher_forced": evaluation.window_steps - 1, "open_loop": settings.horizon}
    found = {
        kind: {
            measure: {name: np.full((len(chosen.numbers), steps), np.nan) for name in PREDICTIONS}
            for measure in MEASURES
        }
        for kind, steps in shapes.items()
    }
    ahead = slice(settings.num_context_steps, settings.num_context_steps + settings.horizon)
    for measured, batch, h in evaluation.iter_windows(chosen, "evaluating"):
        given = _Given(h, batch.actions, batch.states)
        replaced = {name: torch.from_numpy(values[measured]).to(device) for name, values in ablations.items()}
        for predicted in _predictions(evaluation, baselines, given, replaced):
            true, rows = given.h[predicted.rows], measured.start + predicted.rows.cpu().numpy()
            later = true[:, 1 + predicted.first : evaluation.window_steps]
            for measure, error in MEASURES.items():
                values = error(predicted.teacher_forced, later)
                found["teacher_forced"][measure][predicted.name][rows, predicted.first :] = _checked(values, evaluation)
                if predicted.open_loop is not None:
                    values = error(predicted.open_loop, true[:, ahead])
                    found["open_loop"][measure][predicted.name][rows] = _checked(values, evaluation)
    return WindowErrors(chosen.episodes, **found, chosen=chosen, num_fitted_steps=baselines.num_steps)


def _checked(values: Tensor, evaluation: EvaluationContext) -> np.ndarray:
    if not torch.isfinite(values).all():
        raise ValueError(
            f"a prediction on held-out windows of {evaluation.dataset.manifest.dataset} holds NaN or infinity, so no error can be "
            "measured; the training has diverged (see outputs/train/run/train.csv): lower train.lr or set train.clip_norm"
        )
    return values.cpu().numpy()


def _predictions(
    evaluation: EvaluationContext, baselines: Baselines, given: _Given, replaced: Mapping[str, Tensor]
) -> Iterator[Predicted]:
    """Everything in `PREDICTIONS` for one batch, one after the other, as each is as large as the tokens."""
    settings, model = evaluation.config.evaluate, evaluation.model
    h, num_trained = given.h, evaluation.window_steps
    context, horizon = settings.num_context_steps, settings.horizon
    everything = torch.arange(len(h), device=h.device)
    past, true = h[:, : num_trained - 1], h[:, :num_trained]
    last = h[:, context - 1]
    constant = lambda token: token.unsqueeze(1).expand(-1, horizon, -1, -1)  # noqa: E731
    yield Predicted(COPY_LAST, everything, 0, past, constant(last))
    yield Predicted(MEAN, everything, 0, baselines.mean.expand_as(past), constant(baselines.mean.expand_as(last)))
    straight = None
    if context >= 2:
        straight = extrapolate_open_loop(model, h[:, context - 2], last, horizon)
    yield Predicted(EXTRAPOLATION, everything, 1, extrapolate_teacher_forced(model, true), straight)
    ahead = slice(context - 1, context - 1 + horizon)
    yield Predicted(
        REGRESSION,
        everything,
        0,
        regress_teacher_forced(
            baselines, model, true, given.actions[:, : num_trained - 1], given.states[:, : num_trained - 1]
        ),
        regress_open_loop(baselines, model, last, given.actions[:, ahead], given.states[:, ahead]),
    )
    for name, actions in {MODEL: given.actions, **replaced}.items():
        rows = everything
        if name in SHIFTED:  # windows without a neighbour have no such actions
            rows = everything[torch.isfinite(actions).flatten(1).all(dim=1)]
        if len(rows):
            yield _run_predictor(evaluation, name, rows, given, actions)


def _run_predictor(evaluation: EvaluationContext, name: str, rows: Tensor, given: _Given, actions: Tensor) -> Predicted:
    settings = evaluation.config.evaluate
    both = evaluation.model.both_ways(
        given.h[rows],
        actions[rows],
        given.states[rows],
        num_forced=evaluation.window_steps - 1,
        num_context=settings.num_context_steps,
        horizon=settings.horizon,
    )
    return Predicted(name, rows, 0, both.teacher_forced, both.open_loop)
