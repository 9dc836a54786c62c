"""`jepa-cache compare`: evaluated runs in one table, with intervals, the settings that differ, and what chance does not explain."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jepa_cache.cli.outcome import AsJson, Outcome, align, report, shorten
from jepa_cache.config.loading import find_repository, load_config, outputs_folder
from jepa_cache.config.parsing import flatten
from jepa_cache.config.paths import require
from jepa_cache.evaluation.context import OF_THE_MACHINE
from jepa_cache.evaluation.metrics import bootstrap_mean, unguard_cell
from jepa_cache.predictor.checkpoints import read_card

METRICS_FILE, EPISODES_FILE, SETTINGS_FILE = "metrics.json", "episodes.csv", "settings.json"
EVALUATE = "outputs/evaluate"  # as dvc.yaml has it
RESULTS = f"evaluate/{METRICS_FILE}"
WEIGHTS = "predictor.safetensors"

COMPARED = {"teacher_forcing_l1": "teacher forcing", "rollout_l1": "open loop"}
"""Columns of episodes.csv that are paired, lower is better."""

GAPS = {"gap_copy_last": "copying", "gap_shuffled_actions": "shuffled", "gap_zero_actions": "zero actions"}
PREDICTOR = "predictor.name"
READ_OUT = {f"readout_{name}_actions_percent": f"readout, {name}" for name in ("shuffled", "zero")}
"""Per cent above the error of the true actions; of evaluations that read positions out."""
NUM_RESAMPLES = 10_000
NUM_DIGITS = 4  # of a difference in words; one below the last digit is none: another batch size moves the eighth

# Errors are of one kind only where all of these are equal: other tokens, windows or episodes give other numbers for the same predictor.
STEP_LENGTH = "measured.evaluate.step_length"
KIND = (
    STEP_LENGTH,
    *("dataset", "encoder", "tokens_fingerprint", "mode"),
    *(f"measured.split.{name}" for name in ("val_share", "seed", "held_out", "exact_below")),
    *("measured.evaluate.horizon", "measured.evaluate.num_context_steps", "measured.evaluate.windows_per_episode"),
    *("measured.window_steps", "measured.normalize_reps"),
)
FILTERS = "measured.filter."
# A column of episodes.csv, and by which share it may differ on the same steps.
COPIED, SAME_STEPS = "copy_last_l1", 0.01
NO_SETTINGS = (
    "run",
    "encoder_trained",
    "encoder_origin",
    "tokens_fingerprint",
)  # names of other things, or follow from them


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, as it was read from files."""

    name: str  # as the user typed it
    metrics: Mapping[str, Any]  # metrics.json
    settings: Mapping[str, Any] | None  # settings.json, flat names; None where the evaluation is older than the file
    episodes: Mapping[str, Mapping[str, float]]  # episodes.csv: episode to column to value


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="metrics.json, a folder with one, a training run that was evaluated, a DVC experiment, a git revision; "
            "the others are compared with the first one"
        ),
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="list every run of the project, the best first")] = False,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare evaluated runs: errors, gaps to baselines and ablations, settings that differ, and paired differences to the first run.

    A run is called better or worse than the first one only when the 95 % interval of the paired difference over the episodes
    that both have excludes 0. Runs whose errors are not of one kind (other tokens, mode, split, filter or windows) are shown
    in groups of their own.

    --all takes the runs named and those found in the project: in outputs and folders beside them, of the last commit and of
    DVC's experiments. It is a table by the held-out open-loop error; what cannot be read is named under it.

    Exit code 0: all runs can be compared, or --all; 1: some cannot, and are shown apart; 2: wrong usage, or a run cannot be read.
    """
    if not runs and not everything:
        raise typer.BadParameter("name runs, or --all for every run of the project")
    report(lambda: (list_all if everything else compare_runs)(runs or [], seed=seed), as_json=as_json)


def compare_runs(names: Sequence[str], *, seed: int = 0) -> Outcome:
    """Read the runs and say how they differ."""
    if len(set(names)) < len(names):
        raise ValueError(f"each run is compared once; {next(n for n in names if names.count(n) > 1)!r} was named twice")
    groups = group_runs(map(read_run, names))
    documents, lines = [], []
    for group in groups:
        document, first = describe_group(group, seed=seed), groups[0][0]
        if documents:
            document["apart"] = why_apart(first, group[0])
            lines += ["", document["apart"]]
        documents.append(document)
        lines += list_group(document)
    return Outcome({"groups": documents}, lines, len(groups) == 1)


def group_runs(runs: Iterable[Evaluated]) -> list[list[Evaluated]]:
    """Runs whose errors are of one kind, together; one of which it is not known what was measured stands alone."""
    groups: dict[Any, list[Evaluated]] = {}
    for position, run in enumerate(runs):
        groups.setdefault(position if run.settings is None else repr(kind_of(run)), []).append(run)
    return list(groups.values())


def list_all(names: Sequence[str], *, seed: int = 0) -> Outcome:
    """Every run of the project, and those named, in a table for each kind of error, the best run first."""
    repository, runs, unread = find_repository(Path.cwd()), list[Evaluated](), list[str]()
    for name in dict.fromkeys([*names, *find_runs(repository)]):
        try:
            run = read_run(name)
            runs.append(replace(run, name=name.removesuffix("/evaluate")))
        except ValueError as error:
            unread.append(str(error))
    if not runs:
        raise ValueError(
            "\n  ".join([f"no evaluation was found in {repository}; `python stages/evaluate.py` makes one", *unread])
        )
    documents, lines, groups = list[dict[str, Any]](), list[str](), group_runs(runs)
    for group in groups:
        ranked: dict[str, Evaluated] = {}  # an experiment that still lies in the workspace is one run under two names
        for run in sorted(group, key=lambda run: run.metrics["val"]["rollout_l1"]):
            same = ranked.get(content := repr((run.metrics, run.settings, run.episodes)))
            ranked[content] = run if same is None else replace(same, name=f"{same.name}, {run.name}")
        document, table = rank_group(list(ranked.values()), seed=seed)
        if documents:
            document["apart"] = why_apart(groups[0][0], group[0])
            table = ["", *table, document["apart"]]
        documents.append(document)
        lines += table
    return Outcome({"groups": documents, "unread": unread}, lines + [f"not shown: {reason}" for reason in unread])


def find_runs(repository: Path) -> list[str]:
    """Names of a project's runs: of folders with an evaluation, of the last commit and of the experiments that DVC knows."""
    folders = {path.parents[1] for depth in ("*", "*/*") for path in repository.glob(f"{depth}/{RESULTS}")}
    if ((outputs := outputs_folder(load_config(repository), repository)) / RESULTS).is_file():
        folders.add(outputs)
    names = [os.path.relpath(folder / "evaluate") for folder in sorted(folders)]
    if find_spec("dvc") is not None and (repository / ".dvc").is_dir():
        # Not asked of DVC, which would wait for a pipeline that runs.
        refs, lock = (
            subprocess.run(["git", *command.split()], cwd=repository, capture_output=True, text=True).stdout
            for command in ("for-each-ref --format=%(refname) refs/exps", "ls-tree --name-only HEAD dvc.lock")
        )
        names += ["HEAD"] * bool(lock)  # of a commit before the first `dvc repro` there is no run
        names += re.findall(r"^refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/(.+)$", refs, re.MULTILINE)
    return names


