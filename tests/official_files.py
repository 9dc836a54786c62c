"""Weight files of exactly the official structure: what upstream's AC trainer writes, with its names, prefixes and other entries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def write_official_file(
    path: Path, predictor: Mapping[str, Tensor], encoder: Mapping[str, Tensor], *, prefix: str = "module."
) -> None:
    """Write `predictor`, `encoder`, `target_encoder`, and the entries that a trainer keeps beside them."""
    frozen = {f"{prefix}backbone.{name}": tensor for name, tensor in encoder.items()}
    torch.save(
        {
            "encoder": frozen,
            "predictor": {f"{prefix}{name}": tensor for name, tensor in predictor.items()},
            "opt": {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
                "param_groups": [{"lr": 1e-4}],
            },
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
            "target_encoder": frozen,
            "epoch": 315,
            "loss": 0.4,
            "batch_size": 8,
            "world_size": 32,
            "lr": 4.25e-4,
        },
        path,
    )


def without_storage(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of full size that take the room of one number, in memory and in a file: every element is the same one."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
