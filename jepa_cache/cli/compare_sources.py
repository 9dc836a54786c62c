"""Where `jepa-cache compare` finds an evaluation: a file, a folder, a training run, or an experiment or revision that DVC knows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_cache.config.loading import find_repository

METRICS_FILE, EPISODES_FILE, SETTINGS_FILE = "metrics.json", "episodes.csv", "settings.json"
EVALUATE = "outputs/evaluate"
WEIGHTS = "predictor.safetensors"


@dataclass(frozen=True)
class Evaluated:
    """One evaluation, as it was read from files."""

    name: str  # as the user typed it
    metrics: Mapping[str, Any]  # metrics.json
    settings: Mapping[str, Any] | None  # settings.json, flat names; None where the evaluation is older than the file
    episodes: Mapping[str, Mapping[str, float]]  # episodes.csv: episode to column to value


def read_run(name: str) -> Evaluated:
    """Read one evaluation.

    Args:
        name: metrics.json, a folder that holds it, a checkout, the folder of a training run that was evaluated, or else the
            name of a DVC experiment, or a git branch, tag or commit.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    path = Path(name)
    if not path.exists():
        return _read(name, _revision_reader(name))
    folder = _find_folder(path)
    run = _read(name, lambda file: (folder / file).read_text() if (folder / file).exists() else None)
    if (path / WEIGHTS).is_file():
        _check_same_run(path / WEIGHTS, run)
    return run


def _find_folder(path: Path) -> Path:
    candidates = [path.parent] if path.is_file() else [path, path / EVALUATE]
    if (path / WEIGHTS).is_file():
        candidates.append(path.absolute().parent.parent / "evaluate")
    for folder in candidates:
        if (folder / METRICS_FILE).is_file() and (not path.is_file() or path.name == METRICS_FILE):
            return folder
    looked = ", ".join(str(folder / METRICS_FILE) for folder in candidates)
    raise ValueError(f"{path} holds no evaluation (looked for {looked}); run `python stages/evaluate.py` there first")


def _check_same_run(weights: Path, run: Evaluated) -> None:
    from jepa_cache.predictor.checkpoints import read_card

    card = read_card(weights)
    if run.settings is None or (run.settings["run"], run.settings["step"]) != (card["run"], card["step"]):
        raise ValueError(
            f"the evaluation beside {weights} is of another training run than these weights; run `python stages/evaluate.py`"
        )


def _revision_reader(revision: str) -> Callable[[str], str | None]:
    """Reads files of outputs/evaluate as DVC has them under a revision; None for one that the evaluation did not write."""
    import dvc.api
    from dvc.exceptions import DvcException, OutputNotFoundError, PathMissingError
    from dvc.repo import Repo

    repository = find_repository(Path.cwd())
    try:
        with Repo(str(repository), rev=revision) as repo:
            known = {Path(out.fs_path).name for out in repo.index.outs}
    except DvcException as error:
        raise ValueError(
            f"{revision} is no file or folder, and DVC knows no experiment or revision of that name in {repository} ({error}); "
            "`dvc exp list` and `git branch` name those that there are"
        ) from error

    def read(file: str) -> str | None:
        try:
            return dvc.api.read(f"{EVALUATE}/{file}", repo=str(repository), rev=revision, encoding="utf-8")
        except (FileNotFoundError, OutputNotFoundError, PathMissingError) as error:
            if file != METRICS_FILE and file not in known:
                return None  # older than the file
            raise ValueError(
                f"revision {revision} has no {EVALUATE}/{file}: it was not evaluated, or its dvc.lock was not committed"
            ) from error
        except DvcException as error:
            raise ValueError(
                f"{EVALUATE}/{file} of revision {revision} is not in the DVC cache ({error}); `dvc pull`, or run it again"
            ) from error

    return read


def _read(name: str, read: Callable[[str], str | None]) -> Evaluated:
    from jepa_cache.evaluation.metrics import flatten

    try:
        metrics: dict[str, Any] = json.loads(read(METRICS_FILE) or "")
        settings, episodes = read(SETTINGS_FILE), read(EPISODES_FILE)
        for section in ("val", "val_ci"):
            for column in ("teacher_forcing_l1", "rollout_l1"):
                metrics[section][column]  # KeyError where this is something else
        return Evaluated(
            name=name,
            metrics=metrics,
            settings=None if settings is None else flatten(json.loads(settings)),
            episodes=_parse_episodes(episodes or ""),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{name} is no evaluation of this program ({reason}); run `python stages/evaluate.py` again"
        ) from error


def _parse_episodes(text: str) -> dict[str, dict[str, float]]:
    from jepa_cache.evaluation.metrics import unguard_cell

    rows = csv.DictReader(io.StringIO(text))
    try:
        return {
            unguard_cell(row.pop("episode")): {name: float(value or "nan") for name, value in row.items()}
            for row in rows
        }
    except ValueError as error:
        raise TypeError(f"{EPISODES_FILE}: {error}") from error
