"""Which attention kernels a GPU may take: chosen here, not by the torch release that happens to be installed."""

import os

import torch

SETTING = "JEPA_ATTENTION"


def pin_attention() -> None:
    """Let `F.scaled_dot_product_attention` take flash, else the memory-efficient kernel, else plain products, in this process.

    Encoder and predictor call it before every forward pass on a GPU. From torch 2.11 on cuDNN's kernel would come first on Hopper and
    Blackwell: other numbers than on other cards, no deterministic backward, a plan of 23 to 37 ms for each new shape, and open reports of
    NaN (pytorch issues 169849, 193893). $JEPA_ATTENTION=cudnn admits it all the same; any other value is a ValueError.
    """
    wanted = os.environ.get(SETTING, "flash")
    if wanted not in ("flash", "cudnn"):
        raise ValueError(f"{SETTING} is flash or cudnn; got {wanted!r}. Unset it for flash")
    torch.backends.cuda.enable_cudnn_sdp(wanted == "cudnn")
