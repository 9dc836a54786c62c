"""How tokens are stored in fewer bits, and the formula that gives the numbers back. numpy only.

`float16` and `bfloat16` store the values themselves. The others store codes: a channel's mean is taken off and its deviation
divided out (a few channels of such encoders are far larger than the others and would take all the bits), then each token,
or each 64 channels of it, has a scale that makes its largest value the largest code:

    value = code * token_scale * channel_scale + channel_mean

in float32, in this order. Means and deviations are those of all steps of the store, so the same content gives the same bytes.
Codes are made from float16 tokens, so a float16 store has all it takes to make them later, without the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.config.schema import INT4_GROUP

FINITE_PIECE = 1 << 19  # values that are looked at at once, 1 MiB
FORMULA = "value = code * token_scales * channel_scales + channel_means, in float32, from left to right"


class Codec(NamedTuple):
    """One way to store tokens, with all that follows from it: a new one is an entry of `CODECS` and a name in the settings' schema."""

    dtype: str  # of the stored array: bit patterns where numpy and Zarr know no such numbers
    torch_dtype: str  # the same array as torch sees it, by its name there
    cast: str  # floating-point dtype, by its name in torch, that tokens are cast to on the encoder's device; its range is the limit
    # What other readers show for a chunk that is not there, and what is never stored: NaN, also as a bit pattern, and for
    # integers the code that symmetric scaling leaves over.
    fill_value: float
    # Stored numbers as float32, codes or values: [..., D / codes_per_item] to [..., D], by numpy, and by torch on any device.
    unpack: Callable[[np.ndarray], np.ndarray] = lambda stored: stored.astype(np.float32)
    unpack_tensor: Callable[[Any], Any] = lambda stored: stored.float()
    meaning: str | None = None  # of a stored number, for the array's attributes; None where it needs no words
    # Codes as they are stored, from float32 [N, D] of magnitude at most `max_code`, which it may overwrite. None for both where the
    # values themselves are stored.
    pack: Callable[[np.ndarray], np.ndarray] | None = None
    # The same codes as numbers that the torch dtype holds, from a float32 tensor [..., D] of any device.
    pack_tensor: Callable[[Any], Any] = lambda codes: codes
    max_code: float | None = None
    grouped: bool = False  # scales are for each 64 channels of a token, in float16, and not for the token, in float32
    codes_per_item: int = 1  # codes in one stored number

    @property
    def given(self) -> str:
        """Dtype of the tokens that the writer takes; uint16 is bfloat16's bits, for numpy knows no such numbers."""
        return "uint16" if self.cast == "bfloat16" else self.cast


class Channels(NamedTuple):
    """What is divided out of and taken off each channel: [D] float32 each."""

    scales: np.ndarray
    means: np.ndarray


def get_codec(name: str) -> Codec:
    """The codec of a stored dtype; ValueError for an unknown name."""
    if name not in CODECS:
        raise ValueError(f"tokens cannot be stored as {name!r}; known: {', '.join(CODECS)}")
    return CODECS[name]


def fits(name: str, width: int) -> bool:
    """Whether a codec can cut tokens of this width into its groups."""
    return not get_codec(name).grouped or width % INT4_GROUP == 0


def check_width(name: str, width: int) -> None:
    """Raise ValueError for a token width that a codec cannot cut into groups."""
    if not fits(name, width):
        raise ValueError(
            f"{name} needs a token width that is a multiple of {INT4_GROUP}; got {width}. Store as int8 instead"
        )


