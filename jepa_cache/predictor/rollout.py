"""Predictions from a predictor: with true tokens (teacher forcing) and with its own (rollout).

Pure functions that training, validation and evaluation share. They only call the predictor, so that a wrapped one (DDP,
LoRA) serves as well, and they carry gradients unless the caller switches them off.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_cache.predictor.layers import KeysValues
from jepa_cache.predictor.model import ACPredictor, PredictorOutput

Predictor = Callable[..., PredictorOutput]
"""An `ACPredictor`, or a module that wraps one and is called alike."""

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The low dtype of a precision."""
PASS_BYTES = 4 * 2**30
"""What one pass without gradients is given beside the weights: more windows or samples go through a transformer in parts."""

REPS_NORM_EPS = 1e-5
"""Of the parameter-free layer norm on tokens; the blocks' own norms have 1e-6."""


def normalize_tokens(tokens: Tensor) -> Tensor:
    """Apply the parameter-free layer norm that the predictor's inputs, targets and outputs share.

    Tokens [..., D] of any floating dtype become float32 (float64 stays), also under autocast: mean 0, variance 1 over D.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (`normalize_reps`; eps 1e-5).
    """
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    return F.layer_norm(tokens, tokens.shape[-1:], eps=REPS_NORM_EPS)


def as_reps(predicted: Tensor, normalize_reps: bool) -> Tensor:
    """Turn raw predictions [..., D] into what is compared and fed back: float32, layer-normed where `normalize_reps`."""
    if not predicted.is_floating_point():
        raise ValueError(
            f"tokens must be values, not the codes of a store ({predicted.dtype}); take `data.loader.to_device` first"
        )
    if normalize_reps:
        return normalize_tokens(predicted)
    return predicted if predicted.dtype == torch.float64 else predicted.float()


