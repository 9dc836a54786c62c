"""The V-JEPA 2.1 transformer: single images have a patch embedding of their own, and four depths have norms of their own."""

import torch
from torch import Tensor, nn

from jepa_cache.config.schema import LEVEL_LAYERS
from jepa_cache.encoder.vit import Block, PatchEmbed, count_tubelets, measure_clip, rotation_tables, split_width


class VisionTransformer21(nn.Module):
    """V-JEPA 2.1 encoder. Owns the forward pass; never loads weights, chooses precision or prepares pixels.

    Differs from V-JEPA 2 by: both channels of a rotated pair share a frequency; rows and columns are rescaled to span 0 to 15 at
    every resolution; a clip of exactly one frame goes through `patch_embed_img`, whose kernel is one frame; a learned vector is
    added to the patches of an image, another to those of a video; in place of one final norm there are four, each for the output
    of one of four blocks (its levels). Parameters carry the official names. Freshly made ones mean nothing: load a state.

    The modality vectors are kept in float32, so under autocast the residual stream is float32 too.

    Source: V-JEPA 2.1, arXiv 2603.14482.
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
        positions: str = "rescaled",
    ) -> None:
        """Make the modules; `positions` is "rescaled" as in all released weights (patches of 16 px), or "grid" for plain indices."""
        super().__init__()
        self.head_dim = split_width(embed_dim, num_heads)
        self.levels = LEVEL_LAYERS[depth]
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.positions = positions
        self.patch_embed = PatchEmbed(embed_dim, patch_size, tubelet_size)
        self.patch_embed_img = PatchEmbed(embed_dim, patch_size, 1)
        self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_dim, norm_eps) for _ in range(depth))
        self.norms_block = nn.ModuleList(nn.LayerNorm(embed_dim, eps=norm_eps) for _ in self.levels)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode clips of any length and size; attention spans the whole clip in both directions of time.

        Args:
            clip: [B, 3, F, h, w] float, normalised pixels. F = 1 takes the image path; above it frames beyond a multiple of the
                tubelet are dropped.

        Returns:
            tokens [B, T*H*W, D] after the norm of the last level, T = 1 for an image, else F // tubelet; H = h / patch,
            W = w / patch; order time, row, column.
        """
        x, cosine, sine = self._embed(clip)
        for block in self.blocks:
            x = block(x, cosine, sine)
        return self.norms_block[-1](x)

    def encode_levels(self, clip: Tensor) -> Tensor:
        """Encode as `forward` does, and give all four levels.

        Returns:
            [B, T*H*W, 4 * D]: the normed outputs of four blocks, the deepest last, side by side on the channel axis.
        """
        x, cosine, sine = self._embed(clip)
        levels = []
        for index, block in enumerate(self.blocks):
            x = block(x, cosine, sine)
            if index in self.levels:
                levels.append(self.norms_block[len(levels)](x))
        return torch.cat(levels, dim=-1)

    def _embed(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [B, T*H*W, D] with the vector of their modality, and the rotation tables of their grid."""
        num_frames, rows, columns = measure_clip(clip, self.patch_size)
        if num_frames == 1:
            steps, x = 1, self.patch_embed_img(clip) + self.img_mod_embed
        else:
            steps = count_tubelets(num_frames, self.tubelet_size)
            x = self.patch_embed(clip[:, :, : steps * self.tubelet_size]) + self.video_mod_embed
        grid = (steps, rows, columns)
        return x, *rotation_tables(grid, self.head_dim, clip.device, pairing="paired", positions=self.positions)
