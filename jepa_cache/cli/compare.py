"""`jepa-cache compare`: evaluated runs in one table, with intervals, the settings that differ, and what chance does not explain."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from jepa_cache.cli.outcome import AsJson, Outcome, align, report, shorten
from jepa_cache.config.loading import find_repository, load_config, outputs_folder
from jepa_cache.config.parsing import flatten
from jepa_cache.config.paths import require
from jepa_cache.data.windows import LEAST_FOR_YES
from jepa_cache.evaluation.context import OF_THE_MACHINE
from jepa_cache.evaluation.metrics import bootstrap_mean, unguard_cell
from jepa_cache.predictor.checkpoints import read_card

METRICS_FILE, EPISODES_FILE, SETTINGS_FILE = "metrics.json", "episodes.csv", "settings.json"
EVALUATE = "outputs/evaluate"  # as dvc.yaml has it
RESULTS = f"evaluate/{METRICS_FILE}"
WEIGHTS = "predictor.safetensors"

COMPARED = {"teacher_forcing_l1": "teacher forcing", "rollout_l1": "open loop"}
"""Columns of episodes.csv that are paired, lower is better."""

GAPS = ("gap_copy_last", "gap_shuffled_actions", "gap_zero_actions")  # in the JSON
PREDICTOR = "predictor.name"
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
# What is read below of metrics.json, of settings.json and of each row of episodes.csv.
METRICS = ("num_episodes", "num_windows", "mode", "encoder_trained", "comparable", "verdict")
SETTINGS, COLUMNS = ("dataset", "encoder", "run", "step"), ("num_windows", COPIED, *COMPARED)
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
    settings: Mapping[str, Any]  # settings.json, flat names
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
    as_json: AsJson = False,
) -> None:
    """Compare evaluated runs: errors, gaps to baselines and ablations, settings that differ, and paired differences to the first run.

    A run is called better or worse than the first one only when the 95 % interval of the paired difference over the episodes
    that both have excludes 0. Runs whose errors are not of one kind (other tokens, mode, split, filter or windows) are shown
    in groups of their own.

    --all takes the runs named and those found in the project: in outputs and folders beside them, of the last commit and of
    DVC's experiments. It is a table by the held-out open-loop error; what cannot be read is named under it.

    Exit code 0: all runs can be compared, or --all; 1: some cannot, and it is said why; 2: wrong usage, or a run cannot be read.
    """
    if not runs and not everything:
        raise typer.BadParameter("name runs, or --all for every run of the project")
    report(lambda: compare_runs(runs or [], everything=everything), as_json=as_json)


def compare_runs(names: Sequence[str], *, everything: bool = False) -> Outcome:
    """Read the runs, or all of the project with those named, and say how they differ."""
    unread = list[str]()
    if everything:
        runs, unread = read_all(names)
    elif len(set(names)) < len(names):
        raise ValueError(f"each run is compared once; {next(n for n in names if names.count(n) > 1)!r} was named twice")
    else:
        runs = [read_run(name) for name in names]
    groups, documents, lines, fine = group_runs(runs), list[dict[str, Any]](), list[str](), True
    for group in groups:
        document = describe_group(_rank(group) if everything else group)
        if documents:
            document["apart"] = why_apart(groups[0][0], group[0])
            lines += ["", document["apart"]]
            fine = False
        fine &= all("mean" in pair[column] for pair in document["paired"] for column in COMPARED)
        documents.append(document)
        lines += list_group(document) + ([] if everything else list_differences(document))
    lines += [f"not shown: {reason}" for reason in unread]
    return Outcome({"groups": documents, "unread": unread}, lines, everything or fine)


def group_runs(runs: Iterable[Evaluated]) -> list[list[Evaluated]]:
    """Runs whose errors are of one kind, together."""
    groups: dict[str, list[Evaluated]] = {}
    for run in runs:
        groups.setdefault(repr(kind_of(run)), []).append(run)
    return list(groups.values())


def read_all(names: Sequence[str]) -> tuple[list[Evaluated], list[str]]:
    """Every run of the project, and those named; and why some cannot be read."""
    repository, runs, unread = find_repository(Path.cwd()), list[Evaluated](), list[str]()
    for name in dict.fromkeys([*names, *find_runs(repository)]):
        try:
            run = read_run(name)
            runs.append(replace(run, name=name.removesuffix("/evaluate")))
        except (ValueError, OSError) as error:
            unread.append(str(error))
    if not runs:
        raise ValueError(
            "\n  ".join([f"no evaluation was found in {repository}; `python stages/evaluate.py` makes one", *unread])
        )
    return runs, unread


def _rank(group: Sequence[Evaluated]) -> list[Evaluated]:
    """The best run first; an experiment that still lies in the workspace is one run under two names."""
    ranked: dict[str, Evaluated] = {}
    for run in sorted(group, key=lambda run: run.metrics["val"]["rollout_l1"]):
        same = ranked.get(content := repr((run.metrics, run.settings, run.episodes)))
        ranked[content] = run if same is None else replace(same, name=f"{same.name}, {run.name}")
    return list(ranked.values())


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


def kind_of(run: Evaluated) -> dict[str, Any]:
    """What decides whether a run's errors may be compared with another's."""
    settings = {STEP_LENGTH: 1, **run.settings}  # those of the first release know no other
    return {name: value for name, value in settings.items() if name in KIND or name.startswith(FILTERS)}


def why_apart(one: Evaluated, other: Evaluated) -> str:
    """Why the errors of two runs are no comparison."""
    mine, its = kind_of(one), kind_of(other)
    return f"not comparable with {one.name}: " + "; ".join(
        f"{name}: {show_setting(mine.get(name))} in {one.name}, {show_setting(its.get(name))} in {other.name}"
        for name in sorted(mine.keys() | its.keys())
        if mine.get(name) != its.get(name)
    )


def show_setting(value: Any) -> str:
    """A setting on one line as YAML takes it: null, true, [energy, distances], and words without quotes."""
    if isinstance(value, list):
        return f"[{', '.join(show_setting(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def describe_group(group: Sequence[Evaluated]) -> dict[str, Any]:
    """Runs of one kind as JSON; all are paired with the first."""
    differing, metrics = list_differing(group), group[0].metrics
    told = group[0].settings
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
            "uses_its_actions": run.metrics["verdict"]["actions"]["answer"],
            "settings": {name: values[position] for name, values in differing.items()},
        }
        for position, run in enumerate(group)
    ]
    notes = []
    if not metrics["encoder_trained"]:
        notes.append("the encoder has random weights, or is plain pixels: figures are relative")
    if not metrics["comparable"]:
        notes.append("clip mode: early steps have seen later frames")
    return {
        "kind": f"{told['dataset']}, encoder {told['encoder']}, {metrics['mode']} mode",
        "runs": runs,
        "paired": [pair_runs(run, group[0]) for run in group[1:]],
        "notes": notes,
    }


def list_differing(runs: Sequence[Evaluated]) -> dict[str, list[Any]]:
    """Settings that are not the same in all of some runs, with the value of each; what moves no number is skipped."""
    names = sorted(set().union(*(run.settings for run in runs)))
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: of_runs
        for name, of_runs in values.items()
        if name not in NO_SETTINGS
        # The first is equal where it decides these numbers, the second is what joints are called.
        and not name.startswith(("measured.", "columns."))
        and name.rpartition(".")[2] not in OF_THE_MACHINE
        and any(value != of_runs[0] for value in of_runs)
    }


def pair_runs(run: Evaluated, reference: Evaluated) -> dict[str, Any]:
    """Mean over shared episodes of the run's errors less the reference's, with 95 % intervals, and what may be said; or why nothing may be."""
    paired: dict[str, Any] = {"run": run.name, "reference": reference.name}
    try:
        shared = _share_episodes(run, reference)
    except ValueError as error:
        return paired | {column: {"words": "cannot be told", "reason": str(error)} for column in COMPARED}
    for column in COMPARED:
        values = np.array([own[column] - other[column] for own, other in shared])
        values = values[np.isfinite(values)]  # an empty cell: that episode has no such figure
        if len(values) < 2:
            paired[column] = {"words": "cannot be told", "reason": "fewer than two shared episodes"}
            continue
        estimate = bootstrap_mean(values, num_resamples=NUM_RESAMPLES, seed=0)
        low, high = round(estimate.low, NUM_DIGITS), round(estimate.high, NUM_DIGITS)
        words = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
        if len(values) < LEAST_FOR_YES:  # intervals of a few of one sign always exclude 0
            words = "too few episodes"
        paired[column] = {"words": words, "num_episodes": len(values), **estimate._asdict()}
    return paired


def _share_episodes(run: Evaluated, reference: Evaluated) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    """The episodes of both; ValueError where one has other windows in the two, or is of other recordings, so that pairs would be none."""
    shared = []
    for name in sorted(run.episodes.keys() & reference.episodes.keys()):
        own, other = run.episodes[name], reference.episodes[name]
        if own["num_windows"] != other["num_windows"]:
            raise ValueError(
                f"episode {name} has {own['num_windows']:.0f} windows in {run.name} and {other['num_windows']:.0f} in {reference.name}; "
                "evaluate both with the same data and settings"
            )
        # Whatever the predictor, it is the same on the same steps, but for the last bits of another machine's encoder.
        copied = own[COPIED], other[COPIED]
        if abs(copied[0] - copied[1]) > SAME_STEPS * max(copied):
            raise ValueError(
                f"episode {name} is another recording in {run.name} than in {reference.name}: copying its last step errs by {copied[0]:.4f} and "
                f"{copied[1]:.4f}; recordings that lie under one name in two folders are no pair"
            )
        shared.append((own, other))
    return shared


def list_group(document: dict[str, Any]) -> list[str]:
    """A group in words: a table of six columns."""
    runs, paired = document["runs"], document["paired"]
    rows = [["run", *COMPARED.values(), "uses actions", "than the first", "other settings"]]
    for run, pair in zip(runs, [None, *paired], strict=True):
        figures = (run["figures"][name] for name in COMPARED)
        settings = {name: it for name, it in run["settings"].items() if it != runs[0]["settings"][name]}
        words = "-" if pair is None else pair["rollout_l1"]["words"]
        cells = [_with_interval(it["mean"], *it["interval"]) for it in figures]
        rows.append([run["run"], *cells, run["uses_its_actions"] or "-", words, _in_short(settings)])
    table = align(rows)
    reasons = dict.fromkeys(it["reason"] for pair in paired if "reason" in (it := pair["rollout_l1"]))
    head = f"{document['kind']}: {runs[0]['num_episodes']} held-out episodes"
    return [head, table[0], *shorten(table[1:]), *document["notes"], *reasons]


def list_differences(document: dict[str, Any]) -> list[str]:
    """The settings of a group that differ, with all values, and the differences of its runs from the first."""
    lines = []
    for name in document["runs"][0]["settings"]:
        values = (f"{show_setting(run['settings'][name])} in {run['run']}" for run in document["runs"])
        lines.append(f"{name}: {', '.join(values)}")
    for pair in document["paired"]:
        for column, words in COMPARED.items():
            if "mean" in (it := pair[column]):
                interval = _with_interval(it["mean"], it["low"], it["high"], NUM_DIGITS)
                told = f"{it['words']}, difference {interval}, paired over {it['num_episodes']} episodes"
                lines.append(f"{pair['run']} against {pair['reference']}, {words}: {told}")
    return lines


def _in_short(settings: Mapping[str, Any]) -> str:
    """Three settings on a line; of another predictor its name stands for all."""
    names = [it for it in settings if it == PREDICTOR or PREDICTOR not in settings or not it.startswith("predictor.")]
    shown = [
        f"{name.removeprefix('train.').removesuffix('.name')}={show_setting(settings[name])}" for name in names[:3]
    ]
    return " ".join([*shown, *[f"and {len(names) - 3} more"] * (len(names) > 3)]) or "-"


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
    run = _read(name, lambda file: (folder / file).read_text())
    if weights is not None:
        card = read_card(weights)
        if (run.settings["run"], run.settings["step"]) != (card["run"], card["step"]):
            raise ValueError(
                f"the evaluation beside {weights} is of another training run than these weights; run `python stages/evaluate.py`"
            )
    return run


def _revision_reader(revision: str) -> Callable[[str], str]:
    """Reads files of outputs/evaluate as DVC has them under a revision."""
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

    def read(file: str) -> str:
        if file not in there:
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


def _read(name: str, read: Callable[[str], str]) -> Evaluated:
    texts = [read(file) for file in (METRICS_FILE, EPISODES_FILE, SETTINGS_FILE)]
    try:
        metrics: dict[str, Any] = json.loads(texts[0])
        for section, column in itertools.product(("val", "val_ci"), COMPARED):
            # One of the errors below where this is something else.
            if not np.isfinite(metrics[section][column]).all():
                raise ValueError(f"{section}.{column} is {metrics[section][column]}")
        episodes = {
            unguard_cell(row.pop("episode")): {column: float(value or "nan") for column, value in row.items()}
            for row in csv.DictReader(io.StringIO(texts[1]))
        }
        settings = flatten(json.loads(texts[2]))
        for part, names in ((metrics, METRICS), (settings, SETTINGS), *((row, COLUMNS) for row in episodes.values())):
            itemgetter(*names)(part)
        return Evaluated(name, metrics, settings, episodes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{name} is no evaluation of this program ({reason}); run `python stages/evaluate.py` again"
        ) from error
