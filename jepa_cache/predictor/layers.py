"""What the blocks of the AC predictor are made of: rotary positions, block-causal attention, and one transformer block.

A sequence is T steps of L tokens each, conditioning tokens first: [B, heads, T*L, d]. A token may attend to every token of
its own step and of earlier steps, never to a later one. Parameter names are those of the released checkpoint.

Which kernels run follows from device, dtype and what the processor can do, never from a measurement, so that equal
machines give equal numbers: `F.scaled_dot_product_attention` per step over its prefix (on a GPU the kernels that
`devices.pin_attention` admits: flash in half precision, memory-efficient in float32), but `_PrefixAttention` for bfloat16 on CPUs
that multiply such matrices in hardware.

Letters of this file besides the project's: P predictor width; L tokens per step, conditioning included; d head width.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_SCORE_BYTES = 2 * 2**20
"""Scores of heads multiplied together: 2 of 258 rows x 1806 keys in bfloat16; 1 and 6 took 2 to 4 % longer."""

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, each [B, heads, steps*L, d]; the keys are already rotated to their own time positions."""


class RotaryTable(NamedTuple):
    """Cosine and signed sine of every angle of a run of steps, and the sine that turns back; each [T*L, d], in the dtype of the queries."""

    cos: Tensor
    sin: Tensor
    back: Tensor


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

    The head is cut into three equal blocks of even width r for time, row and column; the channels left over are not
    rotated. Inside a block the frequencies 10000^(-2j/r) are TILED over the channels while pairs are adjacent channels, so
    that the two members of a pair turn by different angles: a quirk of the released weights that has to be kept.
    Conditioning tokens turn in the time block only. Columns count in units of rows/columns of the grid, rows as they are.
    Angles are float32 whatever the dtype.

    `num_conditioning` tokens precede the frame tokens of each step; the tables are [T*(num_conditioning + H*W), d].

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
        sin = sin.to(dtype)
        return RotaryTable(angle.cos().to(dtype), sin, _partner(sin))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [..., T*L, d] by their positions: `x * cos + partner(x) * sin`, see `_partner`."""
    return _partner(x).mul_(sin).addcmul_(x, cos)


class _SplitRotated(torch.autograd.Function):
    """Queries, keys and values, each [B, heads, T*L, d], of one projection [B, T*L, 3, heads, d]: the first two rotated, none a view of it.

    A view of the values would keep all three alive. In memory heads come after tokens, as in the projection, so that attention's output
    has the order which the next projection reads. The gradient is the rotation back, written out: fewer passes over memory than
    autograd would take.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, back: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, back)
        q, k = rotate(qkv[:, :, :2], cos[:, None, None], sin[:, None, None]).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].contiguous().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, back = (it[:, None] for it in ctx.saved_tensors)
        q, k, v = (gradient.transpose(1, 2) for gradient in gradients)
        return torch.stack((rotate(q, cos, back), rotate(k, cos, back), v), dim=2), None, None, None


def _partner(x: Tensor) -> Tensor:
    """A new tensor with the channels of each pair swapped; the last channel of an odd width is its own partner."""
    paired = x.shape[-1] // 2 * 2
    # Half the time of a flip on a CPU (torch 2.13).
    partner = torch.stack((x[..., 1:paired:2], x[..., 0:paired:2]), dim=-1).flatten(-2)
    return partner if paired == x.shape[-1] else torch.cat([partner, x[..., paired:]], dim=-1)


@lru_cache(maxsize=16)
def step_mask(num_steps: int, tokens_per_step: int, device: torch.device) -> BlockMask:
    """The mask of FlexAttention over a run of steps: own and earlier ones."""

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row // tokens_per_step >= column // tokens_per_step

    length = num_steps * tokens_per_step
    with torch.inference_mode(False), torch.no_grad():  # as `rotary_table`
        return create_block_mask(sees, None, None, length, length, device=str(device))


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tokens_per_step: int,
    num_past_steps: int = 0,
    mask: BlockMask | None = None,
    num_kept: int = 0,
) -> tuple[Tensor, KeysValues]:
    """Attend from the queries of the newest steps to all tokens up to each query's own step.

    One kernel call per step over the keys of its prefix: exact, no mask in memory, and the half that a mask would throw
    away is never computed.

    Queries [B, heads, T*L, d] are of the T newest steps, keys and values [B, heads, (P+T)*L, d] of the P past ones too. Returns
    [B, heads, T*L, d], and the keys and values of the first `num_kept` tokens as views. A ValueError where the lengths are not such whole
    steps.

    With the `step_mask` of steps that have no past it is one call of FlexAttention instead, to be compiled: else it holds all scores.
    """
    num_steps, rest = q.shape[2] // tokens_per_step, q.shape[2] % tokens_per_step  # torch.compile takes no divmod
    if rest or k.shape[2] != (num_past_steps + num_steps) * tokens_per_step or v.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention over whole steps of {tokens_per_step} tokens needs queries of T steps and keys and values of "
            f"{num_past_steps} + T steps; got {q.shape[2]} queries, {k.shape[2]} keys and {v.shape[2]} values"
        )
    by_products = q.device.type == "cpu" and q.dtype == torch.bfloat16 and has_bfloat16_products()
    by_steps = num_steps > 1 and mask is None and not by_products
    lengths = [tokens_per_step * (num_past_steps + step) for step in range(1, num_steps if by_steps else 1)]
    keys, values = (_first_tokens(it, [*lengths, num_kept]) for it in (k, v))
    if mask is not None:
        out = flex_attention(q, keys[0], values[0], block_mask=mask)
    elif by_products:
        out = _PrefixAttention.apply(q, keys[0], values[0], tokens_per_step)
    elif by_steps:
        prefixes = zip(q.split(tokens_per_step, dim=2), (*keys[1:-1], keys[0]), (*values[1:-1], values[0]), strict=True)
        # Kernels give [B, T*L, heads, d] in memory, which is what the projection after them reads.
        outputs = [F.scaled_dot_product_attention(*parts).transpose(1, 2) for parts in prefixes]
        out = torch.cat(outputs, dim=1).transpose(1, 2)
    else:
        out = F.scaled_dot_product_attention(q, keys[0], values[0])
    return out, (keys[-1], values[-1])


