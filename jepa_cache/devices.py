"""The device that stages compute on, chosen in one place, and what is known of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from jepa_cache.config.parsing import ConfigError

log = logging.getLogger(__name__)


def resolve_device(key: str, wanted: str) -> str:
    """The device, "cpu" or "cuda", that a setting (auto, cpu or cuda) means on this machine; "auto" is a GPU where there is one.

    From now on float32 products of this process are float32 on a GPU too, and not TF32, which containers may switch on, and attention
    takes the kernels of `pin_attention`.

    Raises:
        ConfigError: torch finds no GPU, but one is asked for.
    """
    # Else cuBLAS may sum in another order each time; it reads this when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    pin_attention()
    found = torch.cuda.is_available() and torch.cuda.device_count() > 0
    if wanted == "cuda" and not found:
        raise ConfigError(
            f"{key} is 'cuda', but torch finds no GPU here; set it to auto or cpu, or see with `jepa-cache doctor` what is missing"
        )
    return "cuda" if found and wanted != "cpu" else "cpu"


def pin_attention() -> None:
    """Let attention on a GPU take torch's flash kernel, else the memory-efficient one, else plain products, in this process.

    From torch 2.11 on cuDNN's kernel would come first on Hopper and Blackwell: other numbers than on other cards, no deterministic backward
    pass, a plan of 23 to 37 ms for each new shape, and open reports of NaN (pytorch issues 169849, 193893). $JEPA_ATTENTION=cudnn admits it.

    Raises:
        ConfigError: $JEPA_ATTENTION is something else than flash or cudnn.
    """
    wanted = os.environ.get("JEPA_ATTENTION", "flash")
    if wanted not in ("flash", "cudnn"):
        raise ConfigError(f"$JEPA_ATTENTION is flash or cudnn; got {wanted!r}. Unset it for flash")
    torch.backends.cuda.enable_cudnn_sdp(wanted == "cudnn")


def name_device(device: str) -> str:
    """A device of `resolve_device` as people know it: "cpu", or the model of the GPU."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def describe_machine(device: torch.device) -> dict[str, str]:
    """What may change the last bits of a training: the kind of device with its model, and the version of torch."""
    return {"device": name_device(device.type), "torch": torch.__version__}


@contextmanager
def repeatable(device: torch.device, wanted: bool | str) -> Iterator[None]:
    """Take only kernels that give equal bits for equal input in the block; "auto" means on a GPU, as on a CPU they all do.

    An operator that has no such kernel raises a RuntimeError that names it.
    """
    if not (device.type == "cuda" if wanted == "auto" else wanted):
        yield
        return
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling would write all memory twice; nothing here reads it unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills


class Copies:
    """Copies of tensors on the CPU: from a GPU begun and not waited for, into page-locked memory, in the order of its kernels."""

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None

    def take(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Begin a copy, into `out` if that is of the same shape; it has the values once `wait` has returned."""
        out = self.make_room(tensor, out)
        out.copy_(tensor.detach(), non_blocking=True)
        if tensor.device.type == "cuda":
            self._done = self._done or torch.cuda.Event()
            self._done.record()
        return out

    def make_room(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """`out` where it is of the tensor's shape, else new memory for a copy."""
        if out is not None and out.shape == tensor.shape:
            return out
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")

    def wait(self) -> None:
        """Wait until all that was begun has ended; from any thread."""
        if self._done is not None:
            self._done.synchronize()


def has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 itself; one that imitates it (before Ampere) is slow, and attention takes far more memory."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def warn_of_bfloat16(key: str, precision: str, device: str) -> None:
    """Say that a setting asks for bfloat16 of a GPU that only imitates it; `device` is one of `resolve_device`."""
    if (precision, device) == ("bfloat16", "cuda") and not has_bfloat16():
        log.warning(
            "%s only imitates bfloat16, slowly and with far more memory for attention: set %s=float16",
            name_device(device),
            key,
        )
