"""Errors read out: how far predicted tokens are from true ones in what a linear readout tells of positions.

Most of an error over all tokens is of what no action moves, and hides what one does. A ridge regression from all tokens of a step to
the recorded positions (`ActionSpace.positions`), fitted on training episodes, looks at the rest. What it is worth stands beside it: its
R2 on held-out episodes. Where that is about 0 the readout tells nothing there, and no error is read through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_cache.data.dataset import Segment
from jepa_cache.data.windows import count_episodes
from jepa_cache.evaluation.context import EvaluationContext, choose_windows
from jepa_cache.evaluation.metrics import draw_episodes
from jepa_cache.evaluation.probes import estimate, measure_r2
from jepa_cache.ridge import fit_rows

MAX_STEPS = 4096  # of the training and of the held-out episodes each, evenly spread: the regression's memory is 8 bytes times its square
MAX_NUMBERS = 16384  # of a step that are read; of more tokens the means of 2 x 2 neighbours, until they fit
LEAST_R2 = 0.1
"""On held-out episodes. A column that is told worse is not read: it would add noise that is the same whatever the actions."""


class Readout(NamedTuple):
    """A linear readout and what it is worth; reads nothing where `columns` is empty, and `words` say why."""

    columns: tuple[str, ...] = ()  # that it reads
    words: str = ""
    r2: dict[str, tuple[float, float, float]] = {}  # noqa: RUF012 (never written) column to R2 on held-out episodes and its interval
    grid: tuple[int, int] = (1, 1)
    weight: Tensor = torch.empty(0)  # [P, columns]; told values are in units of the column's spread over training steps

    def error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean squared difference of what is read of two steps: [B, T, N, D] twice to [B, T]."""
        return (pool_tokens(predicted - target, self.grid) @ self.weight).square().mean(dim=-1)


def pool_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """All numbers of each step, [..., N, D] to [..., P] with P at most `MAX_NUMBERS`: tokens, or means of those of neighbouring places."""
    cells, width = list(grid), tokens.shape[-1]
    while cells[0] * cells[1] * width > MAX_NUMBERS and max(cells) > 1:
        cells = [-(-side // 2) for side in cells]
    if cells != list(grid):
        pictures = tokens.flatten(0, -3).unflatten(1, grid).permute(0, 3, 1, 2)
        tokens = F.adaptive_avg_pool2d(pictures, cells).flatten(2).mT.unflatten(0, tokens.shape[:-2])
    return tokens.flatten(-2)


@torch.no_grad()
def fit_readout(evaluation: EvaluationContext) -> Readout:
    """Fit the ridge regression on training episodes, choose its strength on those it was not fitted to, and score held-out ones.

    Held-out episodes decide which columns are read, and nothing else.

    Memory: 4 bytes times `MAX_STEPS` times the numbers of a step (268 MB at most), and 8 times the square of `MAX_STEPS`.
    """
    space, grid = evaluation.dataset.space, evaluation.dataset.manifest.grid
    names = [column.name for column in space.states]
    columns = [names.index(name) for name in space.positions]
    if not columns:
        return Readout(words=f"the states of action space {space.name} say of no position")
    segments = evaluation.training_segments()
    if count_episodes(segments) < 2:
        return Readout(
            words="its strength is chosen on training episodes that it was not fitted to, and there is one only"
        )
    x, positions, episodes = read_steps(evaluation, segments, columns)
    known = np.flatnonzero(positions.std(axis=0) > 0)
    if not len(known):
        return Readout(words=f"{', '.join(space.positions)} never change in the training episodes")
    mean, spread = positions[:, known].mean(axis=0), positions[:, known].std(axis=0)
    weight, bias, _ = fit_rows(x, torch.from_numpy((positions[:, known] - mean) / spread), episodes)
    x, positions, episodes = read_steps(evaluation, evaluation.held_out_segments(), columns)
    told, true = (x @ weight + bias).cpu().double().numpy(), (positions[:, known] - mean) / spread
    episode_names, owners = np.unique(np.array(episodes), return_inverse=True)
    settings = evaluation.config.evaluate
    drawn = draw_episodes(len(episode_names), num_resamples=settings.num_bootstrap, seed=settings.seed)
    weights, origin, r2 = np.concatenate([np.ones((1, len(episode_names))), drawn]), np.zeros((1, 1)), {}
    for place, column in enumerate(known):
        own = slice(place, place + 1)
        values = measure_r2(true[:, own], told[:, own], origin, owners, weights)
        if np.isfinite(values).all():
            r2[space.positions[column]] = estimate(values)
    read = [place for place, column in enumerate(known) if r2.get(space.positions[column], (0,))[0] >= LEAST_R2]
    if not read:
        found = ", ".join(f"{name} {value[0]:.2f}" for name, value in r2.items()) or "no column that changes"
        why = f"R2 on held-out episodes is about 0 or below ({found}): the cameras or scenes differ too much, nothing to read"
        return Readout(words=why, r2=r2)
    return Readout(tuple(space.positions[known[place]] for place in read), "", r2, grid, weight[:, read])


def read_steps(
    evaluation: EvaluationContext, segments: Sequence[Segment], columns: Sequence[int]
) -> tuple[Tensor, np.ndarray, list[str]]:
    """Up to `MAX_STEPS` steps of some segments: numbers [n, P] on the device, positions [n, k] float64 as recorded, and episodes."""
    dataset, grid = evaluation.dataset, evaluation.dataset.manifest.grid
    chosen = choose_windows(segments, 1, -(-MAX_STEPS // count_episodes(segments)), limit=MAX_STEPS)
    rows = [pool_tokens(h[:, 0], grid) for _, _, h in evaluation.iter_windows(chosen, "readout")]
    states = [dataset.controls(window.store)[1][window.start][list(columns)] for window in chosen.windows]
    return torch.cat(rows), np.array(states, np.float64), chosen.episodes


def describe_readout(readout: Readout) -> dict[str, Any]:
    """The sections `readout` and `readout_ci` of metrics.json, and `readout_notes`: what is read, or why nothing is."""
    words = f"reads {', '.join(readout.columns)}" if readout.columns else f"nothing is read: {readout.words}"
    return {
        "readout": {f"r2_{name}": value for name, (value, _, _) in readout.r2.items()},
        "readout_ci": {f"r2_{name}": [low, high] for name, (_, low, high) in readout.r2.items()},
        "readout_notes": {"columns": words},
    }
