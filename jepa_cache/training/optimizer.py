"""AdamW as V-JEPA 2-AC is trained with: which parameters decay, and how the rates of a train step are set."""

import torch
from torch import nn

BETAS = (0.9, 0.999)
EPS = 1e-8
_FUSED_DEVICES = ("cpu", "cuda")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters of a model into those that decay and those that do not.

    No decay for biases (a name that contains "bias") and for 1-d tensors (norm scales). Frozen parameters are in no group.

    Args:
        model: whatever is trained.
        weight_decay: of the first group.

    Returns:
        Two optimiser groups with keys `params`, `weight_decay` and `decays`; a group without parameters is left out.

    Raises:
        ValueError: nothing is trainable.

    Source: V-JEPA 2-AC training recipe.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if "bias" in name or parameter.ndim == 1 else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("optimiser: the model has no trainable parameter; unfreeze some, or train another part")
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": plain, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, *, lr: float, weight_decay: float, kind: str = "adamw") -> torch.optim.Optimizer:
    """Make the AdamW of the official recipe, with its one-kernel form where the device has one (same numbers, a third of the time).

    Args:
        model: its parameters must already lie on the device they are trained on.
        lr: first learning rate; `set_rates` sets those of each train step.
        weight_decay: first weight decay.
        kind: `adamw`, or `adamw8bit` with both moments in 8 bits by blocks (2 bytes a weight instead of 8).

    Raises:
        ValueError: nothing is trainable, or bitsandbytes is not installed.

    Source: V-JEPA 2-AC training recipe; 8 bits: Dettmers et al., arXiv 2110.02861, as bitsandbytes has it.
    """
    groups = parameter_groups(model, weight_decay)
    if kind == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "train.optimizer is adamw8bit, but bitsandbytes is not installed; pip install 'jepa-cache[adamw8bit]', or set "
                "train.optimizer to adamw"
            ) from error
        return AdamW8bit(groups, lr=lr, betas=BETAS, eps=EPS)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=devices <= set(_FUSED_DEVICES))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the rates of the coming train step; groups that do not decay keep 0.

    Args:
        optimizer: from `build_optimizer`, or a wrapper that shows its `param_groups`.
        lr: learning rate of every group.
        weight_decay: of the groups that decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay
