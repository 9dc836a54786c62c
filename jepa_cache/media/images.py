"""Encoded videos that are no plain container: a picture per frame, or two pictures side by side in one frame."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FORMATS = ("JPEG", "PNG")
# Stated sizes are checked before any pixel is decoded: a PNG of 60 kB may hold 3 GB of zeros. Twice an 8K frame is 199 MB
# of RGB, far above any robot camera.
MAX_FRAME_PIXELS = 2 * 7680 * 4320


@dataclass(frozen=True)
class FrameSequence:
    """A video as one encoded JPEG or PNG picture per frame, in order of time, at `fps` Hz."""

    frames: tuple[bytes, ...]
    fps: float

    @property
    def size_bytes(self) -> int:
        """Bytes of all encoded pictures."""
        return sum(map(len, self.frames))


@dataclass(frozen=True)
class SideBySide:
    """A video whose frames hold the pictures of a stereo camera beside each other; opened, it is the left one alone."""

    video: bytes | Path

    @property
    def size_bytes(self) -> int:
        """Bytes of the container."""
        return len(self.video) if isinstance(self.video, bytes) else self.video.stat().st_size


def measure_image(data: bytes) -> tuple[int, int, str]:
    """Height, width and format ("jpeg" or "png") as the header states them; decodes no pixel.

    Raises:
        ValueError: No JPEG or PNG, or more pixels than any camera's frame.
    """
    with _open_image(data) as image:
        return image.height, image.width, str(image.format).lower()


def decode_image(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG or PNG, which must be of this size (h, w), to [h, w, 3] uint8, RGB; not to be written to.

    Raises:
        ValueError: It is damaged, too large or of another size.
    """
    with _open_image(data) as image:
        if (image.height, image.width) != size:
            raise ValueError(
                f"a picture is {image.width}x{image.height}; the video began with {size[1]}x{size[0]} pixels"
            )
        try:
            # convert copies even where there is nothing to convert.
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others for damaged pictures.
            raise ValueError(f"a picture cannot be decoded: {type(error).__name__}: {error}") from error


def _open_image(data: bytes):
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise ValueError(f"a frame is no {' or '.join(FORMATS)} picture ({len(data)} bytes): {error}") from error
    if image.width * image.height > MAX_FRAME_PIXELS:
        raise ValueError(
            f"a picture states {image.width}x{image.height} pixels in {len(data)} bytes; at most {MAX_FRAME_PIXELS} are decoded"
        )
    return image
