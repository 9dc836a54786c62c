"""A frozen encoder ready for use: pixels in, tokens out, and the guarded cast to the stored precision.

`FrozenEncoder.encode` gives tokens of one batch; `Overlap` runs batches one behind the other, so that a GPU never waits for the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.preprocess import Frames, crop_rule, normalise

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
        compiled: bool = False,
    ) -> None:
        """Move a preset's encoder, from `load_module`, to a device such as "cuda:1".

        A lower `compute_dtype` is autocast; weights of products, which it would cast at every pass, are cast here once. `single_frame`
        says how frame mode gives a frame: "doubled" into a tubelet, or as an "image" (V-JEPA 2.1 only). `pool` 2 averages the tokens of
        each 2 x 2 patches. `compiled`: by torch.compile, which fuses what would be rounded between operations, so that other bits
        come out.
        """
        side = preset.resolution // preset.patch_size
        self.grid, self.pool, self.compiled = (side, side), pool, compiled
        self.frames_of_one = preset.tubelet_size if single_frame == "doubled" else 1
        self.preset = preset
        self.device = torch.device(device)
        self.compute_dtype = COMPUTE_DTYPES[compute_dtype]
        self._crop = crop_rule(preset)
        self._offset, self._spread = (it.to(self.device) for it in self._crop.statistics(preset.mean, preset.std))
        self.encoder = module.to(self.device)
        if self.compute_dtype != torch.float32:
            for part in self.encoder.modules():
                if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d):
                    part.to(self.compute_dtype)
        if compiled:
            self.encoder.compile()

    @property
    def num_tokens(self) -> int:
        """Tokens per step (N), after pooling."""
        return (self.grid[0] // self.pool) * (self.grid[1] // self.pool)

    @property
    def width(self) -> int:
        """Channels of a token (D)."""
        return self.preset.embed_dim

    def preprocess(self, frames: Frames) -> Tensor:
        """Crop and resize frames on the CPU, each on its own; `encode` takes mean and deviation.

        Gives pixels as they go to the device, see `CropRule.cut`: with a GPU uint8 wherever that changes no bit.
        """
        return self._crop.cut(frames, self.preset.resolution, resize_later=self.device.type != "cpu")

    @torch.no_grad()
    def encode(self, groups: Tensor) -> Tensor:
        """Encode groups of frames, each group on its own.

        Args:
            groups: [B, G, 3, R, R] float32 or [B, G, h, w, 3] uint8, as `preprocess` gives frames, here or on the device. G = 1 is frame
                mode: the frame is repeated to fill a tubelet, as the AC trainer does, or goes through the image path. G = tubelet is
                tubelet mode, a larger multiple clip mode, where attention spans the clip in both directions of time.

        Returns:
            tokens [B, T, N, D] on the device, T = 1 in frame mode, else G / tubelet; after the encoder's final norm,
            before any parameter-free layer norm. float32, or under autocast what its final norm gives (float32 or
            the compute dtype); pooled tokens are float32.

        Source: V-JEPA 2-AC, arXiv 2506.09985 (frame mode).
        """
        if self.compiled and len(groups) == 1:  # a size of 1 would be a graph of its own
            return self.encode(groups.expand(2, *groups.shape[1:]))[:1]
        frames = groups.to(self.device, non_blocking=True).flatten(0, 1)
        resolution = self.preset.resolution
        frames = normalise(frames, resolution, self._offset, self._spread, in_levels=self._crop.in_levels)
        clips = frames.unflatten(0, groups.shape[:2]).transpose(1, 2)
        if groups.shape[1] == 1:
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


def cast_tokens(tokens: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] cast to the stored precision, and what that changed of each step, on their device without waiting for it.

    `dtype` is the `cast` of the store's codec; each is cast from what was computed, never from another. The errors [B, 3] float64 are the
    sum of squared errors, the sum of squares and the largest error. A cast's error is a float32 number, so only the sums round, in
    float64. The largest one is finite where all that was cast is, before and after.
    """
    truth = tokens.detach()
    stored, truth = truth.to(COMPUTE_DTYPES[dtype]), truth.float()
    error = stored.float() - truth
    squared, squares = (values.square().sum(dim=(-2, -1), dtype=torch.float64) for values in (error, truth))
    return stored, torch.stack([squared, squares, error.abs().amax(dim=(-2, -1)).double()], dim=-1)


def check_cast(errors: np.ndarray, tokens: Tensor, dtype: str) -> None:
    """Refuse what the stored precision cannot hold: `errors` [B, 3] are those of `cast_tokens`, `tokens` what was cast.

    Raises:
        TokenOverflowError: a value is not finite after the cast; names the first such step and its largest value.
    """
    finite = np.isfinite(errors[:, 2])
    if finite.all():
        return
    step = int(finite.argmin())
    values = tokens.detach()[step].float()
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
        f"tokens of step {step} (of {len(finite)} in this batch) cannot be stored as {dtype}: {reason}", step
    )


