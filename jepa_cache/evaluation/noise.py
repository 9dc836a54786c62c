"""The noise floor: how far apart neighbouring steps are, and what storing tokens in fewer bits does to the predictor's error.

An error can hardly fall below what differs between two frames in which nothing happens (sensor, compression, the encoder's own
jitter). And a cache in fewer bits is only worth its disk if the error stays: the same predictor is given tokens as int8 and so on
would have stored them, made in memory from the float16 ones by the store's own functions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.config.schema import STORED_DTYPES
from jepa_cache.data.ablations import positions_of
from jepa_cache.data.cache import CachedDataset
from jepa_cache.evaluation.context import EvaluationContext, Measurement, choose_windows
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, build_section, write_table
from jepa_cache.predictor.rollout import l1_error
from jepa_cache.store.quantisation import (
    Channels,
    check_width,
    decode,
    encode,
    get_codec,
    measure_channels,
    step_bytes,
)

QUIET_PERCENTILE = 10
READ_STEPS = 32  # at once, for a store's channels


class NoiseFloor(NamedTuple):
    """Of every held-out window.

    Attributes:
        episodes: Key of each window's episode.
        adjacent: [windows, T-1] L1 between each step's tokens and the next one's.
        cosine: [windows, T-1] their cosine similarity.
        errors: Stored dtype to measure ("one_step", "rollout") to [windows], L1 against the float16 tokens.
        own_errors: The same against targets in the same dtype: what an evaluation on such a cache shows.
        token_rmse: Stored dtype to [windows], root mean square of what storing changed, relative to that of the raw tokens.
    """

    episodes: list[str]
    adjacent: np.ndarray
    cosine: np.ndarray
    errors: dict[str, dict[str, np.ndarray]]
    own_errors: dict[str, dict[str, np.ndarray]]
    token_rmse: dict[str, np.ndarray]


@torch.no_grad()
def measure_floor(evaluation: EvaluationContext) -> NoiseFloor:
    """Distances of neighbouring steps, and the predictor's errors per stored dtype, on the same held-out windows.

    Only a float16 cache can be stored again in fewer bits; of others the errors are those of the tokens as they are. Channels'
    means and deviations are of all steps of each store that holds a window, as the writer takes them.

    Raises:
        ValueError: No held-out segment is long enough.

    Cost: one pass of the predictor per dtype, and for a float16 cache one reading of every store that holds a window.
    """
    settings, dataset = evaluation.config.evaluate, evaluation.dataset
    num_steps = max(evaluation.window_steps, settings.num_context_steps + settings.horizon)
    chosen = choose_windows(evaluation.held_out_segments(), num_steps, settings.noise_windows)
    windows = chosen.windows
    others = _other_dtypes(dataset)
    channels: dict[int, Channels] = {}
    found: dict[str, list[np.ndarray]] = {}

    def put(name: str, values: Tensor | np.ndarray) -> None:
        found.setdefault(name, []).append(values.cpu().numpy() if isinstance(values, Tensor) else values)

    for rows, batch, h in evaluation.iter_windows(chosen, "noise"):
        put("adjacent", l1_error(h[:, 1:], h[:, :-1]))
        put("cosine", torch.nn.functional.cosine_similarity(h[:, 1:], h[:, :-1], dim=-1).mean(dim=-1))
        moves = batch.actions, batch.states
        for measure, error in _errors(evaluation, h, h, moves).items():
            put(f"{dataset.dtype}/{measure}", error)
        for dtype in others:
            stores = [window.store for window in windows[rows]]
            for store in set(stores) - channels.keys():
                channels[store] = read_channels(dataset, store)
            raw = batch.tokens.cpu().numpy()
            stored = np.stack(
                [restore(tokens, dtype, channels[store]) for tokens, store in zip(raw, stores, strict=True)]
            )
            put(f"{dtype}/token_rmse", _relative_rmse(stored, raw))
            changed = evaluation.model.as_reps(torch.from_numpy(stored).to(evaluation.device))
            for measure, error in _errors(evaluation, changed, h, moves).items():
                put(f"{dtype}/{measure}", error)
            for measure, error in _errors(evaluation, changed, changed, moves).items():
                put(f"{dtype}/own/{measure}", error)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    measures = ("one_step", "rollout")
    return NoiseFloor(
        chosen.episodes,
        joined["adjacent"],
        joined["cosine"],
        {dtype: {m: joined[f"{dtype}/{m}"] for m in measures} for dtype in (dataset.dtype, *others)},
        {dtype: {m: joined[f"{dtype}/own/{m}"] for m in measures} for dtype in others},
        {dtype: joined[f"{dtype}/token_rmse"] for dtype in others},
    )


def _errors(
    evaluation: EvaluationContext, given: Tensor, target: Tensor, moves: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """L1 [B] of predictions from `given` [B, T, N, D] against `target`: teacher-forced, and mean over the open-loop steps."""
    settings, trained = evaluation.config.evaluate, evaluation.window_steps
    both = evaluation.model.both_ways(
        given,
        *moves,
        num_forced=trained - 1,
        num_context=settings.num_context_steps,
        horizon=settings.horizon,
    )
    ahead = slice(settings.num_context_steps, settings.num_context_steps + settings.horizon)
    return {
        "one_step": l1_error(both.teacher_forced, target[:, 1:trained]).mean(dim=1),
        "rollout": l1_error(both.open_loop, target[:, ahead]).mean(dim=1),
    }


def _other_dtypes(dataset: CachedDataset) -> list[str]:
    """Dtypes that the tokens of this cache can be stored in again; what is left out is said."""
    if dataset.dtype != "float16":
        return []
    chosen = []
    for dtype in STORED_DTYPES:
        try:
            check_width(dtype, dataset.manifest.width)
        except ValueError as error:
            print(f"noise floor without {dtype}: {error}", file=sys.stderr)
            continue
        if dtype != "float16":
            chosen.append(dtype)
    return chosen


def read_channels(dataset: CachedDataset, store: int) -> Channels:
    """Means and deviations of a float16 store's channels over all its steps, as its writer would take them for codes."""
    num_steps = dataset.manifest.entries[store].num_steps
    width, num_tokens = dataset.manifest.width, dataset.manifest.num_tokens

    def runs():
        for start in range(0, num_steps, READ_STEPS):
            out = np.empty((min(READ_STEPS, num_steps - start), num_tokens, width), np.float16)
            dataset.read_tokens(store, start, out)
            yield out

    return measure_channels(runs(), width)


