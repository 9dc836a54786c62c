"""Are predicted tokens, taken together, distributed as true ones? Fréchet and MMD distances per horizon, in place of FVD.

There are no pixels here, so the distances are taken on layer-normed tokens themselves: on single tokens, and on the mean token
of each step. An L1 error tells how far a prediction is from its own future; these tell whether predictions look like futures at
all. A predictor that hedges foresees means: near in L1, far in distribution.

Windows are dealt into two halves in turn. Predictions of one half are compared with the true tokens of the other, both ways,
so nothing is compared with its own target; copies of the last true step are compared alike, and the true tokens of the one half
with those of the other are the floor. All three have the same number of vectors and so the same bias.

Letters of the statistics: d dimensions, n and m vectors, G groups (of episodes). They are float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh, eigvalsh
from torch import Tensor

from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext, Measurement, choose_windows
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, Estimate, write_table


class TooFewError(ValueError):
    """There is too little to estimate a distribution from; the message says of what, and the way out."""


class Moments(NamedTuple):
    """Sums over vectors from which mean and covariance follow; those of two sets add up.

    Attributes:
        count: [...] vectors.
        total: [..., d] sum.
        outer: [..., d, d] sum of outer products.
    """

    count: np.ndarray
    total: np.ndarray
    outer: np.ndarray

    def mean(self) -> np.ndarray:
        """Mean [d]."""
        return self.total / self.count

    def covariance(self) -> np.ndarray:
        """Unbiased covariance [d, d]."""
        mean = self.mean()
        return (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)


def sum_moments(vectors: np.ndarray, groups: np.ndarray, num_groups: int) -> Moments:
    """Moments of each group: vectors [n, d] with groups [n] in [0, G) to count [G], total [G, d], outer [G, d, d]."""
    size = vectors.shape[1]
    moments = Moments(np.zeros(num_groups), np.zeros((num_groups, size)), np.zeros((num_groups, size, size)))
    for group in np.unique(groups):
        rows = vectors[groups == group].astype(np.float64)
        moments.count[group] = len(rows)
        moments.total[group] = rows.sum(axis=0)
        moments.outer[group] = rows.T @ rows
    return moments


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Fréchet distance of the Gaussians that share mean and covariance with two sets.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in the unit of the vectors squared; at least 0. With few vectors it is biased
    upwards, the more the fewer there are.

    Source: Dowson and Landau 1982; as a distance of learned features, Heusel et al. 2017 (FID).
    """
    first, second = one.covariance(), other.covariance()
    values, basis = eigh(first)
    root = (basis * np.sqrt(np.maximum(values, 0))) @ basis.T
    # (C1 C2)^(1/2) and (C1^(1/2) C2 C1^(1/2))^(1/2) have the same trace; the second matrix is symmetric.
    cross = np.sqrt(np.maximum(eigvalsh(root @ second @ root), 0)).sum()
    shift = one.mean() - other.mean()
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))


class Kernels(NamedTuple):
    """Kernel values of two sets summed by group; those of groups add up.

    Attributes:
        within_first: [G, G] over pairs of the first set, a vector with itself left out.
        within_second: [G, G] likewise of the second.
        across: [G, G], first set's groups in rows.
        count_first: [G] vectors.
        count_second: [G].
    """

    within_first: np.ndarray
    within_second: np.ndarray
    across: np.ndarray
    count_first: np.ndarray
    count_second: np.ndarray


def sum_kernels(
    first: np.ndarray,
    second: np.ndarray,
    groups: tuple[np.ndarray, np.ndarray],
    num_groups: int,
    bandwidth: float,
) -> Kernels:
    """Gaussian kernel exp(-|x - y|^2 / (2 bandwidth^2)) of vectors [n, d] and [m, d], whose groups are [n] and [m]."""
    from sklearn.metrics.pairwise import euclidean_distances

    member = [np.eye(num_groups)[group] for group in groups]

    def summed(x: np.ndarray, y: np.ndarray, rows: int, columns: int) -> np.ndarray:
        distances = euclidean_distances(x.astype(np.float64), y.astype(np.float64), squared=True)
        kernel = np.exp(distances / (-2 * bandwidth**2))
        if rows == columns:
            np.fill_diagonal(kernel, 0)
        return member[rows].T @ kernel @ member[columns]

    return Kernels(
        summed(first, first, 0, 0),
        summed(second, second, 1, 1),
        summed(first, second, 0, 1),
        member[0].sum(axis=0),
        member[1].sum(axis=0),
    )


