"""From decoded frames to normalised square clips: the crop rules of the official pipelines.

A rule crops and resizes on the CPU; mean and deviation are applied where the encoder is, by single operations that round alike on every
device. What travels there is uint8 wherever a rule has whole levels.

No torchvision and no cv2: both resizes are torch's own, and both official results are met within one uint8 level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset

Frames = np.ndarray | Sequence[np.ndarray]
"""F frames [h, w, 3] uint8 RGB of one size, in one array or wherever each of them lies."""

# What the AC training config's random-resized-crop allows before it falls back to a centred crop.
AC_ASPECT_RANGE = (0.75, 1.35)
# The eval pipelines keep 224/256 of the short side.
EVAL_SHORT_SIDE_RATIO = 256 / 224


class CropRule(NamedTuple):
    """How frames become an encoder's pixels, each alone.

    `cut(frames, size, resize_later=)` takes `Frames` of any size and gives pixels from 0 to 255 in one of two forms:
    uint8 [F, size, size, 3], or with `resize_later` also the crop before it is resized; float32 [F, 3, size, size] where the rule
    resizes without rounding. `normalise` takes both.
    """

    cut: Callable[..., Tensor]
    in_levels: bool  # mean and deviation are taken of 0 to 255, else of 0 to 1: that rounds otherwise

    def statistics(self, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Offset and spread [3, 1, 1] float32, as `normalise` takes them, of the mean and deviation of pixels in [0, 1]."""
        scale = 255.0 if self.in_levels else 1.0
        offset, spread = (torch.tensor(it, dtype=torch.float32).view(3, 1, 1) * scale for it in (mean, std))
        return offset, spread


