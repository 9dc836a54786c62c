"""Are predicted tokens, taken together, distributed as true ones? A Fréchet distance per horizon, in place of FVD.

There are no pixels here, so the distances are taken on layer-normed tokens themselves: on single tokens, and on the mean token
of each step. An L1 error tells how far a prediction is from its own future; these tell whether predictions look like futures at
all. A predictor that hedges foresees means: near in L1, far in distribution.

Windows are dealt into two halves in turn. Predictions of one half are compared with the true tokens of the other, both ways,
so nothing is compared with its own target; copies of the last true step are compared alike, and the true tokens of the one half
with those of the other are the floor. All three have the same number of vectors and so the same bias.

Letters of the statistics: d dimensions, n and m vectors. They are float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh, eigvalsh

from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, Measurement, choose_windows
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, Estimate, write_table

TRUE, MODEL, COPY_LAST = "true", "model", "copy_last"
COMPARED = {MODEL: "", COPY_LAST: "_copy_last", TRUE: "_floor"}  # with the true tokens of the other half; ends of names
KINDS = ("token", "pooled")
MAX_DIMS = 64  # of the principal components that the Fréchet distance is taken in
MIN_VECTORS_PER_DIM = 4  # of a half: a covariance of fewer is mostly noise, and of fewer than one it has no full rank
MAX_VECTORS = 1024  # of both halves together, which are held in memory
MAX_TRAINING_VECTORS = 4096  # that components are fitted on
MAX_GROUPS = 20  # of episodes, left out one after the other


class TooFewError(ValueError):
    """There is too little to estimate a distribution from."""


class Vectors(NamedTuple):
    """Vectors of one kind from all held-out windows."""

    groups: np.ndarray  # [windows] group of each window's episode
    halves: np.ndarray  # [windows] 0 or 1
    # Name in COMPARED to [windows, K, P, D] float32: P of each window and horizon, 1 where pooled.
    values: dict[str, np.ndarray]
    training: np.ndarray  # [n, D] of training windows


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians that share mean and covariance with two sets, [n, d] and [m, d].

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0. With few vectors it is biased upwards, the more the fewer there are.

    Source: Dowson and Landau 1982; as a distance of learned features, Heusel et al. 2017 (FID).
    """
    first, second = (np.atleast_2d(np.cov(vectors.T)) for vectors in (one, other))
    values, basis = eigh(first)
    root = (basis * np.sqrt(np.maximum(values, 0))) @ basis.T
    # (C1 C2)^(1/2) and (C1^(1/2) C2 C1^(1/2))^(1/2) have the same trace; the second matrix is symmetric.
    cross = np.sqrt(np.maximum(eigvalsh(root @ second @ root), 0)).sum()
    shift = one.mean(axis=0) - other.mean(axis=0)
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))


def jackknife(statistic: Callable[[np.ndarray], float], groups: np.ndarray) -> Estimate:
    """Value over all windows and its 95 % interval (Student's t), from the values with one of `groups` [windows] left out at a time.

    The bootstrap repeats vectors, and the distance grows where vectors repeat; leaving out does not. `statistic` is told which
    windows are kept, [windows] bool.

    Source: the delete-a-group jackknife (Efron and Stein 1981).
    """
    from scipy.stats import t

    value, names = statistic(np.ones(len(groups), bool)), np.unique(groups)
    without = np.array([statistic(groups != group) for group in names])
    reach = t.ppf(0.975, len(names) - 1) * np.sqrt((len(names) - 1) * without.var())
    return Estimate(value, float(value - reach), float(value + reach))


