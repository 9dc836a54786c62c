"""The baseline of train_step.py: the same predictor and loss computed in the plain way that the reference implementation is known to use.

One attention call with a dense boolean mask over the whole sequence, rotary angles evaluated at every call for frame and conditioning
tokens apart, a rollout that computes its growing context again, AdamW one tensor at a time. Written from a description of that
implementation, with the same parameter names, so that both take the same weights and are compared in one process.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NUM_CONDITIONING = 2


def turn(x: Tensor, position: Tensor) -> Tensor:
    """Rotate adjacent channels of [..., n, r] by position * tiled frequencies, everything evaluated anew."""
    width = x.shape[-1]
    omega = torch.arange(width // 2, dtype=x.dtype, device=x.device) / (width / 2.0)
    omega = 1.0 / 10000**omega
    angle = torch.einsum("n,f->nf", position.to(x.dtype), omega)
    sin, cos = angle.sin().repeat(1, 2), angle.cos().repeat(1, 2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    partner = torch.stack((-second, first), dim=-1).flatten(-2)
    return x * cos + partner * sin


class ReferenceAttention(nn.Module):
    """Dense masked attention over all steps."""

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.block = 2 * (width // num_heads // 3 // 2)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def place(self, x: Tensor, num_steps: int) -> Tensor:
        """Give queries or keys [B, heads, T*L, d] their positions."""
        rows, columns = self.grid
        x = x.unflatten(2, (num_steps, -1))
        frames = x[:, :, :, NUM_CONDITIONING:].flatten(2, 3)
        index = torch.arange(num_steps * rows * columns, device=x.device)
        step = index // (rows * columns)
        row = (index - step * rows * columns) // columns
        column = index - step * rows * columns - row * columns
        r = self.block
        parts = [turn(frames[..., i * r : (i + 1) * r], p) for i, p in enumerate((step, row, column))]
        if 3 * r < x.shape[-1]:
            parts.append(frames[..., 3 * r :])
        frames = torch.cat(parts, dim=-1).unflatten(2, (num_steps, -1))
        time = torch.arange(num_steps, device=x.device)
        tokens = []
        for i in range(NUM_CONDITIONING):
            token = x[:, :, :, i]
            token = torch.cat([turn(token[..., :r], time), token[..., r:]], dim=-1)
            tokens.append(token.unsqueeze(3))
        return torch.cat([*tokens, frames], dim=3).flatten(2, 3)

    def forward(self, x: Tensor, mask: Tensor, num_steps: int) -> Tensor:
        """x: [B, T*L, P]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.place(q, num_steps).to(v.dtype), self.place(k, num_steps).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class ReferenceBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, num_heads: int, hidden: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = ReferenceAttention(width, num_heads, grid)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, mask: Tensor, num_steps: int) -> Tensor:
        """x: [B, T*L, P]."""
        x = x + self.attn(self.norm1(x), mask, num_steps)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ReferencePredictor(nn.Module):
    """The official forward pass: whole windows only."""

    def __init__(
        self,
        *,
        embed_dim: int,
        predictor_dim: int,
        depth: int,
        num_heads: int,
        action_dim: int,
        state_dim: int,
        grid: tuple[int, int],
        max_steps: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.predictor_embed = nn.Linear(embed_dim, predictor_dim)
        self.action_encoder = nn.Linear(action_dim, predictor_dim)
        self.state_encoder = nn.Linear(state_dim, predictor_dim)
        self.extrinsics_encoder = nn.Linear(action_dim - 1, predictor_dim)
        self.predictor_blocks = nn.ModuleList(
            ReferenceBlock(predictor_dim, num_heads, 4 * predictor_dim, grid) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(predictor_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_dim, embed_dim)
        step = torch.arange(max_steps).repeat_interleave(grid[0] * grid[1] + NUM_CONDITIONING)
        self.mask = step[:, None] >= step[None, :]

    def forward(self, tokens: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """tokens: [B, T, N, E]; returns the same shape."""
        num_steps = tokens.shape[1]
        conditioning = [self.action_encoder(actions).unsqueeze(2), self.state_encoder(states).unsqueeze(2)]
        x = torch.cat([*conditioning, self.predictor_embed(tokens)], dim=2).flatten(1, 2)
        mask = self.mask[: x.shape[1], : x.shape[1]]
        for block in self.predictor_blocks:
            if self.activation_checkpointing:
                x = checkpoint(block, x, mask, num_steps, use_reentrant=False)
            else:
                x = block(x, mask, num_steps)
        x = x.unflatten(1, (num_steps, -1))[:, :, NUM_CONDITIONING:]
        return self.predictor_proj(self.predictor_norm(x))


def normalize(tokens: Tensor) -> Tensor:
    """Parameter-free layer norm."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def reference_loss(
    predictor: nn.Module, tokens: Tensor, actions: Tensor, states: Tensor, auto_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The L1 world-model loss with a rollout that feeds its growing context from the start; returns loss, z_tf and z_ar."""
    h = normalize(tokens)
    z_tf = normalize(predictor(h[:, :-1], actions, states[:, :-1]))
    seen = torch.cat([h[:, :1], z_tf[:, :1].to(h.dtype)], dim=1)
    for n in range(1, auto_steps):
        out = normalize(predictor(seen, actions[:, : n + 1], states[:, : n + 1])[:, -1:])
        seen = torch.cat([seen, out.to(h.dtype)], dim=1)
    z_ar = seen[:, 1:]
    loss = (z_tf - h[:, 1:]).abs().mean() + (z_ar - h[:, 1 : auto_steps + 1]).abs().mean()
    return loss, z_tf, z_ar
