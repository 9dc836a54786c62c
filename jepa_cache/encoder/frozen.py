"""A frozen encoder ready for use: pixels in, tokens out, and the guarded cast to the stored precision."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.preprocess import crop_rule

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TokenOverflowError(ValueError):
    """Tokens do not fit the stored precision; `step` is the first such step, counted over all leading axes."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def load_module(preset: EncoderPreset, weights: Path | None) -> nn.Module:
    """A preset's encoder with weights in memory: what becomes of the file `weights` afterwards changes nothing."""
    module = KINDS[preset.kind].load(preset, weights)
    # Loaded tensors are views of the mapped file, which would change with it while we encode.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


class FrozenEncoder:
    """Owns one encoder on one device. Never trains, never reads files; `preprocess` may be called from any thread."""

    def __init__(
        self,
        preset: EncoderPreset,
        module: nn.Module,
        *,
        device: str | torch.device,
        compute_dtype: str,
        single_frame: str = "doubled",
        pool: int = 1,
    ) -> None:
        """Move a preset's encoder, from `load_module`, to a device such as "cuda:1".

        A lower `compute_dtype` is autocast over float32 weights. `single_frame` says how frame mode gives a frame: "doubled" into a
        tubelet, or as an "image" (V-JEPA 2.1 only). `pool` 2 averages the tokens of each 2 x 2 patches.
        """
        side = preset.resolution // preset.patch_size
        self.grid, self.pool = (side, side), pool
        self.frames_of_one = preset.tubelet_size if single_frame == "doubled" else 1
        self.preset = preset
        self.device = torch.device(device)
        self.compute_dtype = COMPUTE_DTYPES[compute_dtype]
        self._crop = crop_rule(preset)
        self.encoder = module.to(self.device)

    @property
    def num_tokens(self) -> int:
        """Tokens per step (N), after pooling."""
        return (self.grid[0] // self.pool) * (self.grid[1] // self.pool)

    @property
    def width(self) -> int:
        """Channels of a token (D)."""
        return self.preset.embed_dim

    def preprocess(self, frames: np.ndarray) -> Tensor:
        """Crop, resize and normalise frames [F, h, w, 3] uint8 RGB to [F, 3, R, R] float32 on the CPU, each on its own."""
        preset = self.preset
        return self._crop(frames, preset.resolution, mean=preset.mean, std=preset.std)

    @torch.no_grad()
    def encode(self, groups: Tensor) -> Tensor:
        """Encode groups of frames, each group on its own.

        Args:
            groups: [B, G, 3, R, R] float32, preprocessed. G = 1 is frame mode: the frame is repeated to fill a
                tubelet, as the AC trainer does, or goes through the image path. G = tubelet is tubelet mode, a larger
                multiple clip mode, where attention spans the clip in both directions of time.

        Returns:
            tokens [B, T, N, D] on the device, T = 1 in frame mode, else G / tubelet; after the encoder's final norm,
            before any parameter-free layer norm. float32, or under autocast what its final norm gives (float32 or
            the compute dtype); pooled tokens are float32.

        Source: V-JEPA 2-AC, arXiv 2506.09985 (frame mode).
        """
        tubelet, num_frames = self.preset.tubelet_size, groups.shape[1]
        if num_frames != 1 and (num_frames == 0 or num_frames % tubelet):
            raise ValueError(
                f"a group is 1 frame or a multiple of the tubelet ({tubelet}); got {num_frames} frames. Choose such "
                f"an encode.frames_per_clip"
            )
        clips = groups.to(self.device, non_blocking=True).transpose(1, 2)
        if num_frames == 1:
            clips = clips.expand(-1, -1, self.frames_of_one, -1, -1)
        autocast = nullcontext()
        if self.compute_dtype != torch.float32:
            autocast = torch.autocast(self.device.type, dtype=self.compute_dtype)
        with autocast:
            tokens = self.encoder(clips)
        return pool_tokens(tokens.unflatten(1, (-1, self.grid[0] * self.grid[1])), self.grid, self.pool)


def pool_tokens(tokens: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """Average each square of pool x pool patches, in float32.

    Tokens [..., H*W, D], rows after rows, become [..., H/pool * W/pool, D] float32; 1 returns them as they are.
    """
    if pool == 1:
        return tokens
    rows, columns = grid
    squares = tokens.to(torch.float32).unflatten(-2, (rows // pool, pool, columns // pool, pool))
    return squares.mean(dim=(-4, -2)).flatten(-3, -2)


def to_stored(tokens: Tensor, dtype: str) -> np.ndarray:
    """Cast tokens to the stored precision, refusing what it cannot hold.

    `tokens` are [..., N, D] on any device, the leading axes steps; `dtype` is the `cast` of the store's codec. Each is cast from what was
    computed, never from another. Gives an array of the same shape on the CPU; bfloat16 as its bits, uint16.

    Raises:
        TokenOverflowError: a value is not finite after the cast; names the first such step and its largest value.
    """
    stored = tokens.detach().to(COMPUTE_DTYPES[dtype])
    finite = stored.isfinite().all(dim=-1).all(dim=-1).flatten()
    if not finite.all():
        step = int((~finite).nonzero()[0])
        values = tokens.detach().flatten(0, -3)[step] if tokens.ndim > 2 else tokens.detach()
        if values.isnan().any():
            reason = (
                "they are no numbers (NaN). In float32 that comes from damaged weights or from a preset's mean and std; in a lower "
                "encode.compute_dtype also from an overflow inside the encoder, which float32 mends"
            )
        else:
            reason = (
                f"largest magnitude {values.abs().max().item():g}, limit {torch.finfo(COMPUTE_DTYPES[dtype]).max:g}. Store with another "
                "dtype, or compute in float32 if the encoder itself overflows"
            )
        raise TokenOverflowError(
            f"tokens of step {step} (of {finite.numel()} in this batch) cannot be stored as {dtype}: {reason}", step
        )
    return (stored.view(torch.uint16) if dtype == "bfloat16" else stored).cpu().numpy()


def measure_cast(tokens: Tensor, dtype: str) -> np.ndarray:
    """What `to_stored` changes of finite tokens [B, N, D]: per step the sum of squared errors, the sum of squares and the largest error.

    Gives [B, 3] float64. A cast's error is a float32 number, so only the sums round, in float64.
    """
    truth = tokens.detach().float()
    error = truth.to(COMPUTE_DTYPES[dtype]).float() - truth
    squared, squares = (values.square().sum(dim=(-2, -1), dtype=torch.float64) for values in (error, truth))
    return torch.stack([squared, squares, error.abs().amax(dim=(-2, -1)).double()], dim=-1).cpu().numpy()