@cache
def has_bfloat16_products() -> bool:
    """Say whether this CPU multiplies bfloat16 matrices in hardware; elsewhere such products are slower than float32 ones.

    torch before 2.11 or so does not tell; there the answer is no.
    """
    tell = getattr(torch.cpu, "get_capabilities", dict)
    found = tell()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _first_tokens(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Return x [B, heads, n, d] and its first tokens, once for each length; views."""
    if all(length in (0, x.shape[2]) for length in lengths):
        return x, *(x[:, :, :length] for length in lengths)
    return _FirstTokens.apply(x, lengths)


class _FirstTokens(torch.autograd.Function):
    """The gradients of all parts are added into one: autograd would pad each with zeros to the whole, and add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        return x[:], *(x[:, :, :length] for length in lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, whole: Tensor, *parts: Tensor) -> tuple[Tensor, None]:
        total = whole.clone()
        for part in parts:
            total[:, :, : part.shape[2]].add_(part)
        return total, None


class _PrefixAttention(torch.autograd.Function):
    """The same by batched matrix products, forward and backward.

    The CPU's flash kernel gains nothing from bfloat16, matrix products gain a lot. Scores are rounded to bfloat16, softmax
    and sums run in float32. Probabilities are computed again in the backward pass; kept, they would take 22 MB a block and
    window of 8 steps at 6 heads.

    As many heads go together as have scores of `_SCORE_BYTES`, in buffers that every step uses again: memory does not grow
    with the batch, and the passes over the scores stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tokens_per_step: int) -> Tensor:
        shape = q.shape
        q, k, v = q.flatten(0, 1) * shape[-1] ** -0.5, k.flatten(0, 1), v.flatten(0, 1).contiguous()
        keys_across, out = k.mT.contiguous(), torch.empty_like(q)
        for some, rows, prefix, (scores, probability) in _pieces(q, k, tokens_per_step):
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
        for some, rows, prefix, (scores, probability) in _pieces(q, k, ctx.tokens_per_step):
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


def _pieces(q: Tensor, k: Tensor, tokens_per_step: int) -> Iterator[tuple[slice, slice, slice, list[Tensor]]]:
    """Yield some heads, the rows of one step, the prefix it sees, and two buffers [heads, rows, prefix] of these."""
    num_past = k.shape[1] - q.shape[1]
    num_together = max(1, _SCORE_BYTES // (tokens_per_step * k.shape[1] * q.element_size()))
    buffers = [q.new_empty(min(num_together, len(q)) * tokens_per_step * k.shape[1]) for _ in range(2)]
    for first in range(0, len(q), num_together):
        num_heads = min(num_together, len(q) - first)
        for start in range(0, q.shape[1], tokens_per_step):
            stop = start + tokens_per_step
            size = (num_heads, tokens_per_step, num_past + stop)
            pieces = [buffer[: math.prod(size)].view(size) for buffer in buffers]
            yield slice(first, first + num_heads), slice(start, stop), slice(0, num_past + stop), pieces


class Attention(nn.Module):
    """Multi-head attention of one block with a fused projection; owns weights only, masking and kernels are `attention`'s."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        table: RotaryTable,
        tokens_per_step: int,
        past: KeysValues | None,
        mask: BlockMask | None,
        num_kept: int,
    ) -> tuple[Tensor, KeysValues]:
        """Attend from the new steps to the past and to themselves; x: [B, T*L, P]. Also keys and values of the first `num_kept` tokens."""
        batch, length, width = x.shape
        q, k, v = _SplitRotated.apply(self.qkv(x).view(batch, length, 3, self.num_heads, -1), *table)
        num_past_steps = 0
        if past is not None:
            num_past_steps = past[0].shape[2] // tokens_per_step
            k, v = torch.cat([past[0].to(k.dtype), k], dim=2), torch.cat([past[1].to(v.dtype), v], dim=2)
        steps = {"tokens_per_step": tokens_per_step, "num_past_steps": num_past_steps}
        out, kept = block_causal_attention(q, k, v, **steps, mask=mask, num_kept=num_kept)
        if num_kept and (num_kept < k.shape[2] or past is None):
            # A view would keep the whole window alive; and new keys share their memory with the queries. In the order of `torch.cat`, as
            # torch.compile makes a graph for each order.
            keys, values = (it.clone(memory_format=torch.contiguous_format) for it in kept)
            kept = keys, values
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), kept


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between; the tanh form moves outputs by 1e-3."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., P] to [..., P]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, width: int, num_heads: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, hidden)

    def forward(
        self,
        x: Tensor,
        table: RotaryTable,
        tokens_per_step: int,
        past: KeysValues | None,
        modulation: Tensor | None = None,
        mask: BlockMask | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x: [B, T*L, P] to the same, with the keys and values of the first tokens so far, as many as `kept` [K, 0] has rows.

        A size, because torch.compile makes a new graph for a new number.

        A modulation [B, T, 6, P] shifts and scales the inputs of attention and MLP and gates their outputs, by step; zeros change nothing.
        """
        num_kept = 0 if kept is None else len(kept)
        if modulation is None:
            attended, (k, v) = self.attn(self.norm1(x), table, tokens_per_step, past, mask, num_kept)
            x = x + attended
            x = x + self.mlp(self.norm2(x))
        else:
            by_token = modulation.repeat_interleave(tokens_per_step, dim=1).unbind(2)
            shift1, scale1, gate1, shift2, scale2, gate2 = by_token
            modulated = self.norm1(x) * (1 + scale1) + shift1
            attended, (k, v) = self.attn(modulated, table, tokens_per_step, past, mask, num_kept)
            x = x + (1 + gate1) * attended
            x = x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        # Else a compiled block would add gradients of zeros to those of keys and values.
        return (x, k, v) if num_kept else (x, None, None)


class _ForPasses(torch.autograd.Function):
    """Weights in other dtypes, once for each of several passes; a GPU casts them, and adds and casts back their gradients, by one kernel each.

    Autograd would add the gradients of two passes weight by weight. The sums have its bits: those of the last pass come first.
    """

    @staticmethod
    def forward(ctx: Any, dtypes: Sequence[torch.dtype], num_passes: int, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.num_passes = [weight.dtype for weight in weights], num_passes
        return tuple(it.detach() for it in _cast_all(weights, dtypes) for _ in range(num_passes))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        by_weight = [gradients[i : i + ctx.num_passes] for i in range(0, len(gradients), ctx.num_passes)]
        given = [[it for it in passes if it is not None] for passes in by_weight]
        sums = {number: passes[0] for number, passes in enumerate(given) if passes}
        for i in range(1, ctx.num_passes):
            more = {number: passes[i] for number, passes in enumerate(given) if len(passes) > i}
            if more:
                added = torch._foreach_add([sums[number] for number in more], list(more.values()))
                sums |= zip(more, added, strict=True)
        cast = dict(zip(sums, _cast_all(sums.values(), [ctx.dtypes[number] for number in sums]), strict=True))
        return None, None, *(cast.get(number) for number in range(len(given)))


def _cast_all(tensors: Collection[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    cast = [
        it if it.dtype == dtype else torch.empty_like(it, dtype=dtype)
        for it, dtype in zip(tensors, dtypes, strict=True)
    ]
    pairs = [(new, old) for new, old in zip(cast, tensors, strict=True) if new is not old]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
    return cast


def cast_for_passes(module: nn.Module, dtype: torch.dtype, num_passes: int) -> list[dict[str, Tensor]]:
    """The weights of a module by name, those of linear layers in `dtype`, once for each pass; to be taken from the end."""
    weights = dict(module.named_parameters())
    linear = tuple(f"{name}." for name, it in module.named_modules() if isinstance(it, nn.Linear))
    cast: list[dict[str, Tensor]] = [{} for _ in range(num_passes)]
    for trained in (True, False):
        some = {name: weight for name, weight in weights.items() if weight.requires_grad is trained}
        dtypes = [dtype if name.startswith(linear) else weight.dtype for name, weight in some.items()]
        if trained:
            made = _ForPasses.apply(dtypes, num_passes, *some.values())
        else:
            made = [it for it in _cast_all(some.values(), dtypes) for _ in range(num_passes)]
        for number, weights_of_pass in enumerate(cast):
            weights_of_pass |= zip(some, made[number::num_passes], strict=True)
    return cast
