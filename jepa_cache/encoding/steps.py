"""Which frames become which steps, in the three encode modes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jepa_cache.config.schema import EncodeConfig

MAX_SHOWN = 3  # rates of videos in a sentence
SLOWER_SHARE = 0.01  # of the requested rate, by which a true one may be lower without a word: 4.995 for 5 of 29.97 Hz


class StepPlan(NamedTuple):
    """The encoder inputs of one episode and the steps that come out of them."""

    inputs: np.ndarray  # [I, G] int64, video frames of each encoder input; G frames are encoded together
    anchors: np.ndarray  # [n] int64, the frame whose moment a step stands for: the last that its tokens have seen
    segments: np.ndarray  # [X, 2] int64, [start, stop) of the contiguous runs of steps
    step_hz: float


def sampling_stride(video_fps: float, fps: float) -> int:
    """Frames between sampled ones: ceil(video fps / fps), so the true rate is never above the requested one.

    Source: the V-JEPA 2-AC training loader (15 Hz video at 4 fps gives stride 4, truly 3.75 fps). ValueError when more
    frames are requested than the video has.
    """
    if fps > video_fps * (1 + 1e-6):
        raise ValueError(f"encode.fps {fps:g} is above the video's {video_fps:g} frames per second; lower encode.fps")
    return math.ceil(video_fps / fps - 1e-6)


def find_slower(video_fps: float, fps: float) -> tuple[float, int] | None:
    """The rate of a video, Hz, and its stride where frames are sampled at another rate than `fps` asks; else None."""
    stride = sampling_stride(video_fps, fps)
    return (round(video_fps, 3), stride) if video_fps / stride < (1 - SLOWER_SHARE) * fps else None


def describe_slower(slower: Iterable[tuple[float, int]], fps: float) -> str:
    """A sentence on what `find_slower` gave of some videos; empty where there are none."""
    made = [f"{hz / stride:.4g} Hz made (1 of {stride} frames at {hz:g} Hz)" for hz, stride in sorted(set(slower))]
    if len(made) > MAX_SHOWN:
        made[MAX_SHOWN:] = [f"{len(made) - MAX_SHOWN} other rates"]
    if not made:
        return ""
    return (
        f"encode.fps: {fps:g} Hz asked, {', '.join(made)}, as sampled frames lie whole numbers of frames apart, never closer. "
        "The weights tell programs the true rate; for another one set encode.fps to the video's rate over a whole number"
    )


def plan_episode(
    num_frames: int,
    video_fps: float,
    encode: EncodeConfig,
    *,
    tubelet_size: int,
    phase: int = 0,
    times_s: np.ndarray | None = None,
) -> StepPlan:
    """Lay out the encoder inputs of an episode of `num_frames` usable frames.

    `frame`: each sampled frame is encoded alone (doubled into a tubelet by the encoder). `tubelet`: consecutive sampled
    frames of one tubelet are encoded together as one step. `clip`: `frames_per_clip` sampled frames are encoded jointly
    into frames_per_clip / tubelet_size steps; early steps see later frames, so each clip is a segment of its own.
    Sampled frames at the end that fill no input are skipped. `phase` is the first sampled frame; where the rate varies,
    `times_s` [F] says when each frame was taken, see `sample_times`.

    Raises:
        ValueError: When the video is too short for one input, or slower than `encode.fps`.
    """
    mode, stride = encode.mode, sampling_stride(video_fps, encode.fps)
    if phase >= stride:
        raise ValueError(
            f"phase {phase} is not below the stride {stride} of a video at {video_fps:g} Hz; lower encode.phases"
        )
    group = {"frame": 1, "tubelet": tubelet_size, "clip": encode.frames_per_clip}[mode]
    if times_s is None:
        runs = [np.arange(phase, num_frames, stride, dtype=np.int64)]
    else:
        runs = sample_times(times_s, stride / video_fps, times_s[0] + phase / video_fps)
    num_sampled, runs = sum(map(len, runs)), [run[: len(run) // group * group] for run in runs if len(run) >= group]
    if not runs:
        raise ValueError(
            f"{num_frames} usable frames give {num_sampled} sampled ones at stride {stride}, but {mode} mode needs "
            f"{group}; lower encode.frames_per_clip or raise encode.fps"
        )
    inputs = np.concatenate(runs).reshape(-1, group)
    steps_per_input = max(1, group // tubelet_size)
    anchors = inputs.reshape(len(inputs), steps_per_input, -1)[:, :, -1].reshape(-1)
    if mode == "clip":
        bounds = np.arange(0, len(anchors) + 1, steps_per_input)
    else:
        bounds = np.cumsum([0, *(len(run) // group * steps_per_input for run in runs)])
    segments = np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int64)
    frames_per_step = group // steps_per_input
    return StepPlan(inputs, anchors, segments, video_fps / stride / frames_per_step)


def sample_times(times_s: np.ndarray, interval_s: float, start_s: float) -> list[np.ndarray]:
    """Frames evenly spaced in time, in runs: of each moment the nearest frame, the earlier of two equally near.

    `times_s` [F] is non-decreasing; moments lie `interval_s` apart from `start_s` on. One with no frame within a
    quarter of the interval ends a run: steps of other lengths would tell the predictor another speed.
    """
    moments_s = start_s + interval_s * np.arange(math.floor((times_s[-1] - start_s) / interval_s + 1e-6) + 1)
    after = np.clip(np.searchsorted(times_s, moments_s), 1, len(times_s) - 1) if len(times_s) > 1 else 0 * moments_s
    after = np.asarray(after, np.int64)
    before = np.maximum(after - 1, 0)
    # Rounded to ns, so that ties fall the same way on every machine.
    to_before, to_after = (np.round(np.abs(times_s[frames] - moments_s), 9) for frames in (before, after))
    frames, distances_s = np.where(to_before <= to_after, before, after), np.minimum(to_before, to_after)
    near = distances_s <= interval_s / 4  # of one moment alone, as moments lie an interval apart
    bounds = np.flatnonzero(np.diff(near, prepend=False, append=False))
    return [frames[start:stop] for start, stop in bounds.reshape(-1, 2)]
