"""One transformer block of the AC predictor: attention over the prefix of steps, then an MLP. Names are those of the released checkpoint.

Letters besides the project's: P predictor width; L tokens per step; d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_cache.predictor.attention import block_causal_attention
from jepa_cache.predictor.rotary import RotaryTable, rotate

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, each [B, heads, steps*L, d]; the keys are already rotated to their own time positions."""


class Attention(nn.Module):
    """Multi-head attention of one block with a fused projection; owns weights only, masking and kernels are `attention`'s."""

    def __init__(self, width: int, num_heads: int) -> None:
        """Make the two projections of `width` channels."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, table: RotaryTable, tokens_per_step: int, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Attend from the new steps to the past and to themselves; x: [B, T*L, P]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, table), rotate(k, table)
        num_past_steps = 0
        if past is not None:
            num_past_steps = past[0].shape[2] // tokens_per_step
            k, v = torch.cat([past[0].to(k.dtype), k], dim=2), torch.cat([past[1].to(v.dtype), v], dim=2)
        out = block_causal_attention(q, k, v, tokens_per_step=tokens_per_step, num_past_steps=num_past_steps)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), (k, v)


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between; the tanh form moves outputs by 1e-3."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make both layers."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., P] to [..., P]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to its input."""

    def __init__(self, width: int, num_heads: int, hidden: int, norm_eps: float) -> None:
        """Make the block's four parts."""
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, hidden)

    def forward(
        self, x: Tensor, table: RotaryTable, tokens_per_step: int, num_kept: int, past: KeysValues | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, T*L, P] to the same, with the keys and values of the first `num_kept` tokens of all so far."""
        attended, (k, v) = self.attn(self.norm1(x), table, tokens_per_step, past)
        x = x + attended
        x = x + self.mlp(self.norm2(x))
        if num_kept < k.shape[2]:
            # Copies: a view would keep the whole window alive, which activation checkpointing is there to avoid.
            k, v = k[:, :, :num_kept].clone(), v[:, :, :num_kept].clone()
        return x, k, v
