"""report.html: the whole evaluation as one file that opens from disk, made from nothing but what lies in the folder."""

from __future__ import annotations

import csv
import fnmatch
import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jepa_cache.evaluation.context import Measurement, Picture
from jepa_cache.evaluation.figures import gain_name, gap_name
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, unguard_cell
from jepa_cache.evaluation.windows import PREDICTIONS
from jepa_cache.files import atomic_file
from jepa_cache.webpage import build_document, build_figure, build_markup_table, build_table, picture_url

MAX_ROWS = 40  # of a table; a data set may have thousands of episodes
MAX_PICTURE_BYTES = 3_600_000  # of all pictures together: as text a third more, which keeps the page below 5 MB
KINDS = {".png": "png", ".gif": "gif", ".jpg": "jpeg"}
WORDS_FROM = 32  # characters; longer cells may wrap


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


CURVES = Picture(
    "horizon.png",
    "Curves of error against open-loop step, with bands, for the predictor, baselines and action ablations",
    "The predictor's curve (thick, blue) should lie below every other one, with bands that do not touch. Where it meets "
    '"copy the last step", it sees no further ahead; where it meets "shuffled actions", it does not use its actions. '
    "Numbers: horizon.csv.",
)
ROLLOUT = Picture(
    "rollout1.gif",
    "Animation of one held-out window: recorded frame, true tokens, predicted tokens and error at each step",
    "The window of strip1.png, step by step. Predicted tokens should change as the true ones do; a picture that stands still while the "
    "recording moves is a copy. It stops after ten rounds; reload to see it again.",
)
STRIPS = "strip*.png"
FIRST_STRIP = (
    "Strip of one held-out window: rows of recorded frames, true tokens, predicted tokens and error",
    "Colours are the first three principal components of true tokens, one basis for all strips and the animation, so equal colours "
    "are alike everywhere. Look for errors where things move, and for predictions that blur or stand still.",
)
OTHER_STRIP = (
    "Strip of another held-out window: rows of recorded frames, true tokens, predicted tokens and error",
    "Another held-out window, in the same colours.",
)
ACTIONS = Picture(
    "actions.png",
    "Histograms of the recorded actions of held-out and training episodes",
    "Held-out actions (blue) should be spread as those of training (grey). A column that never moves cannot be learned, and none can be "
    "used that the training episodes lack. Heights are on a logarithmic scale; values beyond the range count at its ends.",
)
SLICES = "Where it is better and worse: each row is a part of the held-out windows. Gaps above 0 say that actions are used there."
WORST = "The windows with the largest error, by name, so that one can look at the recording."
PAGE = "report.html"
METRICS = "metrics.json"
SETTINGS = "settings.json"
QUESTIONS = {
    "actions": "Does it use its actions?",
    "actions_rollout": "Does it still use them at the last open-loop step?",
    "timing": "Does it use the right step's action?",
    "copying": "Is it better than copying the last step?",
    "baselines": "Is it better than every baseline?",
    "horizon": "How far ahead can it see?",
    "limits": "Is there anything that these figures cannot say?",
}
GOOD, BAD = "yes", "no"
MAIN_FIGURES = {
    "teacher_forcing_l1": "L1, one step ahead from true steps",
    "rollout_l1": "L1, open loop, mean of all steps",
    "teacher_forcing_cosine": "cosine, one step ahead",
    "rollout_cosine": "cosine, open loop, mean of all steps",
}
STEP_TABLES = {
    "horizon.csv": "L1 per open-loop step",
    "horizon_l2.csv": "L2 per open-loop step",
    "horizon_cosine.csv": "Cosine per open-loop step",
    "positions.csv": "L1 one step ahead, by the number of true steps seen",
}
STYLE = """
.warning { border-left: 4px solid var(--open); background: var(--box); padding: .5em .8em; }
.verdict { list-style: none; padding: 0; } .verdict li { margin: 0 0 .9em; } .verdict b { display: block; }
.answer { display: inline-block; border: 1px solid currentColor; border-radius: 4px; padding: 0 .5em; margin-right: .3em; font-weight: 600; }
.answer.good { color: var(--good); } .answer.bad { color: var(--bad); } .answer.open { color: var(--open); }
"""


