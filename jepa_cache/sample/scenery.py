"""The looks of the synthetic world: block textures, sky and hills, shared by all episodes of one data set.

Colours are Y, U, V of BT.601 in its limited range, less its offsets: Y 0 to 219, U and V -112 to 112. That is what a
video stores, and light and haze scale it as they scale RGB. They are kept as planes: one value of all pixels together.
"""

from typing import NamedTuple

import numpy as np

TEXELS = 8  # per block side; at 90 rows one texel is one pixel about 8 blocks away
_PANORAMA_ROWS, _PANORAMA_COLUMNS = 128, 1024
_LOWEST_SINE = -0.06  # of the elevation in the panorama's last row
FAR_HAZE = 0.65  # share of haze in what lies at the end of the reach
_HAZE = (196, 208, 218)  # RGB, as all colours written in this file

# BT.601, limited range: what players assume of untagged standard-definition video. Rows Y, U, V.
_RGB_TO_YUV = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]) / 255

# Mean colour of every block kind, RGB 0-255, and how its texels vary about it.
KINDS: tuple[tuple[str, tuple[int, int, int], str], ...] = (
    ("grass", (104, 146, 72), "noise"),
    ("sand", (206, 192, 140), "noise"),
    ("gravel", (136, 130, 124), "noise"),
    ("stone", (112, 112, 118), "noise"),
    ("planks", (176, 136, 84), "planks"),
    ("brick", (158, 82, 66), "bricks"),
    ("log", (92, 70, 44), "bark"),
    ("leaves", (48, 98, 42), "noise"),
    ("snow", (234, 238, 242), "noise"),
    ("lapis", (52, 82, 160), "bricks"),
)
NUM_GROUND_KINDS = 3


class Scenery(NamedTuple):
    """Textures, sky and hills, shared by all episodes of one data set so that what was learnt carries over."""

    means: np.ndarray  # [3, kinds] float32, YUV
    texels: np.ndarray  # [kinds * TEXELS * TEXELS] float32, Y about the mean
    tint_levels: float  # Y that a tint of 1 adds
    panorama: np.ndarray  # [3, rows * columns] float32, YUV, rows by falling sine of the elevation
    haze: np.ndarray  # [3] float32, YUV


def build_scenery(rng: np.random.Generator, contrast: float) -> Scenery:
    """Draw the shared textures, sky and hills; `contrast` (0 to 1) scales the textures about their means."""
    texels = np.stack([_pattern(rng, style) for _, _, style in KINDS])
    means = _to_yuv(np.array([colour for _, colour, _ in KINDS]))
    texels = (contrast * 60 * texels).astype(np.float32).ravel()
    return Scenery(means, texels, contrast * 43, _to_yuv(_panorama(rng)), _to_yuv(np.array(_HAZE)))


def _to_yuv(rgb: np.ndarray) -> np.ndarray:
    """Convert colours [..., 3], RGB 0-255, to planes [3, ...] float32."""
    return np.ascontiguousarray(np.moveaxis(rgb @ _RGB_TO_YUV.T, -1, 0), np.float32)


def look_up_panorama(scenery: Scenery, sine: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    """Sky and hills behind the pixels, [3, pixels] float32."""
    row = ((1 - sine) * ((_PANORAMA_ROWS - 1) / (1 - _LOWEST_SINE))).astype(np.int32)
    column = np.floor(azimuth * np.float32(_PANORAMA_COLUMNS / (2 * np.pi))).astype(np.int32) % _PANORAMA_COLUMNS
    place = np.minimum(row, _PANORAMA_ROWS - 1) * _PANORAMA_COLUMNS + column
    return np.stack([plane.take(place) for plane in scenery.panorama])


def _panorama(rng: np.random.Generator) -> np.ndarray:
    """Draw sky, sun, clouds and two ridges of hills all around, [rows * columns, 3], RGB 0-255."""
    haze = np.array(_HAZE)
    sine = np.linspace(1, _LOWEST_SINE, _PANORAMA_ROWS)[:, None]
    azimuth = np.linspace(0, 2 * np.pi, _PANORAMA_COLUMNS, endpoint=False)[None]
    slope = sine / np.sqrt(np.maximum(1 - sine**2, 1e-6))
    sky = haze + np.clip(sine, 0, 1)[..., None] ** 0.6 * (np.array([86, 138, 214]) - haze)
    bands = sum(
        np.sin(k * azimuth + rng.uniform(0, 6.28) + (3 + k) * sine) / k**0.5 * np.exp(-2 * np.abs(sine))
        for k in (2, 3, 5)
    )
    cover = np.clip(bands - 0.35, 0, 0.8)[..., None]
    image = sky + cover * (np.array([244, 246, 250]) - sky)
    sun_azimuth, sun_sine = rng.uniform(0, 2 * np.pi), 0.55
    away = (1 - np.cos(azimuth - sun_azimuth)) * (1 - sun_sine**2) + (sine - sun_sine) ** 2 / 2
    image = np.where((away < 0.008)[..., None], np.array([255, 246, 206]), image)
    for colour, base, size in (((134, 152, 168), 0.13, 0.05), ((88, 118, 92), 0.06, 0.03)):
        ridge = base + size * sum(np.sin(k * azimuth + rng.uniform(0, 6.28)) / k**0.7 for k in (3, 5, 8, 13))
        image = np.where((slope < np.maximum(ridge, 0.01))[..., None], np.array(colour), image)
    ground = (1 - FAR_HAZE) * np.array(KINDS[0][1]) + FAR_HAZE * haze
    image = np.where((sine < 0)[..., None], ground, image)
    return image.reshape(-1, 3)


def _pattern(rng: np.random.Generator, style: str) -> np.ndarray:
    """Texels of one kind about 0, [TEXELS, TEXELS], row 0 on top, within about -1 to 1."""
    noise = rng.uniform(-1, 1, (TEXELS, TEXELS))
    row, column = np.indices((TEXELS, TEXELS))
    if style == "planks":
        structure = np.where(row % 4 == 3, -0.9, 0.35)
    elif style == "bricks":
        structure = np.where((row % 4 == 3) | ((column + 2 * (row // 4)) % 4 == 3), 0.8, -0.4)
    elif style == "bark":
        structure = np.where(column % 3 == 0, -0.7, 0.4)
    else:
        return noise - noise.mean()
    pattern = structure + 0.3 * noise
    return pattern - pattern.mean()
