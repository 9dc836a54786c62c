"""VPT recordings: tar shards of mp4 + jsonl pairs, by OpenAI's contractors or in the simple schema of older guides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.actions import wrap_degrees
from jepa_cache.config.parsing import nearest, parse_dataclass
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.tar import TarSample, expand_inputs, iter_samples
from jepa_cache.media.video import DecodeError, VideoInfo, probe_video
from jepa_cache.sources import Unit
from jepa_cache.sources._vpt_lines import LineError, read_contractor, read_simple

RECIPE_VERSION = 1
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

SUFFIXES = ("mp4", "jsonl")
SCHEMAS = ("contractor", "simple")
CAMERA_UNITS = ("delta_deg", "delta_rad", "absolute_deg", "absolute_rad")
TICK_HZ = 20.0
DEG_PER_COUNT = 0.15  # 360 / 2400 exactly: in 99.9 % of the non-GUI steps of 64 VPT logs, within 0.01 degrees.
YAW_TOLERANCE_DEG = 0.01
# A recording is no VPT when fewer than this share of its turning steps follow the law. Real logs: 100 % in five of five, 99.9 %
# of all steps in 64. Where yaw is a per-step change, each lone movement gives one step that follows (0 to dyaw) and one that
# does not (back to 0): up to 50 %. Not higher, so that boats and respawns, which turn the player without the mouse, pass.
MIN_YAW_SHARE = 0.6
# Fewer breaches than this prove nothing: one respawn in a recording that hardly moves is a breach.
MIN_YAW_BREACHES = 3
# Frame and line counts of one recording differed by up to 3 %; beyond 10 % they say nothing about the clock.
MAX_COUNT_RATIO = 1.1


class RecordingError(ValueError):
    """A recording that can be read but must not be used as VPT."""


@dataclass(frozen=True)
class VptOptions:
    """Options of the source.

    Attributes:
        schema: "contractor", or "simple" for lines of timestamp, mouse, keyboard, camera, hotbar.
        camera_unit: Simple schema only, and needed there: delta_deg, delta_rad, absolute_deg or absolute_rad.
    """

    schema: str = "contractor"
    camera_unit: str | None = None

    def __post_init__(self) -> None:
        """Check the values and their combination."""
        if self.schema not in SCHEMAS:
            raise ValueError(f"vpt source: there is no schema {self.schema!r}{nearest(self.schema, SCHEMAS)}")
        if self.schema == "contractor" and self.camera_unit is not None:
            raise ValueError(
                "vpt source: camera_unit belongs to schema 'simple'; contractor lines hold absolute degrees"
            )
        if self.schema == "simple" and self.camera_unit not in CAMERA_UNITS:
            raise ValueError(
                f"vpt source: schema 'simple' needs source_options.camera_unit, one of {', '.join(CAMERA_UNITS)} "
                f"(its lines do not say which); got {self.camera_unit!r}"
            )


def build(options: Mapping[str, Any]) -> VptSource:
    """Make the source from the `source_options` of a preset.

    Raises:
        ValueError: An unknown option (the nearest known one is named) or a wrong value.
    """
    return VptSource(parse_dataclass(VptOptions, options, "source_options of vpt"))


class VptSource:
    """Reads VPT tar shards; holds its options and nothing else. A unit is a tar shard.

    Frame t shows the state before line t (measured by optical flow on two recordings). Where the numbers of frames and lines
    differ they are aligned at the start, the shorter decides, and the difference goes into `Episode.notes`.
    """

    def __init__(self, options: VptOptions) -> None:
        """Hold the options."""
        self.options = options
        self.recipe: dict[str, object] = {"source": "vpt", "recipe_version": RECIPE_VERSION, **asdict(options)}

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find tar shards: folders, files, globs and brace ranges, relative to `base`; sorted, each once.

        Raises:
            ValueError: An input finds no tar.
        """
        return [Unit(path.name, path) for path in expand_inputs(inputs, base, ".tar")]

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the recordings of a tar shard in its order, one in memory at a time.

        Skipped, with the reason: a sample without its partner or otherwise unusable in the tar, a video that cannot be
        opened, a bad line or a field of a wrong type (with the line's number), and a recording that is no VPT because its
        yaw does not follow the mouse. A recording with one bad line is skipped as a whole.

        Raises:
            ValueError: The file is no tar.
        """
        for sample in iter_samples(unit.path, SUFFIXES):
            missing = [suffix for suffix in SUFFIXES if suffix not in sample.members]
            if sample.problem is not None:
                yield Skipped(sample.key, sample.problem)
            elif missing:
                yield Skipped(sample.key, f"the tar shard holds no {sample.key}.{missing[0]} beside its partner")
            else:
                try:
                    yield self._read_episode(sample)
                except (DecodeError, LineError, RecordingError) as error:
                    yield Skipped(sample.key, str(error))

    def _read_episode(self, sample: TarSample) -> Episode:
        video, lines = (sample.members[suffix] for suffix in SUFFIXES)
        if self.options.schema == "contractor":
            controls, notes = read_contractor(lines)
            check_yaw_law(controls)
            info = probe_video(video)
            fps, frame_ticks, clock_notes = _align_ticks(info, len(controls["tick"]))
        else:
            controls, times_s = read_simple(lines, self.options.camera_unit or "")
            notes = ()
            info = probe_video(video)
            fps, frame_ticks, clock_notes = info.fps, *_align_times(info, times_s)
        return Episode(
            key=sample.key,
            video=video,
            fps=fps,
            controls=controls,
            frame_ticks=frame_ticks,
            num_video_frames=info.num_frames,
            notes=(*notes, *clock_notes),
        )


def check_yaw_law(controls: Mapping[str, np.ndarray]) -> None:
    """Check that outside GUIs the player turns by 0.15 degrees per mouse count: `yaw[t+1] - yaw[t] == 0.15 * dx[t]`.

    Judged are the steps with both lines outside a GUI in which the mouse or the yaw moves; the difference is taken on the
    circle. GUI steps are left out: there the mouse moves the cursor, at a scale that differs between recorder versions.
    Lines without yaw cannot be judged and pass.

    Args:
        controls: The columns [M] `mouse_dx`, `yaw_deg` and `gui`.

    Raises:
        RecordingError: At least 3 breaches, and the law holds in less than 60 % of the judged steps.

    Source: measured on 64 VPT logs.
    """
    outside = ~controls["gui"][:-1] & ~controls["gui"][1:]
    turned_deg = np.diff(controls["yaw_deg"])
    counts = controls["mouse_dx"][:-1]
    judged = outside & np.isfinite(turned_deg) & ((counts != 0) | (np.abs(turned_deg) > YAW_TOLERANCE_DEG))
    breaches = np.abs(wrap_degrees(turned_deg[judged] - DEG_PER_COUNT * counts[judged])) > YAW_TOLERANCE_DEG
    num_breaches = int(breaches.sum())
    if num_breaches >= MIN_YAW_BREACHES and num_breaches > (1 - MIN_YAW_SHARE) * len(breaches):
        row = int(np.flatnonzero(judged)[breaches.argmax()])
        raise RecordingError(
            f"this is no VPT contractor recording: yaw does not follow the mouse in {num_breaches} of {len(breaches)} "
            f"turning steps (it must turn by {DEG_PER_COUNT} degrees per count of mouse.dx; line {row + 1}: dx {counts[row]:g}, "
            f"yaw turns by {turned_deg[row]:g}). Is its yaw a change per step, or on another scale? Use schema 'simple'"
        )


def _align_ticks(info: VideoInfo, num_ticks: int) -> tuple[float, np.ndarray, tuple[str, ...]]:
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
    frame_ticks, notes = _align_times(info, np.arange(num_ticks) / TICK_HZ)
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


def _align_times(info: VideoInfo, times_s: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
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
    interval_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 1.0 / info.fps
    frame_times_s = np.arange(info.num_frames) / info.fps
    late_s = max(interval_s, 1.0 / info.fps)
    if abs(times_s[0]) > late_s * 1.001:
        raise RecordingError(
            f"the timestamps begin at {times_s[0]:g} s and the video, which lasts {info.num_frames / info.fps:g} s, at 0 s: they "
            f"must be seconds since its start (within {late_s:g} s), else frames and controls cannot be brought together"
        )
    usable = frame_times_s <= times_s[-1] + late_s / 2
    frame_times_s = frame_times_s[usable]
    after = np.minimum(np.searchsorted(times_s, frame_times_s), len(times_s) - 1)
    before = np.maximum(after - 1, 0)
    # Rounded to ns: 3/30 and 0.1 differ in the last bit, and ties must fall the same way on every machine.
    to_before, to_after = (np.round(np.abs(times_s[rows] - frame_times_s), 9) for rows in (before, after))
    frame_ticks = np.where(to_before <= to_after, before, after).astype(np.int64)
    notes = []
    if len(frame_ticks) < info.num_frames:
        notes.append(
            f"{info.num_frames} frames, rows until {times_s[-1]:g} s: the last {info.num_frames - len(frame_ticks)} "
            "frames are not used"
        )
    num_later = len(times_s) - 1 - int(frame_ticks[-1])
    if num_later * interval_s > late_s:
        notes.append(f"the last {num_later} rows come after the last frame and are not used")
    if len(times_s) > 1 and (gap_s := float(np.diff(times_s).max())) > 5 * late_s:
        notes.append(f"the rows have a gap of {gap_s:g} s; frames in it show no controls")
    return frame_ticks, tuple(notes)
