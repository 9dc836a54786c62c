"""Small pictures of frames, as JPEG."""

from __future__ import annotations

import io

import numpy as np

PICTURE_WIDTH = 320  # pixels


def encode_picture(frame: np.ndarray, width: int = PICTURE_WIDTH) -> bytes:
    """A frame [h, w, 3] uint8 as JPEG, thinned to between `width` and twice that where it is larger."""
    from matplotlib.image import imsave

    stride = max(1, frame.shape[1] // width)
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(frame[::stride, ::stride]), format="jpeg", pil_kwargs={"quality": 75})
    return buffer.getvalue()
