"""Rotary positions of the AC predictor: which angle each channel of each token turns by, and the turning.

Letters of this file besides the project's: L tokens per step (conditioning and frame tokens), d head width.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RotaryTable(NamedTuple):
    """Cosine and signed sine of every angle of a run of steps; each [T*L, d], in the dtype of the queries."""

    cos: Tensor
    sin: Tensor


@lru_cache(maxsize=64)
def rotary_table(
    head_width: int,
    *,
    first_step: int,
    num_steps: int,
    grid: tuple[int, int],
    num_conditioning: int,
    dtype: torch.dtype,
    device: torch.device,
) -> RotaryTable:
    """Build the rotation of every token of a run of steps, once per shape and dtype.

    The head is cut into three equal blocks of even width r for time, row and column; the channels left over are not rotated. Inside a
    block the frequencies 10000^(-2j/r) are TILED over the channels while pairs are adjacent channels, so that the two members of a
    pair turn by different angles: a quirk of the released weights that has to be kept. Conditioning tokens turn in the time block
    only. Columns count in units of rows/columns of the grid, rows as they are. Angles are float32 whatever the dtype.

    Args:
        head_width: d.
        first_step: time position of the first step.
        num_steps: T.
        grid: (H, W) rows and columns of the patch grid.
        num_conditioning: tokens that precede the frame tokens of each step.
        dtype: of the tables.
        device: of the tables.

    Returns:
        Tables [T*(num_conditioning + H*W), d]: see `rotate`.

    Source: V-JEPA 2-AC, arXiv 2506.09985; the tiling is known upstream as vjepa2 pull request 15.
    """
    num_rows, num_columns = grid
    block = 2 * (head_width // 3 // 2)
    # inference_mode(False): a cached table must stay usable in training, whoever asked for it first.
    with torch.inference_mode(False), torch.no_grad():
        frequency = 10000.0 ** (-torch.arange(block // 2, dtype=torch.float32, device=device) / (block / 2))
        frequency = frequency.repeat(2)
        frame = torch.arange(num_rows * num_columns, dtype=torch.float32, device=device)
        row = torch.div(frame, num_columns, rounding_mode="floor")
        column = (frame - row * num_columns) * (num_rows / num_columns)
        still = torch.zeros(num_conditioning, dtype=torch.float32, device=device)
        row, column = torch.cat([still, row]), torch.cat([still, column])
        time = torch.arange(first_step, first_step + num_steps, dtype=torch.float32, device=device)
        angle = torch.zeros(num_steps, len(row), head_width, dtype=torch.float32, device=device)
        angle[..., :block] = (time[:, None] * frequency)[:, None]
        angle[..., block : 2 * block] = row[:, None] * frequency
        angle[..., 2 * block : 3 * block] = column[:, None] * frequency
        angle = angle.flatten(0, 1)
        sin = angle.sin()
        sin[:, 0 : 3 * block : 2] *= -1.0  # x0 takes minus its partner's part, x1 plus
        return RotaryTable(angle.cos().to(dtype), sin.to(dtype))


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn queries or keys by their positions: `x * cos + partner(x) * sin`, the partner being the other channel of a pair.

    Args:
        x: [..., T*L, d].
        table: tables [T*L, d] of the same dtype.

    Returns:
        [..., T*L, d].
    """
    return _Rotation.apply(x, table.cos, table.sin)


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back, written out: fewer passes over memory than autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _partner(x).mul_(sin).addcmul_(x, cos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _partner(gradient).mul_(_partner(sin)).addcmul_(gradient, cos), None, None


def _partner(x: Tensor) -> Tensor:
    """A new tensor with the channels of each pair swapped; the last channel of an odd width is its own partner."""
    paired = x.shape[-1] // 2 * 2
    # Half the time of a flip on a CPU (torch 2.13).
    partner = torch.stack((x[..., 1:paired:2], x[..., 0:paired:2]), dim=-1).flatten(-2)
    return partner if paired == x.shape[-1] else torch.cat([partner, x[..., paired:]], dim=-1)
