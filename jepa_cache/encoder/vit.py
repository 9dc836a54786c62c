"""The video transformers of V-JEPA 2 and 2.1, with the released checkpoints' parameter names.

Own module instead of transformers' VJEPA2Model: that one takes positions from its configuration instead of the input,
so another resolution or aspect runs with wrong positions and without a warning.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_cache.config.schema import LEVEL_LAYERS

ROPE_BASE = 10000.0
RESCALED_SPAN = 15.0  # rescaled rows and columns run from 0 to this: the last index of the 16 x 16 grid of 256 px


@lru_cache(maxsize=16)
def rotation_tables(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, *, pairing: str = "tiled", positions: str = "grid"
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's and channel's rotation angle, each [T*H*W, head_dim] float32.

    The head's channels are three blocks (time, row, column) of equal even width and a rest that is not rotated (cosine
    1, sine 0). Within a block of width r there are r/2 frequencies. `tiled` repeats the list of them, so that the two members of
    an adjacent pair turn by different angles: an upstream slip that the released V-JEPA 2 weights were trained with.
    `paired` gives both members the same one, as V-JEPA 2.1 does.

    Positions are the integer indices of the input's own grid; `rescaled` stretches rows and columns, not time, so that they
    span 0 to 15 at every resolution (V-JEPA 2.1). A side of one patch is at 0.

    Tables are float32 and made on the CPU whatever the compute dtype and device. Upstream builds them in bfloat16 under
    autocast (angles off by 3e-3 rad at position 15); we keep float32, which differs from the released training by less
    than bfloat16's other noise and gives one answer for every precision.

    Source: V-JEPA 2, arXiv 2506.09985, upstream `VisionTransformer` with RoPE; V-JEPA 2.1, arXiv 2603.14482.
    """
    width = 2 * (head_dim // 3 // 2)
    frequencies = ROPE_BASE ** (-2.0 * torch.arange(width // 2, dtype=torch.float32) / width)
    times, rows, columns = (torch.arange(n, dtype=torch.float32) for n in grid)
    if positions == "rescaled":
        rows, columns = (side * (RESCALED_SPAN / max(1, len(side) - 1)) for side in (rows, columns))
    axes = torch.meshgrid(times, rows, columns, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    angles = [it.repeat_interleave(2, dim=1) if pairing == "paired" else it.repeat(1, 2) for it in angles]
    rest = torch.zeros(angles[0].shape[0], head_dim - 3 * width)
    joined = torch.cat([*angles, rest], dim=1)
    return joined.cos().to(device), joined.sin().to(device)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn adjacent channel pairs of queries or keys x [..., N, head_dim] by tables [N, head_dim], in float32."""
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return (x * cosine + swapped * sine).to(x.dtype)


class Attention(nn.Module):
    """Full self-attention over all tokens of a clip, with rotary positions."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        """Make the projections; `qkv` rows are query, key, value, each split into heads contiguously."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Mix tokens x [B, N, D] -> [B, N, D]."""
        batch, num_tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, num_tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[:2], cosine, sine)  # at once, by half the kernels
        mixed = F.scaled_dot_product_attention(q, k, qkv[2])
        return self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, dim))


class MLP(nn.Module):
    """Two-layer perceptron with exact (erf) GELU."""

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = MLP(embed_dim, mlp_dim)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Map x [B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x), cosine, sine)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Cuts a clip into tubelets of patches and projects each to a token."""

    def __init__(self, embed_dim: int, patch_size: int, tubelet_size: int) -> None:
        """Make the projection; a Conv3d for the official names and shapes, applied as a matrix product."""
        super().__init__()
        self.kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=self.kernel, stride=self.kernel)

    def forward(self, clip: Tensor) -> Tensor:
        """Project clip [B, 3, F, h, w] -> [B, N, D] in time, row, column order; F, h, w are whole tubelets."""
        # One matrix product instead of Conv3d: kernel = stride makes them equal, and bfloat16 Conv3d is slow on GPUs.
        batch, channels, *size = clip.shape
        split = [part for axis, k in zip(size, self.kernel, strict=True) for part in (axis // k, k)]
        patches = clip.reshape(batch, channels, *split).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """V-JEPA 2 encoder. Owns the forward pass; never loads weights, chooses precision or prepares pixels.

    Parameters carry the official names, so a released state dict loads strictly. Freshly made parameters are torch's
    defaults and mean nothing: load a state before use.

    Source: V-JEPA 2, arXiv 2506.09985.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        patch_size: int = 16,
        tubelet_size: int = 2,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or embed_dim // num_heads < 6:  # two channels turn on each of three axes
            raise ValueError(
                f"encoder width must be a multiple of its heads with at least 6 channels a head; got embed_dim {embed_dim} and "
                f"num_heads {num_heads}. Change one of them in the encoder preset"
            )
        self.head_dim = embed_dim // num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.patch_embed = PatchEmbed(embed_dim, patch_size, tubelet_size)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_dim, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.compiled = False

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile each block by `torch.compile`, in place: all share one graph for batches of every size but 1, which would have its own."""
        self.compiled = True
        for block in self.blocks:
            block.compile(*arguments, **options)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode clips of any length and size; attention spans the whole clip in both directions of time.

        Args:
            clip: [B, 3, F, h, w] float, normalised pixels; h and w multiples of the patch. Frames beyond a multiple of the tubelet are dropped.

        Returns:
            tokens [B, T*H*W, D] after the last norm, T = F // tubelet, H = h / patch, W = w / patch; order time, row, column.
        """
        x, cosine, sine = self._embed(clip, *(side // self.patch_size for side in clip.shape[3:]))
        if self.compiled:
            torch._dynamo.mark_dynamic(x, 0)
        for block in self.blocks:
            x = block(x, cosine, sine)
        return self._last_norm(x)

    def _embed(self, clip: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [B, T*H*W, D], and the rotation tables of their grid."""
        steps = clip.shape[2] // self.tubelet_size
        tables = rotation_tables((steps, rows, columns), self.head_dim, clip.device)
        return self.patch_embed(clip[:, :, : steps * self.tubelet_size]), *tables

    def _last_norm(self, x: Tensor) -> Tensor:
        # CUDA's autocast norms in float32, the CPU's in the dtype of x: one recipe, one dtype.
        return self.norm(x).to(x.dtype)


class VisionTransformer21(VisionTransformer):
    """V-JEPA 2.1 encoder.

    Differs from V-JEPA 2 by: both channels of a rotated pair share a frequency; rows and columns are rescaled to span 0 to 15 at
    every resolution; a clip of exactly one frame goes through `patch_embed_img`, whose kernel is one frame; a learned vector is
    added to the patches of an image, another to those of a video; in place of one final norm there are four, each for the output
    of one of four blocks (its levels), of which tokens pass the last.

    The modality vectors are kept in float32, so under autocast the residual stream is float32 too.

    Source: V-JEPA 2.1, arXiv 2603.14482.
    """

    def __init__(
        self, *, embed_dim: int, depth: int, norm_eps: float = 1e-6, positions: str = "rescaled", **sizes: int
    ) -> None:
        """Make the modules; `positions` is "rescaled" as in all released weights (patches of 16 px), or "grid" for plain indices."""
        super().__init__(embed_dim=embed_dim, depth=depth, norm_eps=norm_eps, **sizes)
        self.levels = LEVEL_LAYERS[depth]
        self.positions = positions
        self.patch_embed_img = PatchEmbed(embed_dim, self.patch_size, 1)
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        del self.norm
        self.norms_block = nn.ModuleList(nn.LayerNorm(embed_dim, eps=norm_eps) for _ in self.levels)

    def _embed(self, clip: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        if clip.shape[2] == 1:
            steps, x = 1, self.patch_embed_img(clip) + self.img_mod_embed
        else:
            steps = clip.shape[2] // self.tubelet_size
            x = self.patch_embed(clip[:, :, : steps * self.tubelet_size]) + self.video_mod_embed
        grid = (steps, rows, columns)
        return x, *rotation_tables(grid, self.head_dim, clip.device, pairing="paired", positions=self.positions)

    def _last_norm(self, x: Tensor) -> Tensor:
        return self.norms_block[-1](x).to(x.dtype)
