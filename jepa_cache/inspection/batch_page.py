"""A training batch as one HTML file: its tables, and for some windows the frames with the actions between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from jepa_cache.inspection.batch import BatchReport, ColumnReport, Spread, TensorReport, name_window
from jepa_cache.inspection.pictures import encode_picture
from jepa_cache.webpage import build_document, build_table, picture_url

FRAME_WIDTH = 160  # pixels
BATCH_STYLE = """
.strip { margin-bottom: 1.5em; } .strip td, .strip th { padding: .1em .3em; font-size: 12px; }
.strip img { width: 150px; display: block; } .strip td.action { text-align: center; color: var(--accent); }
@media print { .strip img { width: 100%; } }
"""
SPREAD_HEAD = ("min", "mean", "max", "std")


def build_batch_page(report: BatchReport, frames: Sequence[np.ndarray | None], raw_actions: np.ndarray) -> str:
    """Write the report as HTML; every text that comes from the data is escaped, and scripts are forbidden.

    Args:
        report: The batch.
        frames: Of its first windows [T, h, w, 3] uint8 each; None where the recording is not on this machine.
        raw_actions: [B, T-1, A] unscaled.
    """
    shown = ", ".join(
        f"{escape(name)} {escape(f'{value:g}' if isinstance(value, float) else str(value))}"
        for name, value in report.settings.items()
    )
    body = [
        f"<h1>The first training batch: {len(report.windows)} windows</h1>",
        f"<p>{shown}</p>",
        "<h2>Tensors</h2>",
        build_table(
            ("tensor", "shape", "dtype", *SPREAD_HEAD, "not finite", "what it is"),
            map(_tensor_row, report.tensors),
            label="Tensors",
            words=(8,),
        ),
        *(
            f"<h2>{title} columns</h2>"
            + build_table(
                (
                    "column",
                    "unit",
                    "kind",
                    *(f"scaled {name}" for name in SPREAD_HEAD),
                    *(f"raw {name}" for name in SPREAD_HEAD),
                ),
                map(_column_row, columns),
                label=f"{title} columns",
            )
            for title, columns in (("Action", report.actions), ("State", report.states))
        ),
        "<h2>Windows</h2>",
        f"<p>Between two frames: the raw actions that lead from one to the other, columns that are 0 throughout left out. "
        f"Frames of the first {len(frames)} windows.</p>",
        *(_strip(report, number, window_frames, raw_actions[number]) for number, window_frames in enumerate(frames)),
        "<ol start='0'>" + "".join(f"<li>{escape(name_window(window))}</li>" for window in report.windows) + "</ol>",
    ]
    return build_document("jepa-cache inspect --batch", body, style=BATCH_STYLE)


def _strip(report: BatchReport, number: int, frames: np.ndarray | None, actions: np.ndarray) -> str:
    """One window: a row of frames, and a row for every action column that is not 0 throughout."""
    window = report.windows[number]
    head = f"<h3>window {number}: {escape(name_window(window))}</h3>"
    if frames is None:
        head += '<p class="bad">Its recording is not on this machine any more, or was changed since it was encoded: no frames.</p>'
        pictures = ""
    else:
        cells = (
            f'<td><img src="{picture_url(encode_picture(frame, FRAME_WIDTH))}" alt="a frame"></td>' for frame in frames
        )
        pictures = "<tr><th></th>" + "<td></td>".join(cells) + "</tr>"
    ticks = (
        "<tr><th>frame, tick</th>"
        + "<td></td>".join(f"<td>{frame}, {tick}</td>" for frame, tick in zip(window.frames, window.ticks, strict=True))
        + "</tr>"
    )
    rows = "".join(
        f"<tr><th>{escape(column.name)}</th>"
        + "".join(f'<td></td><td class="action">{value:.4g}</td>' for value in actions[:, index])
        + "<td></td></tr>"
        for index, column in enumerate(report.actions)
        if actions[:, index].any()
    )
    return (
        f'<section class="strip">{head}<div class="scroll" role="region" aria-label="window {number}" tabindex="0">'
        f"<table>{pictures}{ticks}{rows}</table></div></section>"
    )


def _tensor_row(tensor: TensorReport) -> tuple[str, ...]:
    shape = " ".join(f"{letter}={size}" for letter, size in zip(tensor.axes.split(), tensor.shape, strict=True))
    return (tensor.name, shape, tensor.dtype, *_numbers(tensor.spread), str(tensor.spread.num_bad), tensor.meaning)


def _column_row(column: ColumnReport) -> tuple[str, ...]:
    return (column.name, column.unit, column.kind, *_numbers(column.scaled), *_numbers(column.raw))


def _numbers(spread: Spread) -> Iterable[str]:
    return ("-" if value is None else f"{value:.4g}" for value in spread[:4])
