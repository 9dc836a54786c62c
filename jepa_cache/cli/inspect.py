"""`jepa-cache inspect`: what recordings hold and what looks wrong in them, before anything is encoded.

Reading order: `inspect`, `inspect_units` (a data set), `inspect_recording`. A report is a dictionary of JSON types, which
is printed or dumped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from jepa_cache.actions import Column, get_action_space
from jepa_cache.cli.outcome import AsJson, Outcome, Recordings, align, report
from jepa_cache.config.loading import find_repository, load_config, recordings_base, split_arguments
from jepa_cache.config.schema import Config
from jepa_cache.encoding.groups import check_inputs, find_space, open_source
from jepa_cache.encoding.steps import StepPlan, describe_slower, find_slower, plan_episode
from jepa_cache.encoding.units import list_units
from jepa_cache.episode import Episode, Skipped, find_implausible
from jepa_cache.media.probe import DecodeError, VideoInfo, header_counts, probe_video
from jepa_cache.media.video import open_video
from jepa_cache.sources import Source, Unit, describe_unreadable, iter_recordings
from jepa_cache.sources.vpt import measure_yaw_law

Report = dict[str, Any]

# Frames are decoded of the first recordings and of every 50th after them: 200 frames of 640x360 take half a second.
NUM_FIRST_DECODED, DECODED_EVERY = 100, 50
NUM_DECODED = 200  # frames of a recording, from its start: 10 s of VPT
BATCH_FRAMES = 20
SMALL_WIDTH = 160  # pixels that frames are measured at, or some more

# Thresholds of what is called suspicious. The real recordings at hand stay clear of all of them.
MAX_YAW_BREACHES = 0.01  # 0.1 % in 64 VPT logs
MAX_FPS_ERROR = 0.01
MAX_RATE_ERROR = 0.2  # Ticks by the clock; the median tick of laggy recordings is still near 50 ms.
EQUAL_FRAMES = 0.01  # Mean difference of two frames, of 255; real ones that move differ by 1 or more.
MAX_EQUAL_SHARE, MIN_JUDGED_FRAMES = 0.1, 20
FLAT_DEVIATION, MAX_FLAT_SHARE = 4.0, 0.5  # Luma deviation of 255: loading screens have 16, night scenes 11.
MAX_IDLE_SHARE = 0.95
MIN_DURATION_S = 2.0
MAX_UNUSED_S = 1.0

MAX_SHOWN = 10  # recordings, and of each kind of remark
MAX_KINDS = 20  # of remarks
# Names and numbers: what differs between remarks of one kind.
VARYING = re.compile(r"'[^']*'|[+-]?\d[\d.,:]*(e[+-]?\d+)?")


def inspect(
    arguments: Recordings = None,
    *,
    as_json: AsJson = False,
    limit: Annotated[int | None, typer.Option(min=1, help="look at the first recordings only")] = None,
) -> None:
    """Report rates, shares, action statistics and what is suspicious in recordings, without encoding them.

    Exit code 0: inspected; 2: wrong usage, or there is nothing to inspect.
    """

    def work() -> Outcome:
        reports = list(inspect_data_sets(arguments, limit=limit))
        return Outcome({"data_sets": reports}, [line for it in reports for line in list_report(it)])

    report(work, as_json=as_json, typed=arguments)


def inspect_data_sets(arguments: Sequence[str] | None, *, limit: int | None) -> Iterator[Report]:
    """Report on each data set of a mixture, or the one data set, seen by each camera."""
    root, (overrides, paths) = find_repository(Path.cwd()), split_arguments(arguments)
    config = load_config(root, overrides)
    check_inputs(config, paths)
    base = Path.cwd() if paths else recordings_base(config, root)
    for preset, _ in config.members:
        for camera in config.encode.cameras or (None,):
            source = open_source(preset, camera)
            name = f"{preset.name}, {camera}" if camera else preset.name
            units = list_units(source, preset, paths, base)
            space = find_space(config, source, units).name
            named = replace(config, encode=replace(config.encode, action_space=space))
            bar = tqdm(units, desc=f"inspect {preset.name}", unit="unit", disable=None)
            yield inspect_units(named, source, bar, name=name, limit=limit)


def inspect_units(
    config: Config, source: Source, units: Iterable[Unit], *, name: str, limit: int | None = None
) -> Report:
    """Report on every recording of some units, or the first `limit`: its records, and its video's header; nothing is encoded.

    200 frames are decoded of the first hundred recordings and of every fiftieth after them.

    Cost: linear; a recording's records, a few milliseconds for its video's header, half a second where frames are decoded.
    """
    space = get_action_space(config.encode.action_space)
    statistics, recordings, skipped, same_controls, number = _Statistics(len(space.actions)), [], [], {}, 0
    rates: set[float] = set()
    slower: set[tuple[float, int] | None] = set()
    for unit in units:
        results = iter_recordings(source, unit)
        while number != limit:
            decode = number < NUM_FIRST_DECODED or number % DECODED_EVERY == 0
            # Where nothing is decoded, the source need not read the video either.
            with contextlib.nullcontext() if decode else header_counts():
                if (result := next(results, None)) is None:
                    break
                number += 1
                if isinstance(result, Skipped):
                    skipped.append({"unit": unit.name, **result._asdict()})
                    continue
                doubts, space = [], space.named(result.column_names)
                try:
                    plan = _plan_steps(config, result)
                    statistics.add(space.aggregate(result.controls, result.frame_ticks[plan.anchors]).actions)
                    rates.add(plan.step_hz)
                    slower.add(find_slower(result.fps, config.encode.fps))
                except ValueError as error:
                    doubts.append(f"stage one cannot use it: {error}")
                first = same_controls.setdefault(_digest_controls(result), result.key)
                if first != result.key:
                    doubts.append(f"its rows are those of {first}: a copy?")
                recordings.append(inspect_recording(result, unit.name, decode=decode))
            recordings[-1]["suspicions"] += doubts
        if number == limit:
            break
    return {
        "name": name,
        "source": str(source.recipe.get("source", type(source).__name__)),
        "action_space": space.name,
        "step_hz": [min(rates), max(rates)] if rates else None,
        "slower": describe_slower(filter(None, slower), config.encode.fps),
        "num_actions": statistics.count,
        "num_suspicious": sum(bool(recording["suspicions"]) for recording in recordings),
        "recordings": recordings,
        "skipped": skipped,
        "action_columns": statistics.describe(space.actions),
    }


def _plan_steps(config: Config, episode: Episode) -> StepPlan:
    """The steps that stage one makes of a recording in the first phase; a ValueError where it makes none in a phase."""
    phases = (0,) if isinstance(config.encode.phases, str) else config.encode.phases
    num_frames, tubelet_size, times_s = len(episode.frame_ticks), config.encoder.tubelet_size, episode.frame_times_s
    plans = [
        plan_episode(num_frames, episode.fps, config.encode, tubelet_size=tubelet_size, phase=phase, times_s=times_s)
        for phase in phases
    ]
    return plans[0]


def _digest_controls(episode: Episode) -> bytes:
    digest = hashlib.sha256()
    for name, column in sorted(episode.controls.items()):
        digest.update(f"{name} {column.dtype} {len(column)} ".encode() + np.ascontiguousarray(column).tobytes())
    return digest.digest()


def inspect_recording(episode: Episode, unit: str, *, decode: bool) -> Report:
    """Measure one recording of a unit and say what is suspicious in it; a video that cannot be decoded is a suspicion, no error.

    With `decode` its first 200 frames are decoded, else only its header is read.

    Returns:
        Shares lie in [0, 1] and are None where they cannot be known. `equal_share` is that of decoded frames that equal the
        one before although something moves, `tick_hz` the rate of the rows by their own clock, `missing` the controls that
        the recording does not hold.
    """
    info, frames, doubts = VideoInfo(0, episode.fps, 0, 0, "unknown"), None, list[str]()
    try:
        info, frames = _look_at_video(episode) if decode else (probe_video(episode.video), None)
    except DecodeError as error:
        doubts.append(f"its video cannot be decoded: {error}")
    except OSError as error:
        doubts.append(f"its video cannot be read now: {describe_unreadable(error)}")
    controls, ticks, times_s = episode.controls, episode.frame_ticks, episode.frame_times_s
    num_used = len(ticks)
    rows_hz = episode.fps * ((ticks[-1] - ticks[0]) / (num_used - 1) if num_used > 1 else 1.0)
    unused, left = episode.num_video_frames - num_used, episode.num_ticks - 1 - int(ticks[-1])
    duration_s = num_used / episode.fps if times_s is None else float(times_s[-1] - times_s[0])
    missing = [name for name, column in controls.items() if _is_absent(column)]
    # NaN is what cannot be known; no comparison with it is true.
    idle, gui = (float(np.mean(controls[name])) if name in controls else math.nan for name in ("idle", "gui"))
    equal, tick_hz, breaches = _measure_equal(episode, frames), _measure_clock(controls), math.nan
    flat = math.nan if frames is None else np.mean(frames.mean(axis=-1).std(axis=(1, 2)) < FLAT_DEVIATION)
    if {"mouse_dx", "yaw_deg", "gui"} <= set(controls) and (law := measure_yaw_law(controls)).num_judged:
        breaches = law.num_breaches / law.num_judged
        if breaches > MAX_YAW_BREACHES:
            doubts.append(
                f"yaw does not follow the mouse in {law.num_breaches} of {law.num_judged} turning steps (first in line {law.line}: "
                f"dx {law.dx:g}, yaw turns by {law.turned_deg:g} degrees)"
            )
    fps_error = abs(info.typical_fps / episode.fps - 1)
    checks = [
        (flat > MAX_FLAT_SHARE, f"{flat:.0%} of its first frames are flat (black?)"),
        (equal > MAX_EQUAL_SHARE, f"{equal:.0%} of the decoded frames equal the one before though something moves"),
        (bool(missing), f"it holds no {', '.join(missing)}"),
        (fps_error > MAX_FPS_ERROR, f"the container says {info.typical_fps:g} frames/s, its rows say {episode.fps:g}"),
        (
            abs(tick_hz - rows_hz) > MAX_RATE_ERROR * rows_hz > 0,
            f"its clock counts {tick_hz:.1f} rows/s, its video {rows_hz:.1f}",
        ),
        (unused > MAX_UNUSED_S * episode.fps, f"{unused} of {episode.num_video_frames} frames have no row"),
        (left > MAX_UNUSED_S * rows_hz, f"{left} of {episode.num_ticks} rows have no frame"),
        (idle > MAX_IDLE_SHARE, f"nothing is done in {idle:.0%} of its ticks"),
        (duration_s < MIN_DURATION_S, f"it lasts only {duration_s:.1f} s"),
    ]
    shares = {
        "tick_hz": tick_hz,
        "idle_share": idle,
        "gui_share": gui,
        "yaw_breach_share": breaches,
        "equal_share": equal,
    }
    return {
        "unit": unit,
        "key": episode.key,
        "decoded": decode,
        "fps": episode.fps,
        "container_fps": info.fps,
        "codec": info.codec,
        "width": info.width,
        "height": info.height,
        "num_frames": episode.num_video_frames,
        "num_used_frames": num_used,
        "num_ticks": episode.num_ticks,
        "duration_s": duration_s,
        **{name: None if math.isnan(value) else value for name, value in shares.items()},
        "missing": missing,
        "notes": list(episode.notes),
        "suspicions": [*doubts, *find_implausible(controls), *(text for found, text in checks if found)],
    }


def _look_at_video(episode: Episode) -> tuple[VideoInfo, np.ndarray]:
    """What the header says, and the first 200 frames [F, h, w, 3] made small."""
    num_frames = len(episode.frame_ticks)
    with open_video(episode.video, first_frame=episode.first_frame, num_frames=num_frames) as video:
        stride, num_decoded = max(1, video.info.width // SMALL_WIDTH), min(NUM_DECODED, num_frames)
        batches = np.split(np.arange(num_decoded), range(BATCH_FRAMES, num_decoded, BATCH_FRAMES))
        small = np.concatenate([video.read(batch)[:, ::stride, ::stride] for batch in batches])
    return video.info, small.astype(np.int16)


def _measure_equal(episode: Episode, frames: np.ndarray | None) -> float:
    """Share of frames [F, h, w, 3] that equal the one before; only those count between which something was done."""
    if frames is None:
        return math.nan
    changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    judged = np.ones(len(changes), bool)
    for name in ("idle", "gui"):  # Inside a GUI nothing need move: the cursor is not recorded.
        if name in episode.controls:
            judged &= episode.controls[name][episode.frame_ticks[: len(changes)]] < 0.5
    return float(np.mean(changes[judged] <= EQUAL_FRAMES)) if judged.sum() >= MIN_JUDGED_FRAMES else math.nan


def _measure_clock(controls: Mapping[str, np.ndarray]) -> float:
    """Rows per second by the recording's clock `milli`: of the median row, as lag stretches a few."""
    milli = controls.get("milli", np.empty(0))
    interval_ms = np.median(np.diff(milli)) if len(milli) > 2 and (milli >= 0).all() else 0
    return 1000.0 / float(interval_ms) if interval_ms > 0 else math.nan


