"""The action space `vpt25`: the 25 named columns of Oasis and Solaris, made from the sums and presses of `vpt36`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np

# actions.py registers what is made here, so its ActionSpace cannot be imported.
Space = TypeVar("Space")

CAMERA_DEG_PER_COUNT = 0.15
"""360 / 2400: the turn of one mouse count outside a GUI; holds in 99.9 % of such steps of 64 VPT logs, within 0.01 degrees."""
CAMERA = {"cameraX": "mouse_dx", "cameraY": "mouse_dy"}
VPT25_NAMES = (
    *("inventory", "ESC"),
    *(f"hotbar.{slot}" for slot in range(1, 10)),
    *("forward", "back", "left", "right", "cameraX", "cameraY", "jump", "sneak", "sprint", "swapHands"),
    *("attack", "use", "pickItem", "drop"),
)


def build_vpt25(vpt36: Space) -> Space:
    """Make `vpt25` from `vpt36`: A = 25, S = 2 (yaw in (-180, 180] and pitch, degrees, at the step).

    Columns in the order of Oasis. 23 keys and buttons: 1 where held or pressed on any tick of the step, else 0. `cameraX`,
    `cameraY`: degrees, 0.15 times the summed mouse.dx and mouse.dy; positive is right and down. Inside a GUI they are the
    cursor's movement on the same scale, as in the recordings' other readers; the view does not turn there.

    Other code gives these names other meanings, so columns are matched by name, and cameraX and cameraY by unit as well.
    Oasis clips to 20 degrees, scales to [-1, 1], and in its published files takes cameraX for pitch; Solaris puts the
    camera last, with cameraX for yaw in degrees, as here. Nothing is clipped here.

    Unlike `vpt36` it needs no hotbar slot, which recorders before 6.11 do not write; without slots there are no presses
    by the wheel either.

    Args:
        vpt36: That `ActionSpace`, whose sums and presses are taken.

    Source: column names of etched-ai/open-oasis and solaris-wm/solaris.
    """
    columns = {column.name: column for column in vpt36.actions}
    actions = tuple(
        columns[CAMERA[name]]._replace(name=name, unit="deg") if name in CAMERA else columns[name]
        for name in VPT25_NAMES
    )
    required = tuple(name for name in vpt36.required if name != "hotbar")
    return dataclasses.replace(
        vpt36, name="vpt25", version=1, actions=actions, required=required, rule=partial(_aggregate, vpt36)
    )


def _aggregate(vpt36: Any, controls: Mapping[str, np.ndarray], anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num_ticks = len(next(iter(controls.values())))
    result = vpt36.aggregate({**controls, "hotbar": np.zeros(num_ticks, np.int8)}, anchors)
    names = [column.name for column in vpt36.actions]
    taken = result.actions[:, [names.index(CAMERA.get(name, name)) for name in VPT25_NAMES]].astype(np.float64)
    scale = np.array([CAMERA_DEG_PER_COUNT if name in CAMERA else 1.0 for name in VPT25_NAMES])
    return taken * scale, result.states