def l1_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over tokens and channels: [B, T, N, D] twice to [B, T]."""
    return (predicted - target).abs().mean(dim=(-2, -1))


def repeat_past(past: Sequence[KeysValues] | None, count: int) -> Sequence[KeysValues] | None:
    """Return the past of one context (B = 1) for `count` continuations of it, without copying."""
    return past and [(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in past]


def continue_rollout(
    predictor: Predictor,
    first: Tensor,
    actions: Tensor,
    states: Tensor,
    *,
    past: Sequence[KeysValues],
    normalize_reps: bool = True,
) -> Tensor:
    """Feed a predicted step back, again and again: one further prediction for every row of `actions`.

    Args:
        predictor: an `ACPredictor`.
        first: [B, 1, N, E] the first predicted step, as it is to be fed.
        actions: [B, R, A] that lead onwards from the first predicted step; R may be 0.
        states: [B, R, S] at the predicted steps.
        past: keys and values of the steps before `first`.
        normalize_reps: layer-norm each prediction before it is fed back.

    Returns:
        [B, 1+R, N, E] float32: `first` and the R predictions after it.
    """
    predicted = [first]
    last = actions.shape[1] - 1
    for row in range(last + 1):
        now = slice(row, row + 1)
        # Nothing follows the last row: the keys and values of all steps would be held for nothing.
        out = predictor(predicted[-1], actions[:, now], states[:, now], past, 0 if row == last else None)
        past = out.past
        predicted.append(as_reps(out.tokens, normalize_reps))
    return torch.cat(predicted, dim=1)


class TeacherForcedAndRollout(NamedTuple):
    """Predictions of the same windows with true tokens and with the predictor's own, float32.

    Attributes:
        teacher_forced: [B, P, N, E] of steps 1 to P.
        open_loop: [B, K, N, E] of steps C to C+K-1.
    """

    teacher_forced: Tensor
    open_loop: Tensor


class LatentModel(NamedTuple):
    """A predictor together with the norm that it was trained under: all that evaluation, planning and the API hold.

    Actions and states are scaled as in training; tokens `h` are those that `as_reps` gives. Predictions are float32 and
    normed before they are returned and fed back; in another `precision` than float32 the predictor alone runs under autocast.
    """

    predictor: Predictor
    normalize_reps: bool = True
    precision: str = "float32"  # of AUTOCAST

    def predict(self, tokens: Tensor, *arguments: Any) -> PredictorOutput:
        """Call the predictor, which gives predictions that are not normed."""
        dtype = AUTOCAST[self.precision]
        with torch.autocast(tokens.device.type, dtype) if dtype is not None else nullcontext():
            return self.predictor(tokens, *arguments)

    def rows_at_once(self, num_steps: int, num_kept: int) -> int:
        """How many windows or samples, 1 or more, go through a pass over `num_steps` steps while keys and values of `num_kept` are held."""
        if not isinstance(self.predictor, ACPredictor):
            return sys.maxsize
        return max(
            1, PASS_BYTES // self.predictor.bytes_per_row(num_steps, num_kept, 4 if self.precision == "float32" else 2)
        )

    def as_reps(self, tokens: Tensor) -> Tensor:
        """Turn tokens [..., D] as they are stored or predicted into what is compared and fed back."""
        return as_reps(tokens, self.normalize_reps)

    def teacher_forcing(self, h: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """Predict every step of a window from the true steps before it.

        Args:
            h: [B, T, N, E] true tokens; the last step is a target only.
            actions: [B, T-1, A]; `actions[t]` leads from step t to t+1.
            states: [B, T, S] or [B, T-1, S].

        Returns:
            [B, T-1, N, E] float32 predictions of steps 1 to T-1.

        """
        if h.ndim != 4 or h.shape[1] < 2:
            raise ValueError(f"teacher forcing needs tokens [B, T, N, E] of at least two steps, got {list(h.shape)}")
        num_steps = h.shape[1] - 1
        return self.as_reps(self.predict(h[:, :num_steps], actions, states[:, :num_steps], None, 0).tokens)

    def open_loop(self, h: Tensor, actions: Tensor, states: Tensor, horizon: int) -> Tensor:
        """Predict K steps after a true context, each from the predictions before it.

        The context is computed once; every further step costs one step, as keys and values of earlier ones are kept.

        Args:
            h: [B, C, N, E] true context of C >= 1 steps.
            actions: [B, C+K-1, A]; `actions[t]` leads from step t to t+1.
            states: [B, C+K-1, S]; true or assumed states, also of the predicted steps.
            horizon: K >= 1.

        Returns:
            [B, K, N, E] float32 predictions of steps C to C+K-1.
        """
        num_context = h.shape[1]
        num_rows = num_context + horizon - 1
        if horizon < 1:
            raise ValueError(f"rollout: horizon must be at least 1, got {horizon}")
        for name, rows in (("actions", actions), ("states", states)):
            if rows.shape[1] != num_rows:
                raise ValueError(
                    f"rollout: {name} must have {num_rows} rows ({num_context} context steps + horizon {horizon} - 1), "
                    f"got {rows.shape[1]}"
                )
        counts = {"num_forced": 1, "num_context": num_context, "horizon": horizon}
        return self.both_ways(h, actions, states, **counts).open_loop

    def both_ways(
        self, h: Tensor, actions: Tensor, states: Tensor, *, num_forced: int, num_context: int, horizon: int
    ) -> TeacherForcedAndRollout:
        """Predict by teacher forcing and in open loop, at the cost of one pass and horizon - 1 single steps.

        Windows that together would take more than `PASS_BYTES` go through in parts.

        Args:
            h: [B, T, N, E] true tokens; at least the larger of P and C steps are read.
            actions: [B, T-1, A]; `actions[t]` leads from step t to t+1.
            states: [B, T, S].
            num_forced: P >= 1.
            num_context: C >= 1 true steps before the open loop.
            horizon: K >= 1.
        """
        num_steps, last = max(num_forced, num_context), num_context + horizon - 1
        kept = num_context if horizon > 1 else 0
        # The past of a step is held while that of the next is made.
        at_once = self.rows_at_once(num_steps, max(kept, 2 * last - 3) if kept else 0)
        if len(h) > at_once:
            counts = {"num_forced": num_forced, "num_context": num_context, "horizon": horizon}
            parts = zip(*(rows.split(at_once) for rows in (h, actions, states)), strict=True)
            joined = zip(*(self.both_ways(*part, **counts) for part in parts), strict=True)
            return TeacherForcedAndRollout(*map(torch.cat, joined))
        out = self.predict(h[:, :num_steps], actions[:, :num_steps], states[:, :num_steps], None, kept)
        forced = self.as_reps(out.tokens)
        rolled = continue_rollout(
            self.predict,
            forced[:, num_context - 1 : num_context],
            actions[:, num_context:last],
            states[:, num_context:last],
            past=out.past,
            normalize_reps=self.normalize_reps,
        )
        return TeacherForcedAndRollout(forced[:, :num_forced], rolled)

    def read_past(self, h: Tensor, actions: Tensor, states: Tensor) -> Sequence[KeysValues] | None:
        """Return keys and values of the steps before the last one of a context, for many continuations of it.

        The context is h [B, C, N, E], with actions [B, C-1, A] between its steps and states [B, C, S]; None for C = 1.
        """
        if h.shape[1] == 1:
            return None
        return self.predict(h[:, :-1], actions, states[:, :-1]).past
