"""AdamW as V-JEPA 2-AC is trained with: which parameters decay, and the rates of each training step.

Schedules are pure functions of the training step k, counted from 1: the value for k is set before the k-th update.
Beyond `num_steps` the last value holds. Nothing is remembered, so a resumed training needs its step and nothing else.
"""

import math

import torch
from torch import nn

from jepa_cache.config.paths import require
from jepa_cache.config.schema import TrainConfig

BETAS = (0.9, 0.999)
EPS = 1e-8
_FUSED_DEVICES = {"cpu", "cuda"}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters of a model into those that decay and those that do not; no group is empty.

    Biases (a name that contains "bias") and 1-d tensors (norm scales) do not decay. Frozen parameters are in no group.

    Source: V-JEPA 2-AC training recipe.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if "bias" in name or parameter.ndim == 1 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": plain, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """Make the AdamW of the official recipe, as one kernel where the device has it (same numbers, a third of the time).

    The model must already lie on the device it is trained on. `adamw8bit` keeps both moments in 8 bits by blocks (2 bytes
    a weight instead of 8) and needs bitsandbytes, a ValueError where that is not installed.

    Source: V-JEPA 2-AC training recipe; 8 bits: Dettmers et al., arXiv 2110.02861, as bitsandbytes has it.
    """
    groups = parameter_groups(model, weight_decay)
    if kind == "adamw8bit":
        require("bitsandbytes", "adamw8bit", "train.optimizer=adamw8bit")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=lr, betas=BETAS, eps=EPS)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=devices <= _FUSED_DEVICES)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the rates of the coming training step; groups that do not decay keep a decay of 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay


def rates_at(k: int, settings: TrainConfig) -> tuple[float, float]:
    """Return learning rate and weight decay of training step k, counted from 1, under a training's settings."""
    steps = {"num_steps": settings.num_steps, "num_warmup": settings.num_warmup}
    rates = {"start_lr": settings.start_lr, "peak_lr": settings.lr, "final_lr": settings.final_lr}
    if settings.schedule == "wsd":
        lr = warmup_stable_decay(k, num_anneal=settings.num_anneal, **steps, **rates)
    else:
        lr = warmup_cosine(k, **steps, **rates)
    decays = {"start_weight_decay": settings.weight_decay, "final_weight_decay": settings.final_weight_decay}
    return lr, cosine_weight_decay(k, num_steps=settings.num_steps, **decays)


def warmup_stable_decay(
    k: int, *, num_steps: int, num_warmup: int, num_anneal: int, start_lr: float, peak_lr: float, final_lr: float
) -> float:
    """Return the learning rate of training step k: linear warm-up from `start_lr` at k = 0, constant, linear decay.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (4,500 + 85,500 + 4,500 training steps); official "WSD" schedule.
    """
    if k < num_warmup:
        return start_lr + k / num_warmup * (peak_lr - start_lr)
    first_decay = num_steps - num_anneal
    if k < first_decay or num_anneal == 0:
        return peak_lr
    return peak_lr + min(1.0, (k - first_decay) / num_anneal) * (final_lr - peak_lr)


def warmup_cosine(
    k: int, *, num_steps: int, num_warmup: int, start_lr: float, peak_lr: float, final_lr: float
) -> float:
    """Return the learning rate of training step k: linear warm-up, then half a cosine down to `final_lr`.

    Source: V-JEPA 2 pretraining, arXiv 2506.09985.
    """
    if k < num_warmup:
        return start_lr + k / num_warmup * (peak_lr - start_lr)
    return _half_cosine(min(1.0, (k - num_warmup) / max(1, num_steps - num_warmup)), peak_lr, final_lr)


def cosine_weight_decay(k: int, *, num_steps: int, start_weight_decay: float, final_weight_decay: float) -> float:
    """Return the weight decay of training step k: half a cosine from its value at k = 0 to that at `num_steps`.

    Source: V-JEPA 2-AC, arXiv 2506.09985; the released recipe has 0.04 at both ends.
    """
    return _half_cosine(min(1.0, k / num_steps), start_weight_decay, final_weight_decay)


def _half_cosine(progress: float, start: float, final: float) -> float:
    return final + (start - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
