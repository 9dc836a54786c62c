"""Which tick each video frame of a VPT-like recording shows: by count, or by time where the video has another clock."""

from __future__ import annotations

import math

import numpy as np

from jepa_cache.episode import RecordingError
from jepa_cache.media.video import VideoInfo
from jepa_cache.sources._placement import measure_intervals, place_by_time

TICK_HZ = 20.0
# Frame and line counts of one recording differed by up to 3 %; beyond 10 % they say nothing about the clock.
MAX_COUNT_RATIO = 1.1


def align_ticks(info: VideoInfo, num_ticks: int) -> tuple[float, np.ndarray, tuple[str, ...]]:
    """Frame rate, frame_ticks [F] and notes of a recording whose lines are ticks of 1/20 s."""
    if math.isclose(info.fps, TICK_HZ, rel_tol=0.01):
        # The ticks' own rate: a header of 20.002 Hz must not give another stride than one of 20.
        return TICK_HZ, *_align_counts(info.num_frames, num_ticks)
    # Other recorders write another rate into the header. The counts tell whether that is just the header (a frame per line)
    # or whether the video really has another clock.
    by_count = info.num_frames / num_ticks
    by_time = by_count * TICK_HZ / info.fps
    ratios = [max(ratio, 1 / ratio) for ratio in (by_count, by_time)]
    if min(ratios) > MAX_COUNT_RATIO:
        raise RecordingError(
            f"{info.num_frames} frames at {info.fps:g} Hz fit {num_ticks} ticks at {TICK_HZ:g} Hz neither frame by line "
            "nor by time; the frames cannot be placed"
        )
    if ratios[0] <= ratios[1]:
        frame_ticks, notes = _align_counts(info.num_frames, num_ticks)
        note = f"the header says {info.fps:g} Hz, but there is a frame per line: taken as {TICK_HZ:g} Hz"
        return TICK_HZ, frame_ticks, (note, *notes)
    frame_ticks, notes = align_times(info, np.arange(num_ticks) / TICK_HZ)
    return info.fps, frame_ticks, (f"video at {info.fps:g} Hz: frames are placed on the ticks by time", *notes)


def _align_counts(num_frames: int, num_ticks: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Frame t shows line t, from the start, as long as there are both."""
    num_used = min(num_frames, num_ticks)
    notes: tuple[str, ...] = ()
    if num_frames != num_ticks:
        what = "frames" if num_frames > num_ticks else "lines"
        surplus = abs(num_frames - num_ticks)
        notes = (f"{num_frames} frames, {num_ticks} lines: the last {surplus} {what} are not used",)
    return np.arange(num_used, dtype=np.int64), notes


def align_times(info: VideoInfo, times_s: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Place each frame on the row that is nearest in time, the earlier one of two equally near.

    Nearest, not last: times are rounded (0.067 for 2/30 s), and a row that comes just after its frame would lose it to the row
    before. The error is at most half a row's interval either way, whichever of frames and rows is the faster.

    Args:
        info: The video; frame t is at t / fps seconds.
        times_s: [M] non-decreasing times of the rows, seconds since the start of the video.

    Returns:
        frame_ticks [F], without the frames that come after the last row by more than half an interval; and notes.

    Raises:
        RecordingError: The first row comes later than one interval (or frame) after the first frame, or no row falls into
            the video: the times do not count from the video's start.
    """
    _, late_s = measure_intervals(times_s, info.fps)
    if abs(times_s[0]) > late_s * 1.001:
        raise RecordingError(
            f"the timestamps begin at {times_s[0]:g} s and the video, which lasts {info.num_frames / info.fps:g} s, at 0 s: they "
            f"must be seconds since its start (within {late_s:g} s), else frames and controls cannot be brought together"
        )
    frame_ticks, notes = place_by_time(times_s, info.num_frames, info.fps)
    if (num_late := info.num_frames - len(frame_ticks)) > 0:
        late = f"{info.num_frames} frames, rows until {times_s[-1]:g} s: the last {num_late} frames are not used"
        notes = (late, *notes)
    return frame_ticks, notes