def write_page(out: Path, measurements: Iterable[Measurement]) -> None:
    """Write report.html from the metrics, tables and pictures in a folder; what is not there is said to be left out.

    Args:
        out: An evaluation's folder.
        measurements: All that there are; those that were not made are named with the command that makes them.

    Raises:
        ValueError: metrics.json is missing, or a file of the evaluation cannot be read.
    """
    page = build_page(out, measurements)
    with atomic_file(out / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def build_page(out: Path, measurements: Iterable[Measurement]) -> str:
    """The page as text, see `write_page`."""
    if not (out / METRICS).is_file():
        raise ValueError(
            f"{out / METRICS} is missing, without which there is no report; run `python stages/evaluate.py`"
        )
    metrics = read_json(out / METRICS)
    settings = read_json(out / SETTINGS) if (out / SETTINGS).is_file() else None
    remaining, measurements = Remaining(out / "pictures"), list(measurements)
    return build_document(
        f"Evaluation of {_subject(metrics)}",
        [
            *_heading(metrics),
            *_verdict(metrics),
            "<h2>Figures</h2>",
            *_figures(metrics),
            *_horizon(out),
            "<h2>Pictures</h2>",
            *_pictures(remaining),
            "<h2>Slices</h2>",
            _table_or_line(out, "slices.csv", SLICES),
            "<h2>Worst windows</h2>",
            _table_or_line(out, "worst.csv", WORST),
            *(part for known in measurements for part in _measurement(known, out, metrics, remaining)),
            *_others(remaining),
            "<h2>Every figure</h2>",
            *build_section_tables(metrics, skip={"verdict", "settings", *(known.section for known in measurements)}),
            "<h2>Settings</h2>",
            *build_settings(metrics, settings),
            "<h2>Command</h2>",
            f"<p><code>{escape(format_command(settings))}</code></p>",
        ],
        style=STYLE,
    )


def _subject(metrics: Mapping[str, Any]) -> str:
    settings = metrics.get("settings")
    if not settings:
        return "a predictor"
    return f"{settings['predictor']} on {settings['dataset']} ({settings['encoder']} features)"


def _heading(metrics: Mapping[str, Any]) -> list[str]:
    warnings = []
    if not metrics["encoder_trained"]:
        warnings.append(
            "The encoder has random weights. Every figure and picture here is relative: it shows that the path works and how the "
            "predictor compares with its baselines on these features, and nothing about the world."
        )
    if not metrics["comparable"]:
        warnings.append(
            "Clip mode: early steps have seen later frames, so these figures are not comparable with frame or tubelet mode."
        )
    return [
        f"<h1>Evaluation of {escape(_subject(metrics))}</h1>",
        f'<p class="soft">{metrics["num_windows"]} windows of {metrics["num_episodes"]} held-out episodes; encode mode '
        f"{escape(str(metrics['mode']))}. Intervals are 95 %, over episodes. Mean and regression are fitted on all "
        f"{metrics['num_fitted_steps']} steps of the training episodes.</p>",
        *(f'<p class="warning" role="note">{escape(text)}</p>' for text in warnings),
    ]


def _verdict(metrics: Mapping[str, Any]) -> list[str]:
    verdict = metrics.get("verdict")
    if not verdict:
        return ["<h2>Verdict</h2>", '<p class="soft">This evaluation gave none; evaluate again to get one.</p>']
    items = []
    known = [
        name for name in QUESTIONS if name in verdict
    ]  # in the order of the questions; the file sorts them by name
    for name in [*known, *(name for name in verdict if name not in known)]:
        entry = verdict[name]
        answer = str(entry["answer"])
        kind = {GOOD: "good", BAD: "bad"}.get(answer, "open")
        question = QUESTIONS.get(name, name.replace("_", " ").capitalize())
        items.append(
            f'<li><b>{escape(question)}</b> <span class="answer {kind}">{escape(answer)}</span> {escape(str(entry["words"]))}</li>'
        )
    return ["<h2>Verdict</h2>", f'<ul class="verdict">{"".join(items)}</ul>']


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    """The few that matter most; the page ends with all."""
    values, intervals = metrics["val"], metrics["val_ci"]

    def cells(name: str) -> list[str]:
        low, high = intervals[name]
        return [format_number(values[name]), f"{format_number(low)} to {format_number(high)}"]

    main = [[words, *cells(name)] for name, words in MAIN_FIGURES.items() if name in values]
    gaps = []
    for prediction in sorted(PREDICTIONS[1:]):
        for step in range(len(values)):  # no evaluation has more steps than figures
            name, gain = gap_name(prediction, step), gain_name(prediction, step)
            if name not in values:
                continue
            against = prediction.replace("_", " ") + (f", open-loop step {step}" if step else "")
            percent = cells(gain) if gain in values else ["-", "-"]
            gaps.append([against, *percent, *cells(name), format_number(metrics.get("p_value", {}).get(name))])
    return [
        build_markup_table(("figure", "value", "95 % interval"), main, label="Main figures"),
        "<h3>How much better than baselines and action ablations</h3>",
        '<p class="soft">Gap: their L1 less the predictor\'s, per episode; above 0 the predictor is better. Gain: the same in percent of '
        "theirs. An interval that holds 0 tells nothing apart.</p>",
        build_markup_table(
            ("against", "gain, %", "95 % interval", "gap", "95 % interval", "p"),
            gaps,
            label="Gaps to baselines and action ablations",
        ),
    ]


def _horizon(out: Path) -> list[str]:
    """Tables of errors by step; those that are there."""
    parts = []
    for name, heading in STEP_TABLES.items():
        if table := build_file_table(out / name, label=heading):
            parts += [f"<h3>{heading}</h3>", table]
    return parts


def _pictures(remaining: Remaining) -> list[str]:
    strips = [
        Picture(name, *(OTHER_STRIP if position else FIRST_STRIP), wide=True)
        for position, name in enumerate(remaining.matching(STRIPS))
    ]
    parts = [remaining.show(picture) for picture in (CURVES, ROLLOUT, *strips, ACTIONS)]
    return parts if any(parts) else ['<p class="soft">There are none in pictures/; evaluate again to draw them.</p>']


def _others(remaining: Remaining) -> list[str]:
    """Pictures that no section has shown, so that none is lost."""
    names = remaining.matching("*")
    if not names:
        return []
    return [
        "<h2>Other pictures</h2>",
        *(remaining.show(Picture(name, f"Picture {name}", name, wide=True)) for name in names),
    ]


def _table_or_line(out: Path, name: str, explanation: str) -> str:
    table = build_file_table(out / name, label=explanation)
    if table:
        return f'<p class="soft">{escape(explanation)}</p>{table}'
    return f'<p class="soft">Left out: this evaluation wrote no {escape(name)}. <code>python stages/evaluate.py</code> writes it.</p>'


def _measurement(known: Measurement, out: Path, metrics: Mapping[str, Any], remaining: Remaining) -> list[str]:
    heading = f"<h2>{known.heading}</h2>"
    if known.section not in metrics:
        command = f"python stages/evaluate.py 'evaluate.measure=[{known.name}]'"
        return [heading, f'<p class="soft">Not measured. <code>{escape(command)}</code> measures it.</p>']
    return [
        heading,
        f'<p class="soft">{escape(known.explanation)}</p>',
        *build_section_tables(metrics, only={known.section, f"{known.section}_notes"}),
        *(remaining.show(picture) for picture in known.pictures),
        *(
            build_file_table(out / MEASUREMENTS_FOLDER / name, label=f"{known.heading}: {name}")
            for name in known.tables
        ),
    ]
