"""The world-model loss of V-JEPA 2-AC: teacher forcing plus a rollout from the first step.

With h the layer-normed tokens of the window, z predictions, and p = `loss_exp`:

    jloss = mean |z_tf - h[1:]|^p / p          every step from the true ones before it
    sloss = mean |z_ar - h[s+1:s+1+R]|^p / p   R = auto_steps steps from step s, each from its own predictions
    total = jloss + sloss

Nothing is detached: gradients of the rollout flow through every step that it fed back.

In the released recipe s is 0. A new term: compute it in `world_model_loss`, add it to `total` times a weight of the
schema, put it into the scalars and its name into `TERMS`: it is averaged over batches and processes, validated, logged.
"""

from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from jepa_cache.config.schema import TrainConfig
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import AUTOCAST, LatentModel, Predictor, as_reps, continue_rollout

TERMS = ("total", "jloss", "sloss")
"""Scalars that every training and every validation logs, in the order of the columns."""


class Losses(NamedTuple):
    """The loss of one batch and the predictions that it was made of."""

    scalars: dict[str, Tensor]
    """[] float32 each, logged under its key: `TERMS`, and detached the rollout loss of each step, `sloss_h1` to..."""
    z_tf: Tensor
    """[B, T-1, N, D] float32 teacher-forced predictions of steps 1 to T-1."""
    z_ar: Tensor
    """[B, R, N, D] float32 rolled-out predictions of steps s+1 to s+R, s = rollout_start."""
    jloss_by_window: Tensor
    """[B] float32, detached: the teacher-forced loss of each window; their mean is `jloss`."""

    @property
    def total(self) -> Tensor:
        """[] float32; what is minimised."""
        return self.scalars["total"]


class Objective(nn.Module):
    """The predictor with its loss as one module, so that DDP sees one forward pass for each backward pass.

    Only the predictor runs in the low precision; norms and losses are float32.
    """

    def __init__(self, predictor: nn.Module, settings: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.predictor = predictor
        self._settings, self._device = settings, device

    def forward(self, tokens: Tensor, actions: Tensor, states: Tensor, rollout_start: int = 0) -> Losses:
        """Compute the loss of one batch: tokens [B, T, N, D], actions [B, T-1, A], states [B, T, S]."""
        settings = self._settings
        with ExitStack() as passes:
            # Around all of them, as autocast forgets its casts of other weights where the outermost context ends.
            passes.enter_context(torch.autocast(self._device.type, enabled=False))
            for it in self.predictor.modules():
                if isinstance(it, ACPredictor):
                    passes.enter_context(it.cast_once(AUTOCAST[settings.precision], settings.auto_steps))
            return world_model_loss(
                self.latent.predict,
                tokens,
                actions,
                states,
                loss_exp=settings.loss_exp,
                auto_steps=settings.auto_steps,
                normalize_reps=settings.normalize_reps,
                rollout=settings.rollout,
                rollout_start=rollout_start,
            )

    @property
    def latent(self) -> LatentModel:
        """The predictor in the training's precision, with the norm that it is trained under."""
        return LatentModel(self.predictor, self._settings.normalize_reps, self._settings.precision)


def world_model_loss(
    predictor: Predictor,
    tokens: Tensor,
    actions: Tensor,
    states: Tensor,
    *,
    loss_exp: float = 1.0,
    auto_steps: int = 2,
    normalize_reps: bool = True,
    rollout: Literal["fixed", "legacy"] = "fixed",
    rollout_start: int = 0,
) -> Losses:
    """Compute the loss of one batch of windows.

    The rollout reuses the keys and values that the teacher-forced pass has of the steps up to its start, so it costs
    auto_steps - 1 single steps. By causality this is exact, gradients included.

    Args:
        predictor: an `ACPredictor`, or a module that wraps one.
        tokens: [B, T, N, D] encoder output as stored, any floating dtype; layer-normed here where `normalize_reps`.
        actions: [B, T-1, A]; `actions[t]` leads from step t to t+1.
        states: [B, T, S]; true states also condition the rollout.
        loss_exp: p > 0; 1 is L1, 2 half the mean squared error.
        auto_steps: R >= 1, steps of the rollout; capped at T-1.
        normalize_reps: parameter-free layer norm of tokens and of every prediction.
        rollout: `fixed` feeds the prediction of step 1 as step 1; `legacy` the teacher-forced prediction of step 2
            in its place, the rule before June 2025, under which the released weights were trained (needs T >= 3).
        rollout_start: s, last true step that the rollout has seen; 0 in the released recipe. R is capped at T-1-s.

    Returns:
        The scalars and the predictions; norms and losses are float32 also under autocast.

    Raises:
        ValueError: the window is too short, or shapes do not fit.

    Source: V-JEPA 2-AC, arXiv 2506.09985; `legacy` is the rule before vjepa2 pull request 25.
    """
    num_steps, least = tokens.shape[1], 3 if rollout == "legacy" else 2
    if num_steps < least + rollout_start or actions.shape[1] != num_steps - 1 or states.shape[1] != num_steps:
        raise ValueError(
            f"a window of T steps has T-1 actions and T states, and T >= {least + rollout_start} for rollout {rollout!r} from step "
            f"{rollout_start}; got T = {num_steps}, {actions.shape[1]} actions and {states.shape[1]} states"
        )
    num_predicted = num_steps - 1
    auto_steps = min(auto_steps, num_predicted - rollout_start)
    h = as_reps(tokens, normalize_reps)
    # Keys and values are wanted up to the start only, and not at all where nothing is fed back.
    out = predictor(h[:, :-1], actions, states[:, :-1], None, rollout_start + 1 if auto_steps > 1 else 0)
    z_tf = as_reps(out.tokens, normalize_reps)
    fed = rollout_start + (0 if rollout == "fixed" else 1)
    later = slice(rollout_start + 1, rollout_start + auto_steps)
    z_ar = continue_rollout(
        predictor,
        z_tf[:, fed : fed + 1],
        actions[:, later],
        states[:, later],
        past=out.past,
        normalize_reps=normalize_reps,
    )
    forced = _power_errors(z_tf, h[:, 1:], loss_exp)
    jloss = forced.mean()
    rolled = _power_errors(z_ar, h[:, rollout_start + 1 : rollout_start + 1 + auto_steps], loss_exp)
    sloss = rolled.mean()
    scalars = {"total": jloss + sloss, "jloss": jloss, "sloss": sloss}
    by_horizon = rolled.detach().mean(dim=(0, 2, 3)).unbind()
    scalars |= {f"sloss_h{step}": value for step, value in enumerate(by_horizon, start=1)}
    return Losses(scalars, z_tf, z_ar, forced.detach().mean(dim=(1, 2, 3)))


def _power_errors(predicted: Tensor, target: Tensor, p: float) -> Tensor:
    """|predicted - target|^p / p, element by element."""
    error = (predicted - target).abs()
    return error if p == 1.0 else error.pow(p) / p