def to_stored(tokens: Tensor, dtype: str) -> np.ndarray:
    """`cast_tokens` of [..., N, D], the leading axes steps, as an array of the same shape; bfloat16 as its bits, uint16.

    Raises:
        TokenOverflowError: a value is not finite after the cast.
    """
    steps = tokens.reshape(-1, *tokens.shape[-2:])
    stored, errors = cast_tokens(steps, dtype)
    check_cast(errors.cpu().numpy(), steps, dtype)
    return as_array(stored.cpu()).reshape(tokens.shape)


def as_array(stored: Tensor) -> np.ndarray:
    """A tensor of the CPU as an array; bfloat16 as its bits, uint16, for numpy knows no such numbers."""
    return (stored.view(torch.uint16) if stored.dtype == torch.bfloat16 else stored).numpy()


class Overlap:
    """Runs batches of one encoder one behind the other; owns page-locked memory for `num_slots` of them.

    On a GPU upload, computation and download are three streams, and the caller, who only launches, waits for none: it is `Slot.result`, for
    another thread, that waits, and what a batch turned out to hold is known there. On a CPU all is done when `submit` returns.
    """

    def __init__(self, encoder: FrozenEncoder, cast: str, num_slots: int) -> None:
        self.encoder, self.cast = encoder, cast
        self.free: SimpleQueue[Slot] = SimpleQueue()
        on_gpu = encoder.device.type == "cuda"
        self.upload, self.download = (torch.cuda.Stream(encoder.device) if on_gpu else None for _ in range(2))
        for _ in range(num_slots):
            self.free.put(Slot(self))

    def submit(self, *parts: Tensor) -> Slot:
        """Encode and cast a batch as `FrozenEncoder.preprocess` gives it, in parts [B, G, ...], which may be given up afterwards.

        Raises:
            queue.Empty: More than `num_slots` batches were not released.
        """
        slot, groups = self.free.get_nowait(), parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.upload is None:
            slot.compute(groups)
            slot.tokens, slot.errors = slot.stored, slot.summary
            return slot
        compute = torch.cuda.current_stream(self.encoder.device)
        # A copy of the CPU's, beside which the GPU computes the batch before.
        slot.pixels = _fitting(slot.pixels, groups)
        slot.pixels.copy_(groups)
        with torch.cuda.stream(self.upload):
            slot.uploaded = slot.pixels.to(self.encoder.device, non_blocking=True)
        compute.wait_stream(self.upload)
        slot.compute(slot.uploaded)
        slot.tokens, slot.errors = _fitting(slot.tokens, slot.stored), _fitting(slot.errors, slot.summary)
        self.download.wait_stream(compute)
        with torch.cuda.stream(self.download):
            slot.tokens.copy_(slot.stored, non_blocking=True)
            slot.errors.copy_(slot.summary, non_blocking=True)
            slot.done.record(self.download)
        return slot


class Slot:
    """One batch on its way. Tensors on the device are kept until it is released, when no stream uses them any more."""

    pixels: Tensor | None = None  # page-locked, as are the next two
    tokens: Tensor | None = None
    errors: Tensor | None = None
    uploaded: Tensor | None = None  # on the device
    computed: Tensor | None = None
    stored: Tensor | None = None
    summary: Tensor | None = None

    def __init__(self, overlap: Overlap) -> None:
        self._overlap = overlap
        self.done = torch.cuda.Event() if overlap.upload is not None else None

    def compute(self, groups: Tensor) -> None:
        """Launch encoder and cast."""
        self.computed = self._overlap.encoder.encode(groups).flatten(0, 1)
        self.stored, self.summary = cast_tokens(self.computed, self._overlap.cast)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T, N, D] as they are stored and their errors [T, 3] float64, until `release`; waits for the device.

        Raises:
            TokenOverflowError: The stored precision cannot hold a value.
        """
        if self.done is not None:
            self.done.synchronize()
        errors = self.errors.numpy()
        check_cast(errors, self.computed, self._overlap.cast)
        return as_array(self.tokens), errors

    def release(self) -> None:
        """What `result` gave is not needed any more."""
        self.uploaded = self.computed = self.stored = self.summary = None
        if self.done is None:
            self.tokens = self.errors = None
        self._overlap.free.put(self)


def _fitting(buffer: Tensor | None, like: Tensor) -> Tensor:
    """A page-locked buffer of the shape and dtype of `like`: the one that is there, or a new one."""
    num_bytes = like.numel() * like.element_size()
    whole = None if buffer is None else torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
    if whole is None or len(whole) < num_bytes:
        whole = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return whole[:num_bytes].view(like.dtype).view(like.shape)
