"""The noise floor: how far apart neighbouring steps are, and what storing tokens in fewer bits does to the predictor's error.

An error can hardly fall below what differs between two frames in which nothing happens (sensor, compression, the encoder's own
jitter). And a cache in fewer bits is only worth its disk if the error stays: the same predictor is given tokens as int8 and so on
would have stored them, made in memory from the float16 ones by the store's own functions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_cache.config.schema import STORED_DTYPES
from jepa_cache.data.ablations import positions_of
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.evaluation.context import EvaluationContext, Measurement, choose_windows
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, build_section, cosine_similarity, write_table
from jepa_cache.predictor.rollout import TeacherForcedAndRollout, l1_error
from jepa_cache.store.quantisation import Channels, check_width, decode, encode, get_codec, measure_channels, step_bytes

QUIET_PERCENTILE = 10
READ_STEPS = 32  # at once, for a store's channels


@torch.no_grad()
def measure_floor(evaluation: EvaluationContext) -> tuple[dict[str, np.ndarray], list[str]]:
    """Figures of `write_noise` as [windows], and the windows' episodes.

    Channels' means and deviations are of all steps of each store that holds a window, as the writer takes them.

    Cost: one pass of the predictor per dtype, and for a float16 cache one reading of every store that holds a window.
    """
    settings, dataset, trained = evaluation.config.evaluate, evaluation.dataset, evaluation.window_steps
    ahead = slice(settings.num_context_steps, settings.num_context_steps + settings.horizon)
    num_steps = max(trained, ahead.stop)
    apart = {"step_length": settings.step_length}
    chosen = choose_windows(evaluation.held_out_segments(), num_steps, settings.noise_windows, **apart)
    windows, others = chosen.windows, list_other_dtypes(dataset)
    channels = functools.cache(lambda store: read_channels(dataset, store))
    parts: dict[str, list[np.ndarray]] = {}
    counts = {"num_forced": trained - 1, "num_context": ahead.start, "horizon": settings.horizon}

    def errors_of(predicted: TeacherForcedAndRollout, target: Tensor) -> dict[str, Tensor]:
        return {
            "one_step": l1_error(predicted.teacher_forced, target[:, 1:trained]).mean(dim=1),
            "rollout": l1_error(predicted.open_loop, target[:, ahead]).mean(dim=1),
        }

    def put(name: str, values: Tensor | np.ndarray) -> None:
        parts.setdefault(name, []).append(values.cpu().numpy() if isinstance(values, Tensor) else values)

    for rows, batch, h in evaluation.iter_windows(chosen, "noise"):
        put("adjacent", l1_error(h[:, 1:], h[:, :-1]))
        put("adjacent_cosine", cosine_similarity(h[:, 1:], h[:, :-1]).mean(dim=1))
        as_is = errors_of(evaluation.model.both_ways(h, batch.actions, batch.states, **counts), h)
        for error, values in as_is.items():
            put(f"{error}_l1", values)
        for dtype in others:
            raw = batch.tokens.cpu().numpy()
            pairs = zip(raw, windows[rows], strict=True)
            stored = np.stack([restore(tokens, dtype, channels(window.store)) for tokens, window in pairs])
            true = raw.astype(np.float64)
            rmse = np.sqrt(((stored - true) ** 2).mean(axis=(1, 2, 3)) / (true**2).mean(axis=(1, 2, 3)))
            put(f"stored_{dtype}_rmse", rmse)
            given = evaluation.model.as_reps(torch.from_numpy(stored).to(evaluation.device))
            predicted = evaluation.model.both_ways(given, batch.actions, batch.states, **counts)
            for change, target in (("change", h), ("own_change", given)):
                for error, values in errors_of(predicted, target).items():
                    put(f"{change}_{error}_{dtype}_l1", values - as_is[error])
    found = {name: np.concatenate(values) for name, values in parts.items()}
    adjacent, quietest = found.pop("adjacent"), np.empty(len(windows))
    for rows in positions_of(chosen.episodes).values():
        quietest[rows] = np.percentile(adjacent[rows], QUIET_PERCENTILE)
    return {"adjacent_l1": adjacent.mean(axis=1), "quietest_l1": quietest, **found}, chosen.episodes


def list_other_dtypes(dataset: CachedDataset) -> list[str]:
    """Dtypes that the tokens of this cache can be stored in again; what is skipped is said."""
    if dataset.dtype != "float16":
        return []
    chosen = [dtype for dtype in STORED_DTYPES if dtype != "float16"]
    for dtype in tuple(chosen):
        try:
            check_width(dtype, dataset.manifest.width)
        except ValueError as error:
            print(f"noise floor without {dtype}: {error}", file=sys.stderr)
            chosen.remove(dtype)
    return chosen


def read_channels(dataset: CachedDataset, store: int) -> Channels:
    """Means and deviations of a float16 store's channels over all its steps, as its writer would take them for codes."""
    num_steps = dataset.manifest.entries[store].num_steps
    width, num_tokens = dataset.manifest.width, dataset.manifest.num_tokens

    def runs() -> Iterator[np.ndarray]:
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


