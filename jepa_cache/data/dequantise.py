"""From stored tokens to numbers, with torch: where the batch is, so that a GPU is sent the stored bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jepa_cache.store.quantisation import Codec


class TokenScales(NamedTuple):
    """What turns the codes of B windows into values.

    Attributes:
        tokens: [B, T, N] float32, or [B, T, N, D / 64] float16 for int4.
        channels: [B, D] float32, of the store that each window is from.
        means: [B, D] float32, likewise.
        codec: By which the codes are stored.
    """

    tokens: Tensor
    channels: Tensor
    means: Tensor
    codec: Codec

    def to(self, device: torch.device) -> TokenScales:
        """The same on a device."""
        return TokenScales(self.tokens.to(device), self.channels.to(device), self.means.to(device), self.codec)


def dequantise(tokens: Tensor, scales: TokenScales | None) -> Tensor:
    """The formula of `store.quantisation.decode`, bit for bit on any device; values that are stored as such stay as they are.

    Args:
        tokens: [B, T, N, D] int8 or float8_e4m3fn, or [B, T, N, D / 2] uint8 for int4, with scales; float16 or bfloat16 without.
        scales: None where the values themselves are stored.

    Returns:
        [B, T, N, D] float32 where there are scales, else `tokens`.
    """
    if scales is None:
        return tokens
    codes = scales.codec.unpack_tensor(tokens)
    num_groups = scales.tokens.shape[3] if scales.tokens.ndim == 4 else 1
    codes.unflatten(-1, (num_groups, -1)).mul_(scales.tokens.float().reshape(*codes.shape[:3], num_groups, 1))
    # Two roundings, as the formula has: a fused multiply-add would have one.
    return codes.mul_(scales.channels[:, None, None]).add_(scales.means[:, None, None])
