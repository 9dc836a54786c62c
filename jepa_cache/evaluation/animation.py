"""A rollout as an animated GIF: at each step the recorded frame, its true tokens, what was predicted, and the error."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jepa_cache.evaluation.plots import ERROR_COLOURS, Strip, label_step

PANEL_WIDTH = 232  # pixels; two side by side suit a phone
GAP, LINE = 8, 20  # pixels between panels, and height of a line of text
STEP_MS, LAST_MS = 900, 2500  # how long each step and the last one are shown
NUM_LOOPS = 10  # then it stops: what moves for ever is hard to read beside
GREY, INK = (238, 238, 238), (34, 34, 34)


def write_animation(strip: Strip, path: Path) -> None:
    """Write one window as a GIF of 2 x 2 panels, a picture for each step, with the step's number above.

    Context steps are given to the predictor, so they have neither prediction nor error.
    """
    pictures = [_compose(strip, step) for step in range(len(strip.true))]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=[STEP_MS] * (len(pictures) - 1) + [LAST_MS],
        loop=NUM_LOOPS,
    )


def _compose(strip: Strip, step: int):
    """One picture of the animation."""
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = strip.true.shape[1:3]
    height = round(PANEL_WIDTH * rows / columns)
    context = len(strip.true) - len(strip.predicted)
    picture = Image.new("RGB", (2 * PANEL_WIDTH + 3 * GAP, 2 * (height + LINE + GAP) + LINE + GAP), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((GAP, GAP // 2), f"{label_step(step, context)}   ({step + 1} of {len(strip.true)})", INK, font)
    given = step < context
    panels = (
        ("recorded frame", None if strip.frames is None else strip.frames[step], "recording not here"),
        ("true tokens", _bytes(strip.true[step]), ""),
        ("predicted tokens", None if given else _bytes(strip.predicted[step - context]), "given, not predicted"),
        (_error_name(strip), None if given else _error_colours(strip, step - context), "given, not predicted"),
    )
    for number, (name, pixels, without) in enumerate(panels):
        left = GAP + (number % 2) * (PANEL_WIDTH + GAP)
        top = LINE + GAP + (number // 2) * (height + LINE + GAP)
        draw.text((left, top), name, INK, font)
        top += LINE
        draw.rectangle((left, top, left + PANEL_WIDTH - 1, top + height - 1), GREY)
        if pixels is None:
            draw.text((left + PANEL_WIDTH / 2, top + height / 2), without, INK, font, anchor="mm")
            continue
        scale = min(PANEL_WIDTH / pixels.shape[1], height / pixels.shape[0])
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        how = Image.Resampling.BILINEAR if number == 0 else Image.Resampling.NEAREST
        panel = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, how)
        picture.paste(panel, (left + (PANEL_WIDTH - size[0]) // 2, top + (height - size[1]) // 2))
    return picture


def _error_name(strip: Strip) -> str:
    return f"error, L1: 0 (dark) to {float(strip.error.max()):.2g}"


def _error_colours(strip: Strip, step: int) -> np.ndarray:
    from matplotlib import colormaps

    limit = float(strip.error.max()) or 1.0
    return _bytes(colormaps[ERROR_COLOURS](strip.error[step] / limit)[..., :3])


def _bytes(colours: np.ndarray) -> np.ndarray:
    """[H, W, 3] in [0, 1] as uint8."""
    return (colours * 255).round().astype(np.uint8)