def write_noise(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Write noise.csv and return the sections `noise` and `noise_ci` of metrics.json.

    `adjacent_l1` and `adjacent_cosine` between neighbouring steps; `quietest_l1`, the 10th percentile of the former in each
    episode: what differs when next to nothing happens; `one_step_l1` and `rollout_l1` of the predictor on the same windows. Of a
    float16 cache for each other dtype `change_<error>_<dtype>_l1`: the error with its tokens as input less that with float16's,
    both against float16 tokens; `own_change_...`: with targets of that dtype as well, as an evaluation on such a cache would show
    it; `stored_<dtype>_rmse`: what storing changed, relative to the tokens. `stored_rmse`: that of the cache's own dtype, from
    its manifest.
    """
    dataset = evaluation.dataset
    sections = build_section("noise", *measure_floor(evaluation), evaluation.config.evaluate)
    means, ends, manifest = sections["noise"], sections["noise_ci"], dataset.manifest
    if (recorded := recorded_rmse(dataset)) is not None:
        means["stored_rmse"] = recorded
    rows = []
    for dtype in (dataset.dtype, *(name for name in STORED_DTYPES if f"stored_{name}_rmse" in means)):
        own = dtype == dataset.dtype  # no change of itself
        row: dict[str, Any] = {
            "dtype": dtype,
            "step_bytes": step_bytes(dtype, manifest.num_tokens, manifest.width),
            "token_rmse": means.get("stored_rmse", "") if own else means[f"stored_{dtype}_rmse"],
        }
        for error in ("one_step", "rollout"):
            row[f"{error}_l1"] = means[f"{error}_l1"] + means.get(f"change_{error}_{dtype}_l1", 0.0)
            for change in ("change", "own_change"):
                name, key = f"{error}_{change}", f"{change}_{error}_{dtype}_l1"
                low, high = ends.get(key, (0.0, 0.0))
                row |= {name: means.get(key, 0.0), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    write_table(rows, out / MEASUREMENTS_FOLDER / "noise.csv")
    return sections


def recorded_rmse(dataset: CachedDataset) -> float | None:
    """What storing changed, root mean square relative to the encoder's values, over all steps; None where a store does not say."""
    recorded = [(entry.reconstruction_rmse, entry.num_steps) for entry in dataset.manifest.entries]
    if any(rmse is None for rmse, _ in recorded):
        return None
    errors, weights = np.array(recorded).T
    return float(np.sqrt(np.average(errors**2, weights=weights)))


NOISE = Measurement(
    name="noise",
    section="noise",
    run=write_noise,
    heading="Noise floor",
    explanation="Errors hardly fall below what differs between neighbouring steps in which nothing happens.",
    tables=("noise.csv",),
)