def restore(tokens: np.ndarray, dtype: str, channels: Channels) -> np.ndarray:
    """Tokens [T, N, D] float16 as they would be read from a cache of that dtype: [T, N, D] float32."""
    if get_codec(dtype).max_code is None:
        return torch.from_numpy(tokens).to(getattr(torch, dtype)).float().numpy()
    steps = [encode(step, dtype, channels) for step in tokens]
    codes, scales = (np.stack(part) for part in zip(*steps, strict=True))
    return decode(codes, dtype, scales, channels)


def _relative_rmse(stored: np.ndarray, raw: np.ndarray) -> np.ndarray:
    true = raw.astype(np.float64)
    axes = tuple(range(1, true.ndim))
    return np.sqrt(((stored - true) ** 2).mean(axis=axes) / (true**2).mean(axis=axes))


def write_noise(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Write noise.csv and return the sections `noise` and `noise_ci` of metrics.json.

    `adjacent_l1` and `adjacent_cosine` between neighbouring steps; `quietest_l1`, the 10th percentile of the former in each
    episode: what differs when next to nothing happens; `one_step_l1` and `rollout_l1` of the predictor on the same windows. Of a
    float16 cache for each other dtype `change_one_step_<dtype>_l1` and `change_rollout_<dtype>_l1`: the error with its tokens as
    input less that with float16's, both against float16 tokens; `own_change_...`: with targets of that dtype as well, as an
    evaluation on such a cache would show it; `stored_<dtype>_rmse`: what storing changed, relative to the tokens. Of any cache
    `stored_rmse`: the same of its own dtype, as its manifest records it.

    Raises:
        ValueError: Fewer than two episodes with a long enough segment are held out.
    """
    floor, dataset = measure_floor(evaluation), evaluation.dataset
    as_is = floor.errors[dataset.dtype]
    rows_of = positions_of(floor.episodes).items()
    quiet = {name: np.percentile(floor.adjacent[rows], QUIET_PERCENTILE) for name, rows in rows_of}
    quietest = np.array([quiet[name] for name in floor.episodes])
    values = {
        "adjacent_l1": floor.adjacent.mean(axis=1),
        "adjacent_cosine": floor.cosine.mean(axis=1),
        "quietest_l1": quietest,
        **{f"{measure}_l1": error for measure, error in as_is.items()},
    }
    for dtype in floor.own_errors:
        for measure, error in as_is.items():
            values[f"change_{measure}_{dtype}_l1"] = floor.errors[dtype][measure] - error
            values[f"own_change_{measure}_{dtype}_l1"] = floor.own_errors[dtype][measure] - error
        values[f"stored_{dtype}_rmse"] = floor.token_rmse[dtype]
    sections = build_section("noise", values, floor.episodes, evaluation.config.evaluate)
    if (recorded := recorded_rmse(dataset)) is not None:
        sections["noise"]["stored_rmse"] = recorded
    write_table(_noise_table(sections, floor, dataset), out / MEASUREMENTS_FOLDER / "noise.csv")
    return sections


def recorded_rmse(dataset: CachedDataset) -> float | None:
    """What storing changed, root mean square relative to the encoder's values, over all steps; None where a store does not say."""
    entries = dataset.manifest.entries
    if any(entry.reconstruction_rmse is None for entry in entries):
        return None
    weights = [entry.num_steps for entry in entries]
    return float(np.sqrt(np.average([entry.reconstruction_rmse**2 for entry in entries], weights=weights)))


def _noise_table(
    sections: dict[str, dict[str, Any]], floor: NoiseFloor, dataset: CachedDataset
) -> list[dict[str, Any]]:
    """One row per dtype: bytes, what storing changed, the predictor's errors and their changes with interval ends."""
    means, ends, manifest = sections["noise"], sections["noise_ci"], dataset.manifest
    rows = []
    for dtype in floor.errors:
        as_stored = dtype == dataset.dtype
        row: dict[str, Any] = {
            "dtype": dtype,
            "step_bytes": step_bytes(dtype, manifest.num_tokens, manifest.width),
            "token_rmse": means.get("stored_rmse", "") if as_stored else means[f"stored_{dtype}_rmse"],
        }
        for measure in floor.errors[dtype]:
            name = f"change_{measure}_{dtype}_l1"
            row[f"{measure}_l1"] = means[f"{measure}_l1"] + means.get(name, 0.0)
            for kind in ("change", "own_change"):
                name = f"{kind}_{measure}_{dtype}_l1"
                low, high = (0.0, 0.0) if as_stored else ends[name]  # no change of itself
                row[f"{measure}_{kind}"] = 0.0 if as_stored else means[name]
                row |= {f"{measure}_{kind}_low": low, f"{measure}_{kind}_high": high}
        rows.append(row)
    return rows


NOISE = Measurement(
    name="noise",
    section="noise",
    run=write_noise,
    heading="Noise floor",
    explanation="Errors hardly fall below what differs between neighbouring steps in which nothing happens.",
    tables=("noise.csv",),
)
