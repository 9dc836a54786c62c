"""An inspection as one HTML file: tables, a frame per recording, histograms; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from jepa_cache.inspection.recording import RecordingReport
from jepa_cache.inspection.statistics import ColumnStatistics, InspectionReport
from jepa_cache.webpage import build_document, build_markup_table, picture_url

STYLE = "svg { background: var(--box); fill: var(--accent); vertical-align: middle; } .card.suspicious { border-color: var(--bad); }"

MAX_CARDS = 300


def build_page(reports: Iterable[InspectionReport]) -> str:
    """Write reports as HTML; every text that comes from the data is escaped, and scripts are forbidden."""
    body = [part for report in reports for part in _describe(report)]
    return build_document("jepa-cache inspect", body, style=STYLE)


def _describe(report: InspectionReport) -> list[str]:
    suspicious = [recording for recording in report.recordings if recording.suspicions]
    shown = [recording for recording in report.recordings if recording.decoded or recording.suspicions][:MAX_CARDS]
    hours = sum(recording.duration_s for recording in report.recordings) / 3600
    return [
        f"<h1>Recordings of {escape(report.name)} (source {escape(report.source)})</h1>",
        f"<p>{len(report.recordings)} recordings, {hours:.2f} h; {len(suspicious)} suspicious, {len(report.skipped)} skipped; "
        f"{report.num_actions} actions in {escape(report.action_space)} at {report.step_hz:g} steps/s or a little below.</p>",
        "<h2>Skipped</h2>" if report.skipped else "",
        _list(
            f"<b>{escape(entry['key'])}</b> ({escape(entry['unit'])}): {escape(entry['reason'])}"
            for entry in report.skipped
        ),
        "<h2>Suspicious</h2>" if suspicious else "",
        _list(f"<b>{escape(entry.key)}</b>: {escape('; '.join(entry.suspicions))}" for entry in suspicious),
        "<h2>Action columns</h2>",
        _columns(report.columns),
        "<h2>Recordings</h2>",
        f"<p>{len(shown)} of {len(report.recordings)}: those of which frames were decoded or that are suspicious.</p>"
        if len(shown) < len(report.recordings)
        else "",
        '<div class="cards">',
        *(_card(recording) for recording in shown),
        "</div>",
    ]


def draw_histogram(column: ColumnStatistics, width: int = 240, height: int = 48) -> str:
    """Draw one column's histogram as SVG, heights on a square-root scale so that rare values are seen."""
    top = max(max(column.counts), 1) ** 0.5
    bar_width = width / len(column.counts)
    bars = "".join(
        f'<rect x="{index * bar_width:.1f}" y="{height - height * count**0.5 / top:.1f}" width="{bar_width:.1f}" '
        f'height="{height * count**0.5 / top:.1f}"/>'
        for index, count in enumerate(column.counts)
        if count
    )
    title = f"<title>{column.edges[0]:.3g} to {column.edges[-1]:.3g}</title>"
    return f'<svg width="{width}" height="{height}" role="img">{title}{bars}</svg>'


def _columns(columns: Iterable[ColumnStatistics]) -> str:
    head = ("column", "unit", "mean", "std", "min", "max", "zero", "histogram")
    rows = [
        (
            escape(column.name),
            escape(column.unit),
            *(f"{value:.4g}" for value in (column.mean, column.std, column.minimum, column.maximum)),
            f"{column.zero_share:.1%}",
            f"{column.edges[0]:.3g} {draw_histogram(column)} {column.edges[-1]:.3g}",
        )
        for column in columns
    ]
    return build_markup_table(head, rows, label="Action columns") if rows else "<p>No recording gave an action.</p>"


def _card(recording: RecordingReport) -> str:
    picture = f'<img src="{picture_url(recording.picture)}" alt="one frame">' if recording.picture else ""
    facts = (
        f"{recording.width}x{recording.height} {escape(recording.codec)}, {recording.fps:g} frames/s, {recording.duration_s:.1f} s; "
        f"{recording.num_frames} frames, {recording.num_ticks} rows; idle {_share(recording.idle_share)}, "
        f"GUI {_share(recording.gui_share)}, equal frames {_share(recording.equal_share)}"
    )
    bad = "".join(f'<li class="bad">{escape(text)}</li>' for text in recording.suspicions)
    notes = "".join(f"<li>{escape(text)}</li>" for text in recording.notes)
    kind = "card suspicious" if recording.suspicions else "card"
    return f'<div class="{kind}">{picture}<h3>{escape(recording.key)}</h3><p>{facts}</p><ul>{bad}{notes}</ul></div>'


def _list(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _share(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"
