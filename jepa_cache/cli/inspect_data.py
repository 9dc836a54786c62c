"""`jepa-cache inspect`: a data-quality report, before anything is encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from jepa_cache.actions import get_action_space
from jepa_cache.config.loading import find_repository, is_override, load_config, recordings_base
from jepa_cache.inspection.inputs import iter_units
from jepa_cache.inspection.page import build_page
from jepa_cache.inspection.statistics import InspectionReport, inspect_units
from jepa_cache.media.packing import LeftOut
from jepa_cache.sources import build_source

KEY_WIDTH = 44


def inspect(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="recordings (the preset's when absent); key=value overrides of params.yaml"),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page with pictures and histograms to this file")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="look at the first recordings only")] = None,
) -> None:
    """Report rates, shares, action statistics and what is suspicious in recordings, without encoding them.

    Args:
        inputs: Tar shards and folders as `encode.py` takes them, or a folder of loose mp4 + jsonl pairs; and overrides.
        as_json: Print JSON instead of tables.
        html: Write a page to this file as well.
        limit: Look at the first recordings only.

    Raises:
        ValueError: Nothing is found, or a setting is wrong.
    """
    given = inputs or []
    root = find_repository(Path.cwd())
    config = load_config(root, [text for text in given if is_override(text)])
    paths = [text for text in given if not is_override(text)]
    base = Path.cwd() if paths else recordings_base(config, root)
    source = build_source(config.dataset.source, config.dataset.source_options)
    left_out: list[LeftOut] = []
    report = inspect_units(
        source,
        tqdm(
            iter_units(source, paths or config.dataset.inputs, base, left_out),
            desc="inspect",
            unit="unit",
            disable=None,
        ),
        get_action_space(config.encode.action_space),
        step_hz=config.encode.fps,
        limit=limit,
        pictures=html is not None,
    )
    report.skipped.extend({"unit": "", "key": file.name, "reason": file.reason} for file in left_out)
    if html is not None:
        html.write_text(build_page(report), encoding="utf-8")
    if as_json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
        return
    print_report(report)
    if html is not None:
        print(f"wrote {html}")


def print_report(report: InspectionReport) -> None:
    """Print the tables: recordings, action columns, what is suspicious, what was skipped."""
    print(
        f"{'recording':<{KEY_WIDTH}} {'fps':>6} {'frames':>7} {'rows':>7} {'s':>7} {'idle':>5} {'GUI':>5} {'equal':>5}"
    )
    for entry in report.recordings:
        key = entry.key if len(entry.key) <= KEY_WIDTH else f"...{entry.key[3 - KEY_WIDTH :]}"
        shares = " ".join(f"{_share(share):>5}" for share in (entry.idle_share, entry.gui_share, entry.equal_share))
        print(
            f"{key:<{KEY_WIDTH}} {entry.fps:>6g} {entry.num_frames:>7} {entry.num_ticks:>7} {entry.duration_s:>7.1f} {shares}"
            f"{'  suspicious' if entry.suspicions else ''}"
        )
    if report.columns:
        print(
            f"\n{report.num_actions} actions in {report.action_space} at {report.step_hz:g} steps/s or a little below"
        )
        print(f"{'column':<14} {'unit':<14} {'mean':>10} {'std':>10} {'min':>10} {'max':>10} {'zero':>7}")
        for column in report.columns:
            numbers = " ".join(f"{x:>10.4g}" for x in (column.mean, column.std, column.minimum, column.maximum))
            print(f"{column.name:<14} {column.unit[:14]:<14} {numbers} {column.zero_share:>7.1%}")
    print()
    for entry in report.recordings:
        for text in entry.suspicions:
            print(f"suspicious: {entry.key}: {text}")
    for skipped in report.skipped:
        print(f"skipped: {skipped['key']}: {skipped['reason']}")
    suspicious = sum(bool(entry.suspicions) for entry in report.recordings)
    hours = sum(entry.duration_s for entry in report.recordings) / 3600
    print(
        f"{len(report.recordings)} recordings of source {report.source}, {hours:.2f} h: {suspicious} suspicious; "
        f"{len(report.skipped)} skipped"
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
