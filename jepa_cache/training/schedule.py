"""Learning-rate and weight-decay schedules as pure functions of the train step.

k counts train steps from 1: the value for k is set before the k-th update. Nothing is remembered between calls, so that a resumed
training takes up the schedule at its step and nothing else.
"""

import math

from jepa_cache.config.schema import TrainConfig


def warmup_stable_decay(
    k: int, *, num_steps: int, num_warmup: int, num_anneal: int, start_lr: float, peak_lr: float, final_lr: float
) -> float:
    """Return the learning rate of train step k: linear warm-up, constant, linear decay.

    Args:
        k: train step, from 1; beyond `num_steps` the last value holds.
        num_steps: train steps in all.
        num_warmup: k below this is warm-up.
        num_anneal: train steps of the decay at the end.
        start_lr: where the warm-up starts (k = 0, never used itself).
        peak_lr: of the constant part.
        final_lr: of the last train step.

    Raises:
        ValueError: k is below 1, a count is negative, or warm-up and decay do not fit into `num_steps`.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (4,500 + 85,500 + 4,500 train steps); official "WSD" schedule.
    """
    _check(k, num_steps, num_warmup, num_anneal)
    if k < num_warmup:
        return start_lr + k / num_warmup * (peak_lr - start_lr)
    first_decay = num_steps - num_anneal
    if k < first_decay or num_anneal == 0:
        return peak_lr
    return peak_lr + min(1.0, (k - first_decay) / num_anneal) * (final_lr - peak_lr)


def warmup_cosine(
    k: int, *, num_steps: int, num_warmup: int, start_lr: float, peak_lr: float, final_lr: float
) -> float:
    """Return the learning rate of train step k: linear warm-up, then half a cosine down to `final_lr`.

    Args:
        k: train step, from 1; beyond `num_steps` the last value holds.
        num_steps: train steps in all.
        num_warmup: k below this is warm-up.
        start_lr: where the warm-up starts.
        peak_lr: at its end.
        final_lr: of the last train step.

    Raises:
        ValueError: k is below 1, a count is negative, or the warm-up does not fit into `num_steps`.

    Source: V-JEPA 2 pretraining, arXiv 2506.09985.
    """
    _check(k, num_steps, num_warmup, 0)
    if k < num_warmup:
        return start_lr + k / num_warmup * (peak_lr - start_lr)
    progress = min(1.0, (k - num_warmup) / max(1, num_steps - num_warmup))
    return final_lr + (peak_lr - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_weight_decay(k: int, *, num_steps: int, start_weight_decay: float, final_weight_decay: float) -> float:
    """Return the weight decay of train step k: half a cosine from the start value to the final one over all train steps.

    Args:
        k: train step, from 1; beyond `num_steps` the last value holds.
        num_steps: train steps in all.
        start_weight_decay: at k = 0.
        final_weight_decay: at k = `num_steps`; equal to the start in the released recipe (0.04).

    Raises:
        ValueError: k is below 1.

    Source: V-JEPA 2-AC, arXiv 2506.09985.
    """
    _check(k, num_steps, 0, 0)
    progress = min(1.0, k / num_steps)
    return final_weight_decay + (start_weight_decay - final_weight_decay) * 0.5 * (1.0 + math.cos(math.pi * progress))


def rates_at(k: int, settings: TrainConfig) -> tuple[float, float]:
    """Return learning rate and weight decay of train step k, counted from 1, under a training's settings."""
    decay = cosine_weight_decay(
        k,
        num_steps=settings.num_steps,
        start_weight_decay=settings.weight_decay,
        final_weight_decay=settings.final_weight_decay,
    )
    common = {
        "num_steps": settings.num_steps,
        "num_warmup": settings.num_warmup,
        "start_lr": settings.start_lr,
        "peak_lr": settings.lr,
        "final_lr": settings.final_lr,
    }
    if settings.schedule == "wsd":
        return warmup_stable_decay(k, num_anneal=settings.num_anneal, **common), decay
    return warmup_cosine(k, **common), decay


def _check(k: int, num_steps: int, num_warmup: int, num_anneal: int) -> None:
    if k < 1:
        raise ValueError(f"schedule: train steps count from 1, got k = {k}")
    if num_steps < 1 or num_warmup < 0 or num_anneal < 0 or num_warmup + num_anneal > num_steps:
        raise ValueError(
            f"schedule: num_warmup + num_anneal must fit into num_steps, got {num_warmup} + {num_anneal} of {num_steps}"
        )
