"""report.html: the whole evaluation as one file that opens from disk, made from nothing but what lies in the folder."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jepa_cache.config.parsing import flatten
from jepa_cache.evaluation.context import Measurement
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, unguard_cell
from jepa_cache.evaluation.pictures import LABELS
from jepa_cache.files import atomic_file

MAX_ROWS = 40  # of a table; a data set may have thousands of episodes
TEMPLATES = Path(__file__).parent / "templates"
WORDS = {name: words for name, (words, _) in LABELS.items()} | {
    "l1": "L1",
    "l2": "L2",
    "r2": "R2",
    "rmse": "RMSE",
    "percent": "%",
    "num_windows": "windows",
    "num_episodes": "episodes",
    "num_seen": "true steps seen",
    "horizon": "open-loop step",
    "num_dims": "principal components",
    "num_vectors": "vectors in the smaller half",
    "num_samples": "actions ranked",
    "frechet": "Fréchet distance",
    "floor": "floor (true against true)",
    "kept_variance": "variance kept",
    "share": "as a share",
    "token": "single tokens",
    "pooled": "mean token of a step",
    "mean_rank": "mean rank of the true action (0: best, 0.5: chance)",
    "top10_rate": "true action in the best tenth (chance: 0.1)",
    "true_l1": "energy of the true action (L1)",
    "others_l1": "mean energy of the others (L1)",
    "margin_l1": "energy of the others less that of the true action (L1)",
    "tokens_percent": "L1 of all tokens, % above",
    "readout_percent": "through the readout, % above",
    "tokens_episodes_above": "episodes (tokens)",
    "readout_episodes_above": "episodes (readout)",
    "gap_shuffled": "L1 of shuffled actions less the predictor's",
    "action_size": "size of actions",
    "gui": "open screen",
    "token_motion": "motion of tokens",
    "first_step": "first step",
    "start_s": "start, s",
    "step_bytes": "bytes of a step",
    "adjacent": "neighbouring steps",
    "quietest": "neighbouring steps, quietest tenth",
    "one_step": "one step ahead",
    "own_change": "change, with targets of that dtype",
    "change": "change",
    "rollout": "open loop",
    "stored": "what storing changed",
}
"""What names of figures, or parts of them, mean; the longest that fits is taken."""
KNOWN = re.compile(rf"(?:(?<=_)|^)({'|'.join(sorted(WORDS, key=len, reverse=True))})(?=[_,]|$)")


class Table(NamedTuple):
    """The first rows of a CSV file as they are shown, and how many there are."""

    name: str
    head: list[str]
    rows: list[list[str]]
    num_rows: int


def write_page(out: Path, measurements: Iterable[Measurement], typed: str = "") -> None:
    """Write report.html from what lies in an evaluation's folder; measurements that do not are named with their command.

    `typed` are the settings that were typed behind the stage, with a space before each.
    """
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    filters = {
        "number": shorten,
        "spell": spell,
        "read_table": lambda name: read_table(out / name),
        "url": lambda name: read_picture(out / "pictures" / name),
    }
    films, script = out / MEASUREMENTS_FOLDER / "films.json", (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = render(
        TEMPLATES / "report.html.j2",
        filters,
        reel=json.loads(films.read_text(encoding="utf-8")),
        script=script,
        # The one script that a browser runs in this page: names in the data cannot add another.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        metrics=json.loads((out / "metrics.json").read_text(encoding="utf-8")),
        settings=flatten(settings),
        command=f"python stages/evaluate.py{typed}",
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


def spell(name: str) -> str:
    """The name of a figure or a column in words; parts that `WORDS` does not have stay as they are."""
    name = re.sub(r"_step(\d+)$", r", open-loop step \1", name)
    parts = KNOWN.sub(lambda found: f", {WORDS[found[1]]}, ", name).split(", ")
    return ", ".join(part.strip("_").replace("_", " ") for part in parts if part.strip("_"))


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
    return Table(path.name, [spell(name) for name in kept], shown, len(rows))


def read_picture(path: Path) -> str | None:
    """A picture as an address that holds it; None where it is absent."""
    if not path.is_file():
        return None
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"
