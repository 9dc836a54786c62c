"""`jepa-cache compare`: evaluated runs in one table, with intervals, the settings that differ, and what chance does not explain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jepa_cache.cli.outcome import FINE, PROBLEM, Outcome, report

if TYPE_CHECKING:
    from jepa_cache.evaluation.comparison import Evaluated

GAPS = {"gap_copy_last": "copying", "gap_shuffled_actions": "shuffled", "gap_zero_actions": "zero actions"}
NUM_RESAMPLES = 10_000


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="metrics.json, a folder with one, a training run that was evaluated, a DVC experiment, a git revision"
        ),
    ],
    *,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Compare evaluated runs: errors, gaps to the controls, settings that differ, and paired differences to the first run.

    A run is called better or worse than the first one only when the 95 % interval of the paired difference over the episodes
    that both have leaves 0 out. Runs whose errors are not of one kind (other tokens, mode, split, filter or windows) are shown
    in groups of their own.

    Exit code 0: all runs can be compared; 1: some cannot, and are shown apart; 2: wrong usage, or a run cannot be read.

    Args:
        runs: What to compare; the first one of each group is its reference.
        seed: Of the bootstrap.
        as_json: Print JSON.
    """
    report(lambda: compare_runs(runs, seed=seed), as_json=as_json)


def compare_runs(names: Sequence[str], *, seed: int = 0) -> Outcome:
    """Read the runs and say how they differ."""
    from jepa_cache.cli.compare_sources import read_run
    from jepa_cache.evaluation.comparison import group_runs, why_apart

    if len(set(names)) < len(names):
        raise ValueError(f"each run is compared once; {next(n for n in names if names.count(n) > 1)!r} was named twice")
    groups = group_runs([read_run(name) for name in names])
    documents = [describe_group(group, seed=seed) for group in groups]
    lines: list[str] = []
    for number, (group, document) in enumerate(zip(groups, documents, strict=True)):
        if number:
            apart = f"not comparable with {groups[0][0].name}: {why_apart(groups[0][0], group[0])}"
            document["apart"] = apart
            lines += ["", apart]
        lines += list_group(document)
    return Outcome({"groups": documents}, lines, FINE if len(groups) == 1 else PROBLEM)


def describe_group(group: Sequence[Evaluated], *, seed: int) -> dict[str, Any]:
    """Runs of one kind as JSON."""
    from jepa_cache.evaluation.comparison import CLIP, COMPARED, UNTRAINED, differing_settings, paired_difference

    differing = differing_settings(group)
    runs = [
        {
            "run": run.name,
            "num_episodes": run.metrics["num_episodes"],
            "num_windows": run.metrics["num_windows"],
            "figures": {
                name: {"mean": run.metrics["val"][name], "interval": run.metrics["val_ci"][name]}
                for name in (*COMPARED, *GAPS)
                if name in run.metrics["val"]
            },
            "uses_its_actions": run.metrics.get("verdict", {}).get("actions", {}).get("answer"),
            "settings": {name: values[position] for name, values in differing.items()},
        }
        for position, run in enumerate(group)
    ]
    paired = []
    for run in group[1:]:
        found = {
            column: paired_difference(run, group[0], column, num_resamples=NUM_RESAMPLES, seed=seed)
            for column in COMPARED
        }
        paired.append(
            {"run": run.name, "reference": group[0].name}
            | {
                column: {
                    "words": difference.words,
                    "num_episodes": difference.num_episodes,
                    **({} if difference.estimate is None else difference.estimate._asdict()),
                }
                for column, difference in found.items()
            }
        )
    metrics = group[0].metrics
    notes = [
        text for text, said in ((UNTRAINED, not metrics["encoder_trained"]), (CLIP, not metrics["comparable"])) if said
    ]
    return {"runs": runs, "paired": paired, "notes": notes}


def list_group(document: dict[str, Any]) -> list[str]:
    """A group in words: a table, the settings that differ, and the paired differences."""
    from jepa_cache.evaluation.comparison import COMPARED, NUM_DIGITS, show_setting

    rows = [["run", *COMPARED.values(), *(f"gap to {name}" for name in GAPS.values()), "uses its actions", "episodes"]]
    for run in document["runs"]:
        figures = [run["figures"].get(name) for name in (*COMPARED, *GAPS)]
        cells = ["-" if figure is None else _with_interval(figure["mean"], *figure["interval"]) for figure in figures]
        rows.append([run["run"], *cells, run["uses_its_actions"] or "-", str(run["num_episodes"])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name in document["runs"][0]["settings"]:
        lines.append(
            f"{name}: "
            + ", ".join(f"{show_setting(run['settings'][name])} in {run['run']}" for run in document["runs"])
        )
    for pair in document["paired"]:
        for column, words in COMPARED.items():
            difference = pair[column]
            shown = (
                f", difference {_with_interval(*(difference[key] for key in ('mean', 'low', 'high')), NUM_DIGITS)}"
                if "mean" in difference
                else ""
            )
            lines.append(
                f"{pair['run']} against {pair['reference']}, {words}: {difference['words']}{shown}, "
                f"paired over {difference['num_episodes']} episodes"
            )
    return lines + document["notes"]


def _with_interval(mean: float, low: float, high: float, num_digits: int = 3) -> str:
    return f"{mean:.{num_digits}f} [{low:.{num_digits}f}, {high:.{num_digits}f}]"
