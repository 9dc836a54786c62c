"""VPT recordings: tar shards of mp4 + jsonl pairs, by OpenAI's contractors or in the simple schema of older guides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jepa_cache.actions import CAMERA_DEG_PER_COUNT, wrap_degrees
from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.config.paths import spell_name
from jepa_cache.episode import Episode, RecordingError, Skipped
from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.tar import SUFFIXES, expand_inputs, iter_samples
from jepa_cache.sources import Unit
from jepa_cache.sources.parsers.placement import align_vpt_frames, place_by_time
from jepa_cache.sources.parsers.vpt_controls import read_contractor, read_simple

RECIPE_VERSION = 2
"""Raised whenever controls, frame_ticks or fps of an unchanged recording change."""

YAW_TOLERANCE_DEG = 0.01
# A recording is no VPT when fewer than this share of its turning steps follow the law. Real logs: 100 % in five of five, 99.9 %
# of all steps in 64. Where yaw is a per-step change, each lone movement gives one step that follows (0 to dyaw) and one that
# does not (back to 0): up to 50 %. Not higher, so that boats and respawns, which turn the player without the mouse, pass.
MIN_YAW_SHARE = 0.6
# Fewer breaches than this prove nothing: one respawn in a recording that hardly moves is a breach.
MIN_YAW_BREACHES = 3


@dataclass(frozen=True)
class VptOptions:
    """Options of the source.

    Attributes:
        schema: "contractor", or "simple" for lines of timestamp, mouse, keyboard, camera, hotbar.
        camera_unit: Simple schema only, and needed there: its lines do not say what their camera is.
    """

    schema: Literal["contractor", "simple"] = "contractor"
    camera_unit: Literal["delta_deg", "delta_rad", "absolute_deg", "absolute_rad"] | None = None

    def __post_init__(self) -> None:
        if self.schema == "contractor" and self.camera_unit is not None:
            raise ValueError(
                "vpt source: camera_unit belongs to schema 'simple'; contractor lines hold absolute degrees"
            )
        if self.schema == "simple" and self.camera_unit is None:
            raise ValueError(
                "vpt source: schema 'simple' needs source_options.camera_unit, one of delta_deg, delta_rad, absolute_deg, "
                "absolute_rad (its lines do not say which)"
            )


def build(options: Mapping[str, Any]) -> VptSource:
    """Make the source from the `source_options` of a preset; a ValueError for an unknown option or a wrong value."""
    return VptSource(parse_dataclass(VptOptions, options, "source_options of vpt"))


class VptSource:
    """Reads VPT tar shards. A unit is a tar shard.

    Frame t shows the state before line t (measured by optical flow on two recordings). Where the numbers of frames and
    lines differ they are aligned at the start, the shorter decides, and the difference goes into `Episode.notes`.
    """

    def __init__(self, options: VptOptions) -> None:
        self.options = options
        self.recipe: dict[str, object] = {"source": "vpt", "recipe_version": RECIPE_VERSION, **asdict(options)}

    def list_units(self, inputs: Sequence[str], base: Path) -> list[Unit]:
        """Find tar shards: folders, files, globs and brace ranges, relative to `base`; sorted, each once."""
        return [Unit(spell_name(path.name), (path,)) for path in expand_inputs(inputs, base, "*.tar")]

    def iter_episodes(self, unit: Unit) -> Iterator[Episode | Skipped]:
        """Yield the recordings of a tar shard in its order, one in memory at a time.

        Of a contractor recording with lines that are no JSON the longest run between them is kept, with a note; one in
        the simple schema is skipped. A file that is no tar, or one without recordings, is one skipped.
        """
        name = spell_name(unit.path.name)
        alone: Skipped | None = None
        found = False
        for key, members, problem in iter_samples(unit.path, SUFFIXES):
            found = True
            if alone is not None:
                if problem is not None and key == name:
                    # The tar ends early, and this is the recording that was cut off: one loss, not two.
                    yield Skipped(alone.key, f"{alone.reason}: {problem}")
                    return
                yield alone
                alone = None
            if problem is not None:
                yield Skipped(key, problem)
            elif missing := [suffix for suffix in SUFFIXES if suffix not in members]:
                alone = Skipped(key, f"the tar shard holds no {key}.{missing[0]} beside its partner")
            else:
                try:
                    yield self._read_episode(key, members["mp4"], members["jsonl"])
                except (DecodeError, RecordingError) as error:
                    yield Skipped(key, str(error))
        if alone is not None:
            yield alone
        if not found:
            yield Skipped(name, f"the tar holds no recording: none of its members ends in .{' or .'.join(SUFFIXES)}")

    def name_skipped(self, unit: Unit, key: str) -> str:
        """The tar shard's present name where the tar itself was skipped; see `Source`."""
        return unit.name if key.endswith(".tar") else key

    def _read_episode(self, key: str, video: bytes, lines: bytes) -> Episode:
        if self.options.schema == "simple":
            controls, times_s = read_simple(lines, self.options.camera_unit or "")
            info = probe_video(video)
            fps, notes, shown = info.typical_fps, (), slice(None)
            placement = place_by_time(times_s, info.num_frames, fps, info.frame_times_s)
            first_line = first_frame = 0
        else:
            controls, notes, first_line, num_lines = read_contractor(lines)
            check_yaw_law(controls)
            info = probe_video(video)
            fps, placement = align_vpt_frames(info, num_lines)
            lines_shown = placement.frame_ticks - first_line
            shown = (lines_shown >= 0) & (lines_shown < len(controls["tick"]))
            if not shown.any():
                raise RecordingError(f"no frame of the video shows one of its usable lines: {'; '.join(notes)}")
            first_frame = int(shown.argmax())
        return Episode(
            key=key,
            video=video,
            fps=fps,
            controls=controls,
            frame_ticks=placement.frame_ticks[shown] - first_line,
            num_video_frames=info.num_frames - first_frame,
            notes=(*notes, *placement.notes),
            first_frame=first_frame,
            frame_times_s=None if placement.frame_times_s is None else placement.frame_times_s[shown],
        )


