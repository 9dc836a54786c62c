"""report.html: the whole evaluation as one file that opens from disk, made from nothing but what lies in the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from jepa_cache.evaluation.page_parts import (
    Picture,
    Remaining,
    build_file_table,
    build_section_tables,
    build_settings,
    format_command,
    format_number,
    read_json,
)
from jepa_cache.evaluation.page_words import (
    ACTIONS,
    CURVES,
    FIRST_STRIP,
    OPTIONAL,
    OTHER_STRIP,
    ROLLOUT,
    SECTIONS,
    SLICES,
    STRIPS,
    WORST,
)
from jepa_cache.evaluation.tables import MEASUREMENTS_FOLDER
from jepa_cache.files import atomic_file
from jepa_cache.webpage import build_document, build_markup_table

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
GAP = "gap_"
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


def write_page(out: Path) -> None:
    """Write report.html from the metrics, tables and pictures in a folder; what is not there is said to be left out.

    Args:
        out: An evaluation's folder.

    Raises:
        ValueError: metrics.json is missing, or a file of the evaluation cannot be read.
    """
    page = build_page(out)
    with atomic_file(out / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def build_page(out: Path) -> str:
    """The page as text, see `write_page`."""
    if not (out / METRICS).is_file():
        raise ValueError(
            f"{out / METRICS} is missing, without which there is no report; run `python stages/evaluate.py`"
        )
    metrics = read_json(out / METRICS)
    settings = read_json(out / SETTINGS) if (out / SETTINGS).is_file() else None
    remaining = Remaining(out / "pictures")
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
            *(part for name in OPTIONAL for part in _optional(name, out, metrics, remaining)),
            *_others(remaining),
            "<h2>Every figure</h2>",
            *build_section_tables(metrics, skip={"verdict", "settings", *SECTIONS.values()}),
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
    for name in values:
        if name.startswith(GAP):
            against = name.removeprefix(GAP)
            words = re.sub(r" step(\d+)$", r", open-loop step \1", against.replace("_", " "))
            gain, p_value = f"gain_{against}_percent", metrics.get("p_value", {}).get(name)
            percent = cells(gain) if gain in values else ["-", "-"]
            gaps.append([escape(words), *percent, *cells(name), format_number(p_value)])
    return [
        build_markup_table(("figure", "value", "95 % interval"), main, label="Main figures"),
        "<h3>How much better than baselines and controls</h3>",
        '<p class="soft">Gap: their L1 less the predictor\'s, per episode; above 0 the predictor is better. Gain: the same in percent of '
        "theirs. An interval that holds 0 tells nothing apart.</p>",
        build_markup_table(
            ("against", "gain, %", "95 % interval", "gap", "95 % interval", "p"),
            gaps,
            label="Gaps to baselines and controls",
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


def _optional(name: str, out: Path, metrics: Mapping[str, Any], remaining: Remaining) -> list[str]:
    heading, explanation, tables, pictures = OPTIONAL[name]
    section = SECTIONS[name]
    parts = [f"<h2>{heading}</h2>"]
    if section not in metrics:
        command = f"python stages/evaluate.py 'evaluate.measure=[{name}]'"
        return [*parts, f'<p class="soft">Not measured. <code>{escape(command)}</code> measures it.</p>']
    parts.append(f'<p class="soft">{escape(explanation)}</p>')
    parts += build_section_tables(metrics, only={section, f"{section}_notes"})
    parts += [remaining.show(picture) for picture in pictures]
    parts += [build_file_table(out / MEASUREMENTS_FOLDER / table, label=f"{heading}: {table}") for table in tables]
    return parts
