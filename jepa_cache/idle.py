"""openpi's rule for the parts of a DROID episode in which the robot rests, and the ranges that others have published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

JOINT_VELOCITY_CONTROLS = tuple(f"command_joint{joint}_rad_s" for joint in range(1, 8))
"""Columns of an episode's controls that the rule looks at."""
IDLE_TOLERANCE = 1e-3  # rad/s, change of a commanded joint velocity from one row to the next
# openpi's numbers: so many idle rows in a row are a rest; so many of what remains are kept, about 1 s at 15 Hz.
MIN_IDLE_ROWS, MIN_KEPT_ROWS = 7, 16
# The published list of all 76 k episodes is a few tens of MB; a larger file is none.
MAX_RANGES_BYTES = 1 << 30

_EPISODE_PATH = re.compile(r"([^/]+/(?:success|failure)/[^/]+/[^/]+)/")


def find_episode_key(path: str) -> str | None:
    """`<lab>/<success or failure>/<date>/<episode>` from a path of the raw release; None where the path has no such part.

    RLDS and raw recordings of one episode thus have one key, and a list of ranges fits both.
    """
    matches = _EPISODE_PATH.findall(path)
    return matches[-1] if matches else None


def find_idle_rows(joint_velocity_commands: np.ndarray) -> np.ndarray:
    """Rows [M] bool in which the command [M, 7] rad/s stays as it was: every joint's velocity changes by less than 1e-3 rad/s.

    The change of the command counts, not its size. Row 0 has nothing before it and is not idle; nor is a row at a NaN.

    Source: openpi, `compute_droid_nonidle_ranges`.
    """
    commands = np.asarray(joint_velocity_commands, np.float64)
    still = (np.abs(np.diff(commands, axis=0)) < IDLE_TOLERANCE).all(axis=1)
    return np.concatenate((np.zeros(min(1, len(commands)), bool), still))


def keep_ranges(idle: np.ndarray, *, cut_end: int = 10) -> list[tuple[int, int]]:
    """What remains of an episode without its rests: runs of 16 rows and more, after runs of 7 and more idle rows are gone.

    Args:
        idle: [M] bool, as `find_idle_rows` tells.
        cut_end: Rows taken from the end of each kept run, whose chunks of 16 actions would reach into the rest. A world
            model needs no chunk: 0 keeps them.

    Returns:
        Ranges of rows [start, end), ascending; without those that the cut leaves empty.

    Source: openpi, `compute_droid_nonidle_ranges`.
    """
    kept = np.ones(len(idle), bool)
    for start, end in _find_runs(np.asarray(idle, bool)):
        if end - start >= MIN_IDLE_ROWS:
            kept[start:end] = False
    runs = [(start, end) for start, end in _find_runs(kept) if end - start >= MIN_KEPT_ROWS]
    return [(start, end - cut_end) for start, end in runs if end - cut_end > start]


def idle_ranges(joint_velocity_commands: np.ndarray, *, cut_end: int = 10) -> list[tuple[int, int]]:
    """The ranges of rows that openpi keeps of an episode with commands [M, 7] rad/s at 15 Hz: `keep_ranges` of its idle rows."""
    return keep_ranges(find_idle_rows(joint_velocity_commands), cut_end=cut_end)


def read_ranges(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Read a published list of kept ranges: JSON of `"<recording folder>--<file path>": [[start, end], ...]`.

    Returns:
        Ranges [start, end) of 15 Hz rows by the episode's key `<lab>/<outcome>/<date>/<episode>`; by the name as it stands
        where it has no such part.

    Raises:
        ValueError: No such JSON, a range that is none, or two entries of one episode.
    """
    if path.stat().st_size > MAX_RANGES_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a list of ranges has at most {MAX_RANGES_BYTES}")
    try:
        listed = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); a list of ranges maps names of episodes to ranges") from error
    if not isinstance(listed, dict):
        raise ValueError(f"{path} must map names of episodes to ranges; got a {type(listed).__name__}")
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name, pairs in listed.items():
        key = find_episode_key(name) or name
        if key in ranges:
            raise ValueError(f"{path} lists the episode {key!r} twice")
        if not isinstance(pairs, list) or not all(_is_range(pair) for pair in pairs):
            raise ValueError(
                f"{path}: ranges are pairs [start, end] with 0 <= start <= end; got {str(pairs)[:80]} for {name!r}"
            )
        ranges[key] = [(start, end) for start, end in pairs]
    return ranges


def _is_range(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(bound, int) and not isinstance(bound, bool) for bound in pair)
        and 0 <= pair[0] <= pair[1]
    )


def _find_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the runs of True."""
    edges = np.diff(np.concatenate(([0], mask.astype(np.int8), [0])))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))
