"""Which row of the controls each video frame shows: by count, or by time where rows or frames have a clock of their own."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jepa_cache.episode import RecordingError
from jepa_cache.media.probe import VideoInfo

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

    One to one: as many rows as frames, and the rows lie 1 / fps apart within a quarter of a frame. Their first time
    then does not matter (rows of a real data set begin at one frame's length and still belong to the frames one by
    one).

    Args:
        times_s: [M] times of the rows, seconds since the first frame.
        num_frames: Frames of the recording.
        fps: Hz.
        frame_times_s: [num_frames] when each frame is shown, seconds since the first; None for t / fps.
        measured: Whether somebody wrote the times down. Where there is one for each frame they are then the frames'
            own, whatever the container says.

    Raises:
        RecordingError: No row; times that are not finite or go back; a first row more than one interval away from the
            first frame; or rows that last more than 1.5 times as long as the video, or the reverse.
    """
    if len(times_s) == 0:
        raise RecordingError("the recording holds no row")
    wrong = ~np.isfinite(times_s) | (np.diff(times_s, prepend=times_s[0]) < 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise RecordingError(f"the times of the rows must be finite and not go back; row {row} says {times_s[row]:g} s")
    if len(times_s) == num_frames:
        one_by_one, since_s = np.arange(num_frames, dtype=np.int64), times_s - times_s[0]
        if frame_times_s is None and np.abs(since_s - one_by_one / fps).max() <= 0.25 / fps:
            note = f"the rows begin at {times_s[0]:g} s, but there is one for each frame: taken one by one"
            return Placement(one_by_one, (note,) if abs(times_s[0]) > 0.25 / fps else ())
        if measured:
            return Placement(one_by_one, ("each frame has a time of its own in the rows",), since_s)
    placement = place_by_time(times_s, num_frames, fps, frame_times_s)
    rows_s = float(times_s[-1]) + _measure_interval(times_s, fps)
    length_s = num_frames / fps if frame_times_s is None else float(frame_times_s[-1]) + 1 / fps
    if max(rows_s, length_s) > MAX_LENGTH_RATIO * min(rows_s, length_s):
        raise RecordingError(
            f"{len(times_s)} rows last {rows_s:g} s and {num_frames} frames at {fps:g} Hz last {length_s:g} s: one of "
            "the two rates must be wrong"
        )
    note = f"{num_frames} frames at {fps:g} Hz and {len(times_s)} rows until {times_s[-1]:g} s are placed by time"
    return placement._replace(notes=(note, *placement.notes))


def place_by_time(
    times_s: np.ndarray, num_frames: int, fps: float, frame_times_s: np.ndarray | None = None
) -> Placement:
    """Place each frame on the row that is nearest in time, the earlier one of two equally near; arguments as of `place_frames`.

    Frames that come after the last row by more than half an interval are not used. A note says so, and tells of later
    rows and gaps.

    Raises:
        RecordingError: The first row is more than one interval (or frame) away from the first frame, so that the times
            do not count from the video's start; or no frame shows a row.
    """
    interval_s = _measure_interval(times_s, fps)
    late_s = max(interval_s, 1 / fps)
    shown_s = np.arange(num_frames) / fps if frame_times_s is None else frame_times_s
    if abs(times_s[0]) > late_s * 1.001:
        raise RecordingError(
            f"the rows begin at {times_s[0]:g} s and the video, which lasts {shown_s[-1] + 1 / fps:g} s, at 0 s: times must be seconds "
            f"since its first frame (within {late_s:g} s), else frames and rows cannot be brought together"
        )
    shown_s = shown_s[shown_s <= times_s[-1] + late_s / 2]
    if len(shown_s) == 0:
        raise RecordingError(
            f"the last row is at {times_s[-1]:g} s, before the video's first frame at 0 s: no frame shows a row"
        )
    after = np.minimum(np.searchsorted(times_s, shown_s), len(times_s) - 1)
    before = np.maximum(after - 1, 0)
    # Rounded to ns: 3/30 and 0.1 differ in the last bit, and ties must fall the same way on every machine.
    to_before, to_after = (np.round(np.abs(times_s[rows] - shown_s), 9) for rows in (before, after))
    frame_ticks = np.where(to_before <= to_after, before, after).astype(np.int64)
    notes = []
    if len(shown_s) < num_frames:
        notes.append(f"the last {num_frames - len(shown_s)} frames come after the last row and are not used")
    if frame_times_s is not None:
        frame_times_s = shown_s
        notes.append("the rate of its frames varies: they are placed by the times in the container")
    num_later = len(times_s) - 1 - int(frame_ticks[-1])
    if num_later * interval_s > late_s:
        notes.append(f"the last {num_later} rows come after the last frame and are not used")
    if len(times_s) > 1 and (gap_s := float(np.diff(times_s).max())) > 5 * late_s:
        notes.append(f"the rows have a gap of {gap_s:g} s; frames in it show no controls")
    return Placement(frame_ticks, tuple(notes), frame_times_s)


def _measure_interval(times_s: np.ndarray, fps: float) -> float:
    """Median interval of the rows, that of the frames for a single row; seconds."""
    return float(np.median(np.diff(times_s))) if len(times_s) > 1 else 1 / fps


TICK_HZ = 20.0
# Frame and line counts of one recording differed by up to 3 %; beyond 10 % they say nothing about the clock.
MAX_COUNT_RATIO = 1.1


def align_vpt_frames(info: VideoInfo, num_ticks: int) -> tuple[float, Placement]:
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
    placement = place_by_time(np.arange(num_ticks) / TICK_HZ, info.num_frames, fps, info.frame_times_s)
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


DROID_HZ = 15.0
# Counts of one recording differ by a frame or two; beyond that and 10 % frames and rows have different clocks.
MAX_COUNT_DIFFERENCE = 2


def align_droid_frames(info: VideoInfo, num_rows: int) -> Placement:
    """Place video frames on rows, from the first of both; the shorter decides. A RecordingError where nothing fits.

    A video of 15 Hz has a frame per row. One of another rate has a frame per row as well where the counts say so (then
    its rows were thinned with it, or its header is wrong); else each frame is placed on the row nearest to it in time,
    which is t / fps seconds unless the container says that the rate varies.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (its loader takes row t for frame t whatever the rates are).
    """
    constant = info.times_s is None
    times_s = np.arange(info.num_frames) / info.fps if constant else info.frame_times_s
    lasts = num_rows * info.fps / DROID_HZ if constant else info.num_frames * num_rows / (times_s[-1] * DROID_HZ + 1)
    misfits = [_misfit(info.num_frames, expected) for expected in (num_rows, lasts)]
    if constant and math.isclose(info.fps, DROID_HZ, rel_tol=0.01):
        ticks, notes = np.arange(info.num_frames, dtype=np.int64), []
    elif min(misfits) > MAX_COUNT_RATIO:
        raise RecordingError(
            f"{info.num_frames} frames at {info.fps:g} Hz fit {num_rows} rows at {DROID_HZ:g} Hz neither frame by row nor by "
            "time; the frames cannot be placed"
        )
    elif misfits[0] <= misfits[1] and (constant or info.num_frames == num_rows or misfits[1] > MAX_COUNT_RATIO):
        ticks, times_s = np.arange(info.num_frames, dtype=np.int64), None
        notes = [f"the video is at {info.fps:g} Hz with a frame per row: the rows count as {info.fps:g} Hz as well"]
    else:
        # Rounded before halves are: 0.5 is never reached by 5 and 15 Hz, but must fall the same way on every machine.
        times = np.round(np.arange(info.num_frames) * (DROID_HZ / info.fps) if constant else times_s * DROID_HZ, 6)
        ticks = np.ceil(times - 0.5).astype(np.int64)
        notes = [f"video at {info.typical_fps:g} Hz: frames are placed on the {DROID_HZ:g} Hz rows by time"]
    usable = ticks[ticks < num_rows]
    if len(usable) < len(ticks):
        surplus = len(ticks) - len(usable)
        notes.append(f"{info.num_frames} frames, {num_rows} rows: the last {surplus} frames are not used")
    step = max(1.0, DROID_HZ / info.fps) if len(ticks) > 1 and ticks[1] > 1 else 1.0
    unused = num_rows - 1 - int(usable[-1])
    if unused >= step:
        notes.append(f"{info.num_frames} frames, {num_rows} rows: the last {unused} rows come after the last frame")
    return Placement(usable, tuple(notes), None if constant or times_s is None else times_s[: len(usable)])


def _misfit(num_frames: int, expected: float) -> float:
    """How many times more frames there are than expected, or fewer; 1 where they differ by no more than recorders do."""
    if abs(num_frames - expected) <= MAX_COUNT_DIFFERENCE:
        return 1.0
    return max(num_frames / expected, expected / num_frames)
