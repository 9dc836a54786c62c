"""One recording under the lens: rates, shares, and what looks wrong in it, from its controls and its first frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jepa_cache.episode import Episode
from jepa_cache.inspection.pictures import encode_picture
from jepa_cache.media.probe import DecodeError, VideoInfo, header_counts, probe_video
from jepa_cache.media.video import Video, open_video
from jepa_cache.plausibility import find_implausible
from jepa_cache.sources.vpt import measure_yaw_law

NUM_DECODED = 200
"""Frames that are decoded of a recording, from its start: 10 s of VPT, some 0.4 s of work at 640x360."""
BATCH_FRAMES = 20

# Thresholds of what is called suspicious. The real recordings at hand stay clear of all of them.
MAX_YAW_BREACHES = 0.01  # 0.1 % in 64 VPT logs
MAX_RATE_ERROR = 0.2  # Ticks by the clock; the median tick of laggy recordings is still near 50 ms.
EQUAL_FRAMES = 0.01  # Mean difference of two frames, of 255; real ones that move differ by 1 or more.
MAX_EQUAL_SHARE, MIN_JUDGED_FRAMES = 0.1, 20
FLAT_DEVIATION, MAX_FLAT_SHARE = 4.0, 0.5  # Luma deviation of 255: loading screens have 16, night scenes 11.
MAX_IDLE_SHARE = 0.95
MIN_DURATION_S = 2.0
MAX_UNUSED_S = 1.0


@dataclass(frozen=True)
class RecordingReport:
    """What was found in one recording; shares lie in [0, 1] and are None where they cannot be known.

    `decoded` says whether frames were looked at, `missing` are controls that the recording does not hold, `equal_share` is that of decoded frames that equal the one before
    although something moves, `tick_hz` the rate of its rows by its own clock, `picture` a JPEG of one frame.
    """

    unit: str
    key: str
    decoded: bool
    fps: float
    container_fps: float
    codec: str
    width: int
    height: int
    num_frames: int
    num_used_frames: int
    num_ticks: int
    duration_s: float
    tick_hz: float | None
    idle_share: float | None
    gui_share: float | None
    yaw_breach_share: float | None
    equal_share: float | None
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    suspicions: tuple[str, ...]
    picture: bytes | None


@dataclass(frozen=True)
class _Frames:
    """Of the first frames: differences to the one before (NaN first), luma deviations, a picture."""

    changes: np.ndarray
    deviations: np.ndarray
    picture: bytes | None


def inspect_recording(episode: Episode, unit: str, *, decode: bool, picture: bool) -> RecordingReport:
    """Measure one recording and say what is suspicious in it; a video that cannot be decoded is a suspicion, no error.

    Args:
        episode: The recording.
        unit: The name of the unit that it came from.
        decode: Whether to decode its first 200 frames; else only the video's header is read.
        picture: Whether to keep a small picture of one of these frames.
    """
    controls, suspicions = episode.controls, []
    info, frames = VideoInfo(0, episode.fps, 0, 0, "unknown"), None
    try:
        if decode:
            num_frames = len(episode.frame_ticks)
            with open_video(episode.video, first_frame=episode.first_frame, num_frames=num_frames) as video:
                info = video.info
                frames = _read_frames(video, min(NUM_DECODED, num_frames), picture=picture)
        else:
            with header_counts():
                info = probe_video(episode.video)
    except DecodeError as error:
        suspicions.append(f"its video cannot be decoded: {error}")
    tick_hz, equal_share = _tick_hz(controls), None
    if frames is not None:
        equal_share = _equal_share(episode, frames)
        suspicions += _judge_frames(frames, equal_share)
    breach_share, broken_law = _judge_yaw(controls)
    suspicions += broken_law
    suspicions += find_implausible(controls)
    missing = tuple(name for name, column in controls.items() if _is_absent(column))
    if missing:
        suspicions.append(f"it holds no {', '.join(missing)}")
    if abs(info.typical_fps / episode.fps - 1) > 0.01:
        suspicions.append(f"the container says {info.typical_fps:g} frames/s, its rows say {episode.fps:g}")
    suspicions += _judge_clock(episode, tick_hz)
    idle_share, gui_share = _mean(controls, "idle"), _mean(controls, "gui")
    if idle_share is not None and idle_share > MAX_IDLE_SHARE:
        suspicions.append(f"nothing is done in {idle_share:.0%} of its ticks")
    times_s = episode.frame_times_s
    duration_s = len(episode.frame_ticks) / episode.fps if times_s is None else float(times_s[-1] - times_s[0])
    if duration_s < MIN_DURATION_S:
        suspicions.append(f"it lasts only {duration_s:.1f} s")
    return RecordingReport(
        unit=unit,
        key=episode.key,
        decoded=decode,
        fps=episode.fps,
        container_fps=info.fps,
        codec=info.codec,
        width=info.width,
        height=info.height,
        num_frames=episode.num_video_frames,
        num_used_frames=len(episode.frame_ticks),
        num_ticks=episode.num_ticks,
        duration_s=duration_s,
        tick_hz=tick_hz,
        idle_share=idle_share,
        gui_share=gui_share,
        yaw_breach_share=breach_share,
        equal_share=equal_share,
        missing=missing,
        notes=episode.notes,
        suspicions=tuple(suspicions),
        picture=frames.picture if frames is not None else None,
    )


def _read_frames(video: Video, num_frames: int, *, picture: bool) -> _Frames:
    changes, deviations, kept, last = [], [], None, None
    for start in range(0, num_frames, BATCH_FRAMES):
        frames = video.read(np.arange(start, min(start + BATCH_FRAMES, num_frames)))
        if start <= num_frames // 2 < start + BATCH_FRAMES:
            kept = frames[num_frames // 2 - start]
        small = frames[:, ::4, ::4].astype(np.int16)
        before = small[:1] if last is None else last
        changes.append(np.abs(np.diff(np.concatenate((before, small)), axis=0)).mean(axis=(1, 2, 3)))
        deviations.append(small.mean(axis=-1).std(axis=(1, 2)))
        last = small[-1:]
    changes = np.concatenate(changes)
    changes[0] = np.nan
    return _Frames(changes, np.concatenate(deviations), encode_picture(kept) if picture else None)


def _equal_share(episode: Episode, frames: _Frames) -> float | None:
    """Share of frames that equal the one before, among those between which something was done (all, if not known)."""
    rows = episode.frame_ticks[: len(frames.changes) - 1]
    judged = np.ones(len(rows), bool)
    for name in ("idle", "gui"):  # Inside a GUI nothing need move: the cursor is not recorded.
        if name in episode.controls:
            judged &= episode.controls[name][rows] < 0.5
    if judged.sum() < MIN_JUDGED_FRAMES:
        return None
    return float(np.mean(frames.changes[1:][judged] <= EQUAL_FRAMES))


def _judge_frames(frames: _Frames, equal_share: float | None) -> list[str]:
    suspicions = []
    flat_share = np.mean(frames.deviations < FLAT_DEVIATION)
    if flat_share > MAX_FLAT_SHARE:
        suspicions.append(f"{flat_share:.0%} of its first frames are flat (black?)")
    if equal_share is not None and equal_share > MAX_EQUAL_SHARE:
        suspicions.append(
            f"{equal_share:.0%} of the decoded frames equal the one before though something moves: duplicated frames"
        )
    return suspicions


def _judge_yaw(controls: Mapping[str, np.ndarray]) -> tuple[float | None, list[str]]:
    """Share of the turning steps in which yaw does not follow the mouse, None where nothing can be judged; and suspicions."""
    if not {"mouse_dx", "yaw_deg", "gui"} <= set(controls):
        return None, []
    law = measure_yaw_law(controls)
    share = law.num_breaches / law.num_judged if law.num_judged else None
    if share is None or share <= MAX_YAW_BREACHES:
        return share, []
    words = (
        f"yaw does not follow the mouse in {law.num_breaches} of {law.num_judged} turning steps (first in line "
        f"{law.line}: dx {law.dx:g}, yaw turns by {law.turned_deg:g} degrees)"
    )
    return share, [words]


def _judge_clock(episode: Episode, tick_hz: float | None) -> list[str]:
    suspicions = []
    ticks = episode.frame_ticks
    if tick_hz is not None and len(ticks) > 1 and ticks[-1] > ticks[0]:
        nominal_hz = episode.fps * (ticks[-1] - ticks[0]) / (len(ticks) - 1)
        if abs(tick_hz / nominal_hz - 1) > MAX_RATE_ERROR:
            suspicions.append(f"its clock counts {tick_hz:.1f} rows/s, its video {nominal_hz:.1f}")
    unused = episode.num_video_frames - len(ticks)
    if unused > MAX_UNUSED_S * episode.fps:
        suspicions.append(f"{unused} of {episode.num_video_frames} frames have no row")
    left = episode.num_ticks - 1 - int(ticks[-1])
    ticks_per_frame = (ticks[-1] - ticks[0]) / (len(ticks) - 1) if len(ticks) > 1 else 1.0
    if left > MAX_UNUSED_S * episode.fps * ticks_per_frame:
        suspicions.append(f"{left} of {episode.num_ticks} rows have no frame")
    return suspicions


def _tick_hz(controls: Mapping[str, np.ndarray]) -> float | None:
    """Rows per second by the recording's clock `milli`: of the median row, as lag stretches a few."""
    milli = controls.get("milli")
    if milli is None or len(milli) < 3 or (milli < 0).any():
        return None
    interval_ms = float(np.median(np.diff(milli)))
    return 1000.0 / interval_ms if interval_ms > 0 else None


def _is_absent(column: np.ndarray) -> bool:
    """Sources write NaN, or -1 in integer columns, where a recording does not hold a field."""
    if column.dtype.kind == "f":
        return bool(np.isnan(column).all())
    return column.dtype.kind == "i" and bool((column == -1).all())


def _mean(controls: Mapping[str, np.ndarray], name: str) -> float | None:
    return float(np.mean(controls[name])) if name in controls else None
