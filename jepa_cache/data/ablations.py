"""Action ablations: the same predictor is given no actions, those of another episode, or those of the wrong step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jepa_cache.actions import zero_actions
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex

SHUFFLED, ZERO, PERMUTED = "shuffled_actions", "zero_actions", "permuted_actions"
NEXT, PREVIOUS = "next_actions", "previous_actions"
ABLATIONS = (SHUFFLED, ZERO, PERMUTED, NEXT, PREVIOUS)
SHIFTED = (NEXT, PREVIOUS)
PERMUTED_STREAM = 1  # of the seed; the donors of whole windows have the seed's own


def action_ablations(
    dataset: CachedDataset, scaler: Scaler, index: WindowIndex, numbers: Sequence[int], *, seed: int
) -> dict[str, np.ndarray]:
    """Scaled actions of every ablation for some windows: [windows, T-1, A] float32 each.

    Windows that go forward only. Other actions are of windows of the same step length.

    - `shuffled_actions`: those of a whole window of another episode.
    - `permuted_actions`: for each step another one, of any window of another episode.
    - `zero_actions`: raw zeros before scaling, one-hot columns kept.
    - `next_actions`, `previous_actions`: the true ones, one step too early or too late. A window without the neighbour
      in its segment is NaN in both, so that both are measured on the same windows.

    Raises:
        ValueError: When all windows, or all of one step length, are of one episode.
    """
    windows = [index[number] for number in numbers]
    episodes = [index.segments[window.segment].episode for window in windows]
    num_rows = index.num_steps - 1
    shape = len(windows), num_rows, len(dataset.space.actions)
    raw, after, before = (np.full(shape, np.nan, np.float32) for _ in range(3))
    for place, window in enumerate(windows):
        step_length = window.step_length
        actions, _ = dataset.controls(window.store, step_length)
        segment = index.segments[window.segment]
        raw[place] = actions[window.rows(num_rows)]
        # The last row of a segment leads nowhere, so the row after the window's must lie before it.
        first, last = window.start - step_length, window.start + (num_rows + 1) * step_length
        if segment.start <= first and last < segment.stop:
            after[place] = actions[window._replace(start=window.start + step_length).rows(num_rows)]
            before[place] = actions[window._replace(start=first).rows(num_rows)]
    lengths = np.array([window.step_length for window in windows])
    donors, permuted = np.empty(len(windows), np.int64), np.empty_like(raw)
    for alike in (np.flatnonzero(lengths == step_length) for step_length in dict.fromkeys(lengths.tolist())):
        # An action that leads further than the window's own would be known by its size.
        names = [episodes[place] for place in alike]
        donors[alike] = alike[choose_donors(names, seed=seed)]
        permuted[alike] = raw[alike].reshape(-1, shape[-1])[draw_rows(names, num_rows, seed=seed)]
    given = {
        SHUFFLED: raw[donors],
        ZERO: zero_actions(raw, dataset.space),
        PERMUTED: permuted,
        NEXT: after,
        PREVIOUS: before,
    }
    return {name: scaler.actions.apply(values) for name, values in given.items()}


def choose_donors(episodes: Sequence[str], *, seed: int) -> np.ndarray:
    """For every window another one, of another episode, whose actions or goal it is given: [windows] positions.

    Shuffled actions keep their marginals and their order in time; only what links them to the frames is gone.

    Raises:
        ValueError: When all windows are of one episode.
    """
    generator = np.random.default_rng(seed)
    if len(set(episodes)) < 2:
        raise ValueError(
            "ablations by another episode need windows of at least two held-out episodes; lower evaluate.horizon where these are too short for "
            f"it, raise split.val_share, try another split.seed, or add recordings (held out: {', '.join(sorted(set(episodes))) or 'none'})"
        )
    positions = positions_of(episodes)
    return np.array([draw_others(positions[name], len(episodes), generator) for name in episodes])


def draw_rows(episodes: Sequence[str], num_rows: int, *, seed: int) -> np.ndarray:
    """For every step of every window a row of another episode: [windows, rows] positions among all windows' rows.

    Each is drawn alone and evenly, so the marginals are those of the other episodes and the order in time is gone too.
    """
    positions = positions_of(episodes)
    generator = np.random.default_rng([seed, PERMUTED_STREAM])
    rows = np.empty((len(episodes), num_rows), np.int64)
    for place, name in enumerate(episodes):
        donors = draw_others(positions[name], len(episodes), generator, num_rows)
        rows[place] = donors * num_rows + generator.integers(num_rows, size=num_rows)
    return rows


def positions_of(names: Iterable[str]) -> dict[str, np.ndarray]:
    """Each name's positions, in order, and names in the order of their first."""
    found: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        found.setdefault(name, []).append(position)
    return {name: np.array(positions) for name, positions in found.items()}


def draw_others(
    own: np.ndarray, num_all: int, generator: np.random.Generator, count: int | None = None
) -> np.ndarray | np.int64:
    """Draw positions below `num_all` that are not among the sorted `own`: as `choice` among the others, which are never listed.

    To list them for every window costs windows times windows, minutes for ten thousand episodes.
    """
    drawn = generator.integers(0, num_all - len(own), size=count)
    # The n-th of the others stands behind every own one that has at most n others before it.
    return drawn + np.searchsorted(own - np.arange(len(own)), drawn, side="right")
