"""Which tick each video frame of a VPT-like recording shows: by count, or by time where the video has another clock."""

from __future__ import annotations

import math

import numpy as np

from jepa_cache.episode import RecordingError
from jepa_cache.media.probe import VideoInfo
from jepa_cache.sources._placement import Placement, measure_intervals, place_by_time

TICK_HZ = 20.0
# Frame and line counts of one recording differed by up to 3 %; beyond 10 % they say nothing about the clock.
MAX_COUNT_RATIO = 1.1


def align_ticks(info: VideoInfo, num_ticks: int) -> tuple[float, Placement]:
    """Frame rate and placement of a recording whose lines are ticks of 1/20 s."""
    constant, fps = info.times_s is None, info.typical_fps
    at_tick_rate = math.isclose(fps, TICK_HZ, rel_tol=0.01)
    if constant and at_tick_rate:
        # The ticks' own rate: a header of 20.002 Hz must not give another stride than one of 20.
        return TICK_HZ, _align_counts(info.num_frames, num_ticks)
    # Other recorders write another rate into the header, or times that follow the clock on the wall where the game lags. The counts
    # tell whether that is just the container (a frame per line) or whether the video really has another clock, or lacks frames.
    by_count = info.num_frames / num_ticks
    by_time = by_count * TICK_HZ / info.fps if constant else (info.times_s[-1] + 1 / fps) * TICK_HZ / num_ticks
    ratios = [max(ratio, 1 / ratio) for ratio in (by_count, by_time)]
    if min(ratios) > MAX_COUNT_RATIO:
        raise RecordingError(
            f"{info.num_frames} frames at {fps:g} Hz fit {num_ticks} ticks at {TICK_HZ:g} Hz neither frame by line "
            "nor by time; the frames cannot be placed"
        )
    if ratios[0] <= ratios[1]:
        placement, notes = _align_counts(info.num_frames, num_ticks), ()
        if not at_tick_rate:
            notes = (f"the header says {fps:g} Hz, but there is a frame per line: taken as {TICK_HZ:g} Hz",)
        return TICK_HZ, placement._replace(notes=(*notes, *placement.notes))
    placement = align_times(info, np.arange(num_ticks) / TICK_HZ)
    note = f"video at {fps:g} Hz: frames are placed on the ticks by time"
    return fps, placement._replace(notes=(note, *placement.notes))


def _align_counts(num_frames: int, num_ticks: int) -> Placement:
    """Frame t shows line t, from the start, as long as there are both."""
    num_used = min(num_frames, num_ticks)
    notes: tuple[str, ...] = ()
    if num_frames != num_ticks:
        what = "frames" if num_frames > num_ticks else "lines"
        surplus = abs(num_frames - num_ticks)
        notes = (f"{num_frames} frames, {num_ticks} lines: the last {surplus} {what} are not used",)
    return Placement(np.arange(num_used, dtype=np.int64), notes)


def align_times(info: VideoInfo, times_s: np.ndarray) -> Placement:
    """Place each frame on the row that is nearest in time, the earlier one of two equally near.

    Nearest, not last: times are rounded (0.067 for 2/30 s), and a row that comes just after its frame would lose it to the row
    before. The error is at most half a row's interval either way, whichever of frames and rows is the faster.

    Args:
        info: The video.
        times_s: [M] non-decreasing times of the rows, seconds since the start of the video.

    Returns:
        The placement, without the frames that come after the last row by more than half an interval.

    Raises:
        RecordingError: The first row comes later than one interval (or frame) after the first frame, or no row falls into
            the video: the times do not count from the video's start.
    """
    _, late_s = measure_intervals(times_s, info.typical_fps)
    if abs(times_s[0]) > late_s * 1.001:
        raise RecordingError(
            f"the timestamps begin at {times_s[0]:g} s and the video, which lasts {info.num_frames / info.fps:g} s, at 0 s: they "
            f"must be seconds since its start (within {late_s:g} s), else frames and controls cannot be brought together"
        )
    placement = place_by_time(times_s, info.num_frames, info.typical_fps, info.frame_times_s)
    if (num_late := info.num_frames - len(placement.frame_ticks)) > 0:
        late = f"{info.num_frames} frames, rows until {times_s[-1]:g} s: the last {num_late} frames are not used"
        placement = placement._replace(notes=(late, *placement.notes))
    return placement