class YawLaw(NamedTuple):
    """How well yaw follows the mouse: judged steps, breaches among them, and the first breach (line from 1, dx, turn)."""

    num_judged: int
    num_breaches: int
    line: int
    dx: float
    turned_deg: float


def measure_yaw_law(controls: Mapping[str, np.ndarray]) -> YawLaw:
    """Measure where outside GUIs the player turns by 0.15 degrees per mouse count: `yaw[t+1] - yaw[t] == 0.15 * dx[t]`.

    Judged are the steps with both lines outside a GUI in which the mouse or the yaw moves; the difference is taken on
    the circle. In a GUI the mouse moves the cursor. Lines without yaw cannot be judged.
    """
    outside = ~controls["gui"][:-1] & ~controls["gui"][1:]
    turned_deg = np.diff(controls["yaw_deg"])
    counts = controls["mouse_dx"][:-1]
    judged = outside & np.isfinite(turned_deg) & ((counts != 0) | (np.abs(turned_deg) > YAW_TOLERANCE_DEG))
    breaches = np.abs(wrap_degrees(turned_deg[judged] - CAMERA_DEG_PER_COUNT * counts[judged])) > YAW_TOLERANCE_DEG
    if not breaches.any():
        return YawLaw(len(breaches), 0, 0, 0.0, 0.0)
    row = int(np.flatnonzero(judged)[breaches.argmax()])
    return YawLaw(len(breaches), int(breaches.sum()), row + 1, float(counts[row]), float(turned_deg[row]))


def check_yaw_law(controls: Mapping[str, np.ndarray]) -> None:
    """Refuse a recording in which `measure_yaw_law` finds 3 breaches or more, in over 40 % of the judged steps."""
    law = measure_yaw_law(controls)
    if law.num_breaches >= MIN_YAW_BREACHES and law.num_breaches > (1 - MIN_YAW_SHARE) * law.num_judged:
        raise RecordingError(
            f"this is no VPT contractor recording: yaw does not follow the mouse in {law.num_breaches} of {law.num_judged} "
            f"turning steps (it must turn by {CAMERA_DEG_PER_COUNT} degrees per count of mouse.dx; line {law.line}: dx {law.dx:g}, "
            f"yaw turns by {law.turned_deg:g}). Is its yaw a change per step, or on another scale? Write its lines in the simple schema "
            "(timestamp, mouse, keyboard, camera) and set source_options to {schema: simple, camera_unit: delta_deg} "
            "(or absolute_deg, delta_rad, absolute_rad)"
        )
