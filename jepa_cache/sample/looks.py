"""What a scene of the simulated robot looks like: light, colours, things on the table's edge, camera; drawn by a seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Rgb = tuple[float, float, float]  # each 0 to 1
Xyz = tuple[float, float, float]  # metres, in the robot's base frame

NUM_DISTRACTORS = 4
"""Most of them in one scene: a box, a ball, a cylinder and an upright capsule, in this order."""

# Edges of the table where the arm never comes; x and y of the lowest and highest place.
_EDGES_M = (((0.30, -0.50), (0.75, -0.38)), ((0.30, 0.38), (0.75, 0.50)), ((0.72, -0.35), (0.82, 0.35)))


class Distractor(NamedTuple):
    """A thing that can be seen and not touched."""

    place_m: Xyz
    size_m: Xyz  # MuJoCo's: half lengths of a box, radius of a ball, radius and half height of the others
    rgb: Rgb


class Look(NamedTuple):
    """Everything about a scene that does not move; the defaults are the plain look. The block has one colour in all of them."""

    light_direction: Xyz = (-0.3, -0.2, -1.0)
    light_rgb: Rgb = (0.5, 0.5, 0.5)
    headlight_rgb: Rgb = (0.2, 0.2, 0.2)
    ambient_rgb: Rgb = (0.35, 0.35, 0.35)
    table_rgb: Rgb = (0.62, 0.54, 0.44)
    floor_rgb: Rgb = (1.0, 1.0, 1.0)  # times the texture, a blue checkerboard
    arm_tint: Rgb = (1.0, 1.0, 1.0)  # times the arm's own colours
    eye_shift_m: Xyz = (0.0, 0.0, 0.0)  # of the exterior cameras
    target_shift_m: Xyz = (0.0, 0.0, 0.0)  # of the point that they look at
    field_shift_deg: float = 0.0  # of their field of view
    distractors: tuple[Distractor, ...] = ()


PLAIN = Look()


def draw_look(seed: int) -> Look:
    """The random look of a seed; a ValueError for what is none."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"a look is the seed of one, an integer from 0 up, or None for the plain one; got {seed!r}")
    # A stream of its own: the same seed elsewhere draws other things.
    rng = np.random.default_rng([seed, 0x100C])
    warmth = rng.uniform(-0.12, 0.12)
    tint = np.array([1 + warmth, 1.0, 1 - warmth])
    angle = rng.uniform(0, 2 * np.pi)
    lean = rng.uniform(0.1, 0.9)
    things = []
    for index in range(rng.integers(NUM_DISTRACTORS + 1)):
        side, height = rng.uniform(0.02, 0.05, 2)
        low, high = _EDGES_M[rng.integers(len(_EDGES_M))]
        x, y = rng.uniform(low, high)
        # A ball rests on its radius, a capsule's ends are round.
        z = (height, side, height, height + side)[index]
        things.append(Distractor((x, y, z), (side, side if index == 0 else height, height), _floats(rng.random(3))))
    return Look(
        light_direction=(lean * np.cos(angle), lean * np.sin(angle), -1.0),
        light_rgb=_floats(rng.uniform(0.2, 0.6) * tint),
        headlight_rgb=_floats(rng.uniform(0.05, 0.35) * tint),
        ambient_rgb=_floats(rng.uniform(0.2, 0.45) * tint),
        table_rgb=_floats(rng.uniform(0.2, 0.75) + rng.uniform(-0.15, 0.15, 3)),
        floor_rgb=_floats(rng.uniform(0.5, 2.5) * rng.uniform(0.7, 1.3, 3)),
        arm_tint=_floats(rng.uniform(0.6, 0.95) + rng.uniform(-0.05, 0.05, 3)),
        eye_shift_m=_floats(rng.uniform(-0.04, 0.04, 3)),
        target_shift_m=_floats(rng.uniform(-0.02, 0.02, 3)),
        field_shift_deg=float(rng.uniform(-2, 2)),
        distractors=tuple(things),
    )


def _floats(values: np.ndarray) -> tuple[float, float, float]:
    return tuple(values.tolist())
