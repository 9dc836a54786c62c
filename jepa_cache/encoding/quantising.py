"""Codes of tokens, and sums of their channels, made on a GPU: the same bits as `store.quantisation` makes by numpy, which is the reference."""

from __future__ import annotations

import numpy as np
import torch

from jepa_cache.config.schema import INT4_GROUP
from jepa_cache.store.quantisation import Channels, get_codec


def sum_channels(run: np.ndarray, origin: np.ndarray, device: torch.device) -> np.ndarray:
    """`store.quantisation.sum_channels` on a device, bit for bit."""
    values = torch.from_numpy(run).to(device).float() - torch.from_numpy(origin).to(device)
    sums = []
    for rows in (values, values * values):
        total = rows[:, 0]
        for number in range(1, rows.shape[1]):
            total = total + rows[:, number]
        sums.append(total)
    return torch.stack(sums).cpu().numpy()


def quantise(steps: np.ndarray, channels: Channels, dtype: str, device: torch.device) -> tuple[np.ndarray, ...]:
    """`store.quantisation.encode` of steps [T, N, D] float16 on a device, bit for bit, and the errors [T, 3] float64 of what it gives.

    Every operation is one that rounds as IEEE says, alone, so that no device can give other codes.
    """
    codec = get_codec(dtype)
    scales, means = (torch.from_numpy(it).to(device) for it in channels)
    truth = torch.from_numpy(steps).to(device).float()
    values = ((truth - means) / scales).unflatten(-1, (-1, INT4_GROUP if codec.grouped else steps.shape[2]))
    # By a tensor: by a number, CUDA multiplies with the reciprocal, which rounds otherwise.
    largest = torch.maximum(values.amax(dim=-1), -values.amin(dim=-1)) / torch.full((), codec.max_code, device=device)
    stored = largest.to(torch.float16 if codec.grouped else torch.float32)
    stored = stored.masked_fill(stored < torch.finfo(stored.dtype).tiny, 0)
    divisor = stored.float().masked_fill(stored == 0, 1)
    codes = codec.pack_tensor((values / divisor[..., None]).flatten(-2)).to(getattr(torch, codec.torch_dtype))
    decoded = codec.unpack_tensor(codes).unflatten(-1, values.shape[-2:]) * stored.float()[..., None]
    error = decoded.flatten(-2) * scales + means - truth
    squared, squares = (it.square().sum(dim=(-2, -1), dtype=torch.float64) for it in (error, truth))
    errors = torch.stack([squared, squares, error.abs().amax(dim=(-2, -1)).double()], dim=-1)
    codes = codes.view(torch.uint8) if codec.dtype == "uint8" else codes
    return codes.cpu().numpy(), (stored if codec.grouped else stored[..., 0]).cpu().numpy(), errors.cpu().numpy()