def normalise(pixels: Tensor, size: int, offset: Tensor, spread: Tensor, *, in_levels: bool) -> Tensor:
    """Pixels of a rule's `cut`, on any device, to normalised float32 [F, 3, size, size]; offset and spread are there too."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    if not in_levels:
        # By a tensor: by a number, CUDA multiplies with the reciprocal, which rounds otherwise.
        pixels = pixels / torch.full_like(offset, 255.0)
    return pixels.sub(offset).div_(spread)


def ac_crop_box(height: int, width: int, aspect_range: tuple[float, float] = AC_ASPECT_RANGE) -> tuple[int, ...]:
    """Find the centred crop of the AC pipeline, the largest whose aspect (width / height) lies in the range: top, left, height, width.

    The released config asks for an area larger than the frame, so its random crop never fits and always ends in this
    deterministic fallback: caching loses no augmentation. Rounding is half to even.

    Source: V-JEPA 2-AC, upstream vjepa_droid transforms.
    """
    low, high = aspect_range
    crop_height, crop_width = height, width
    if width / height < low:
        crop_height = round(width / low)
    elif width / height > high:
        crop_width = round(height * high)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _resized(frames: Frames, height: int, width: int, *, antialias: bool) -> Tensor:
    # Frame by frame and channels last: 0.5 ms for a 640x360 frame to 64 px against 4.6 ms for planar batches of 64,
    # with the same bits; and a frame cannot depend on its neighbours. One buffer, of which only the rows that are looked at
    # are filled, makes it 0.2 ms.
    resized = torch.empty(len(frames), 3, height, width)
    rows = slice(None) if antialias else _rows_looked_at(frames[0].shape[0], height)
    pixels = np.empty(frames[0].shape, np.float32)
    planar = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    for target, frame in zip(resized, frames, strict=True):
        pixels[rows] = frame[rows]
        target.copy_(
            F.interpolate(planar, (height, width), mode="bilinear", align_corners=False, antialias=antialias)[0]
        )
    return resized


@lru_cache(maxsize=32)
def _rows_looked_at(num_rows: int, num_resized: int) -> np.ndarray | slice:
    """The rows of a frame that bilinear resizing without antialias takes anything from: two for every row of the result."""
    centres = (np.arange(num_resized) + 0.5) * (num_rows / num_resized) - 0.5
    # torch computes the centres in float32, which may be a hair below a row or above it.
    nearest = np.floor(centres + np.array([[-0.01], [0.01]])).astype(np.int64)
    rows = np.unique(np.clip([nearest, nearest + 1], 0, num_rows - 1))
    return rows if len(rows) < 0.7 * num_rows else slice(None)


def resizes_exactly(height: int, width: int, size: int) -> bool:
    """Whether bilinear resizing without antialias to size x size rounds nothing in float32, so that every device and kernel gives the same.

    With sides whose ratio to `size` has a power of two below the line the weights are whole multiples of 1 over twice that; a product of
    two and a level of 8 bits must fit 24 bits. So it is for 256 px from 640x360, 320x180, 1280x720 and 640x480, cropped.
    """
    bits = 8
    for side in (height, width):
        below = size // math.gcd(side, size)
        if below & (below - 1):
            return False
        bits += (2 * below - 1).bit_length()
    return bits <= 24


def cut_ac(
    frames: Frames,
    size: int,
    *,
    aspect_range: tuple[float, float] = AC_ASPECT_RANGE,
    resize_later: bool = False,
) -> Tensor:
    """Crop as the AC trainer does, in the centre, and resize in float32 without antialias, see `CropRule`.

    The crop is squeezed to a square. An `aspect_range` of (1, 1) takes the centred square, as the planning notebook does. `resize_later` leaves
    the resizing to the device where that changes no bit and the crop is no larger than the float32 pixels.

    Source: V-JEPA 2-AC, upstream vjepa_droid transforms.
    """
    rows, columns, _ = frames[0].shape
    top, left, height, width = ac_crop_box(rows, columns, aspect_range)
    crops = [frame[top : top + height, left : left + width] for frame in frames]
    if resize_later and height * width <= 4 * size**2 and resizes_exactly(height, width, size):
        return torch.from_numpy(np.stack(crops))
    return _resized(crops, size, size, antialias=False)


def cut_eval(frames: Frames, size: int, *, antialias: bool, resize_later: bool = False) -> Tensor:
    """Prepare frames as the official evaluation does: resize the short side to size * 256 / 224, round to uint8, cut the centre.

    The official pipeline has two forms that differ by up to 0.8 normalised units on noisy images: for arrays (no
    antialias, `antialias=False`) and for tensors (antialias). Both round the resized image to uint8. The array form's
    fixed-point arithmetic may round one level (0.0175) apart from ours.

    Source: V-JEPA 2, upstream video_classification_frozen transforms.
    """
    height, width = frames[0].shape[:2]
    short = int(size * EVAL_SHORT_SIDE_RATIO)
    resized = (short * height // min(height, width), short * width // min(height, width))
    top, left = (round((side - size) / 2) for side in resized)
    pixels = _resized(frames, *resized, antialias=antialias)[:, :, top : top + size, left : left + size]
    return pixels.round().clamp_(0, 255).to(torch.uint8).movedim(1, -1)


def cut_pillow(
    frames: Frames, size: int, *, resample: str, short_side: int | None = None, resize_later: bool = False
) -> Tensor:
    """Prepare frames as the image processors of the transformers library do: Pillow's resize to uint8, centre crop.

    `resample` is "bilinear", "bicubic" or "lanczos", all with antialias, as Pillow's filters are. The short side is resized to `short_side`
    pixels before the centre is cut out; None squeezes the frame to the square.

    Source: transformers 5.23, BitImageProcessorPil (DINOv2) and ViTImageProcessorPil; their results are met exactly.
    """
    from PIL import Image

    height, width = frames[0].shape[:2]
    resized = (size, size)
    if short_side is not None:
        long_side = int(short_side * max(height, width) / min(height, width))
        resized = (short_side, long_side) if height <= width else (long_side, short_side)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    pixels = torch.empty(len(frames), size, size, 3, dtype=torch.uint8)
    for target, frame in zip(pixels, frames, strict=True):
        picture = Image.fromarray(frame).resize(resized[::-1], Image.Resampling[resample.upper()])
        target.copy_(torch.from_numpy(np.array(picture)[top : top + size, left : left + size]))
    return pixels


CROP_RULES: Mapping[str, CropRule] = {
    "ac": CropRule(cut_ac, in_levels=True),
    "square": CropRule(partial(cut_ac, aspect_range=(1.0, 1.0)), in_levels=True),
    "eval_array": CropRule(partial(cut_eval, antialias=False), in_levels=False),
    "eval_tensor": CropRule(partial(cut_eval, antialias=True), in_levels=False),
    "pillow_bilinear": CropRule(partial(cut_pillow, resample="bilinear"), in_levels=False),
    "pillow_bicubic": CropRule(partial(cut_pillow, resample="bicubic"), in_levels=False),
    "pillow_lanczos": CropRule(partial(cut_pillow, resample="lanczos"), in_levels=False),
}


def crop_rule(preset: EncoderPreset) -> CropRule:
    """The rule that a preset names, with the short side that it gives."""
    if preset.crop not in CROP_RULES:
        raise ValueError(f"unknown crop '{preset.crop}' for encoder '{preset.name}'; known: {', '.join(CROP_RULES)}")
    rule = CROP_RULES[preset.crop]
    return rule if preset.short_side is None else rule._replace(cut=partial(rule.cut, short_side=preset.short_side))
