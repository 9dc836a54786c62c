"""`jepa-cache inspect`: a data-quality report, before anything is encoded."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tqdm import tqdm

from jepa_cache.actions import get_action_space
from jepa_cache.cli.inspect_batch import inspect_batch
from jepa_cache.config.loading import find_repository, is_override, load_config, recordings_base
from jepa_cache.config.schema import Config, DatasetPreset
from jepa_cache.encoding.modes import plan_episode
from jepa_cache.encoding.parts import check_inputs, open_source
from jepa_cache.encoding.units import check_rendered
from jepa_cache.episode import Episode
from jepa_cache.inspection.inputs import iter_units
from jepa_cache.inspection.page import build_page
from jepa_cache.inspection.statistics import InspectionReport, inspect_units
from jepa_cache.media.tar import LeftOut

KEY_WIDTH = 44
MAX_SHOWN = 10  # recordings, and of each kind of remark
MAX_KINDS = 20  # of remarks
VARYING = re.compile(
    r"'[^']*'|[+-]?\d[\d.,:]*(e[+-]?\d+)?"
)  # what differs between remarks of one kind: names and numbers


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
    given = inputs or []
    if html is not None and not html.parent.is_dir():  # Said before the work, not after.
        raise ValueError(f"--html {html}: there is no folder {html.parent}")
    if batch:
        recordings = [text for text in given if not is_override(text)]
        if recordings or limit is not None:
            raise ValueError(
                "--batch shows the data set that is encoded and takes key=value overrides only; got "
                f"{recordings[0] if recordings else f'--limit {limit}'!r}"
            )
        inspect_batch(given, as_json=as_json, html=html)
        return
    root = find_repository(Path.cwd())
    config = load_config(root, [text for text in given if is_override(text)])
    paths = [text for text in given if not is_override(text)]
    check_inputs(config, paths)
    base = Path.cwd() if paths else recordings_base(config, root)
    reports = [
        _inspect_member(config, preset, camera, paths or preset.inputs, base, limit=limit, pictures=html is not None)
        for preset, _ in config.members
        for camera in config.encode.cameras or (None,)
    ]
    if html is not None:
        html.write_text(build_page(reports), encoding="utf-8")
    if as_json:
        print(json.dumps({"data_sets": [report.to_json() for report in reports]}, indent=2, allow_nan=False))
        return
    for report in reports:
        print_report(report)
    if html is not None:
        print(f"wrote {html}")


def _inspect_member(
    config: Config,
    preset: DatasetPreset,
    camera: str | None,
    inputs: Sequence[str],
    base: Path,
    *,
    limit: int | None,
    pictures: bool,
) -> InspectionReport:
    """One data set, of a mixture or alone, seen by one camera."""
    source = open_source(preset, camera)
    left_out: list[LeftOut] = []
    check_rendered(preset, [] if inputs == preset.inputs else inputs, base)
    units = iter_units(source, inputs, base, left_out)
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
    report.skipped.extend({"unit": "", "key": file.name, "reason": file.reason} for file in left_out)
    return report


def _plan_anchors(config: Config, episode: Episode) -> np.ndarray:
    """The frames of the steps that stage one makes of a recording; a ValueError where it makes none."""
    phases = (0,) if isinstance(config.encode.phases, str) else config.encode.phases
    num_frames, tubelet_size = len(episode.frame_ticks), config.encoder.tubelet_size
    plans = [
        plan_episode(num_frames, episode.fps, config.encode, tubelet_size=tubelet_size, phase=phase) for phase in phases
    ]
    return plans[0].anchors


def print_report(report: InspectionReport) -> None:
    """Print the tables: recordings, action columns, what is to be known or suspicious, what was skipped; ten of each kind."""
    print(
        f"{report.name:<{KEY_WIDTH}} {'fps':>6} {'frames':>7} {'rows':>7} {'s':>7} {'idle':>5} {'GUI':>5} {'equal':>5}"
    )
    for entry in report.recordings[:MAX_SHOWN]:
        key = entry.key if len(entry.key) <= KEY_WIDTH else f"...{entry.key[3 - KEY_WIDTH :]}"
        shares = " ".join(f"{_share(share):>5}" for share in (entry.idle_share, entry.gui_share, entry.equal_share))
        print(
            f"{key:<{KEY_WIDTH}} {entry.fps:>6g} {entry.num_frames:>7} {entry.num_ticks:>7} {entry.duration_s:>7.1f} {shares}"
            f"{'  suspicious' if entry.suspicions else ''}"
        )
    if len(report.recordings) > MAX_SHOWN:
        print(f"... and {len(report.recordings) - MAX_SHOWN} more, see --json")
    if report.columns:
        name_width, unit_width = (max(len(column[part]) for column in report.columns) for part in (0, 1))
        print(
            f"\n{report.num_actions} actions in {report.action_space} at {report.step_hz:g} steps/s or a little below"
        )
        head = " ".join(f"{name:>10}" for name in ("mean", "std", "min", "max"))
        print(f"{'column':<{name_width}} {'unit':<{unit_width}} {head} {'zero':>7}")
        for column in report.columns:
            numbers = " ".join(f"{x:>10.4g}" for x in (column.mean, column.std, column.minimum, column.maximum))
            print(f"{column.name:<{name_width}} {column.unit:<{unit_width}} {numbers} {column.zero_share:>7.1%}")
    print()
    _print_remarks("note", [(entry.key, text) for entry in report.recordings for text in entry.notes])
    _print_remarks("suspicious", [(entry.key, text) for entry in report.recordings for text in entry.suspicions])
    _print_remarks("skipped", [(skipped["key"], skipped["reason"]) for skipped in report.skipped])
    suspicious = sum(bool(entry.suspicions) for entry in report.recordings)
    hours = sum(entry.duration_s for entry in report.recordings) / 3600
    decoded = sum(entry.decoded for entry in report.recordings)
    print(
        f"{len(report.recordings)} recordings of {report.name} (source {report.source}), {hours:.2f} h: {suspicious} suspicious; "
        f"{len(report.skipped)} skipped"
        + (f"; frames of {decoded} were decoded" if decoded < len(report.recordings) else "")
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


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