def mmd(kernels: Kernels, kept: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy over the kept groups, [G] bool.

    Its mean is 0 for two independent sets of one distribution, so it may come out below 0.

    Source: Gretton et al. 2012, lemma 6 (the U-statistic).
    """
    keep = kept.astype(np.float64)
    n, m = keep @ kernels.count_first, keep @ kernels.count_second
    within = keep @ kernels.within_first @ keep / (n * (n - 1)) + keep @ kernels.within_second @ keep / (m * (m - 1))
    return float(within - 2 * (keep @ kernels.across @ keep) / (n * m))


def median_distance(vectors: np.ndarray) -> float:
    """Median distance between different vectors [n, d]: the usual bandwidth (Gretton et al. 2012, section 8).

    Raises:
        TooFewError: More than half of the pairs are equal.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    distances = euclidean_distances(vectors.astype(np.float64))
    median = float(np.median(distances[np.triu_indices(len(vectors), 1)]))
    if median == 0:
        raise TooFewError(
            f"more than half of the pairs among {len(vectors)} token vectors are equal, so MMD has no bandwidth: these "
            "tokens tell nothing apart; leave distances out of evaluate.measure"
        )
    return median


def jackknife(statistic: Callable[[np.ndarray], float], num_groups: int) -> Estimate:
    """Value over all groups and its 95 % interval, from the values with one group left out at a time.

    The bootstrap repeats vectors, and both distances grow where vectors repeat; leaving out does not. The interval is that of
    Student's t with G - 1 degrees of freedom.

    Args:
        statistic: Of the kept groups, [G] bool.
        num_groups: G, at least 2.

    Source: the delete-a-group jackknife (Efron and Stein 1981).
    """
    from scipy.stats import t

    kept = np.ones(num_groups, bool)
    value = statistic(kept)
    without = np.array([statistic(np.arange(num_groups) != group) for group in range(num_groups)])
    error = np.sqrt((num_groups - 1) * without.var())
    reach = t.ppf(0.975, num_groups - 1) * error
    return Estimate(value, value - reach, value + reach)


TRUE, MODEL, COPY_LAST = "true", "model", "copy_last"
COMPARED = {MODEL: "", COPY_LAST: "_copy_last", TRUE: "_floor"}  # with the true tokens of the other half; ends of names
KINDS = ("token", "pooled")
MAX_DIMS = 64  # of the principal components that the Fréchet distance is taken in
MIN_VECTORS_PER_DIM = 4  # of a half: a covariance of fewer is mostly noise, and of fewer than one it has no full rank
MAX_VECTORS = 1024  # of both halves together: MMD's cost is quadratic, and they are held in memory
MAX_TRAINING_VECTORS = 4096  # that components and bandwidth are fitted on
MAX_GROUPS = 20  # of episodes, left out one after the other


class Vectors(NamedTuple):
    """Vectors of one kind from all held-out windows.

    Attributes:
        groups: [windows] group of each window's episode.
        halves: [windows] 0 or 1.
        values: Name in COMPARED to [windows, K, P, D] float32: P vectors of each window and horizon (1 where pooled).
        training: [n, D] of training windows.
    """

    groups: np.ndarray
    halves: np.ndarray
    values: dict[str, np.ndarray]
    training: np.ndarray


class Distances(NamedTuple):
    """What is left of one kind of vectors.

    Attributes:
        frechet: Name in COMPARED to K estimates, squared distance.
        mmd: The same of the squared MMD.
        num_dims: Principal components of the Fréchet distance.
        kept_variance: Their share of the training vectors' variance.
        bandwidth: Of the kernel.
        num_vectors: Of the smaller half.
    """

    frechet: dict[str, list[Estimate]]
    mmd: dict[str, list[Estimate]]
    num_dims: int
    kept_variance: float
    bandwidth: float
    num_vectors: int


@torch.no_grad()
def collect_vectors(evaluation: EvaluationContext) -> dict[str, Vectors]:
    """Predicted, copied and true tokens of held-out windows and true tokens of training windows, by kind.

    Single tokens are drawn, the same places for prediction and truth, so that memory is bounded.

    Raises:
        ValueError: Fewer than two held-out episodes have a long enough segment.
    """
    settings = evaluation.config.evaluate
    context, horizon = settings.num_context_steps, settings.horizon
    held_out, per_episode = evaluation.held_out_segments(), settings.windows_per_episode
    chosen = choose_windows(held_out, context + horizon, per_episode, limit=MAX_VECTORS)
    num_tokens = evaluation.dataset.manifest.num_tokens
    num_places = min(num_tokens, MAX_VECTORS // len(chosen.numbers))
    rng = np.random.default_rng(settings.seed)
    parts: dict[str, dict[str, list[np.ndarray]]] = {kind: {name: [] for name in COMPARED} for kind in KINDS}
    for _, batch, h in evaluation.iter_windows(chosen, "distances"):
        predicted = evaluation.model.open_loop(h[:, :context], batch.actions, batch.states[:, :-1], horizon)
        future = h[:, context:]
        places = torch.from_numpy(np.stack([rng.permutation(num_tokens)[:num_places] for _ in batch.numbers]))
        for name, tokens in (
            (TRUE, future),
            (MODEL, predicted),
            (COPY_LAST, h[:, context - 1 : context].expand_as(future)),
        ):
            parts["token"][name].append(_pick(tokens, places.to(h.device)))
            parts["pooled"][name].append(tokens.mean(dim=2, keepdim=True).cpu().numpy())
    groups, halves = deal_windows(chosen.episodes)
    training = _training_vectors(evaluation, rng)
    return {
        kind: Vectors(
            groups, halves, {name: np.concatenate(found) for name, found in parts[kind].items()}, training[kind]
        )
        for kind in KINDS
    }


def deal_windows(episodes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Group [windows] of each window's episode, at most 20 groups, and its half [windows]: of each episode every other window.

    Raises:
        ValueError: Fewer than two episodes, or no group has a window in each half.
    """
    names = sorted(set(episodes))
    if len(names) < 2:
        raise ValueError(f"an interval over episodes needs at least two held-out episodes; got {len(names)}")
    num_groups = min(MAX_GROUPS, len(names))
    group_of = {name: position * num_groups // len(names) for position, name in enumerate(names)}
    seen = {name: position for position, name in enumerate(names)}  # odd numbers of windows do not all favour one half
    halves = []
    for name in episodes:
        halves.append(seen[name] % 2)
        seen[name] += 1
    return np.array([group_of[name] for name in episodes]), np.array(halves)


def _pick(tokens: Tensor, places: Tensor) -> np.ndarray:
    """[B, K, N, D] and [B, P] to [B, K, P, D]."""
    where = places[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
    return tokens.gather(2, where).cpu().numpy()


def _training_vectors(evaluation: EvaluationContext, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Single tokens and mean tokens of steps spread over the training episodes, [n, D] each."""
    segments = evaluation.training_segments()
    index, numbers = choose_windows(segments, 1, max(2, MAX_TRAINING_VECTORS // len({s.episode for s in segments})))
    if len(numbers) > MAX_TRAINING_VECTORS:
        numbers = sorted(rng.choice(numbers, MAX_TRAINING_VECTORS, replace=False).tolist())
    per_step = max(1, MAX_TRAINING_VECTORS // len(numbers))
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    chosen = ChosenWindows(index, numbers)
    for _, _, window in evaluation.iter_windows(chosen, "training tokens", batch_size=16, device=torch.device("cpu")):
        h = window[:, 0]
        parts["token"] += [step.numpy()[rng.permutation(len(step))[:per_step]] for step in h]
        parts["pooled"].append(h.mean(dim=1).numpy())
    return {kind: np.concatenate(found) for kind, found in parts.items()}


def measure_distances(vectors: Vectors) -> Distances:
    """Both distances of every horizon, with intervals over groups of episodes.

    Raises:
        TooFewError: A half has too few vectors for a covariance, or they are all alike.
    """
    from sklearn.decomposition import PCA

    num_groups = int(vectors.groups.max()) + 1
    horizon, per_window, width = next(iter(vectors.values.values())).shape[1:]
    num_vectors = int(np.bincount(vectors.halves, minlength=2).min()) * per_window
    num_dims = min(width, MAX_DIMS, num_vectors // MIN_VECTORS_PER_DIM, len(vectors.training) // MIN_VECTORS_PER_DIM)
    kept = [
        min(np.bincount(vectors.halves[vectors.groups != group], minlength=2)) for group in range(num_groups)
    ]  # windows of the smaller half when a group is left out
    if num_dims < 1 or num_groups < 2 or min(kept) < 2:
        raise TooFewError(
            f"a distance of distributions needs {2 * MIN_VECTORS_PER_DIM} held-out windows or more, two in each half "
            f"whichever group of episodes is left out, and {MIN_VECTORS_PER_DIM} training vectors; got {len(vectors.halves)} "
            f"windows in {num_groups} groups and {len(vectors.training)} training vectors: raise "
            "evaluate.windows_per_episode, or leave distances out of evaluate.measure"
        )
    bandwidth = median_distance(vectors.training[:: -(-len(vectors.training) // MAX_VECTORS)])
    basis = PCA(num_dims, svd_solver="covariance_eigh").fit(vectors.training.astype(np.float64))
    found: dict[str, dict[str, list[Estimate]]] = {"frechet": {}, "mmd": {}}
    for name in COMPARED:
        for kind in found.values():
            kind[name] = []
        for step in range(horizon):
            sides = [
                (vectors.values[given][vectors.halves == half, step], vectors.groups[vectors.halves == half])
                for half in (0, 1)
                for given in (name, TRUE)
            ]  # given of half 0, true of half 0, given of half 1, true of half 1
            found["frechet"][name].append(_frechet(basis.transform, sides, num_groups))
            found["mmd"][name].append(_mmd(sides, num_groups, bandwidth))
    return Distances(
        found["frechet"],
        found["mmd"],
        num_dims,
        float(basis.explained_variance_ratio_.sum()),
        bandwidth,
        num_vectors,
    )


Side = tuple[np.ndarray, np.ndarray]
"""Vectors [windows, P, D] and the groups [windows] they are of."""


def _frechet(project: Callable[[np.ndarray], np.ndarray], sides: Sequence[Side], num_groups: int) -> Estimate:
    """Mean of (given of half 0, true of half 1) and (given of half 1, true of half 0)."""
    moments = [
        sum_moments(project(_flat(values).astype(np.float64)), np.repeat(groups, values.shape[1]), num_groups)
        for values, groups in sides
    ]

    def statistic(kept: np.ndarray) -> float:
        first, first_true, second, second_true = (Moments(*(part[kept].sum(axis=0) for part in m)) for m in moments)
        return (frechet_distance(first, second_true) + frechet_distance(second, first_true)) / 2

    found = jackknife(statistic, num_groups)
    return found._replace(low=max(0.0, found.low))  # no distance is below 0


def _mmd(sides: Sequence[Side], num_groups: int, bandwidth: float) -> Estimate:
    """The same of the squared MMD, on whole vectors."""
    flat = [(_flat(values), np.repeat(groups, values.shape[1])) for values, groups in sides]
    pairs = [
        sum_kernels(one[0], other[0], (one[1], other[1]), num_groups, bandwidth)
        for one, other in ((flat[0], flat[3]), (flat[2], flat[1]))
    ]
    return jackknife(lambda kept: sum(mmd(pair, kept) for pair in pairs) / 2, num_groups)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])


def write_distances(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    """Write distance.csv and return the sections `distance` and `distance_ci` of metrics.json.

    Names: `frechet_token_step1`, `mmd_pooled_step1`; with `_copy_last` or `_floor` before `_step` those of the baseline and of
    two halves of the true tokens; steps 1 and K, the table holds all. Both are squared distances. Intervals are of the jackknife over groups of episodes.

    Where there is too little held out for a distribution, the section holds only the number of windows and there is no table; why
    is said on stderr.

    Raises:
        ValueError: Fewer than two episodes with a long enough segment are held out.
    """
    vectors = collect_vectors(evaluation)
    try:
        found = {kind: measure_distances(some) for kind, some in vectors.items()}
    except TooFewError as error:
        print(f"no distances of distributions: {error}", file=sys.stderr)
        return {"distance": {"num_windows": len(vectors["token"].halves)}, "distance_ci": {}}
    rows: list[dict[str, float]] = [{"horizon": step + 1} for step in range(evaluation.config.evaluate.horizon)]
    section: dict[str, float] = {"num_windows": len(vectors["token"].halves)}
    intervals: dict[str, list[float]] = {}
    for kind, distances in found.items():
        section |= {
            f"num_dims_{kind}": distances.num_dims,
            f"num_vectors_{kind}": distances.num_vectors,
            f"kept_variance_{kind}_share": distances.kept_variance,
            f"bandwidth_{kind}": distances.bandwidth,
        }
        for measure in ("frechet", "mmd"):
            for name, end in COMPARED.items():
                for row, estimate in zip(rows, getattr(distances, measure)[name], strict=True):
                    column = f"{measure}_{kind}{end}"
                    row |= {column: estimate.mean, f"{column}_low": estimate.low, f"{column}_high": estimate.high}
                    if row["horizon"] in (1, len(rows)):
                        section[f"{column}_step{row['horizon']}"] = estimate.mean
                        intervals[f"{column}_step{row['horizon']}"] = [estimate.low, estimate.high]
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
