"""Synthetic block world and its ray caster: what the player of the sample recordings walks in and sees.

The world is a grid of columns on flat ground that repeats every `MAP_BLOCKS` blocks. Coordinates are Minecraft's: x
east, y up, z south, yaw 0 looks along +z and grows to the right, pitch is positive when looking down.
Letters: R rays (azimuths) of one picture, L cells along a ray, P = 90 * 160 pixels.

Colours are Y, U, V of BT.601 in its limited range, less its offsets: Y 0 to 219, U and V -112 to 112. That is what a
video stores, and light and haze scale it as they scale RGB. They are kept as planes: one value of all pixels together.
"""

import math
from typing import NamedTuple

import numpy as np

HEIGHT_PIXELS, WIDTH_PIXELS = 90, 160
MAP_BLOCKS = 64
EYE_BLOCKS = 1.62
BODY_BLOCKS = 0.8  # half width; Minecraft's is 0.3, but then walls fill the whole view too often
REACH_BLOCKS = 21
VERTICAL_FOV_DEG = 70.0

_NUM_RAYS = 320

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


def _look_up_panorama(scenery: Scenery, sine: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
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


class World(NamedTuple):
    """One episode's map; the looks of its blocks are in `Scenery`, which all episodes share."""

    heights: np.ndarray  # [MAP_BLOCKS, MAP_BLOCKS] float32, blocks above the ground, indexed [x, z]
    kinds: np.ndarray  # [MAP_BLOCKS, MAP_BLOCKS] int64, row of `Scenery.means`
    tints: np.ndarray  # [MAP_BLOCKS, MAP_BLOCKS] float32, -1 to 1, lightness of single columns


def build_world(rng: np.random.Generator) -> World:
    """Scatter columns, walls and pillars of 1 to 4 blocks on patchy ground; the middle of the map stays free."""
    shape = (MAP_BLOCKS, MAP_BLOCKS)
    patches = _smooth_noise(rng, 4)
    kinds = np.select([patches > 0.9, patches < -0.9], [1, 2], 0).astype(np.int64)
    heights = np.zeros(shape, np.float32)
    for _ in range(95):
        corner = rng.integers(0, MAP_BLOCKS, 2)
        size = rng.integers(1, 4, 2) if rng.random() < 0.8 else rng.permutation([1, 5])
        cells = np.ix_(*((corner[i] + np.arange(size[i])) % MAP_BLOCKS for i in (0, 1)))
        heights[cells] = rng.integers(1, 5)
        kinds[cells] = rng.integers(NUM_GROUND_KINDS, len(KINDS))
    middle = slice(MAP_BLOCKS // 2 - 2, MAP_BLOCKS // 2 + 3)
    heights[middle, middle] = 0
    kinds[middle, middle] = 0
    return World(heights, kinds, rng.uniform(-1, 1, shape).astype(np.float32))


def is_free(world: World, x_blocks: float, z_blocks: float) -> bool:
    """Tell whether the player's body fits at (x, z) without touching a block that stands on the ground."""
    # All cells from edge to edge: the body is wider than a block, so its corners alone could straddle one.
    xs, zs = (
        np.arange(math.floor(centre - BODY_BLOCKS), math.floor(centre + BODY_BLOCKS) + 1) % MAP_BLOCKS
        for centre in (x_blocks, z_blocks)
    )
    return not world.heights[np.ix_(xs, zs)].any()


def render(
    world: World, scenery: Scenery, x_blocks: float, z_blocks: float, yaw_deg: float, pitch_deg: float
) -> np.ndarray:
    """Render the view of a player who stands on the ground, in true perspective.

    Along one azimuth a ray of slope m (rise per block) ends in the first cell whose wall or top it meets, that is where
    m falls below the cell's slope as seen from the eye. The running maximum of those slopes is sorted, so each pixel is
    one binary search instead of a march.

    Returns:
        float32 [3, 90, 160]: planes Y (0 to 219), U and V (-112 to 112).
    """
    slope, sine, azimuth = _pixel_rays(pitch_deg)
    low, high = float(azimuth.min()), float(azimuth.max())
    ray = ((azimuth - low) * ((_NUM_RAYS - 1) / (high - low)) + 0.5).astype(np.int32)
    angles = np.radians(yaw_deg) + np.linspace(low, high, _NUM_RAYS)
    dir_x, dir_z = (-np.sin(angles)).astype(np.float32), np.cos(angles).astype(np.float32)
    starts, cells, wall_slopes, horizon = _cast(world, x_blocks % MAP_BLOCKS, z_blocks % MAP_BLOCKS, dir_x, dir_z)

    hit = _first_above(horizon, ray, slope)
    num_cells = horizon.shape[1]
    colours = np.empty((3, HEIGHT_PIXELS * WIDTH_PIXELS), np.float32)
    behind = np.flatnonzero(hit == num_cells)
    turn = np.float32(np.radians(yaw_deg % 360))
    colours[:, behind] = _look_up_panorama(scenery, sine.take(behind), azimuth.take(behind) + turn)
    seen = np.flatnonzero(hit < num_cells)
    slope, ray = slope.take(seen), ray.take(seen)
    place = ray * num_cells + hit.take(seen)
    cell = cells.take(place)
    is_wall = slope < wall_slopes.take(place)
    top_distance = (world.heights.take(cell) - np.float32(EYE_BLOCKS)) / np.where(is_wall, np.float32(1), slope)
    distance = np.where(is_wall, starts.take(place), top_distance)
    hit_x = np.float32(x_blocks % MAP_BLOCKS) + distance * dir_x.take(ray)
    hit_z = np.float32(z_blocks % MAP_BLOCKS) + distance * dir_z.take(ray)
    colours[:, seen] = _shade(world, scenery, cell, is_wall, slope, distance, hit_x, hit_z)
    return colours.reshape(3, HEIGHT_PIXELS, WIDTH_PIXELS)


def _pixel_rays(pitch_deg: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slope, sine of the elevation and azimuth relative to the yaw (rad, right positive) of every pixel, [P] each."""
    pitch = np.radians(pitch_deg)
    sin, cos = np.float32(np.sin(pitch)), np.float32(np.cos(pitch))
    ahead = cos + _UP * sin
    rise = _UP * cos - sin
    level = np.maximum(np.hypot(_RIGHT, ahead), np.float32(1e-4))
    return rise / level, rise * _PER_LENGTH, np.arctan2(_RIGHT, ahead)


def _pixel_grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    half = np.tan(np.radians(VERTICAL_FOV_DEG) / 2)
    up = half * (1 - 2 * (np.arange(HEIGHT_PIXELS) + 0.5) / HEIGHT_PIXELS)
    right = half * (2 * (np.arange(WIDTH_PIXELS) + 0.5) - WIDTH_PIXELS) / HEIGHT_PIXELS
    up, right = (grid.astype(np.float32).ravel() for grid in np.meshgrid(up, right, indexing="ij"))
    return up, right, 1 / np.sqrt(1 + up**2 + right**2)


# Pixel rays in the camera's axes, [P] each; the third is 1 / length of (right, up, 1).
_UP, _RIGHT, _PER_LENGTH = _pixel_grid()


def _cast(
    world: World, x: float, z: float, dir_x: np.ndarray, dir_z: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Walk all azimuths over the map: entry distances, cells, wall slopes and running horizon, [R, L] each.

    Crossings with both sets of grid lines are sorted together; the cell between two crossings is that of their middle.
    """
    crossings = [np.zeros((len(dir_x), 1), np.float32)]
    for position, direction in ((x, dir_x), (z, dir_z)):
        inside = np.float32(position - np.floor(position))
        to_first = np.where(direction > 0, 1 - inside, inside)
        speed = np.maximum(np.abs(direction), np.float32(1e-6))
        crossings.append((to_first[:, None] + np.arange(REACH_BLOCKS + 1, dtype=np.float32)) / speed[:, None])
    # Up to sqrt(2) crossings per block; what lies beyond is not complete and is left to the panorama.
    bounds = np.sort(np.concatenate(crossings, 1), 1)[:, : int(REACH_BLOCKS * 1.42) + 2]
    starts, ends = bounds[:, :-1], bounds[:, 1:]
    middle = (starts + ends) / 2
    cell_x = np.floor(np.float32(x) + middle * dir_x[:, None]).astype(np.int32) % MAP_BLOCKS
    cell_z = np.floor(np.float32(z) + middle * dir_z[:, None]).astype(np.int32) % MAP_BLOCKS
    cells = cell_x * MAP_BLOCKS + cell_z
    above_eye = world.heights.take(cells) - np.float32(EYE_BLOCKS)
    wall_slopes = above_eye / np.maximum(starts, np.float32(1e-4))
    top_slopes = above_eye / np.maximum(ends, np.float32(1e-4))
    slopes = np.where(starts < REACH_BLOCKS, np.maximum(wall_slopes, top_slopes), -np.float32(np.inf))
    return starts, cells, wall_slopes, np.maximum.accumulate(slopes, 1)


def _first_above(horizon: np.ndarray, ray: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Number of leading entries of `horizon[ray]` (rows ascending) that are not above `slope`, [P] int32."""
    num_cells = horizon.shape[1]
    flat = horizon.ravel()
    first = ray * num_cells
    count = np.zeros(len(ray), np.int32)
    stride = 1 << (num_cells.bit_length() - 1)
    while stride:
        probe = count + stride
        inside = probe <= num_cells
        below = flat.take(first + np.minimum(probe, num_cells) - 1) <= slope
        count += np.int32(stride) * (inside & below)
        stride >>= 1
    return count


def _shade(
    world: World,
    scenery: Scenery,
    cell: np.ndarray,
    is_wall: np.ndarray,
    slope: np.ndarray,
    distance: np.ndarray,
    hit_x: np.ndarray,
    hit_z: np.ndarray,
) -> np.ndarray:
    """Colour the pixels that meet a block or the ground, [3, pixels] float32."""
    hit_y = np.float32(EYE_BLOCKS) + slope * distance
    # Fractions by floor: numpy's remainder takes ten times as long.
    hit_x, hit_y, hit_z = (hit - np.floor(hit) for hit in (hit_x, hit_y, hit_z))
    # A wall is met on a grid line: the coordinate that is nearly whole tells which side it is.
    faces_x = is_wall & (np.abs(hit_x - 0.5) > np.abs(hit_z - 0.5))
    across = np.where(faces_x, hit_z, hit_x)
    down = np.where(is_wall, 1 - hit_y, hit_z)
    column = np.minimum((across * TEXELS).astype(np.int32), TEXELS - 1)
    row = np.minimum((down * TEXELS).astype(np.int32), TEXELS - 1)
    kind = world.kinds.take(cell)
    # Texels smaller than a pixel are aliasing noise, so each fades to its mean; ground seen at a grazing angle sooner.
    footprint = np.where(is_wall, distance, distance * np.minimum(1 / np.maximum(-slope, 1e-3), 4) * 0.7)
    fade = np.clip(1.5 - footprint / 10, 0, 1)
    tint_fade = np.clip(1.6 - footprint / 30, 0, 1)
    lightness = scenery.texels.take((kind * TEXELS + row) * TEXELS + column) * fade
    lightness += world.tints.take(cell) * (tint_fade * scenery.tint_levels)
    light = np.where(is_wall, np.where(faces_x, np.float32(0.62), np.float32(0.8)), np.float32(1))
    haze = np.square(np.minimum(distance / REACH_BLOCKS, 1)) * np.float32(FAR_HAZE)
    light *= 1 - haze
    y, u, v = (mean.take(kind) for mean in scenery.means)
    y += lightness
    return np.stack([plane * light + haze * far for plane, far in zip((y, u, v), scenery.haze, strict=True)])


def _smooth_noise(rng: np.random.Generator, max_frequency: int) -> np.ndarray:
    """Periodic noise over the map with unit deviation, [MAP_BLOCKS, MAP_BLOCKS]."""
    axis = 2 * np.pi * np.arange(MAP_BLOCKS) / MAP_BLOCKS
    noise = np.zeros((MAP_BLOCKS, MAP_BLOCKS))
    for kx in range(max_frequency + 1):
        for kz in range(-max_frequency, max_frequency + 1):
            noise += rng.normal() * np.cos(kx * axis[:, None] + kz * axis[None] + rng.uniform(0, 2 * np.pi))
    return (noise - noise.mean()) / noise.std()
