"""Values that cannot be what the unit of their column says, found in the controls alone; each rule with its reason.

A finding is a reason to look, never to skip: nothing here decides what is encoded. On 27 real recordings (VPT, DROID,
LeRobot) no rule finds anything, and each threshold says how far they stay from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from jepa_cache.poses import POSE_CONTROLS

# Whole name of a column, between which values it lies, and what is to be asked where it does not.
LIMITS = {
    # Euler angles lie in (-pi, pi] or [0, 2 pi); the real ones reach 3.1416.
    r"(command_|ext_)?r[xyz]_rad": (-6.3, 6.3, "radians lie within 2 pi; are these degrees?"),
    # Seen from the base an arm's hand is some decimetres away: 0.79 m at most.
    r"(command_|ext_)?[xyz]_m": (-10.0, 10.0, "an arm reaches metres; are these millimetres or centimetres?"),
    # Sensors overshoot a little (real ones lie in 0 to 0.991); percent and bytes go to 100 and 255.
    r"(command_)?gripper": (-0.5, 1.5, "0 is open and 1 closed; are these percent, 0 to 255 or another scale?"),
    # 90 at most, and 180 from where it began in recordings of changes.
    r"pitch_deg": (-181.0, 181.0, "a view tilts by 180 degrees at most; is source_options.camera_unit right?"),
}
# Times the distance from the median below which nine tenths of the values lie (in a normal column 1.6 deviations); real
# columns reach 81. Columns that are still most of the time, their noise aside, are measured in ones: one keystroke is no outlier.
MAX_OUTLIER, STILL = 1e5, 1e-3
# Exactly equal rows in a run, as share of all: a measured pose trembles (7 of 137 rows at most).
MAX_FROZEN_SHARE, MIN_FROZEN_ROWS = 0.5, 20
MIN_ZERO_POSES = 2  # A hand inside its own base; one such row may be the origin of a relative recording.


def find_implausible(controls: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """What is implausible in the controls of one recording, name to [M], as sentences; nothing where all is well."""
    found: list[str] = []
    doubted: set[str] = set()
    for pattern, (low, high, question) in LIMITS.items():
        beyond = {
            name: values
            for name, values in controls.items()
            if re.fullmatch(pattern, name) and ((values < low) | (values > high)).any()
        }
        if beyond:
            values = np.stack(list(beyond.values())).astype(np.float64)
            column, row = np.unravel_index(np.nan_to_num(np.abs(values)).argmax(), values.shape)
            found.append(f"{', '.join(beyond)} reach {values[column, row]:g} at row {row}: {question}")
            doubted |= beyond.keys()
    found += [text for name, column in controls.items() if name not in doubted for text in _find_outlier(name, column)]
    states = [name for name in controls if re.fullmatch(r"state_[0-9]+", name)]
    for words, names in (("its pose stays", POSE_CONTROLS[:6]), ("its states stay", states)):
        if names and set(names) <= controls.keys():
            found += _find_frozen(words, np.stack([controls[name] for name in names], axis=1), names)
    return tuple(found)


def _find_outlier(name: str, column: np.ndarray) -> list[str]:
    values = column[np.isfinite(column)] if column.dtype.kind == "f" else column[:0]
    if len(values) == 0:
        return []
    distances = np.abs(values.astype(np.float64) - np.median(values))
    spread = float(np.quantile(distances, 0.9))
    if distances.max() <= MAX_OUTLIER * (spread if spread > STILL else 1.0):
        return []
    worst = values[distances.argmax()]
    row = int(np.flatnonzero(column == worst)[0])
    return [
        f"{name} is {worst:g} at row {row}, and nine tenths of its values within {spread:.2g} of their median: a sentinel?"
    ]


def _find_frozen(words: str, rows: np.ndarray, names: Sequence[str]) -> list[str]:
    same = np.concatenate(([False], (np.diff(rows, axis=0) == 0).all(axis=1), [False]))
    edges = np.flatnonzero(np.diff(same.astype(np.int8)))
    longest = int((edges[1::2] - edges[::2]).max(initial=0)) + 1
    if longest >= max(MIN_FROZEN_ROWS, math.ceil(MAX_FROZEN_SHARE * len(rows))):
        return [
            f"{words} exactly the same for {longest} of {len(rows)} rows{'' if rows.any() else ', at 0'}: was it recorded?"
        ]
    zeros = int((rows == 0).all(axis=1).sum())
    if zeros >= MIN_ZERO_POSES and names == POSE_CONTROLS[:6]:
        return [f"its pose is 0 in all of {', '.join(names)} in {zeros} of {len(rows)} rows: were these recorded?"]
    return []
