"""The readout of states: what training reads of the recorded states in all tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from jepa_cache.actions import Column
from jepa_cache.ridge import RowsFit, fit_rows
from jepa_cache.training.latents import TokenReader

MAX_STEPS, MAX_BYTES = 4096, 2**31  # that it is fitted to, and their tokens in memory
LEAST_R2 = 0.1  # on left-out episodes, of a number that is worth a component


def fit_states(reader: TokenReader) -> tuple[list[str], RowsFit]:
    """Ridge regression from all tokens of a step to the K numbers of its state that ever change, and their names.

    Each number is taken less its mean and divided by its deviation. `reader` is of windows of one step.
    """
    dataset, index = reader.dataset, reader.index
    limit = min(MAX_STEPS, MAX_BYTES // (4 * dataset.manifest.num_tokens * dataset.manifest.width))
    blocks, rows = [], []
    for windows, tokens in tqdm(reader.read(limit), desc="readout of states", unit="block", dynamic_ncols=True):
        blocks.append(tokens.flatten(1))
        rows += windows
    x = torch.cat(blocks)
    del blocks
    states = np.stack([dataset.controls(window.store)[1][window.start] for window in rows]).astype(np.float64)
    names, targets = list_targets(states, dataset.space.states)
    if not names:
        return [], RowsFit(*(x.new_zeros(shape) for shape in ((x.shape[1], 0), 0, 0)))
    y = torch.from_numpy((targets - targets.mean(axis=0)) / targets.std(axis=0))
    return names, fit_rows(x, y, [index.segments[window.segment].episode for window in rows])


def list_targets(states: np.ndarray, columns: Sequence[Column]) -> tuple[list[str], np.ndarray]:
    """Names and numbers [n, K] that a readout is to tell of states [n, S]: angles as sine and cosine; none that never changes."""
    names, targets = [], []
    for column, values in zip(columns, states.T, strict=True):
        turns = {"deg": np.radians(values), "rad": values}.get(column.unit[:3])
        parts = (
            {column.name: values}
            if turns is None
            else {f"sin {column.name}": np.sin(turns), f"cos {column.name}": np.cos(turns)}
        )
        for name, numbers in parts.items():
            if numbers.std() > 1e-6 * max(1.0, float(np.abs(numbers).max())):
                names.append(name)
                targets.append(numbers)
    return names, np.stack(targets, axis=1) if targets else np.zeros((len(states), 0))


def find_read_directions(reader: TokenReader) -> torch.Tensor:
    """The directions [K, D] of a step's tokens along which the numbers of the state are read that can be.

    Raises:
        ValueError: None can, or there is one training episode only.
    """
    names, (weight, _, r2) = fit_states(reader)
    read = r2 > LEAST_R2
    if not read.any():
        found = (
            ", ".join(f"{name} {value:.2g}" for name, value in zip(names, r2.tolist(), strict=True))
            or "no state ever changes"
        )
        raise ValueError(
            "readout_components of the predictor's preset are the directions of tokens in which states are read, but none can be read from "
            f"left-out training episodes (R2: {found}); set it to false, or take another encoder"
        )
    return weight[:, read].T