@torch.no_grad()
def collect_vectors(evaluation: EvaluationContext) -> dict[str, Vectors]:
    """Predicted, copied and true tokens of held-out windows and true tokens of training windows, by kind.

    Single tokens are drawn, the same places for prediction and truth, so that memory is bounded.
    """
    settings = evaluation.config.evaluate
    context, horizon = settings.num_context_steps, settings.horizon
    held_out, per_episode = evaluation.held_out_segments(), settings.windows_per_episode
    apart = {"step_length": settings.step_length}
    chosen = choose_windows(held_out, context + horizon, per_episode, **apart, limit=MAX_VECTORS)
    num_tokens = evaluation.dataset.manifest.num_tokens
    num_places = min(num_tokens, MAX_VECTORS // len(chosen.numbers))
    rng = np.random.default_rng(settings.seed)
    parts: dict[str, dict[str, list[np.ndarray]]] = {kind: {name: [] for name in COMPARED} for kind in KINDS}
    for _, batch, h in evaluation.iter_windows(chosen, "distances"):
        predicted = evaluation.model.open_loop(h[:, :context], batch.actions, batch.states[:, :-1], horizon)
        future = h[:, context:]
        copied = h[:, context - 1 : context].expand_as(future)
        places = np.stack([rng.permutation(num_tokens)[:num_places] for _ in batch.numbers])
        places = torch.from_numpy(places)[:, None, :, None].to(h.device)
        for name, tokens in ((TRUE, future), (MODEL, predicted), (COPY_LAST, copied)):
            parts["token"][name].append(torch.take_along_dim(tokens, places, dim=2).cpu().numpy())
            parts["pooled"][name].append(tokens.mean(dim=2, keepdim=True).cpu().numpy())
    dealt, training = deal_windows(chosen.episodes), _training_vectors(evaluation, rng)
    joined = {kind: {name: np.concatenate(found) for name, found in parts[kind].items()} for kind in KINDS}
    return {kind: Vectors(*dealt, joined[kind], training[kind]) for kind in KINDS}


def deal_windows(episodes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Group [windows] of each window's episode, at most 20 groups, and its half [windows]: of each episode every other window."""
    names, owners = np.unique(np.array(episodes), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {len(names)}")
    seen = np.arange(len(names))  # odd numbers of windows do not all favour one half
    halves = []
    for owner in owners:
        halves.append(seen[owner] % 2)
        seen[owner] += 1
    return owners * min(MAX_GROUPS, len(names)) // len(names), np.array(halves)


def _training_vectors(evaluation: EvaluationContext, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Single tokens and mean tokens of steps spread over the training episodes, [n, D] each."""
    segments = evaluation.training_segments()
    index, numbers = choose_windows(segments, 1, max(2, MAX_TRAINING_VECTORS // len({s.episode for s in segments})))
    if len(numbers) > MAX_TRAINING_VECTORS:
        numbers = sorted(rng.choice(numbers, MAX_TRAINING_VECTORS, replace=False).tolist())
    per_step = max(1, MAX_TRAINING_VECTORS // len(numbers))
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for _, _, window in evaluation.iter_windows(ChosenWindows(index, numbers), "training tokens"):
        h = window[:, 0].cpu()
        parts["token"] += [step.numpy()[rng.permutation(len(step))[:per_step]] for step in h]
        parts["pooled"].append(h.mean(dim=1).numpy())
    return {kind: np.concatenate(found) for kind, found in parts.items()}


def measure_distances(vectors: Vectors) -> tuple[dict[str, float], dict[str, list[Estimate]]]:
    """The distance at every horizon, with intervals over groups of episodes.

    Returns:
        What it was taken with; and for each end in COMPARED an estimate for each step: the mean of both ways of the halves.

    Raises:
        TooFewError: A half has too few vectors for a covariance.
    """
    from sklearn.decomposition import PCA

    groups, halves, values, training = vectors
    horizon, per_window, width = values[TRUE].shape[1:]
    num_vectors = int(np.bincount(halves, minlength=2).min()) * per_window  # of the smaller half
    num_dims = min(width, MAX_DIMS, num_vectors // MIN_VECTORS_PER_DIM, len(training) // MIN_VECTORS_PER_DIM)
    # Windows of the smaller half when a group is left out.
    kept = [np.bincount(halves[groups != group], minlength=2).min() for group in np.unique(groups)]
    if num_dims < 1 or len(kept) < 2 or min(kept) < 2:
        raise TooFewError(
            f"a distance of distributions needs {2 * MIN_VECTORS_PER_DIM} held-out windows or more, two in each half "
            f"whichever group of episodes is left out, and {MIN_VECTORS_PER_DIM} training vectors; got {len(halves)} "
            f"windows in {len(kept)} groups and {len(training)} training vectors: raise "
            "evaluate.windows_per_episode, or remove distances from evaluate.measure"
        )
    basis = PCA(num_dims, svd_solver="covariance_eigh").fit(training.astype(np.float64))

    half_of = np.repeat(halves, per_window)

    def both_ways(given: np.ndarray, true: np.ndarray) -> Estimate:
        """Of the mean distance between vectors [windows * P, d] of one half and true ones of the other."""

        def statistic(kept: np.ndarray) -> float:
            of_half = [np.repeat(kept, per_window) & (half_of == half) for half in (0, 1)]
            return sum(frechet_distance(given[own], true[other]) for own, other in (of_half, of_half[::-1])) / 2

        distance = jackknife(statistic, groups)
        return distance._replace(low=max(0.0, distance.low))

    found: dict[str, list[Estimate]] = {end: [] for end in COMPARED.values()}
    for step in range(horizon):
        at = {name: basis.transform(values[name][:, step].reshape(-1, width).astype(np.float64)) for name in COMPARED}
        for name, end in COMPARED.items():
            found[end].append(both_ways(at[name], at[TRUE]))
    facts = {"num_dims": num_dims, "num_vectors": num_vectors}
    return facts | {"kept_variance": float(basis.explained_variance_ratio_.sum())}, found


def write_distances(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Write distance.csv and return the sections `distance` and `distance_ci` of metrics.json, where steps 1 and K stand.

    Where there is too little held out for a distribution, the section holds only the number of windows and there is no table; why
    is said on stderr.
    """
    vectors = collect_vectors(evaluation)
    section: dict[str, float] = {"num_windows": len(vectors["token"].halves)}
    try:
        measured = {kind: measure_distances(some) for kind, some in vectors.items()}
    except TooFewError as error:
        print(f"no distances of distributions: {error}", file=sys.stderr)
        return {"distance": section, "distance_ci": {}}
    rows: list[dict[str, float]] = [{"horizon": step + 1} for step in range(evaluation.config.evaluate.horizon)]
    intervals: dict[str, list[float]] = {}
    for kind, (facts, found) in measured.items():
        share = facts.pop("kept_variance")
        section |= {f"{name}_{kind}": value for name, value in facts.items()} | {f"kept_variance_{kind}_share": share}
        for end, estimates in found.items():
            column = f"frechet_{kind}{end}"
            for row, estimate in zip(rows, estimates, strict=True):
                row |= {column: estimate.mean, f"{column}_low": estimate.low, f"{column}_high": estimate.high}
                if row["horizon"] in (1, len(rows)):
                    key = f"{column}_step{row['horizon']}"
                    section[key], *intervals[key] = estimate
    write_table(rows, out / MEASUREMENTS_FOLDER / "distance.csv")
    return {"distance": section, "distance_ci": intervals}


DISTANCES = Measurement(
    name="distances",
    section="distance",
    run=write_distances,
    heading="Distances between predicted and true tokens, taken together",
    explanation="Near the distance between two halves of the true tokens is as good as can be; compare with copying the last step.",
    tables=("distance.csv",),
)