def scales_shape(name: str, num_steps: int, num_tokens: int, width: int) -> tuple[int, ...]:
    """Shape of `token_scales`: [n, N], or [n, N, D / 64] where they are grouped."""
    return (num_steps, num_tokens, width // INT4_GROUP) if get_codec(name).grouped else (num_steps, num_tokens)


def scales_dtype(name: str) -> np.dtype:
    """Dtype of `token_scales`."""
    return np.dtype(np.float16 if get_codec(name).grouped else np.float32)


def step_bytes(name: str, num_tokens: int, width: int) -> int:
    """Bytes of one step's values and scales."""
    codec = get_codec(name)
    stored = num_tokens * width // codec.codes_per_item * np.dtype(codec.dtype).itemsize
    if codec.max_code is None:
        return stored
    return stored + int(np.prod(scales_shape(name, 1, num_tokens, width))) * scales_dtype(name).itemsize


def sum_channels(run: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Sums and sums of squares of each step's channels, less `origin` [D] float32: [T, N, D] float16 to [2, T, D] float32.

    Whole rows are added, one after the other, so that neither numpy nor the processor choose an order that could change a bit.
    """
    sums = np.empty((2, len(run), run.shape[2]), np.float32)
    for step, total, squares in zip(run, *sums, strict=True):
        rows = step.astype(np.float32)
        rows -= origin
        rows.sum(axis=0, out=total)
        rows *= rows
        rows.sum(axis=0, out=squares)
    return sums


def measure_channels(
    runs: Iterable[np.ndarray], width: int, sums: Callable[[np.ndarray, np.ndarray], np.ndarray] = sum_channels
) -> Channels:
    """Mean and standard deviation of each of `width` channels in [T, N, D] float16 runs; one that never changes has scale 1.

    Steps are added one after the other in float64; `sums` of a run is `sum_channels`, or what gives the same bits.
    """
    origin: np.ndarray | None = None
    total, squares, count = np.zeros(width), np.zeros(width), 0
    for run in runs:
        if not len(run):
            continue
        if origin is None:
            origin = run[0].astype(np.float32).mean(axis=0)  # a mean far from zero would cost the deviation its digits
        for of_values, of_squares in zip(*sums(run, origin), strict=True):
            total += of_values
            squares += of_squares
        count += len(run) * run.shape[1]
    if origin is None:
        return Channels(np.ones(width, np.float32), np.zeros(width, np.float32))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean * mean, 0)).astype(np.float32)
    deviation[deviation < np.finfo(np.float32).tiny] = 1
    return Channels(deviation, (origin + mean).astype(np.float32))


def encode(step: np.ndarray, name: str, channels: Channels) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of one step [N, D] float16, finite, by a codec that stores codes and the channels of the whole store.

    Returns:
        Codes as they are stored ([N, D], int4 [N, D / 2]), and scales ([N] float32, int4 [N, D / 64] float16).
    """
    codec = get_codec(name)
    values = step.astype(np.float32)
    values -= channels.means
    values /= channels.scales
    groups = values.reshape(len(step), -1, INT4_GROUP if codec.grouped else step.shape[1])
    scales = np.maximum(groups.max(axis=2), -groups.min(axis=2)) / np.float32(codec.max_code)
    stored_scales = scales.astype(scales_dtype(name))
    # Too small a number has too few digits for its largest value to stay the largest code: such values are all the mean.
    stored_scales[stored_scales < np.finfo(stored_scales.dtype).tiny] = 0
    groups /= np.where(stored_scales == 0, np.float32(1), stored_scales.astype(np.float32))[:, :, None]
    return codec.pack(values), stored_scales if codec.grouped else stored_scales[:, 0]


def decode(
    stored: np.ndarray, name: str, scales: np.ndarray | None = None, channels: Channels | None = None
) -> np.ndarray:
    """The documented formula: stored tokens [..., N, D] (int4 [..., N, D / 2]) and their scales to values [..., N, D] float32."""
    codec = get_codec(name)
    codes = codec.unpack(stored)
    if codec.max_code is None:
        return codes
    groups = codes.reshape(*codes.shape[:-1], scales.shape[-1] if codec.grouped else 1, -1)
    groups *= scales.astype(np.float32).reshape(*groups.shape[:-1], 1)
    codes *= channels.scales
    codes += channels.means
    return codes


def is_finite(tokens: np.ndarray) -> bool:
    """Whether every value is a finite number: float16, or uint16 that is bfloat16's bits.

    The exponent of what is not finite is all ones, so the bits of all others are smaller, of either sign: a tenth of the time of `isfinite`.
    """
    exponent = 0x7F80 if tokens.dtype == np.uint16 else 0x7C00
    bits = tokens.reshape(-1).view(np.uint16)
    # In pieces, which the second look finds in the processor's cache.
    pieces = (bits[begin : begin + FINITE_PIECE] for begin in range(0, len(bits), FINITE_PIECE))
    return all(piece.view(np.int16).max() < exponent and piece.max() < 0x8000 + exponent for piece in pieces)


def to_float8(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest float8 E4M3, ties to even: float32 of magnitude at most 448 to uint8."""
    bits = values.view(np.uint32)
    sign = ((bits >> 24) & 0x80).astype(np.uint8)
    bits = bits & 0x7FFFFFFF
    # Adding half of the last bit that stays (a little less on ties to an even one) and cutting the rest off rounds; then
    # the exponent's bias goes from 127 to 7.
    code = bits >> 20
    code &= 1
    code += bits
    code += 0x7FFFF
    code >>= 20
    code -= (127 - 7) << 3
    # Below 2^-6 the steps are 2^-9 wide, as float32's own are at 2^14: that addition rounds.
    small = bits < np.float32(2**-6).view(np.uint32)
    code[small] = (bits[small].view(np.float32) + np.float32(2**14)).view(np.uint32) - np.float32(2**14).view(np.uint32)
    return code.astype(np.uint8) | sign


def from_float8(bits: np.ndarray) -> np.ndarray:
    """The float32 value of float8 E4M3 bits; NaN for 0x7F and 0xFF, of which none is ever stored."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)[bits]


def _pack_int4(codes: np.ndarray) -> np.ndarray:
    codes = (np.rint(codes, out=codes) + 8).astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _pack_int4_tensor(codes: Any) -> Any:
    codes = (codes.round() + 8).byte()
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _unpack_int4(stored: np.ndarray) -> np.ndarray:
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1).astype(np.float32) - 8


def _unpack_int4_tensor(stored: Any) -> Any:
    codes = stored.new_empty((*stored.shape, 2))  # this room needs no torch, so its `stack` is not to be had
    codes[..., 0], codes[..., 1] = stored & 15, stored >> 4
    return codes.flatten(-2).float() - 8


CODECS = {
    "float16": Codec("float16", "float16", "float16", np.nan),
    "bfloat16": Codec(
        dtype="uint16",
        torch_dtype="bfloat16",
        cast="bfloat16",
        fill_value=0x7FC0,
        unpack=lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
        meaning="value = the float32 whose upper 16 bits these are, the lower being 0",
    ),
    "int8": Codec(
        dtype="int8",
        torch_dtype="int8",
        cast="float16",
        fill_value=-128,
        meaning=f"{FORMULA}; code = the stored integer",
        pack=lambda codes: np.rint(codes, out=codes).astype(np.int8),
        pack_tensor=lambda codes: codes.round(),
        max_code=127.0,
    ),
    "float8_e4m3": Codec(
        dtype="uint8",
        torch_dtype="float8_e4m3fn",
        cast="float16",
        fill_value=0x7F,
        unpack=from_float8,
        meaning=f"{FORMULA}; code = the float8 of these bits: sign, 4 bits exponent (bias 7), 3 bits mantissa (E4M3, finite)",
        pack=to_float8,
        max_code=448.0,
    ),
    "int4": Codec(
        dtype="uint8",
        torch_dtype="uint8",
        cast="float16",
        fill_value=0x00,
        unpack=_unpack_int4,
        unpack_tensor=_unpack_int4_tensor,
        meaning=f"{FORMULA}; channels 2i and 2i + 1 are the lower and upper 4 bits of byte i, code = those bits - 8, "
        f"token_scales of channel c is that of group c // {INT4_GROUP}",
        pack=_pack_int4,
        pack_tensor=_pack_int4_tensor,
        max_code=7.0,
        grouped=True,
        codes_per_item=2,
    ),
}
