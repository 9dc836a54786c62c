"""`jepa-cache inspect`: what recordings hold and what looks wrong in them, before anything is encoded; or one training batch.

Reading order: `inspect`, `inspect_units` (a data set), `inspect_recording`, then inspect_batch.py. A report is a dictionary of JSON
types, which is printed, dumped, or shown as a page by templates/inspect.html.j2; its pictures are data URLs and not dumped.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from jepa_cache.actions import ActionSpace, get_action_space
from jepa_cache.cli.inspect_batch import describe_batch, encode_picture, print_batch
from jepa_cache.config.loading import find_repository, is_override, load_config, recordings_base
from jepa_cache.config.schema import Config, DatasetPreset
from jepa_cache.encoding.groups import check_inputs, open_source
from jepa_cache.encoding.steps import plan_episode
from jepa_cache.encoding.units import check_rendered
from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.probe import DecodeError, VideoInfo, header_counts, probe_video
from jepa_cache.media.tar import SUFFIXES, find_episodes
from jepa_cache.media.video import Video, open_video
from jepa_cache.plausibility import find_implausible
from jepa_cache.sources import Source, Unit, describe_unreadable, iter_recordings
from jepa_cache.sources.vpt import measure_yaw_law

Report = dict[str, Any]

NUM_FIRST_DECODED, DECODED_EVERY = 100, 50
"""Frames are decoded of the first recordings and of every 50th after them: an open video is milliseconds, 200 frames half a second."""
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

MAX_ROWS = 200_000
"""Action rows that are kept for histograms; of larger data sets every second, fourth, ... row."""
NUM_BINS = 40

KEY_WIDTH = 44
MAX_SHOWN = 10  # recordings, and of each kind of remark
MAX_KINDS = 20  # of remarks
# What differs between remarks of one kind: names and numbers.
VARYING = re.compile(r"'[^']*'|[+-]?\d[\d.,:]*(e[+-]?\d+)?")
MAX_CARDS = 300  # recordings on a page
PICTURE_WIDTH = 320  # pixels


def inspect(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="recordings (the preset's when absent); key=value overrides of params.yaml"),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page with pictures and histograms to this file")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="look at the first recordings only")] = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="show the first training batch of the encoded data set instead")
    ] = False,
) -> None:
    """Report rates, shares, action statistics and what is suspicious in recordings, without encoding them.

    Args:
        inputs: Tar shards and folders as `encode.py` takes them, or a folder of loose mp4 + jsonl pairs; and overrides.
        as_json: Print JSON instead of tables.
        html: Write a page to this file as well.
        limit: Look at the first recordings only.
        batch: Show one training batch as the predictor would get it; needs `encode.py` and `fit_scaler.py` to have run.

    Raises:
        ValueError: Nothing is found, a setting is wrong, or there is no folder for the page.
    """
    overrides = [text for text in inputs or () if is_override(text)]
    paths = [text for text in inputs or () if not is_override(text)]
    if html is not None and not html.parent.is_dir():  # Said before the work, not after.
        raise ValueError(f"--html {html}: there is no folder {html.parent}")
    if batch and (paths or limit is not None):
        raise ValueError(
            f"--batch shows the data set that is encoded and takes key=value overrides only; got {paths[0] if paths else f'--limit {limit}'!r}"
        )
    reports = [] if batch else _inspect_data_sets(overrides, paths, limit=limit, pictures=html is not None)
    batch_report = describe_batch(overrides, pictures=html is not None) if batch else None
    if html is not None:
        html.write_text(render_page(data_sets=reports, batch=batch_report), encoding="utf-8")
    if as_json:
        shown = {"data_sets": reports} if batch_report is None else batch_report
        print(json.dumps(_without_pictures(shown), indent=2, allow_nan=False))
        return
    for report in reports:
        print_report(report)
    if batch_report is not None:
        print_batch(batch_report)
    if html is not None:
        print(f"wrote {html}")


def _without_pictures(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_pictures(inner) for name, inner in value.items() if name not in ("picture", "pictures")}
    return [_without_pictures(inner) for inner in value] if isinstance(value, list) else value


def _inspect_data_sets(
    overrides: Sequence[str], paths: Sequence[str], *, limit: int | None, pictures: bool
) -> list[Report]:
    """A report for each data set of a mixture, or the one data set, seen by each camera."""
    root = find_repository(Path.cwd())
    config = load_config(root, overrides)
    check_inputs(config, paths)
    base = Path.cwd() if paths else recordings_base(config, root)
    return [
        _inspect_member(config, preset, camera, paths or preset.inputs, base, limit=limit, pictures=pictures)
        for preset, _ in config.members
        for camera in config.encode.cameras or (None,)
    ]


def _inspect_member(
    config: Config,
    preset: DatasetPreset,
    camera: str | None,
    inputs: Sequence[str],
    base: Path,
    *,
    limit: int | None,
    pictures: bool,
) -> Report:
    """One data set, of a mixture or alone, seen by one camera."""
    source = open_source(preset, camera)
    skipped: list[Report] = []
    check_rendered(preset, [] if inputs == preset.inputs else inputs, base)
    units = iter_units(source, inputs, base, skipped)
    report = inspect_units(
        source,
        tqdm(units, desc=f"inspect {preset.name}", unit="unit", disable=None),
        get_action_space(config.encode.action_space),
        name=f"{preset.name}, {camera}" if camera else preset.name,
        step_hz=config.encode.fps / (1 if config.encode.mode == "frame" else config.encoder.tubelet_size),
        plan=functools.partial(_plan_anchors, config),
        limit=limit,
        pictures=pictures,
    )
    report["skipped"] += skipped
    return report


def _plan_anchors(config: Config, episode: Episode) -> np.ndarray:
    """The frames of the steps that stage one makes of a recording; a ValueError where it makes none."""
    phases = (0,) if isinstance(config.encode.phases, str) else config.encode.phases
    num_frames, tubelet_size = len(episode.frame_ticks), config.encoder.tubelet_size
    plans = [
        plan_episode(
            num_frames,
            episode.fps,
            config.encode,
            tubelet_size=tubelet_size,
            phase=phase,
            times_s=episode.frame_times_s,
        )
        for phase in phases
    ]
    return plans[0].anchors


def iter_units(source: Source, inputs: Sequence[str], base: Path, skipped: list[Report]) -> Iterator[Unit]:
    """Yield the units of some inputs; a folder of loose mp4 + jsonl pairs, which only `vpt` has, gives one unit per pair.

    Each loose pair is packed into a tar shard in a temporary folder, which is gone when the next one is requested.

    Args:
        source: Finds the units.
        inputs: Folders, files, globs and brace ranges, relative to `base`.
        base: The folder that relative inputs start from.
        skipped: Receives the files of loose folders that have no partner.

    Raises:
        ValueError: An input finds nothing.
    """
    folders = {text: base / Path(text).expanduser() for text in inputs}
    loose = [text for text, folder in folders.items() if source.recipe.get("source") == "vpt" and _is_loose(folder)]
    if packed := [text for text in inputs if text not in loose]:
        yield from source.list_units(packed, base)
    for text in loose:
        episodes, without_partner = find_episodes(folders[text])
        skipped += [{"unit": "", "key": file.name, "reason": file.reason} for file in without_partner]
        for key, files in episodes.items():
            with tempfile.TemporaryDirectory(prefix="jepa-cache-inspect-") as folder:
                path = Path(folder) / "loose.tar"
                with tarfile.open(path, "w") as tar:
                    for suffix, file in files.items():
                        tar.add(file.resolve(), f"{key}.{suffix}", recursive=False)
                (unit,) = source.list_units([str(path)], base)
                yield unit._replace(name=files["mp4"].name)


def _is_loose(folder: Path) -> bool:
    """Whether recordings lie in a folder that nobody has packed yet."""
    return folder.is_dir() and not any(folder.rglob("*.tar")) and all(any(folder.rglob(f"*.{it}")) for it in SUFFIXES)


def inspect_units(
    source: Source,
    units: Iterable[Unit],
    space: ActionSpace,
    *,
    name: str,
    step_hz: float,
    plan: Callable[[Episode], np.ndarray],
    limit: int | None = None,
    pictures: bool = False,
) -> Report:
    """Report on every recording of some units: its records, and its video's header; nothing is encoded.

    200 frames are decoded of the first hundred recordings and of every fiftieth after them.

    Args:
        source: Reads the units.
        units: May be made while they are read.
        space: The action space whose columns are measured.
        name: Of the data set, for the report.
        step_hz: Steps per second that the actions lead between; as in stage one the true rate may be a little lower.
        plan: The video frames of a recording that its steps stand for in stage one; a ValueError where stage one would skip it.
        limit: Recordings to look at, of all units together; None means all.
        pictures: Keep a picture of each recording of which frames are decoded.

    Cost: linear; a recording's records, a few milliseconds for the header of its video, and half a second for 200 frames of 640x360.
    """
    rows, recordings, skipped, number = _ActionRows(space), [], [], 0
    for unit in units:
        results = iter_recordings(source, unit)
        while number != limit:
            decode = number < NUM_FIRST_DECODED or number % DECODED_EVERY == 0
            # Where nothing is decoded, the source need not read the video either; what it learns is not asked for twice.
            with contextlib.nullcontext() if decode else header_counts():
                if (result := next(results, None)) is None:
                    break
                number += 1
                if isinstance(result, Skipped):
                    skipped.append({"unit": unit.name, **result._asdict()})
                    continue
                report = inspect_recording(result, unit.name, decode=decode, picture=pictures)
            what = "stage one skips it"
            try:
                anchors = plan(result)
                what = f"the action space {space.name} cannot describe it"
                rows.add(space.aggregate(result.controls, result.frame_ticks[anchors]).actions)
            except ValueError as error:
                report["suspicions"].append(f"{what}: {error}")
            recordings.append(report)
        if number == limit:
            break
    return {
        "name": name,
        "source": str(source.recipe.get("source", type(source).__name__)),
        "action_space": space.name,
        "step_hz": step_hz,
        "num_actions": rows.count,
        "num_suspicious": sum(bool(recording["suspicions"]) for recording in recordings),
        "recordings": recordings,
        "skipped": skipped,
        "action_columns": rows.columns(),
    }


def inspect_recording(episode: Episode, unit: str, *, decode: bool, picture: bool) -> Report:
    """Measure one recording and say what is suspicious in it; a video that cannot be decoded is a suspicion, no error.

    Args:
        episode: The recording.
        unit: The name of the unit that it came from.
        decode: Whether to decode its first 200 frames; else only the video's header is read.
        picture: Whether to keep a small picture of one of these frames, as a data URL.

    Returns:
        Shares lie in [0, 1] and are None where they cannot be known. `equal_share` is that of decoded frames that equal the one
        before although something moves, `tick_hz` the rate of the rows by their own clock, `missing` the controls that the
        recording does not hold.
    """
    controls, suspicions = episode.controls, list[str]()
    info, frames = VideoInfo(0, episode.fps, 0, 0, "unknown"), None
    try:
        if decode:
            num_frames = len(episode.frame_ticks)
            with open_video(episode.video, first_frame=episode.first_frame, num_frames=num_frames) as video:
                info = video.info
                frames = _read_frames(video, min(NUM_DECODED, num_frames), picture=picture)
        else:
            info = probe_video(episode.video)
    except DecodeError as error:
        suspicions.append(f"its video cannot be decoded: {error}")
    except OSError as error:
        suspicions.append(f"its video cannot be read now: {describe_unreadable(error)}")
    tick_hz, equal_share = _tick_hz(controls), None
    if frames is not None:
        equal_share = _equal_share(episode, frames)
        suspicions += _judge_frames(frames, equal_share)
    breach_share, broken_law = _judge_yaw(controls)
    suspicions += broken_law
    suspicions += find_implausible(controls)
    missing = [name for name, column in controls.items() if _is_absent(column)]
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
        "num_used_frames": len(episode.frame_ticks),
        "num_ticks": episode.num_ticks,
        "duration_s": duration_s,
        "tick_hz": tick_hz,
        "idle_share": idle_share,
        "gui_share": gui_share,
        "yaw_breach_share": breach_share,
        "equal_share": equal_share,
        "missing": missing,
        "notes": list(episode.notes),
        "suspicions": suspicions,
        "picture": frames.picture if frames is not None else None,
    }


@dataclass(frozen=True)
class _Frames:
    """Of the first frames: differences to the one before (NaN first), luma deviations, a picture."""

    changes: np.ndarray
    deviations: np.ndarray
    picture: str | None


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
    return _Frames(changes, np.concatenate(deviations), encode_picture(kept, PICTURE_WIDTH) if picture else None)


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


@dataclass
class _ActionRows:
    """Running statistics of action rows [A], and a thinned sample of them in bounded memory."""

    space: ActionSpace
    count: int = 0
    sums: np.ndarray = field(init=False)
    squares: np.ndarray = field(init=False)
    zeros: np.ndarray = field(init=False)
    bounds: np.ndarray = field(init=False)
    _kept: list[np.ndarray] = field(default_factory=list)
    _num_kept: int = 0
    _stride: int = 1

    def __post_init__(self) -> None:
        width = len(self.space.actions)
        self.sums, self.squares, self.zeros = np.zeros(width), np.zeros(width), np.zeros(width)
        self.bounds = np.stack([np.full(width, np.inf), np.full(width, -np.inf)])

    def add(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        if len(rows) == 0:
            return
        self._kept.append(rows[-self.count % self._stride :: self._stride].astype(np.float32))
        self._num_kept += len(self._kept[-1])
        self.count += len(rows)
        self.sums += rows.sum(axis=0)
        self.squares += (rows**2).sum(axis=0)
        self.zeros += (rows == 0).sum(axis=0)
        self.bounds[0] = np.minimum(self.bounds[0], rows.min(axis=0))
        self.bounds[1] = np.maximum(self.bounds[1], rows.max(axis=0))
        if self._num_kept > MAX_ROWS:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._num_kept = len(self._kept[0])
            self._stride *= 2

    def columns(self) -> list[Report]:
        if self.count == 0:
            return []
        kept, mean = np.concatenate(self._kept), self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return [
            {
                **column._asdict(),
                "mean": float(mean[index]),
                "std": float(std[index]),
                "minimum": float(self.bounds[0, index]),
                "maximum": float(self.bounds[1, index]),
                "zero_share": float(self.zeros[index] / self.count),
                **_histogram(kept[:, index]),
            }
            for index, column in enumerate(self.space.actions)
        ]


def _histogram(values: np.ndarray) -> Report:
    """Counts of the values between the 0.5 and the 99.5 % quantile."""
    low, high = np.quantile(values, [0.005, 0.995])
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, NUM_BINS, (low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def print_report(report: Report) -> None:
    """Print the tables: recordings, action columns, what is to be known or suspicious, what was skipped; ten of each kind."""
    recordings, columns = report["recordings"], report["action_columns"]
    print(
        f"{report['name']:<{KEY_WIDTH}} {'fps':>6} {'frames':>7} {'rows':>7} {'s':>7} {'idle':>5} {'GUI':>5} {'equal':>5}"
    )
    for entry in recordings[:MAX_SHOWN]:
        key = entry["key"] if len(entry["key"]) <= KEY_WIDTH else f"...{entry['key'][3 - KEY_WIDTH :]}"
        shares = (entry[f"{name}_share"] for name in ("idle", "gui", "equal"))
        print(
            f"{key:<{KEY_WIDTH}} {entry['fps']:>6g} {entry['num_frames']:>7} {entry['num_ticks']:>7} {entry['duration_s']:>7.1f} "
            + " ".join(f"{'-' if share is None else format(share, '.0%'):>5}" for share in shares)
            + ("  suspicious" if entry["suspicions"] else "")
        )
    if len(recordings) > MAX_SHOWN:
        print(f"... and {len(recordings) - MAX_SHOWN} more, see --json")
    if columns:
        name_width, unit_width = (max(len(column[part]) for column in columns) for part in ("name", "unit"))
        print(
            f"\n{report['num_actions']} actions in {report['action_space']} at {report['step_hz']:g} steps/s or a little below"
        )
        head = " ".join(f"{name:>10}" for name in ("mean", "std", "min", "max"))
        print(f"{'column':<{name_width}} {'unit':<{unit_width}} {head} {'zero':>7}")
        for column in columns:
            numbers = " ".join(f"{column[name]:>10.4g}" for name in ("mean", "std", "minimum", "maximum"))
            print(
                f"{column['name']:<{name_width}} {column['unit']:<{unit_width}} {numbers} {column['zero_share']:>7.1%}"
            )
    print()
    for title, kind in (("note", "notes"), ("suspicious", "suspicions")):
        _print_remarks(title, [(entry["key"], text) for entry in recordings for text in entry[kind]])
    _print_remarks("skipped", [(entry["key"], entry["reason"]) for entry in report["skipped"]])
    hours = sum(entry["duration_s"] for entry in recordings) / 3600
    num_decoded = sum(entry["decoded"] for entry in recordings)
    print(
        f"{len(recordings)} recordings of {report['name']} (source {report['source']}), {hours:.2f} h: "
        f"{report['num_suspicious']} suspicious; {len(report['skipped'])} skipped"
        + (f"; frames of {num_decoded} were decoded" if num_decoded < len(recordings) else "")
        + "\n"
    )


def _print_remarks(title: str, remarks: Iterable[tuple[str, str]]) -> None:
    """Print the first ten (recording, remark) of each kind: of remarks that differ in names and numbers alone."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for key, text in remarks:
        stem = key.rpartition("/")[2].partition(".")[0]
        kind = re.sub(rf"\b{re.escape(stem)}\b", "", text.replace(key, "")) if stem in text else text
        kinds.setdefault(VARYING.sub("", kind), []).append((key, text))
    for of_kind in sorted(kinds.values(), key=len, reverse=True)[:MAX_KINDS]:
        for key, text in of_kind[:MAX_SHOWN]:
            print(f"{title}: {key}: {text}")
        if len(of_kind) > MAX_SHOWN:
            print(f"{title}: ... and {len(of_kind) - MAX_SHOWN} more like these, see --json")
    if len(kinds) > MAX_KINDS:
        print(f"{title}: {len(kinds) - MAX_KINDS} more kinds, see --json")


def render_page(*, data_sets: Sequence[Report] = (), batch: Report | None = None) -> str:
    """Write reports as one HTML file that loads nothing; the template escapes every text that comes from the data."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": lambda share: "unknown" if share is None else f"{share:.0%}", "number": _number}
    return environment.get_template("inspect.html.j2").render(data_sets=data_sets, batch=batch, max_cards=MAX_CARDS)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
