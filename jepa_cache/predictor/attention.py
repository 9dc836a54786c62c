"""Block-causal attention and rotary positions: what the blocks of the AC predictor share.

A sequence is T steps of L tokens each, conditioning tokens first: [B, heads, T*L, d] with d the width of one head. A token may
attend to every token of its own step and of earlier steps, never to a later one.

Letters of this file besides the project's: L tokens per step (conditioning and frame tokens), d head width.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RotaryTable(NamedTuple):
    """Cosine and signed sine of every angle of a run of steps; each [T*L, d], in the dtype of the queries."""

    cos: Tensor
    sin: Tensor


def block_causal_mask(num_steps: int, tokens_per_step: int, *, device: torch.device | None = None) -> Tensor:
    """Say which token may attend to which: all of its own step and of earlier steps.

    The definition that `block_causal_attention` keeps to without ever building it; for tests, and for kernels that want a mask.

    Args:
        num_steps: T.
        tokens_per_step: L, conditioning tokens included.
        device: where the mask is made.

    Returns:
        [T*L, T*L] bool, True = may attend, rows are queries.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (block-causal attention).
    """
    step = torch.arange(num_steps * tokens_per_step, device=device) // tokens_per_step
    return step[:, None] >= step[None, :]


def block_causal_attention(q: Tensor, k: Tensor, v: Tensor, *, tokens_per_step: int, num_past_steps: int = 0) -> Tensor:
    """Attend from the queries of the newest steps to all tokens up to each query's own step.

    One kernel call per step over the keys of its prefix: exact, no mask in memory, and the half that a mask would throw away is never
    computed. Forward + backward on one AVX512 thread (torch 2.13, float32) against one call with a mask: 0.80 times the time at B=1,
    T=7, 258 tokens per step, 6x64 heads. With 18 tokens per step (B=32, 4x24 heads) it is 1.4 times, 6 % of that small train step:
    too little for a second path.

    Args:
        q: [B, heads, T*L, d] queries of the T newest steps.
        k: [B, heads, (P+T)*L, d] keys of P past steps and of the newest steps.
        v: [B, heads, (P+T)*L, d] values, as `k`.
        tokens_per_step: L.
        num_past_steps: P.

    Returns:
        [B, heads, T*L, d].

    Raises:
        ValueError: the lengths are not whole steps, or keys and queries do not hold P+T and T steps.
    """
    num_steps, rest = divmod(q.shape[2], tokens_per_step)
    if rest or k.shape[2] != (num_past_steps + num_steps) * tokens_per_step or v.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention over whole steps of {tokens_per_step} tokens needs queries of T steps and keys and values of "
            f"{num_past_steps} + T steps; got {q.shape[2]} queries, {k.shape[2]} keys and {v.shape[2]} values"
        )
    outputs = []
    for step in range(num_steps):
        prefix = (num_past_steps + step + 1) * tokens_per_step
        q_step = q[:, :, step * tokens_per_step : (step + 1) * tokens_per_step]
        outputs.append(F.scaled_dot_product_attention(q_step, k[:, :, :prefix], v[:, :, :prefix]))
    return outputs[0] if num_steps == 1 else torch.cat(outputs, dim=2)


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
    paired = x.shape[-1] // 2 * 2
    partner = x[..., :paired].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    if paired < x.shape[-1]:  # an odd head width: its last channel is never rotated
        partner = torch.cat([partner, x[..., paired:]], dim=-1)
    return torch.addcmul(x * table.cos, partner, table.sin)
