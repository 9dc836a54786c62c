"""One predictor step with any action: what is shared by all actions of a window is computed once, and other actions are recorded ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from jepa_cache.data.ablations import draw_others
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.predictor.rollout import repeat_past


class OneStep:
    """One held-out window of C + 1 steps: its context computed once, then the energy of any last action."""

    def __init__(self, evaluation: EvaluationContext, index: WindowIndex, number: int) -> None:
        """Read one window, whose last step is the one to be foreseen, and compute what all actions share."""
        batch, h = evaluation.read_windows(index, [number])
        states = batch.states
        self._evaluation = evaluation
        self._newest, self._target, self._state = h[:, -2:-1], h[:, -1], states[:, -2:-1]
        self._past = evaluation.model.read_past(h[:, :-1], batch.actions[:, :-1], states[:, :-1])

    def energies(self, actions: np.ndarray) -> np.ndarray:
        """Energies [n] float64 of unscaled actions [n, A]; the state stays as recorded."""
        evaluation, size = self._evaluation, self._evaluation.config.evaluate.batch_size
        scaled = torch.from_numpy(evaluation.scaler.actions.apply(actions)).to(evaluation.device)
        return torch.cat([self._pass(part[:, None]) for part in scaled.split(size)]).double().cpu().numpy()

    def _pass(self, actions: torch.Tensor) -> torch.Tensor:
        count = len(actions)
        tokens, states = (given.expand(count, *given.shape[1:]) for given in (self._newest, self._state))
        out = self._evaluation.model.predictor(tokens, actions, states, None, repeat_past(self._past, count), 0)
        z = self._evaluation.model.as_reps(out.tokens[:, 0])
        return (z - self._target).abs().mean(dim=(1, 2), dtype=torch.float64)


class ActionPool:
    """The recorded actions of a data set, to draw some of other episodes."""

    def __init__(self, dataset: CachedDataset, segments: Sequence[Segment]) -> None:
        """Collect the actions inside the segments.

        Args:
            dataset: The cached data set.
            segments: Of training and held-out episodes.
        """
        self._one_hot = np.array([column.kind == "onehot" for column in dataset.space.actions])
        self._dataset_of = [part.dataset for part, _ in dataset.manifest.stores]
        parts: dict[str, list[np.ndarray]] = {}
        rows_of: dict[str, dict[str, list[np.ndarray]]] = {}
        ends: dict[str, int] = {}
        for segment in segments:
            name = self._dataset_of[segment.store]
            rows = dataset.controls(segment.store)[0][segment.start : segment.stop - 1]
            first = ends.setdefault(name, 0)
            ends[name] += len(rows)
            parts.setdefault(name, []).append(rows)
            rows_of.setdefault(name, {}).setdefault(segment.episode, []).append(np.arange(first, ends[name]))
        self._actions = {name: np.concatenate(rows) for name, rows in parts.items()}
        self._rows_of = {
            name: {episode: np.concatenate(rows) for episode, rows in of.items()} for name, of in rows_of.items()
        }

    def draw(self, count: int, like: np.ndarray, segment: Segment, rng: np.random.Generator) -> np.ndarray:
        """Draw actions [count, A] with replacement from other episodes of the same data set.

        One-hot columns (the slot that is selected at the step) stay as in `like` [A]: the frame shows them, so another one
        would give an action away.

        Raises:
            ValueError: There is no other episode.
        """
        name = self._dataset_of[segment.store]
        actions, own = self._actions[name], self._rows_of[name].get(segment.episode, np.empty(0, np.int64))
        if len(own) == len(actions):
            raise ValueError(
                f"the energy of {segment.episode!r} is compared with actions of other episodes of data set {name!r}, and "
                "there are none; add recordings, or leave energy out of evaluate.measure"
            )
        drawn = actions[draw_others(own, len(actions), rng, count)]
        return np.where(self._one_hot, like, drawn)

    def deviations(self, segment: Segment) -> np.ndarray:
        """Standard deviation [A] of the actions of a segment's data set."""
        return self._actions[self._dataset_of[segment.store]].std(axis=0, dtype=np.float64)


def open_window(evaluation: EvaluationContext, index: WindowIndex, number: int) -> tuple[OneStep, np.ndarray, Segment]:
    """A window of C + 1 steps, its last true action [A] unscaled, and the segment it lies in."""
    place = index[number]
    actions, _ = evaluation.dataset.controls(place.store)
    return OneStep(evaluation, index, number), actions[place.start + index.num_steps - 2], index.segments[place.segment]
