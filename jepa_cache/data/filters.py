"""Which steps windows may hold: segments are cut by the step table and the controls, without video or encoder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from jepa_cache.config.schema import FilterConfig
from jepa_cache.files import file_digest
from jepa_cache.poses import JOINT_VELOCITY_CONTROLS, idle_ranges

DIGESTED = re.compile(r"(?P<path>.+)@(?P<digest>[0-9a-f]{8,64})")
DIGEST_SHOWN = 12  # hex digits
NO_FILTER = FilterConfig(
    drop_gui=False,
    drop_null=False,
    drop_loading=False,
    drop_idle=False,
    idle_cut_end=0,
    drop_skipped_actions=False,
    keep_ranges=None,
    only_success=False,
    min_steps=1,
)
REFUSED = (
    "filter.{key}: this recording does not record {what} (others of its source may); set it to false, or encode a data set "
    "without such recordings"
)
# Luma deviation, of 255, below which a frame is of one colour. The flattest frame of play at hand, a forest at night, has
# 13.5; the loading screen of that recording has 13.7, so no threshold distinguishes those two.
PLAIN_LUMA_STD = 4.0


def keep_steps(steps: pa.Table, config: FilterConfig) -> np.ndarray:
    """Return which steps of a store the filters on its step table leave, [n] bool.

    `drop_gui`, `drop_null` and the part of `drop_loading` that goes by pictures count here. Raises as `keep_ticks`.
    """
    keep = np.ones(len(steps), bool)
    if config.drop_gui:
        keep &= ~steps.column("gui").to_numpy()
    if config.drop_null:
        idle, followed = steps.column("idle").to_numpy(), np.diff(steps.column("segment").to_numpy()) == 0
        if followed.any() and np.isnan(idle).all():
            raise ValueError(REFUSED.format(key="drop_null", what="when somebody acts"))
        # NaN at an episode's end, where nothing acts any more, is no reason to drop.
        keep &= ~(idle == 1.0)
    if config.drop_loading:
        keep &= steps.column("luma_std").to_numpy() >= PLAIN_LUMA_STD
    return keep


def needs_controls(config: FilterConfig) -> bool:
    """Return whether `keep_ticks` can drop anything under these filters, so that the controls have to be read."""
    flags = (config.drop_loading, config.drop_idle, config.drop_skipped_actions, config.only_success)
    return any(flags) or config.keep_ranges is not None


def keep_ticks(
    controls: Mapping[str, np.ndarray], config: FilterConfig, ranges: Sequence[tuple[int, int]] | None = None
) -> np.ndarray:
    """Return which native ticks of an episode the filters on controls leave, [M] bool.

    Args:
        controls: Name to [M] array, as the source recorded them.
        config: `drop_loading`, `drop_idle`, `drop_skipped_actions` and `only_success` count here.
        ranges: Of ticks [start, end), the only ones to keep; None keeps all. Ends beyond M are cut.

    Raises:
        ValueError: A filter needs a record that the recording does not have.
    """
    num_ticks = len(next(iter(controls.values())))
    keep = np.ones(num_ticks, bool)
    if config.only_success:
        keep &= _read(controls, "success", "only_success", "how an episode ended")
    if config.drop_skipped_actions:
        keep &= ~_read(controls, "skip_action", "drop_skipped_actions", "which actions were skipped")
    if config.drop_loading:
        keep[: find_first_act(_read(controls, "idle", "drop_loading", "when somebody acts"))] = False
    if config.drop_idle:
        columns = [_read(controls, name, "drop_idle", f"the commanded {name}") for name in JOINT_VELOCITY_CONTROLS]
        keep &= _mask(idle_ranges(np.stack(columns, axis=1), cut_end=config.idle_cut_end), num_ticks)
    if ranges is not None:
        keep &= _mask(ranges, num_ticks)
    return keep


def find_first_act(idle: np.ndarray) -> int:
    """Return the first tick, from 1 on, at which somebody acts, from `idle` [M], 1 where nothing is done; M if nobody does.

    Nobody can act while a world is loading, and few do at once when it is there. Tick 0 does not count: it holds what
    was pressed and moved while the world was loading (attack in 63 of 64 VPT logs).
    """
    acts = np.flatnonzero(np.asarray(idle)[1:] < 1)
    return int(acts[0]) + 1 if len(acts) else len(idle)


def join_steps(keep: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Return which steps may be followed by the next one, as no tick between the two was dropped: [n] bool, the last False.

    `keep` [M] says which ticks are left; `anchors` [n] are the ticks of the steps, non-decreasing.
    """
    dropped = np.concatenate(([0], np.cumsum(~keep)))[anchors]
    return np.concatenate((np.diff(dropped) == 0, [False]))


def cut_runs(start: int, stop: int, keep: np.ndarray, joined: np.ndarray, min_steps: int) -> list[tuple[int, int]]:
    """Return [start, stop) of the contiguous runs of kept and joined steps in a segment that have at least `min_steps`.

    `keep` and `joined` [n] bool go over the whole store; `joined` says whether the next step may follow.
    """
    inside = keep[start:stop]
    linked = inside[:-1] & inside[1:] & joined[start:stop][:-1]
    outside = np.zeros(min(1, len(inside)), bool)
    firsts = np.flatnonzero(inside & ~np.concatenate((outside, linked))) + start
    ends = np.flatnonzero(inside & ~np.concatenate((linked, outside))) + start + 1
    return [(a, b) for a, b in zip(firsts.tolist(), ends.tolist(), strict=True) if b - a >= min_steps]


def ranges_path(config: FilterConfig, base: Path) -> Path | None:
    """Return the file that `filter.keep_ranges` names: `PATH`, or `PATH@DIGEST` with the beginning of its sha256.

    DVC compares this setting alone, so an edited file would be overlooked there; hence the digest is needed under DVC.

    Raises:
        ValueError: There is no such file, its content is another, or DVC runs this stage and the digest is missing.
    """
    if config.keep_ranges is None:
        return None
    named = DIGESTED.fullmatch(config.keep_ranges)
    name, digest = (named["path"], named["digest"]) if named else (config.keep_ranges, "")
    path = base / Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"filter.keep_ranges={config.keep_ranges!r} names no file ({path}); give a JSON of kept ranges, absolute or relative to "
            f"{base}, or null"
        )
    found = file_digest(path) if digest or os.environ.get("DVC_STAGE") else ""
    if found and not (digest and found.startswith(digest)):
        reason = f"{path} was edited; put it back" if digest else f"DVC would overlook an edit of {path}"
        raise ValueError(
            f"filter.keep_ranges={config.keep_ranges!r}: {reason}, or set filter.keep_ranges to {name}@{found[:DIGEST_SHOWN]}, which says "
            "its present content"
        )
    return path


def _mask(ranges: Sequence[tuple[int, int]], num_ticks: int) -> np.ndarray:
    mask = np.zeros(num_ticks, bool)
    for start, end in ranges:
        mask[start:end] = True
    return mask


def _read(controls: Mapping[str, np.ndarray], name: str, key: str, what: str) -> np.ndarray:
    if name not in controls:
        raise ValueError(REFUSED.format(key=key, what=what))
    return controls[name]
