"""Predictions that need no predictor: the last step, the training mean, a straight line, and a regression on actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex
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

    Cost: reads all tokens of the training episodes once (docs/honesty_report.md has figures); memory [A+S+1, N, D] float64 (150 MB
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
