"""An inspection as one HTML file: tables, a frame per recording, histograms; nothing is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from jepa_cache.inspection.pictures import picture_url
from jepa_cache.inspection.recording import RecordingReport
from jepa_cache.inspection.statistics import ColumnStatistics, InspectionReport

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .bad { color: #a40000; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1em; }
.card { border: 1px solid #ccc; border-radius: 4px; padding: .6em; overflow-wrap: anywhere; } .card.suspicious { border-color: #a40000; }
img { width: 100%; } svg { background: #f6f6f6; } h3 { font-size: 1em; margin: .3em 0; } ul { margin: .3em 0; padding-left: 1.2em; }
"""
# Names and messages come from the data; the policy holds even where escaping should be forgotten.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def build_page(reports: Iterable[InspectionReport]) -> str:
    """Write reports as HTML; every text that comes from the data is escaped, and scripts are forbidden."""
    body = "\n".join(part for report in reports for part in _describe(report) if part)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>jepa-cache inspect</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _describe(report: InspectionReport) -> list[str]:
    suspicious = [recording for recording in report.recordings if recording.suspicions]
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
        '<div class="cards">',
        *(_card(recording) for recording in report.recordings),
        "</div>",
    ]


def draw_histogram(column: ColumnStatistics, width: int = 240, height: int = 48) -> str:
    """Draw one column's histogram as SVG, heights on a square-root scale so that rare values are seen."""
    top = max(max(column.counts), 1) ** 0.5
    bar_width = width / len(column.counts)
    bars = "".join(
        f'<rect x="{index * bar_width:.1f}" y="{height - height * count**0.5 / top:.1f}" width="{bar_width:.1f}" '
        f'height="{height * count**0.5 / top:.1f}" fill="#36648b"/>'
        for index, count in enumerate(column.counts)
        if count
    )
    title = f"<title>{column.edges[0]:.3g} to {column.edges[-1]:.3g}</title>"
    return f'<svg width="{width}" height="{height}" role="img">{title}{bars}</svg>'


def _columns(columns: Iterable[ColumnStatistics]) -> str:
    rows = "".join(
        f"<tr><td>{escape(column.name)}</td><td>{escape(column.unit)}</td><td>{column.mean:.4g}</td><td>{column.std:.4g}</td>"
        f"<td>{column.minimum:.4g}</td><td>{column.maximum:.4g}</td><td>{column.zero_share:.1%}</td>"
        f"<td>{column.edges[0]:.3g} {draw_histogram(column)} {column.edges[-1]:.3g}</td></tr>"
        for column in columns
    )
    head = "".join(f"<th>{name}</th>" for name in ("column", "unit", "mean", "std", "min", "max", "zero", "histogram"))
    return f"<table><tr>{head}</tr>{rows}</table>" if rows else "<p>No recording gave an action.</p>"


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
