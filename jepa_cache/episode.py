"""Episode: what every source yields, an encoded video together with its native-rate records; and records that are implausible.

An implausible value, one that cannot be what the unit of its column says, is a reason to look, never to skip: nothing here decides
what is encoded. On 27 real recordings (VPT, DROID, LeRobot) no rule finds anything, and each threshold says how far they stay from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jepa_cache.poses import POSE_CONTROLS

if TYPE_CHECKING:
    from jepa_cache.media.images import FrameSequence, SideBySide

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


class RecordingError(ValueError):
    """A recording that can be read but must not be used; its source yields it as `Skipped`, for the reason in the message."""


class Skipped(NamedTuple):
    """A recording that was not used, and why; it goes into the `skipped` report instead of being replaced."""

    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class Episode:
    """One original recording, undecoded; owns no open file and never changes after it was made.

    Time alignment: video frame t shows the state BEFORE row `frame_ticks[t]` of the controls acts. The controls that lead
    from frame a to frame b are therefore the rows `frame_ticks[a]` to `frame_ticks[b] - 1`, all of them.

    Attributes:
        key: Unique within the data set: the segment's name, with the folders of the tar member where there are any.
        video: The encoded video: a container, its path, a picture per frame, or a stereo container.
        fps: Frames per second of the video, Hz.
        controls: Name to array of shape [M]: the records at their native rate, unscaled.
        frame_ticks: [F] int64, non-decreasing, within [0, M): the row of the controls that each usable frame shows.
        num_video_frames: Frames in the container, or in this recording's part of it; may exceed F, the frames beyond F are
            not used.
        notes: What a user should know of this recording, as sentences.
        first_frame: Frame t of this recording is frame `first_frame + t` of the container; above 0 only where several
            recordings share a container.
        frame_times_s: [F] float64, non-decreasing: when each usable frame was taken, seconds on any clock, where the rate varies and
            the rows go by time; `fps` is then the typical rate. None where frame t is at t / fps, or the rows are counted.
        column_names: What the data set calls controls that are only numbered here, such as action_0: joints, as a rule. They are shown
            and decide nothing.
    """

    key: str
    video: bytes | Path | FrameSequence | SideBySide
    fps: float
    controls: dict[str, np.ndarray]
    frame_ticks: np.ndarray
    num_video_frames: int
    notes: tuple[str, ...] = ()
    first_frame: int = 0
    frame_times_s: np.ndarray | None = None
    column_names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.key:
            raise ValueError("an episode needs a key; got an empty one")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"episode {self.key!r}: fps must be positive and finite; got {self.fps!r}")
        shapes = {name: column.shape for name, column in self.controls.items()}
        if not shapes or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(f"episode {self.key!r}: controls must be 1-D arrays of one length; got {shapes}")
        ticks = self.frame_ticks
        if ticks.ndim != 1 or ticks.dtype != np.int64 or len(ticks) == 0:
            raise ValueError(
                f"episode {self.key!r}: frame_ticks must be a non-empty 1-D int64 array; got {ticks.dtype} {ticks.shape}"
            )
        if np.any(np.diff(ticks) < 0) or ticks[0] < 0 or ticks[-1] >= self.num_ticks:
            raise ValueError(
                f"episode {self.key!r}: frame_ticks must not decrease and must lie in [0, {self.num_ticks}); "
                f"got values from {ticks.min()} to {ticks.max()}"
            )
        if self.num_video_frames < len(ticks):
            raise ValueError(
                f"episode {self.key!r}: {len(ticks)} frames have a tick, but the video holds {self.num_video_frames}"
            )
        times_s = self.frame_times_s
        if times_s is not None and not (
            times_s.shape == ticks.shape and np.isfinite(times_s).all() and np.all(np.diff(times_s) >= 0)
        ):
            raise ValueError(f"episode {self.key!r}: frame_times_s must be finite and not go back, one for each frame")
        if self.first_frame < 0:
            raise ValueError(f"episode {self.key!r}: first_frame must be at least 0; got {self.first_frame}")

    @property
    def num_ticks(self) -> int:
        """M, the number of native control rows."""
        return len(next(iter(self.controls.values())))


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