def rank_group(group: Sequence[Evaluated], *, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Runs of one kind, the best first, as JSON and as a table."""
    best, differing = group[0], list_differing(group)
    document = {**describe_group(group[:1], seed=seed), "runs": []}
    rows = [["run", "open loop", "uses actions", "than the first", "other settings"]]
    for position, run in enumerate(group):
        metrics = run.metrics
        try:
            words = pair_runs(run, best, "rollout_l1", seed=seed)["words"] if position else "-"
        except ValueError as error:  # of other windows, say; the others can be told
            words, document["notes"] = "cannot be told", [*document["notes"], str(error)]
        of_run: dict[str, Any] = {
            "run": run.name,
            "rollout_l1": metrics["val"]["rollout_l1"],
            "interval": metrics["val_ci"]["rollout_l1"],
            "uses_its_actions": metrics.get("verdict", {}).get("actions", {}).get("answer"),
            "than_the_first": words,
            "settings": {name: of[position] for name, of in differing.items() if of[position] != of[0]},
        }
        document["runs"].append(of_run)
        interval = _with_interval(of_run["rollout_l1"], *of_run["interval"])
        rows.append([run.name, interval, of_run["uses_its_actions"] or "-", words, _in_short(of_run["settings"])])
    told = best.settings or {"dataset": "data set not known", "encoder": "-"}
    head = f"{told['dataset']}, encoder {told['encoder']}, {best.metrics['mode']} mode: {best.metrics['num_episodes']} held-out episodes"
    table = align(rows)
    return document, [head, table[0], *shorten(table[1:]), *document["notes"]]


def _in_short(settings: Mapping[str, Any]) -> str:
    """Three settings on a line; of another predictor its name stands for all."""
    names = [it for it in settings if it == PREDICTOR or PREDICTOR not in settings or not it.startswith("predictor.")]
    shown = [
        f"{name.removeprefix('train.').removesuffix('.name')}={show_setting(settings[name])}" for name in names[:3]
    ]
    return " ".join([*shown, *[f"and {len(names) - 3} more"] * (len(names) > 3)]) or "-"


def kind_of(run: Evaluated) -> dict[str, Any]:
    """What decides whether a run's errors may be compared with another's."""
    settings = {STEP_LENGTH: 1, **(run.settings or {})}  # older ones know no other
    return {name: value for name, value in settings.items() if name in KIND or name.startswith(FILTERS)}


def why_apart(one: Evaluated, other: Evaluated) -> str:
    """Why the errors of two runs are no comparison."""
    told, unknown = f"not comparable with {one.name}: ", [run.name for run in (one, other) if run.settings is None]
    if unknown:
        return f"{told}of {', '.join(unknown)} it is not known what was measured (no settings.json); run its evaluation again"
    mine, its = kind_of(one), kind_of(other)
    return told + "; ".join(
        f"{name}: {show_setting(mine.get(name))} in {one.name}, {show_setting(its.get(name))} in {other.name}"
        for name in sorted(mine.keys() | its.keys())
        if mine.get(name) != its.get(name)
    )


def show_setting(value: Any) -> str:
    """A setting on one line as YAML takes it: null, true, [energy, distances], and words without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(show_setting(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def describe_group(group: Sequence[Evaluated], *, seed: int) -> dict[str, Any]:
    """Runs of one kind as JSON."""
    differing = list_differing(group)
    runs = [
        {
            "run": run.name,
            "num_episodes": run.metrics["num_episodes"],
            "num_windows": run.metrics["num_windows"],
            "figures": {
                name: {"mean": run.metrics["val"][name], "interval": run.metrics["val_ci"][name]}
                for name in (*COMPARED, *GAPS)
                if name in run.metrics["val"]
            }
            | {
                name: {"mean": run.metrics["above"][name], "interval": run.metrics["above_ci"][name]}
                for name in READ_OUT
                if name in run.metrics.get("above", ())
            },
            "uses_its_actions": run.metrics.get("verdict", {}).get("actions", {}).get("answer"),
            "settings": {name: values[position] for name, values in differing.items()},
        }
        for position, run in enumerate(group)
    ]
    paired = [
        {"run": run.name, "reference": group[0].name}
        | {column: pair_runs(run, group[0], column, seed=seed) for column in COMPARED}
        for run in group[1:]
    ]
    notes, metrics = [], group[0].metrics
    if not metrics["encoder_trained"]:
        notes.append("the encoder has random weights, or is plain pixels: figures are relative")
    if not metrics["comparable"]:
        notes.append("clip mode: early steps have seen later frames")
    return {"runs": runs, "paired": paired, "notes": notes}


def list_differing(runs: Sequence[Evaluated]) -> dict[str, list[Any]]:
    """Settings that are not the same in all of some runs, with the value of each; what moves no number is skipped."""
    known = [run.settings or {} for run in runs]
    values = {name: [settings.get(name) for settings in known] for name in sorted(set().union(*known))}
    return {
        name: of_runs
        for name, of_runs in values.items()
        if name not in NO_SETTINGS
        # The first is equal where it decides these numbers, the second is what joints are called.
        and not name.startswith(("measured.", "columns."))
        and name.rpartition(".")[2] not in OF_THE_MACHINE
        and any(value != of_runs[0] for value in of_runs)
    }


def pair_runs(run: Evaluated, reference: Evaluated, column: str, *, seed: int) -> dict[str, Any]:
    """Mean over shared episodes of the run's error less the reference's, with its 95 % interval, and what may be said.

    Raises:
        ValueError: An episode has other numbers of windows in the two, or is of other recordings, so the pairs would not be pairs.
    """
    for evaluated in (run, reference):
        if not evaluated.episodes:
            raise ValueError(
                f"{evaluated.name} has no episodes.csv, without which runs cannot be paired; run its evaluation again"
            )
    differences = []
    for name in sorted(run.episodes.keys() & reference.episodes.keys()):
        own, other = run.episodes[name], reference.episodes[name]
        if own["num_windows"] != other["num_windows"]:
            raise ValueError(
                f"episode {name} has {own['num_windows']:.0f} windows in {run.name} and {other['num_windows']:.0f} in {reference.name}; "
                "evaluate both with the same data and settings"
            )
        # Whatever the predictor, it is the same on the same steps, but for the last bits of another machine's encoder.
        copied = own.get(COPIED, math.nan), other.get(COPIED, math.nan)
        if abs(copied[0] - copied[1]) > SAME_STEPS * max(copied):
            raise ValueError(
                f"episode {name} is another recording in {run.name} than in {reference.name}: copying its last step errs by {copied[0]:.4f} and "
                f"{copied[1]:.4f}; recordings that lie under one name in two folders are no pair"
            )
        differences.append(own[column] - other[column])
    values = np.array(differences)
    values = values[np.isfinite(values)]  # an empty cell: that episode has no such figure
    if len(values) < 2:
        return {"words": "cannot be told: fewer than two shared episodes", "num_episodes": len(values)}
    estimate = bootstrap_mean(values, num_resamples=NUM_RESAMPLES, seed=seed)
    low, high = round(estimate.low, NUM_DIGITS), round(estimate.high, NUM_DIGITS)
    words = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return {"words": words, "num_episodes": len(values), **estimate._asdict()}


def list_group(document: dict[str, Any]) -> list[str]:
    """A group in words: a table, the settings that differ, and the paired differences."""
    read_out = {
        name: words for name, words in READ_OUT.items() if any(name in run["figures"] for run in document["runs"])
    }
    gaps = [f"gap to {name}" for name in GAPS.values()] + [f"{words}, % above" for words in read_out.values()]
    rows = [["run", *COMPARED.values(), *gaps, "uses its actions", "episodes"]]
    for run in document["runs"]:
        figures = [run["figures"].get(name) for name in (*COMPARED, *GAPS, *read_out)]
        cells = ["-" if figure is None else _with_interval(figure["mean"], *figure["interval"]) for figure in figures]
        rows.append([run["run"], *cells, run["uses_its_actions"] or "-", str(run["num_episodes"])])
    lines = align(rows)
    for name in document["runs"][0]["settings"]:
        values = (f"{show_setting(run['settings'][name])} in {run['run']}" for run in document["runs"])
        lines.append(f"{name}: {', '.join(values)}")
    for pair in document["paired"]:
        for column, words in COMPARED.items():
            found, shown = pair[column], ""
            if "mean" in found:
                shown = f", difference {_with_interval(found['mean'], found['low'], found['high'], NUM_DIGITS)}"
            lines.append(
                f"{pair['run']} against {pair['reference']}, {words}: {found['words']}{shown}, "
                f"paired over {found['num_episodes']} episodes"
            )
    return lines + document["notes"]


def _with_interval(mean: float, low: float, high: float, num_digits: int = 3) -> str:
    return f"{mean:.{num_digits}f} [{low:.{num_digits}f}, {high:.{num_digits}f}]"


def read_run(name: str) -> Evaluated:
    """Read one evaluation.

    `name` is metrics.json, a folder that holds it, the outputs of a project, a project, the folder of a training run that was
    evaluated, or else the name of a DVC experiment, or a git branch, tag or commit.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    path = Path(name)
    if not path.exists():
        return _read(name, _revision_reader(name))
    runs = (path, path / "train/run", path / "outputs/train/run")
    weights = next((run / WEIGHTS for run in runs if (run / WEIGHTS).is_file()), None)
    candidates = [path.parent] if path.name == METRICS_FILE else [path, path / "evaluate", path / EVALUATE]
    if weights == path / WEIGHTS:
        candidates.append(path.absolute().parent.parent / "evaluate")
    folder = next((folder for folder in candidates if (folder / METRICS_FILE).is_file()), None)
    if folder is None:
        looked = ", ".join(str(folder / METRICS_FILE) for folder in candidates)
        raise ValueError(
            f"{path} holds no evaluation (looked for {looked}); run `python stages/evaluate.py` there first"
        )
    run = _read(name, lambda file: (folder / file).read_text() if (folder / file).exists() else None)
    if weights is not None:
        card = read_card(weights)
        if run.settings is None or (run.settings["run"], run.settings["step"]) != (card["run"], card["step"]):
            raise ValueError(
                f"the evaluation beside {weights} is of another training run than these weights; run `python stages/evaluate.py`"
            )
    return run


def _revision_reader(revision: str) -> Callable[[str], str | None]:
    """Reads files of outputs/evaluate as DVC has them under a revision; None for one that the evaluation did not write."""
    require("dvc", "dvc", f"a revision such as {revision}")
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    repository = find_repository(Path.cwd())
    try:
        files = DVCFileSystem(str(repository), rev=revision)
        there = {Path(path).name for path in files.glob(f"{EVALUATE}/*")}
    except DvcException as error:
        raise ValueError(
            f"{revision} is no file or folder, and DVC knows no experiment or revision of that name in {repository} ({error}); "
            "`dvc exp list` and `git branch` name those that there are"
        ) from error

    def read(file: str) -> str | None:
        if file not in there:
            if file != METRICS_FILE:
                return None  # older than the file
            raise ValueError(
                f"revision {revision} has no {EVALUATE}/{file}: it was not evaluated, or its dvc.lock was not committed"
            )
        try:
            return files.read_text(f"{EVALUATE}/{file}", encoding="utf-8")
        except (DvcException, OSError) as error:
            raise ValueError(
                f"{EVALUATE}/{file} of revision {revision} is not in the DVC cache ({error}); `dvc pull`, or run it again"
            ) from error

    return read


def _read(name: str, read: Callable[[str], str | None]) -> Evaluated:
    try:
        metrics: dict[str, Any] = json.loads(read(METRICS_FILE) or "")
        settings, episodes = read(SETTINGS_FILE), read(EPISODES_FILE)
        for section in ("val", "val_ci"):
            for column in ("teacher_forcing_l1", "rollout_l1"):
                # KeyError or TypeError where this is something else.
                if not np.isfinite(metrics[section][column]).all():
                    raise TypeError(f"{section}.{column} is {metrics[section][column]}")
        return Evaluated(
            name=name,
            metrics=metrics,
            settings=None if settings is None else flatten(json.loads(settings)),
            episodes=_parse_episodes(episodes or ""),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{name} is no evaluation of this program ({reason}); run `python stages/evaluate.py` again"
        ) from error


def _parse_episodes(text: str) -> dict[str, dict[str, float]]:
    rows = csv.DictReader(io.StringIO(text))
    try:
        return {
            unguard_cell(row.pop("episode")): {name: float(value or "nan") for name, value in row.items()}
            for row in rows
        }
    except ValueError as error:
        raise TypeError(f"{EPISODES_FILE}: {error}") from error
