"""Block-causal attention: what the blocks of the AC predictor share, behind one function.

A sequence is T steps of L tokens each, conditioning tokens first: [B, heads, T*L, d] with d the width of one head. A token may
attend to every token of its own step and of earlier steps, never to a later one.

Which kernels run follows from device, dtype and what the processor can do, never from a measurement, so that equal machines give equal numbers:

| where | forward | backward |
|---|---|---|
| any device, any dtype | `F.scaled_dot_product_attention` per step over its prefix | that of the same kernel |
| CPU with bfloat16 matrix products in hardware (AVX512_BF16 or AMX_BF16), bfloat16 | `_PrefixAttention`: matrix products | matrix products |

On CUDA the first row takes the flash kernel, because no call has a mask; that has not been run on a GPU here.

Letters of this file besides the project's: L tokens per step (conditioning and frame tokens), d head width.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SCORE_BYTES = 2 * 2**20
"""Scores of the heads that are multiplied together: 2 heads of 258 rows x 1806 keys in bfloat16; 1 and 6 heads took 2 to 4 % longer."""


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
    computed.

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
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and has_bfloat16_products():
        return _PrefixAttention.apply(q, k, v, tokens_per_step)
    return _prefix_attention(q, k, v, tokens_per_step)


@cache
def has_bfloat16_products() -> bool:
    """Say whether this CPU multiplies bfloat16 matrices in hardware; elsewhere such products are slower than float32 ones.

    torch before 2.11 or so does not tell; there the answer is no.
    """
    tell = getattr(torch.cpu, "get_capabilities", dict)
    found = tell()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _prefix_attention(q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int) -> Tensor:
    outputs = []
    # Split and shortened from the last step on, because the gradient of a slice is padded with zeros to the whole it was cut from.
    for q_step in reversed(q.split(tokens_per_step, dim=2)):
        outputs.append(F.scaled_dot_product_attention(q_step, k, v))
        k, v = k[:, :, :-tokens_per_step], v[:, :, :-tokens_per_step]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs[::-1], dim=2)


class _PrefixAttention(torch.autograd.Function):
    """The same by batched matrix products, forward and backward.

    The CPU's flash kernel gains nothing from bfloat16, matrix products gain a lot. Scores are rounded to bfloat16, softmax and sums run
    in float32. Probabilities are computed again in the backward pass; kept, they would take 22 MB a block and window of 8 steps at 6 heads.

    As many heads go together as have scores of `_SCORE_BYTES`, in buffers that every step uses again: memory does not grow with the batch,
    and the passes over the scores stay in the processor's cache. Transposed keys and values are made once, not in every product.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int) -> Tensor:
        shape = q.shape
        q, k, v = q.flatten(0, 1) * shape[-1] ** -0.5, k.flatten(0, 1), v.flatten(0, 1).contiguous()
        keys_across, out = k.mT.contiguous(), torch.empty_like(q)
        for some, rows, prefix, (scores, probability) in _pieces(q, k, tokens_per_step, num_buffers=2):
            torch.bmm(q[some, rows], keys_across[some, :, prefix], out=scores)
            torch.softmax(scores, -1, out=probability)
            out[some, rows] = torch.bmm(probability, v[some, prefix])
        ctx.save_for_backward(q, k, v, out)
        ctx.shape, ctx.tokens_per_step = shape, tokens_per_step
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        shape = ctx.shape
        gradient = gradient.flatten(0, 1).contiguous()
        keys_across, values_across = k.mT.contiguous(), v.mT.contiguous()
        minus_delta = -(gradient * out).sum(-1, keepdim=True)  # [B*heads, T*L, 1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for some, rows, prefix, (scores, probability) in _pieces(q, k, ctx.tokens_per_step, num_buffers=2):
            q_step, g_step = q[some, rows], gradient[some, rows]
            torch.bmm(q_step, keys_across[some, :, prefix], out=scores)
            torch.softmax(scores, -1, out=probability)
            grad_v[some, prefix].baddbmm_(probability.mT, g_step)
            grad_score = torch.baddbmm(minus_delta[some, rows], g_step, values_across[some, :, prefix], out=scores)
            grad_score *= probability
            grad_q[some, rows] = torch.bmm(grad_score, k[some, prefix])
            grad_k[some, prefix].baddbmm_(grad_score.mT, q_step)
        grad_q *= shape[-1] ** -0.5
        return grad_q.view(shape), grad_k.unflatten(0, shape[:2]), grad_v.unflatten(0, shape[:2]), None


def _pieces(
    q: Tensor, k: Tensor, tokens_per_step: int, num_buffers: int
) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """Yield some heads, the rows of one step, the prefix it sees, and buffers [heads, rows, prefix] of these."""
    num_past = k.shape[1] - q.shape[1]
    num_together = max(1, _SCORE_BYTES // (tokens_per_step * k.shape[1] * q.element_size()))
    buffers = [q.new_empty(min(num_together, len(q)) * tokens_per_step * k.shape[1]) for _ in range(num_buffers)]
    for first in range(0, len(q), num_together):
        num_heads = min(num_together, len(q) - first)
        for start in range(0, q.shape[1], tokens_per_step):
            stop = start + tokens_per_step
            size = (num_heads, tokens_per_step, num_past + stop)
            pieces = [buffer[: math.prod(size)].view(size) for buffer in buffers]
            yield slice(first, first + num_heads), slice(start, stop), slice(0, num_past + stop), pieces
