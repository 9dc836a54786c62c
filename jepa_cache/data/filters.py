"""Which steps windows may hold: segments are cut by the step table and the controls, without video or encoder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from jepa_cache.config.schema import FilterConfig
from jepa_cache.idle import JOINT_VELOCITY_CONTROLS, idle_ranges

NO_FILTER = FilterConfig(
    drop_gui=False, drop_null=False, drop_idle=False, min_luma_std=0.0, only_success=False, min_steps=1
)


def keep_steps(steps: pa.Table, config: FilterConfig) -> np.ndarray:
    """Which steps of a store the filters leave, [n] bool.

    Args:
        steps: The store's step table, `store.layout.STEPS_SCHEMA`.
        config: What to drop. `drop_idle` is the caller's: it needs the controls.
    """
    keep = np.ones(len(steps), bool)
    if config.drop_gui:
        keep &= ~steps.column("gui").to_numpy()
    if config.drop_null:
        # NaN at an episode's end, where nothing acts any more, is no reason to drop.
        keep &= ~(steps.column("idle").to_numpy() == 1.0)
    if config.min_luma_std > 0:
        keep &= steps.column("luma_std").to_numpy() >= config.min_luma_std
    return keep


def cut_runs(start: int, stop: int, keep: np.ndarray, min_steps: int) -> list[tuple[int, int]]:
    """The contiguous runs of kept steps inside [start, stop) that have at least `min_steps`.

    Args:
        start: First step of a segment.
        stop: One past its last.
        keep: [n] bool over the whole store.
        min_steps: Shorter runs are dropped.

    Returns:
        [start, stop) of each run, in order.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep[start:stop].astype(np.int8), [0]])))
    runs = (edges + start).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in runs if b - a >= min_steps]


def keep_ticks(controls: Mapping[str, np.ndarray], config: FilterConfig) -> np.ndarray:
    """Which native ticks of an episode the filters on controls leave, [M] bool.

    Args:
        controls: Name to [M] array, as the source recorded them.
        config: `drop_idle` and `only_success` count.

    Raises:
        ValueError: A filter needs a record that the source does not have.
    """
    num_ticks = len(next(iter(controls.values())))
    keep = np.ones(num_ticks, bool)
    if config.only_success:
        if "success" not in controls:
            raise ValueError("filter.only_success: this source does not record how an episode ended; set it to false")
        keep &= controls["success"]
    if config.drop_idle:
        missing = [name for name in JOINT_VELOCITY_CONTROLS if name not in controls]
        if missing:
            raise ValueError(
                f"filter.drop_idle needs the commanded joint velocities ({missing[0]} is missing); set it to false"
            )
        commands = np.stack([controls[name] for name in JOINT_VELOCITY_CONTROLS], axis=1)
        moving = np.zeros(num_ticks, bool)
        # A world model has no action chunks that reach beyond a range's end, so nothing is cut there.
        for start, stop in idle_ranges(commands, cut_end=0):
            moving[start:stop] = True
        keep &= moving
    return keep
