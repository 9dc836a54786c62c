"""Which row of the controls each frame of a video shows, for sources whose rows carry times."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jepa_cache.episode import RecordingError

MAX_LENGTH_RATIO = 1.5
"""Rows and video that differ more in length do not tell one story: one of the two rates is wrong."""


class Placement(NamedTuple):
    """`frame_ticks` and `frame_times_s` [F] as in `Episode`, and sentences on what is unusual."""

    frame_ticks: np.ndarray
    notes: tuple[str, ...]
    frame_times_s: np.ndarray | None = None


def place_frames(
    times_s: np.ndarray, num_frames: int, fps: float, frame_times_s: np.ndarray | None = None, *, measured: bool = False
) -> Placement:
    """Bring frames and rows together: one to one where there are as many at the same rate, else by nearest time.

    One to one: as many rows as frames, and the rows lie 1 / fps apart within a quarter of a frame. Their first time then does
    not matter (rows of a real data set begin at one frame's length and still belong to the frames one by one).
    Else each frame shows the row that is nearest in time, the earlier one of two equally near: times are
    rounded, and a row that comes just after its frame would lose it to the row before.

    Args:
        times_s: [M] times of the rows, seconds since the first frame.
        num_frames: Frames of the recording.
        fps: Hz.
        frame_times_s: [num_frames] when each frame is shown, seconds since the first; None for t / fps.
        measured: Whether somebody wrote the times down. Where there is one for each frame they are then the frames' own, whatever
            the container says.

    Returns:
        Ticks of the usable frames: those up to half an interval after the last row.

    Raises:
        RecordingError: No row; times that are not finite or go back; a first row more than one interval away from the first
            frame; or rows that last more than 1.5 times as long as the video, or the reverse.
    """
    if len(times_s) == 0:
        raise RecordingError("the recording holds no row")
    if not np.isfinite(times_s).all() or np.any(np.diff(times_s) < 0):
        row = int(np.argmax(~np.isfinite(times_s) | (np.diff(times_s, prepend=times_s[0]) < 0)))
        raise RecordingError(f"the times of the rows must be finite and not go back; row {row} says {times_s[row]:g} s")
    drift_s = times_s - times_s[0] - np.arange(len(times_s)) / fps
    measured &= len(times_s) == num_frames
    if len(times_s) == num_frames and frame_times_s is None and np.abs(drift_s).max() <= 0.25 / fps:
        notes = ()
        if abs(times_s[0]) > 0.25 / fps:
            notes = (f"the rows begin at {times_s[0]:g} s, but there is one for each frame: taken one by one",)
        return Placement(np.arange(num_frames, dtype=np.int64), notes)
    if measured:
        return Placement(
            np.arange(num_frames, dtype=np.int64),
            ("each frame has a time of its own in the rows",),
            times_s - times_s[0],
        )
    interval_s, late_s = measure_intervals(times_s, fps)
    length_s = num_frames / fps if frame_times_s is None else float(frame_times_s[-1]) + 1 / fps
    if abs(times_s[0]) > late_s * 1.001:
        raise RecordingError(
            f"the rows begin at {times_s[0]:g} s and the video, which lasts {length_s:g} s, at 0 s: times must be "
            f"seconds since its first frame (within {late_s:g} s)"
        )
    lengths_s = (float(times_s[-1]) + interval_s, length_s)
    if max(lengths_s) > MAX_LENGTH_RATIO * min(lengths_s):
        raise RecordingError(
            f"{len(times_s)} rows last {lengths_s[0]:g} s and {num_frames} frames at {fps:g} Hz last {lengths_s[1]:g} s: one of "
            "the two rates must be wrong"
        )
    frame_ticks, other_notes, frame_times_s = place_by_time(times_s, num_frames, fps, frame_times_s)
    notes = [f"{num_frames} frames at {fps:g} Hz and {len(times_s)} rows until {times_s[-1]:g} s are placed by time"]
    if len(frame_ticks) < num_frames:
        notes.append(f"the last {num_frames - len(frame_ticks)} frames come after the last row and are not used")
    return Placement(frame_ticks, (*notes, *other_notes), frame_times_s)


def measure_intervals(times_s: np.ndarray, fps: float) -> tuple[float, float]:
    """Median interval of the rows (that of the frames, for a single row), and the longer one of rows and frames; seconds."""
    interval_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 1.0 / fps
    return interval_s, max(interval_s, 1.0 / fps)


def place_by_time(
    times_s: np.ndarray, num_frames: int, fps: float, frame_times_s: np.ndarray | None = None
) -> Placement:
    """Place each frame on the row that is nearest in time; whether the times are usable is not asked.

    Args:
        times_s: [M] non-decreasing times of the rows, seconds since the first frame, M > 0.
        num_frames: Frames of the recording.
        fps: Hz.
        frame_times_s: [num_frames] when each frame is shown; None for t / fps.

    Returns:
        Ticks without the frames that come after the last row by more than half an interval; notes on later rows and gaps.

    Raises:
        RecordingError: All frames do.
    """
    interval_s, late_s = measure_intervals(times_s, fps)
    shown_s = np.arange(num_frames) / fps if frame_times_s is None else frame_times_s
    frame_ticks = find_nearest_rows(times_s, shown_s[shown_s <= times_s[-1] + late_s / 2])
    if len(frame_ticks) == 0:
        raise RecordingError(
            f"the last row is at {times_s[-1]:g} s, before the video's first frame at 0 s: no frame shows a row"
        )
    notes = []
    if frame_times_s is not None:
        frame_times_s = frame_times_s[: len(frame_ticks)]
        notes.append("the rate of its frames varies: they are placed by the times in the container")
    num_later = len(times_s) - 1 - int(frame_ticks[-1])
    if num_later * interval_s > late_s:
        notes.append(f"the last {num_later} rows come after the last frame and are not used")
    if len(times_s) > 1 and (gap_s := float(np.diff(times_s).max())) > 5 * late_s:
        notes.append(f"the rows have a gap of {gap_s:g} s; frames in it show no controls")
    return Placement(frame_ticks, tuple(notes), frame_times_s)


def find_nearest_rows(times_s: np.ndarray, frame_times_s: np.ndarray) -> np.ndarray:
    """[F] int64: for each frame the row nearest in time, the earlier one of two equally near.

    Args:
        times_s: [M] non-decreasing times of the rows, M > 0.
        frame_times_s: [F] times of the frames, on the same clock.
    """
    after = np.minimum(np.searchsorted(times_s, frame_times_s), len(times_s) - 1)
    before = np.maximum(after - 1, 0)
    # Rounded to ns: 3/30 and 0.1 differ in the last bit, and ties must fall the same way on every machine.
    to_before, to_after = (np.round(np.abs(times_s[rows] - frame_times_s), 9) for rows in (before, after))
    return np.where(to_before <= to_after, before, after).astype(np.int64)
