"""Fits the heads that `train.costs` names (`predictor.heads`): once for a run, in seconds, from cached tokens of training episodes.

The strength of the ridge is chosen by folds of training episodes, the best weights of the other by a fifth of them put aside; of those
left out are the figures in a head's card. Held-out episodes are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from jepa_cache.actions import Column
from jepa_cache.data.dataset import TRAIN
from jepa_cache.data.windows import WindowIndex
from jepa_cache.predictor.checkpoints import CheckpointError, save_state
from jepa_cache.predictor.heads import (
    READOUT,
    SAME_FIELDS,
    TIME,
    TIME_COMPONENTS,
    Head,
    StateReadout,
    TimeHead,
    load_head,
)
from jepa_cache.ridge import fit_rows
from jepa_cache.training.latents import FIT_STEPS, TokenReader
from jepa_cache.training.run import Run

NUM_FOLDS = 5  # of training episodes, by name; the first is put aside
READOUT_STEPS, READOUT_BYTES = 4096, 2**31  # that a readout is fitted to, and their tokens in memory, at most
TIME_STEPS = 2**16  # that a time head is fitted to, at most
TIME_UPDATES, TIME_BATCH, TIME_LR, TIME_CHECK_EVERY = 800, 256, 2e-3, 100
CHECK_PAIRS = 2048


def fit_heads(run: Run, device: torch.device) -> dict[str, Path]:
    """Fit the heads that the run's settings name, or find those that an earlier call fitted; name to file in the run's folder.

    Raises:
        ValueError: There is one training episode only, or no state can be read.
    """
    found = {}
    for name in run.config.train.costs:
        path = run.folder / f"{name}.safetensors"
        try:
            load_head(path, name)
        except CheckpointError:  # not there yet, or damaged
            head, card = FITS[name](run, device)
            same = {"run": run.folder.name, "tokens_fingerprint": run.dataset.manifest.fingerprint}
            same["normalize_reps"] = run.config.train.normalize_reps
            assert set(same) == set(SAME_FIELDS)
            save_state(head.state_dict(), path, {"head": name, **same, **card})
        found[name] = path
    return found


def fit_readout(run: Run, device: torch.device) -> tuple[Head, dict[str, Any]]:
    """Ridge regression from all tokens of a step to its state."""
    reader, index = _reader(run, device)
    shape = run.dataset.manifest.num_tokens, run.dataset.manifest.width
    limit = min(READOUT_STEPS, READOUT_BYTES // (4 * shape[0] * shape[1]))
    blocks, rows = [], []
    for windows, tokens in tqdm(reader.read(limit), desc="readout of states", unit="block", dynamic_ncols=True):
        blocks.append(tokens.flatten(1))
        rows += windows
    x = torch.cat(blocks)
    del blocks
    controls = [run.dataset.controls(store)[1] for store in range(len(run.dataset.manifest.entries))]
    states = np.stack([controls[window.store][window.start] for window in rows]).astype(np.float64)
    names, targets = list_targets(states, run.dataset.space.states)
    if not names:
        raise ValueError(
            "train.costs names readout, but no state ever changes in the training episodes; take train.costs=[time], which needs none"
        )
    y = torch.from_numpy((targets - targets.mean(axis=0)) / targets.std(axis=0))
    weight, bias, r2 = fit_rows(x, y, [index.segments[window.segment].episode for window in rows])
    if not r2.max() > 0:
        raise ValueError(
            f"no state can be read from the tokens of left-out training episodes (best R2 {float(r2.max()):.2g}); take another cost than "
            "readout, or another encoder"
        )
    share = r2.clamp(min=0).sqrt()
    head = StateReadout(*shape, len(names))
    head.load_state_dict({"linear.weight": (weight * share).T.float(), "linear.bias": (bias * share).float()})
    told = dict(zip(names, r2.tolist(), strict=True))
    print("cost readout: R2 on left-out training episodes " + ", ".join(f"{k} {v:.2f}" for k, v in told.items()))
    return head, {
        "architecture": {"num_tokens": shape[0], "embed_dim": shape[1], "num_outputs": len(names)},
        "r2": told,
    }


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


def fit_time(run: Run, device: torch.device) -> tuple[Head, dict[str, Any]]:
    """Train an embedding whose distance is the number of steps between two steps of one segment."""
    reader, index = _reader(run, device)
    shape = run.dataset.manifest.num_tokens, run.dataset.manifest.width
    num_components = min(TIME_COMPONENTS, shape[0] * shape[1], max(1, len(index) // 4))
    torch.manual_seed(run.config.train.seed)
    head = TimeHead(*shape, num_components).to(device)
    head.compressor.fit(lambda: (tokens for _, tokens in reader.read(FIT_STEPS)), 0.5)
    latents, rows = [], []
    with torch.no_grad():
        for windows, tokens in reader.read(TIME_STEPS):
            latents.append(head.compressor.compress(tokens[:, 0]))
            rows += windows
    segment, start = (np.array([getattr(window, name) for window in rows]) for name in ("segment", "start"))
    names = set(sorted({it.episode for it in index.segments})[::NUM_FOLDS])
    is_aside = np.array([index.segments[number].episode in names for number in segment])
    z = torch.cat(latents)
    draw, draw_aside = (
        _pairs(segment, start, np.flatnonzero(is_aside == aside), [run.config.train.seed, int(aside)])
        for aside in (False, True)
    )
    first, second, apart = draw_aside(CHECK_PAIRS)
    optimizer = torch.optim.AdamW(
        [weight for weight in head.parameters() if weight.requires_grad], TIME_LR, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TIME_LR, total_steps=TIME_UPDATES)
    best, kept = -2.0, head.state_dict()
    for update in tqdm(range(1, TIME_UPDATES + 1), desc="time between frames", unit="step", dynamic_ncols=True):
        one, other, wanted = draw(TIME_BATCH)
        wanted = torch.from_numpy(wanted).to(device)
        loss = ((_distance(head, z[one], z[other]) - wanted).abs() / (1 + wanted)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % TIME_CHECK_EVERY == 0:
            with torch.no_grad():
                told = float(spearmanr(_distance(head, z[first], z[second]).cpu().numpy(), apart).statistic)
            if told > best:
                best, kept = told, {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(kept)
    print(f"cost time: rank correlation with the time between frames {best:.2f} on training episodes put aside")
    card = {"num_tokens": shape[0], "embed_dim": shape[1], "num_components": num_components}
    return head.cpu(), {"architecture": card, "rank_correlation": best}


FITS: Mapping[str, Callable[[Run, torch.device], tuple[Head, dict[str, Any]]]] = {READOUT: fit_readout, TIME: fit_time}


def _distance(head: TimeHead, one: Tensor, other: Tensor) -> Tensor:
    return (head.embed(one) - head.embed(other)).square().sum(dim=-1).add(1e-8).sqrt()


def _reader(run: Run, device: torch.device) -> tuple[TokenReader, WindowIndex]:
    segments = run.dataset.segments_of(TRAIN, run.config.split, run.config.filter)
    if len({segment.episode for segment in segments}) < 2:
        raise ValueError(
            f"train.costs puts some training episodes aside to choose by, and there is one only ({segments[0].episode}); add recordings, or "
            "set train.costs=[]"
        )
    index = WindowIndex(segments, 1)
    how = {"normalize_reps": run.config.train.normalize_reps, "device": device}
    return TokenReader(run.dataset, run.scaler, index, **how), index


def _pairs(
    segment: np.ndarray, start: np.ndarray, rows: np.ndarray, seed: list[int]
) -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A drawer of pairs of `rows` that are of one segment: two row numbers [n], and the steps between them [n] float32.

    Of each row that there is: its segment's number, in whose order rows come, and its start in the store.
    """
    rng = np.random.default_rng(seed)
    _, first, count = np.unique(segment[rows], return_index=True, return_counts=True)
    group = np.repeat(np.arange(len(first)), count)

    def draw(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        one = rng.integers(0, len(rows), number)
        other = first[group[one]] + rng.integers(0, count[group[one]])
        apart = np.abs(start[rows[one]] - start[rows[other]])
        return rows[one], rows[other], apart.astype(np.float32)

    return draw
