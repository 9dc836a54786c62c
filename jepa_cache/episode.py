"""Episode: what every source yields, an encoded video together with its native-rate records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jepa_cache.media.images import FrameSequence, SideBySide


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

    Raises:
        ValueError: A shape, range or order above does not hold; the message names the episode.
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

    def __post_init__(self) -> None:
        """Check shapes, ranges and order."""
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
