"""What the two DROID sources share: controls from arrays of one row per 15 Hz step, and frames placed on the rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jepa_cache.episode import RecordingError
from jepa_cache.idle import JOINT_VELOCITY_CONTROLS, find_idle_rows
from jepa_cache.media.probe import VideoInfo
from jepa_cache.poses import CAMERA_CONTROLS, COMMAND_CONTROLS, POSE_CONTROLS
from jepa_cache.sources._placement import Placement

NATIVE_HZ = 15.0
# Counts of one recording differ by a frame or two; beyond that and 10 % frames and rows have different clocks.
MAX_COUNT_RATIO = 1.1
MAX_COUNT_DIFFERENCE = 2


class Rows(NamedTuple):
    """The records of one episode, M rows each; None where the data set has none.

    Attributes:
        poses: [M, 7] measured end-effector poses: x, y, z (m), extrinsic xyz Euler angles (rad), gripper 0 open to 1 closed.
        commands: [M, 7] commanded poses, absolute, in the same form.
        joint_velocity_commands: [M, 7] rad/s.
        cameras: [M, 6] poses of the chosen camera in the robot's base frame.
        success: Whether the episode reached its goal.
    """

    poses: np.ndarray
    commands: np.ndarray | None = None
    joint_velocity_commands: np.ndarray | None = None
    cameras: np.ndarray | None = None
    success: bool | None = None


def build_controls(rows: Rows) -> dict[str, np.ndarray]:
    """Columns [M] of an episode's controls; the names depend on what is there, never on the values.

    Always the seven of a pose; `command_x_m` ... and `command_joint1_rad_s` ... with `idle` (float32, 1 where the joint
    velocity command stays as it was), `ext_x_m` ..., and `success` (bool, the same in every row) where they are known.

    Raises:
        RecordingError: Arrays of other shapes, or no rows.
    """
    num_rows = len(rows.poses)
    widths = {"poses": 7, "commands": 7, "joint_velocity_commands": 7, "cameras": 6}
    for name, width in widths.items():
        array = getattr(rows, name)
        if array is not None and array.shape != (num_rows, width):
            raise RecordingError(f"the episode's {name} must be [{num_rows}, {width}]; got {array.shape}")
    if num_rows == 0:
        raise RecordingError("the episode has no rows")
    groups = (
        (POSE_CONTROLS, rows.poses),
        (COMMAND_CONTROLS, rows.commands),
        (JOINT_VELOCITY_CONTROLS, rows.joint_velocity_commands),
        (CAMERA_CONTROLS, rows.cameras),
    )
    controls: dict[str, np.ndarray] = {}
    for names, array in groups:
        if array is not None:
            columns = np.asarray(array, np.float64)
            controls |= {name: np.ascontiguousarray(columns[:, index]) for index, name in enumerate(names)}
    if rows.joint_velocity_commands is not None:
        controls["idle"] = find_idle_rows(rows.joint_velocity_commands).astype(np.float32)
    if rows.success is not None:
        controls["success"] = np.full(num_rows, rows.success)
    return controls


def align_frames(info: VideoInfo, num_rows: int) -> Placement:
    """Place video frames on rows, from the first of both; the shorter decides.

    A video of 15 Hz has a frame per row. One of another rate has a frame per row as well where the counts say so (then its
    rows were thinned with it, or its header is wrong); else each frame is placed on the row nearest to it in time, which is t / fps
    seconds unless the container says that the rate varies.

    Args:
        info: The video.
        num_rows: M.

    Raises:
        RecordingError: Neither fits.

    Source: V-JEPA 2-AC, arXiv 2506.09985 (its loader takes row t for frame t whatever the rates are).
    """
    constant = info.times_s is None
    times_s = np.arange(info.num_frames) / info.fps if constant else info.frame_times_s
    lasts = num_rows * info.fps / NATIVE_HZ if constant else info.num_frames * num_rows / (times_s[-1] * NATIVE_HZ + 1)
    misfits = [_misfit(info.num_frames, expected) for expected in (num_rows, lasts)]
    if constant and math.isclose(info.fps, NATIVE_HZ, rel_tol=0.01):
        ticks, notes = np.arange(info.num_frames, dtype=np.int64), []
    elif min(misfits) > MAX_COUNT_RATIO:
        raise RecordingError(
            f"{info.num_frames} frames at {info.fps:g} Hz fit {num_rows} rows at {NATIVE_HZ:g} Hz neither frame by row nor by "
            "time; the frames cannot be placed"
        )
    elif misfits[0] <= misfits[1] and (constant or info.num_frames == num_rows or misfits[1] > MAX_COUNT_RATIO):
        ticks, times_s = np.arange(info.num_frames, dtype=np.int64), None
        notes = [f"the video is at {info.fps:g} Hz with a frame per row: the rows count as {info.fps:g} Hz as well"]
    else:
        # Rounded before halves are: 0.5 is never reached by 5 and 15 Hz, but must fall the same way on every machine.
        times = np.round(np.arange(info.num_frames) * (NATIVE_HZ / info.fps) if constant else times_s * NATIVE_HZ, 6)
        ticks = np.ceil(times - 0.5).astype(np.int64)
        notes = [f"video at {info.typical_fps:g} Hz: frames are placed on the {NATIVE_HZ:g} Hz rows by time"]
    usable = ticks[ticks < num_rows]
    if len(usable) < len(ticks):
        surplus = len(ticks) - len(usable)
        notes.append(f"{info.num_frames} frames, {num_rows} rows: the last {surplus} frames are not used")
    step = max(1.0, NATIVE_HZ / info.fps) if len(ticks) > 1 and ticks[1] > 1 else 1.0
    unused = num_rows - 1 - int(usable[-1])
    if unused >= step:
        notes.append(f"{info.num_frames} frames, {num_rows} rows: the last {unused} rows come after the last frame")
    return Placement(usable, tuple(notes), None if constant or times_s is None else times_s[: len(usable)])


def _misfit(num_frames: int, expected: float) -> float:
    """How many times more frames there are than expected, or fewer; 1 where they differ by no more than recorders do."""
    if abs(num_frames - expected) <= MAX_COUNT_DIFFERENCE:
        return 1.0
    return max(num_frames / expected, expected / num_frames)
