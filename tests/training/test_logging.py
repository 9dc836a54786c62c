"""What the record of a training promises.

Claims:
- what is logged is read back, and every tracker holds the same numbers at the same training steps, each once, also after a resume;
- Weights & Biases runs offline under the run's own id; under DVC, DVCLive must be named; a user without a name can train.
"""

import csv
import importlib.util
import json
import os
import pwd
from pathlib import Path

import pytest

from jepa_cache.training.logging import COLUMNS, Recorder, open_trackers


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # DVCLive looks for a repository around the working folder


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} (extra `loggers`) is not installed")


def record(folder: Path, steps, *, logger: str = "dvclive", kept: str | None = None, offset: float = 0.0) -> str:
    """Log some training steps after those of a checkpoint; returns the CSV."""
    trackers = open_trackers([logger], live_folder=folder / "live", run_folder=folder / "abc123", settings={"lr": 0.1})
    recorder = Recorder(folder / "train.csv", COLUMNS, trackers, kept)
    for step in steps:
        row = {"step": step, "total": step / 4 + offset, "jloss": 0.1 * step, "lr": 1e-3 / step}
        recorder.log(row | ({"val_jloss": 0.7} if step % 4 == 0 else {}))
    recorder.close()
    return recorder.text


def csv_rows(folder: Path, name: str) -> list[tuple[int, float]]:
    with (folder / "train.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


def shown_rows(folder: Path, logger: str, name: str) -> list[tuple[int, float]]:
    if logger == "dvclive":
        with (folder / f"live/plots/metrics/{name}.tsv").open(newline="") as file:
            return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file, delimiter="\t")]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "abc123/tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("logger", ["dvclive", pytest.param("tensorboard", marks=needs("tensorboard"))])
def test_a_tracker_mirrors_the_csv_and_a_resume_drops_the_rows_beyond_the_checkpoint(tmp_path, logger):
    kept = record(tmp_path, range(2, 10, 2), logger=logger)
    assert (tmp_path / "train.csv").read_bytes() == kept.encode() and kept.startswith(",".join(COLUMNS))
    record(tmp_path, range(10, 14, 2), logger=logger, kept=kept)
    record(tmp_path, range(10, 18, 2), logger=logger, kept=kept, offset=5.0)
    totals = csv_rows(tmp_path, "total")
    assert [step for step, _ in totals] == list(range(2, 18, 2))
    assert [total > 5 for _, total in totals] == [False] * 4 + [True] * 4
    for name in ("total", "jloss", "lr", "val_jloss"):
        shown = shown_rows(tmp_path, logger, name)
        assert [step for step, _ in shown] == [step for step, _ in csv_rows(tmp_path, name)]
        values = [value for _, value in csv_rows(tmp_path, name)]
        assert [value for _, value in shown] == pytest.approx(values, rel=1e-6)  # TensorBoard keeps float32
    if logger == "dvclive":
        summary = json.loads((tmp_path / "live/metrics.json").read_text())
        assert (summary["step"], summary["total"]) == (16, 9.0)


@needs("wandb")
def test_wandb_runs_offline_under_the_run_s_id(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path, [1, 2], logger="wandb")
    files = list((tmp_path / "abc123/wandb").rglob("run-abc123.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


def test_under_dvc_the_mirrors_must_name_dvclive(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(ValueError, match=r"train\.loggers is \[\], but under DVC it must name dvclive"):
        open_trackers([], live_folder=tmp_path / "live", run_folder=tmp_path / "run", settings={})
    monkeypatch.setenv("DVC_STAGE", "act")  # which trains for each of its seeds
    assert open_trackers([], live_folder=tmp_path / "live", run_folder=tmp_path / "run", settings={}) == []


def test_a_user_without_a_name_trains_in_a_repository_of_dvc(tmp_path, monkeypatch):
    """As in `docker run --user 12345`: DVC takes the name from the environment, else from the list of users."""
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "restored at the end")
        monkeypatch.delenv(name)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    record(tmp_path, [1, 2])
    assert (tmp_path / "live/metrics.json").is_file() and os.environ["LOGNAME"] == str(os.getuid())
