"""What the mirrors of a training's CSV promise.

Claims:
- TensorBoard's event file holds the numbers of the CSV at its train steps, also after a resume, each once;
- Weights & Biases runs offline under the training's own id;
- under DVC the mirrors must name DVCLive, whose files are outputs of the stage;
- a user without a name can train;
- a mixture's CSV has a column for each data set, a single data set none.
"""

import importlib.util
import os
import pwd
from pathlib import Path

import pytest

from jepa_cache.training.logging import COLUMNS, Recorder, columns_for, open_trackers, read_rows


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} (extra `loggers`) is not installed")


def record(folder: Path, logger: str, steps, *, resumed_step: int = 0) -> None:
    trackers = open_trackers([logger], live_folder=folder / "live", run_folder=folder / "abc123", settings={"lr": 0.1})
    recorder = Recorder(folder / "train.csv", COLUMNS, trackers, resumed_step=resumed_step)
    for step in steps:
        recorder.log({"step": step, "total": step / 4, "lr": 0.5})
    recorder.close()


@needs("tensorboard")
def test_tensorboard_shows_the_csv_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(tmp_path, "tensorboard", range(2, 14, 2))
    record(tmp_path, "tensorboard", range(10, 18, 2), resumed_step=8)
    events = EventAccumulator(str(tmp_path / "abc123/tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("total")]
    assert shown == [(int(row["step"]), float(row["total"])) for row in read_rows(tmp_path / "train.csv")]
    assert [step for step, _ in shown] == list(range(2, 18, 2))


@needs("wandb")
def test_wandb_runs_offline_under_the_run_s_id(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path, "wandb", [1, 2])
    files = list((tmp_path / "abc123/wandb").rglob("run-abc123.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


def test_a_mixture_has_a_column_for_each_data_set_and_a_single_one_has_none():
    mixed = columns_for(3, ["vpt", "sample"], on_gpu=True)
    assert mixed[len(COLUMNS) :] == (
        *("sloss_h1", "sloss_h2", "sloss_h3", "jloss.vpt", "jloss.sample", "val_jloss.vpt", "val_jloss.sample"),
        "gpu_memory_mb",
    )
    assert columns_for(1, ["vpt"], on_gpu=False)[len(COLUMNS) :] == ("sloss_h1",)


def test_under_dvc_the_mirrors_must_name_dvclive(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    with pytest.raises(ValueError, match=r"train\.loggers is \[\], but under DVC it must name dvclive"):
        open_trackers([], live_folder=tmp_path / "live", run_folder=tmp_path / "run", settings={})


def test_a_user_without_a_name_trains_in_a_repository_of_dvc(tmp_path, monkeypatch):
    """As in `docker run --user 12345`: DVC takes the name from the environment, else from the list of users."""
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    monkeypatch.chdir(tmp_path)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "restored at the end")
        monkeypatch.delenv(name)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    record(tmp_path, "dvclive", [1, 2])
    assert (tmp_path / "live/metrics.json").is_file() and os.environ["LOGNAME"] == str(os.getuid())
