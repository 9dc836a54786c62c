"""report.html: the whole evaluation as one file that opens from disk, made from nothing but what lies in the folder."""

from __future__ import annotations

import base64
import csv
import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jepa_cache.config.parsing import flatten
from jepa_cache.evaluation.context import Measurement
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, unguard_cell
from jepa_cache.files import atomic_file

MAX_ROWS = 40  # of a table; a data set may have thousands of episodes


class Table(NamedTuple):
    """The first rows of a CSV file as they are shown, and how many there are."""

    name: str
    head: list[str]
    rows: list[list[str]]
    num_rows: int


def write_page(out: Path, measurements: Iterable[Measurement]) -> None:
    """Write report.html from what lies in an evaluation's folder; measurements that do not are named with their command."""
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    filters = {
        "number": shorten,
        "read_table": lambda name: read_table(out / name),
        "url": lambda name: read_picture(out / "pictures" / name),
    }
    page = render(
        Path(__file__).parent / "templates/report.html.j2",
        filters,
        metrics=json.loads((out / "metrics.json").read_text(encoding="utf-8")),
        settings=flatten(settings),
        command=format_command(settings),
        measurements=list(measurements),
        folder=MEASUREMENTS_FOLDER,
    )
    with atomic_file(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A page that loads nothing; the template escapes every text that comes from the data, and an unknown name is an error."""
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(template.parent), **options)
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)


def shorten(value: Any) -> str:
    """Four significant digits of a number with a fraction, also of a cell's; nothing as a dash; all else as it is."""
    if isinstance(value, str) and ("." in value or "e" in value.lower()):  # a name such as "007" is no number
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or value == "":
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def read_table(path: Path) -> Table | None:
    """A CSV file with columns `x`, `x_low`, `x_high` (or `value`, `low`, `high`) as one, "x [low, high]"; None where it is absent."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), list(reader.fieldnames or ())
    ends = {}
    for name in header:
        pair = ("low", "high") if name == "value" else (f"{name}_low", f"{name}_high")
        if set(pair) <= set(header):
            ends[name] = pair
    kept = [name for name in header if not any(name in pair for pair in ends.values())]

    def show(row: Mapping[str, str], name: str) -> str:
        value = shorten(unguard_cell(row[name]))
        if name not in ends or not row[ends[name][0]]:  # one episode has no interval
            return value
        low, high = (shorten(row[end]) for end in ends[name])
        return f"{value} [{low}, {high}]"

    shown = [[show(row, name) for name in kept] for row in rows[:MAX_ROWS]]
    return Table(path.name, [name.replace("_", " ") for name in kept], shown, len(rows))


def read_picture(path: Path) -> str | None:
    """A picture as an address that holds it; None where it is absent."""
    if not path.is_file():
        return None
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def format_command(settings: Mapping[str, Any]) -> str:
    """The command that measures the same again, with the evaluation's settings as overrides."""
    names = {name: settings[name] for name in ("dataset", "encoder")} | {"predictor": settings["predictor"]["name"]}
    overrides = {f"evaluate.{name}": json.dumps(value) for name, value in settings["measured"]["evaluate"].items()}
    return " ".join(
        ["python stages/evaluate.py", *(shlex.quote(f"{name}={value}") for name, value in (names | overrides).items())]
    )
