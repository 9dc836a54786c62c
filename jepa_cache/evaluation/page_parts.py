"""Parts of report.html: tables of figures and of CSV files, pictures, settings, and the command."""

from __future__ import annotations

import csv
import fnmatch
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.evaluation.tables import unguard_cell
from jepa_cache.webpage import build_figure, build_table, picture_url

MAX_ROWS = 40  # of a table; a data set may have thousands of episodes
MAX_PICTURE_BYTES = 3_600_000  # of all pictures together: as text a third more, which keeps the page below 5 MB
KINDS = {".png": "png", ".gif": "gif", ".jpg": "jpeg"}
WORDS_FROM = 32  # characters; longer cells may wrap


class Picture(NamedTuple):
    """A file in pictures/, what it shows, and what to look for; a wide one scrolls on a phone."""

    name: str
    alt: str
    caption: str
    wide: bool = False


class Remaining:
    """The pictures of a folder, each of which is shown once, within what a page may weigh."""

    def __init__(self, folder: Path):
        """List a folder, which need not be there."""
        self._files = {path.name: path for path in sorted(folder.glob("*")) if path.suffix in KINDS}
        self._left_bytes = MAX_PICTURE_BYTES

    def matching(self, pattern: str) -> list[str]:
        """Names of pictures that were not shown yet."""
        return fnmatch.filter(self._files, pattern)

    def show(self, picture: Picture) -> str:
        """Markup of a picture, "" when it is not there; one that is too heavy is named instead."""
        path = self._files.pop(picture.name, None)
        if path is None:
            return ""
        content = path.read_bytes()
        if len(content) > self._left_bytes:
            return f'<p class="soft">Too heavy for this page: pictures/{escape(picture.name)}. {escape(picture.caption)}</p>'
        self._left_bytes -= len(content)
        url = picture_url(content, KINDS[path.suffix])
        return build_figure(url, alt=picture.alt, caption=picture.caption, wide=picture.wide)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of an evaluation.

    Raises:
        ValueError: It is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); run `python stages/evaluate.py` again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; run `python stages/evaluate.py` again")
    return content


def format_number(value: Any) -> str:
    """A number in four significant digits, whole ones as they are; other values as text, and nothing as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def build_file_table(path: Path, *, label: str) -> str:
    """A CSV file as a table, intervals in the cell of their value; "" when the file is not there.

    Raises:
        ValueError: A row has more or fewer cells than the header.
    """
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = [[unguard_cell(cell) for cell in row] for row in csv.reader(file)] or [[]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"line {number} of {path} has {len(row)} cells, its header {len(header)}; run `python stages/evaluate.py` again"
            )
    head, cells = merge_intervals(header, rows[:MAX_ROWS])
    wrapping = [column for column in range(len(head)) if any(len(row[column]) > WORDS_FROM for row in cells)]
    more = len(rows) - MAX_ROWS
    note = f'<p class="soft">The first {MAX_ROWS} of {len(rows)} rows; all are in {escape(path.name)}.</p>'
    return build_table(head, cells, label=label, words=wrapping) + (note if more > 0 else "")


def merge_intervals(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Columns `x`, `x_low`, `x_high` (or `value`, `low`, `high`) as one, "x [low, high]"; other cells as short numbers."""
    places = {name: place for place, name in enumerate(header)}
    ends = {}
    for name in header:
        pair = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
        if all(end in places for end in pair):
            ends[name] = tuple(places[end] for end in pair)
    merged = {place for pair in ends.values() for place in pair}
    kept = [place for place in range(len(header)) if place not in merged]

    def cell(row: Sequence[str], place: int) -> str:
        value = _short(row[place])
        if header[place] not in ends:
            return value
        low, high = (row[end] for end in ends[header[place]])
        return f"{value} [{_short(low)}, {_short(high)}]" if low or high else value  # no interval over one episode

    return [header[place].replace("_", " ") for place in kept], [[cell(row, place) for place in kept] for row in rows]


def _short(text: str) -> str:
    """A cell's number in four digits; what is no number with a fraction stays as it is (a name such as "007" does)."""
    if "." not in text and "e" not in text.lower():
        return text or "-"
    try:
        return format_number(float(text))
    except ValueError:
        return text


def build_section_tables(
    metrics: Mapping[str, Any], *, only: Collection[str] | None = None, skip: Collection[str] = ()
) -> list[str]:
    """A table for each section of metrics.json that holds named values, with intervals where it has them.

    Args:
        metrics: The content of metrics.json.
        only: Names of sections; None for all.
        skip: Names of sections that stand elsewhere.
    """
    parts = []
    for name, section in metrics.items():
        if not isinstance(section, dict) or name in skip or (only is not None and name not in only):
            continue
        base = next((base for base in (name.removesuffix(end) for end in ("_ci", "_notes")) if base != name), name)
        if name.endswith("_ci") or (only is None and base in skip):
            continue
        intervals = metrics.get(f"{name}_ci", {})
        rows = [[key, format_number(value), _interval(intervals.get(key))] for key, value in sorted(section.items())]
        if not rows:
            continue
        if not intervals:
            rows = [row[:2] for row in rows]
        wrapping = [column for column in range(len(rows[0])) if any(len(row[column]) > WORDS_FROM for row in rows)]
        head = (name.replace("_", " "), "value", "95 % interval")[: len(rows[0])]
        parts.append(build_table(head, rows, label=f"Section {name}", words=wrapping))
    return parts


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{format_number(ends[0])} to {format_number(ends[1])}"


def build_settings(metrics: Mapping[str, Any], settings: Mapping[str, Any] | None) -> list[str]:
    """What was measured and how: the short list of metrics.json, then all of settings.json."""
    parts = []
    if "settings" in metrics:
        rows = [[name, format_number(value)] for name, value in flatten(metrics["settings"])]
        parts.append(build_table(("setting", "value"), rows, label="Settings", words=(1,)))
    if settings is None:
        return [*parts, '<p class="soft">Left out: there is no settings.json with all of them.</p>']
    rows = [[name, format_number(value)] for name, value in flatten(settings)]
    return [
        *parts,
        "<h3>All settings of the training and of this evaluation</h3>",
        build_table(("setting", "value"), rows, label="All settings", words=(1,)),
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested values as dotted names; lists and empty mappings as JSON."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += flatten(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, json.dumps(value) if isinstance(value, list | dict) else value))
    return found


def format_command(settings: Mapping[str, Any] | None) -> str:
    """The command that measures the same again, with the evaluation's settings as overrides where they are known."""
    command = "python stages/evaluate.py"
    if settings is None:
        return command
    names = [f"{name}={settings[name]}" for name in ("dataset", "encoder")] + [
        f"predictor={settings['predictor']['name']}"
    ]
    overrides = [f"evaluate.{name}={json.dumps(value)}" for name, value in settings["measured"]["evaluate"].items()]
    return " ".join([command, *(shlex.quote(text) for text in names + overrides)])
