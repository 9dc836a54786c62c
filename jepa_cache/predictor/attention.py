"""Block-causal attention: what the blocks of the AC predictor share, behind one function.

A sequence is T steps of L tokens each, conditioning tokens first: [B, heads, T*L, d] with d the width of one head. A token may
attend to every token of its own step and of earlier steps, never to a later one.

Which kernels run follows from device, dtype and what the processor can do, never from a measurement, so that equal machines give equal numbers:

| where | forward | backward |
|---|---|---|
| any device, any dtype | `F.scaled_dot_product_attention` per step over its prefix | that of the same kernel |
| CPU with bfloat16 matrix products in hardware (AVX512_BF16 or AMX_BF16), bfloat16 | the same | `_PrefixAttention`: matrix products |

On CUDA the first row takes the flash kernel, because no call has a mask; that has not been run on a GPU here.

Letters of this file besides the project's: L tokens per step (conditioning and frame tokens), d head width.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and has_bfloat16_products() and torch.is_grad_enabled():
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
    """The same, with a backward pass of batched matrix products.

    The CPU's flash kernel gains nothing from bfloat16 in its backward pass, matrix products gain a lot. The probabilities are computed
    again from scores that are rounded to bfloat16; kept from the forward pass they would take 22 MB a block and window of 8 steps at
    6 heads.

    Scores are laid out with keys as rows: a product of many short rows takes half the time of one of few long ones.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int) -> Tensor:
        out = _prefix_attention(q, k, v, tokens_per_step)
        ctx.save_for_backward(q, k, v, out)
        ctx.tokens_per_step = tokens_per_step
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        shape, length = q.shape, ctx.tokens_per_step
        scale = shape[-1] ** -0.5
        q, k, v, out, gradient = (x.flatten(0, 1) for x in (q, k, v, out, gradient))
        scaled = q * scale
        minus_delta = -(gradient * out).sum(-1).unsqueeze(1)  # [B*heads, 1, T*L]
        grad_q, grad_k, grad_v = torch.empty_like(scaled), torch.zeros_like(k), torch.zeros_like(v)
        num_past = k.shape[1] - q.shape[1]
        for start in range(0, q.shape[1], length):
            rows, prefix = slice(start, start + length), slice(0, num_past + start + length)
            q_step, g_step = scaled[:, rows].contiguous(), gradient[:, rows].contiguous()
            probability = torch.bmm(k[:, prefix], q_step.transpose(1, 2)).softmax(1)
            grad_v[:, prefix] += torch.bmm(probability, g_step)
            grad_score = torch.baddbmm(minus_delta[:, :, rows], v[:, prefix], g_step.transpose(1, 2))
            grad_score *= probability
            grad_q[:, rows] = torch.bmm(grad_score.transpose(1, 2), k[:, prefix])
            grad_k[:, prefix] += torch.bmm(grad_score, q_step)
        grad_q *= scale
        return grad_q.view(shape), grad_k.unflatten(0, shape[:2]), grad_v.unflatten(0, shape[:2]), None
