"""The device that stages compute on, chosen in one place, and what is known of it."""

from __future__ import annotations

import torch

from jepa_cache.config.parsing import ConfigError


def resolve_device(key: str, wanted: str) -> str:
    """The device, "cpu" or "cuda", that a setting (auto, cpu or cuda) means on this machine; "auto" is a GPU where there is one.

    From now on float32 products of this process are float32 on a GPU too, and not TF32, which containers may switch on.

    Raises:
        ConfigError: torch finds no GPU, but one is asked for.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    found = torch.cuda.is_available() and torch.cuda.device_count() > 0
    if wanted == "cuda" and not found:
        raise ConfigError(
            f"{key} is 'cuda', but torch finds no GPU here; set it to auto or cpu, or see with `jepa-cache doctor` what is missing"
        )
    return "cuda" if found and wanted != "cpu" else "cpu"


def name_device(device: str) -> str:
    """A device of `resolve_device` as people know it: "cpu", or the model of the GPU."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 itself; one that imitates it (before Ampere) is slow, and attention takes far more memory."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