def _is_absent(column: np.ndarray) -> bool:
    """Sources write NaN, or -1 in integer columns, where a recording does not hold a field."""
    if column.dtype.kind == "f":
        return bool(np.isnan(column).all())
    return column.dtype.kind == "i" and bool((column == -1).all())


class _Statistics:
    """Running statistics of the columns of action rows [num_rows, A]."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sums = np.zeros((3, width))  # of the values, their squares and their zeros
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)

    def add(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        self.count += len(rows)
        self.sums += [rows.sum(axis=0), (rows**2).sum(axis=0), (rows == 0).sum(axis=0)]
        self.low = np.minimum(self.low, rows.min(axis=0, initial=np.inf))
        self.high = np.maximum(self.high, rows.max(axis=0, initial=-np.inf))

    def describe(self, columns: Sequence[Column]) -> list[Report]:
        if not self.count:
            return []
        mean, square, zero_share = self.sums / self.count
        values = np.array([mean, np.sqrt(np.maximum(square - mean**2, 0)), self.low, self.high, zero_share])
        names = ("mean", "std", "minimum", "maximum", "zero_share")
        return [
            column._asdict() | dict(zip(names, row, strict=True))
            for column, row in zip(columns, values.T.tolist(), strict=True)
        ]


def list_report(report: Report) -> list[str]:
    """The tables: recordings, action columns, what is to be known or suspicious, what was skipped; ten of each kind."""
    recordings, columns = report["recordings"], report["action_columns"]
    rows = [[report["name"], "fps", "frames", "rows", "s", "idle", "GUI", "equal", ""]]
    for entry in recordings[:MAX_SHOWN]:
        shares = ["-" if (it := entry[f"{name}_share"]) is None else f"{it:.0%}" for name in ("idle", "gui", "equal")]
        counts = [f"{entry['fps']:g}", str(entry["num_frames"]), str(entry["num_ticks"]), f"{entry['duration_s']:.1f}"]
        rows.append([entry["key"], *counts, *shares, "suspicious" * bool(entry["suspicions"])])
    lines = align(rows)
    if len(recordings) > MAX_SHOWN:
        lines.append(f"... and {len(recordings) - MAX_SHOWN} more, see --json")
    if columns:
        rates = dict.fromkeys(f"{hz:.4g}" for hz in report["step_hz"])
        lines += [
            "",
            f"{report['num_actions']} actions in {report['action_space']} at {' to '.join(rates)} steps/s",
            *([report["slower"]] if report["slower"] else []),
        ]
        names = ("mean", "std", "minimum", "maximum")
        lines += align(
            [
                ["column", "unit", *names, "zero"],
                *(
                    [it["name"], it["unit"], *(f"{it[name]:.4g}" for name in names), f"{it['zero_share']:.1%}"]
                    for it in columns
                ),
            ]
        )
    lines.append("")
    for title, kind in (("note", "notes"), ("suspicious", "suspicions")):
        lines += _list_remarks(title, [(entry["key"], text) for entry in recordings for text in entry[kind]])
    lines += _list_remarks("skipped", [(entry["key"], entry["reason"]) for entry in report["skipped"]])
    hours = sum(entry["duration_s"] for entry in recordings) / 3600
    num_decoded = sum(entry["decoded"] for entry in recordings)
    return [
        *lines,
        f"{len(recordings)} recordings of {report['name']} (source {report['source']}), {hours:.2f} h: "
        f"{report['num_suspicious']} suspicious; {len(report['skipped'])} skipped"
        + (f"; frames of {num_decoded} were decoded" if num_decoded < len(recordings) else ""),
        "",
    ]


def _list_remarks(title: str, remarks: Iterable[tuple[str, str]]) -> list[str]:
    """The first ten (recording, remark) of each kind: of remarks that differ in names and numbers alone."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for key, text in remarks:
        stem = re.escape(key.rpartition("/")[2].partition(".")[0])
        kinds.setdefault(VARYING.sub("", re.sub(rf"\b{stem}\b", "", text.replace(key, ""))), []).append((key, text))
    lines = []
    for of_kind in sorted(kinds.values(), key=len, reverse=True)[:MAX_KINDS]:
        lines += [f"{title}: {key}: {text}" for key, text in of_kind[:MAX_SHOWN]]
        if len(of_kind) > MAX_SHOWN:
            lines.append(f"{title}: ... and {len(of_kind) - MAX_SHOWN} more like these, see --json")
    return lines + [f"{title}: {len(kinds) - MAX_KINDS} more kinds, see --json"] * (len(kinds) > MAX_KINDS)
