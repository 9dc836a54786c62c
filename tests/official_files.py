"""Weight files of exactly the official structure: what upstream's trainers write, with their names, prefixes and other entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jepa_cache.config.schema import EncoderPreset
from jepa_cache.encoder import KINDS
from jepa_cache.encoder.preprocess import CropRule, normalise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What every trainer keeps beside the weights.
_BESIDE = {
    "opt": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
        "param_groups": [{"betas": (0.9, 0.999)}],
    },
    **{"epoch": 315, "loss": 0.4, "batch_size": 8, "world_size": 32, "lr": 4.25e-4},
}


def prepare(
    rule: CropRule,
    frames: np.ndarray,
    size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Frames [F, h, w, 3] uint8 as an encoder gets them by a crop rule: normalised float32 [F, 3, size, size]."""
    return normalise(rule.cut(frames, size), size, *rule.statistics(mean, std), in_levels=rule.in_levels)


def write_official_file(
    path: Path, predictor: Mapping[str, Tensor], encoder: Mapping[str, Tensor], *, prefix: str = "module."
) -> None:
    """Write `predictor`, `encoder`, `target_encoder`, and the entries that a trainer keeps beside them."""
    frozen = {f"{prefix}backbone.{name}": tensor for name, tensor in encoder.items()}
    torch.save(
        {
            "encoder": frozen,
            "predictor": {f"{prefix}{name}": tensor for name, tensor in predictor.items()},
            "target_encoder": frozen,
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
            **_BESIDE,
        },
        path,
    )


def write_v21_file(
    path: Path, encoder: Mapping[str, Tensor], *, entry: str = "ema_encoder", prefix: str = "module.backbone."
) -> None:
    """Write a V-JEPA 2.1 pretraining file: the wanted encoder under `entry`, another one under `encoder`, and what lies beside."""
    torch.save(
        {
            "encoder": without_storage({f"{prefix}{name}": tuple(tensor.shape) for name, tensor in encoder.items()}),
            "predictor": {"module.backbone.mask_tokens.0": torch.zeros(1, 1, 24)},
            entry: {f"{prefix}{name}": tensor for name, tensor in encoder.items()},
            "scaler": None,
            **_BESIDE,
        },
        path,
    )


def encoder_shapes(preset: EncoderPreset) -> dict[str, tuple[int, ...]]:
    """The tensors of a preset's encoder by their official names."""
    with torch.device("meta"):
        state = KINDS[preset.kind].make(preset).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def draw_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights drawn wide enough that positions, attention, biases and norms show in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("_embed"):  # V-JEPA 2.1's modality vectors
            state[name] = noise
        elif len(shape) > 1:
            state[name] = noise * 1.6 / torch.Size(shape[1:]).numel() ** 0.5
        else:
            state[name] = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return state


def without_storage(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of full size that take the room of one number, in memory and in a file: every element is the same one."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
