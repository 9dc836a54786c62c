"""What a training reports: one CSV with everything, and the trackers that mirror it."""

from __future__ import annotations

import csv
import getpass
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import DVCLiveTracker, GeneralTracker, TensorBoardTracker, WandBTracker

from jepa_cache.config.paths import require
from jepa_cache.files import atomic_file, full_disk_named
from jepa_cache.training.losses import TERMS
from jepa_cache.training.step import GAPS

LIBRARIES = {"dvclive": ("dvclive", "dvc"), "tensorboard": ("tensorboard", "loggers"), "wandb": ("wandb", "loggers")}
"""Library and extra of each tracker."""
COLUMNS = (
    *("step", "epoch", *TERMS, "lr", "grad_norm", "samples_per_s", "loader_wait_share"),
    *(f"val_{name}" for name in (*TERMS, *GAPS)),
)


def columns_for(num_rollout_steps: int, datasets: Sequence[str], *, on_gpu: bool) -> tuple[str, ...]:
    """Name the columns of a training's CSV: with R rollout steps, a mixture's data sets, and a GPU's memory."""
    extra = [f"sloss_h{step}" for step in range(1, num_rollout_steps + 1)]
    if len(datasets) > 1:
        extra += [f"{prefix}jloss.{name}" for prefix in ("", "val_") for name in datasets]
    return (*COLUMNS, *extra, *(["copy_wait_share", "gpu_memory_mb"] if on_gpu else []))


class Recorder:
    """Appends rows to a CSV that outlives the process, and mirrors them to trackers.

    After a resume, rows beyond the checkpoint are dropped and the rest is replayed into the trackers, so all read as if
    the training had never stopped. The checkpoint's own copy of its rows counts; a CSV that says otherwise is named.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], trackers: Sequence[GeneralTracker], kept: str | None = None
    ) -> None:
        """Write the CSV anew with the rows that the checkpoint kept (None for a fresh run), and replay them."""
        self.path, self._columns, self._trackers = path, tuple(columns), list(trackers)
        if kept is not None and not (path.is_file() and path.read_bytes().startswith(kept.encode())):
            what = "was changed" if path.is_file() else "is gone"
            print(f"{path} {what}; its rows up to the checkpoint are written again from there")
        rows = list(csv.DictReader(io.StringIO(kept or "", newline="")))
        # A column that is no longer written, such as the GPU's memory after a move to a CPU, is dropped.
        kept_rows = [{name: row[name] for name in self._columns if name in row} for row in rows]
        self._lines = [self._format([dict(zip(self._columns, self._columns, strict=True)), *kept_rows])]
        self._rewrite()
        for row in rows:
            self._mirror({name: value for name, value in row.items() if value != ""})

    @property
    def text(self) -> str:
        """The CSV so far."""
        return "".join(self._lines)

    def log(self, row: dict[str, Any]) -> None:
        """Add one row; columns that are absent stay empty."""
        self._lines.append(self._format([row]))
        if self.path.is_file():
            with full_disk_named(self.path), self.path.open("a", newline="") as file:
                file.write(self._lines[-1])
        else:  # somebody removed it meanwhile
            self._rewrite()
        self._mirror(row)

    def close(self) -> None:
        """Let the trackers write what is pending."""
        for tracker in self._trackers:
            tracker.finish()

    def _format(self, rows: Sequence[dict[str, Any]]) -> str:
        file = io.StringIO()
        csv.DictWriter(file, self._columns).writerows(rows)
        return file.getvalue()

    def _rewrite(self) -> None:
        with atomic_file(self.path) as temporary:
            temporary.write_bytes(self.text.encode())

    def _mirror(self, row: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in row.items() if name != "step"}
        with full_disk_named(self.path.parent):
            for tracker in self._trackers:
                tracker.log(values, step=int(row["step"]))


def open_trackers(
    loggers: Sequence[str], *, live_folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> list[GeneralTracker]:
    """Start the trackers that `train.loggers` names; a resumed training replays its rows into them.

    DVCLive's files lie in `live_folder`, in the workspace, TensorBoard's and W&B's in that of the run. Its name is the
    run's id, on W&B too, whose environment variables (WANDB_MODE=offline, WANDB_PROJECT, ...) decide the rest.

    Raises:
        ValueError: A package is not installed, or DVC runs the stage train and DVCLive is not among them.
    """
    # Of the stage train alone: act trains as well, and has no such outputs. From another folder DVC calls it "../dvc.yaml:train".
    if os.environ.get("DVC_STAGE", "").rpartition(":")[2] == "train" and "dvclive" not in loggers:
        raise ValueError(
            f"train.loggers is {list(loggers)}, but under DVC it must name dvclive, whose files are outputs of this stage; add it"
        )
    try:
        getpass.getuser()
    except (KeyError, OSError):  # `docker run --user`: DVC asks for the user's name, and would fail without one
        os.environ["LOGNAME"] = str(os.getuid())
    logging.getLogger("dvclive").setLevel(logging.ERROR)
    trackers: list[GeneralTracker] = []
    for name in loggers:
        require(*LIBRARIES[name], f"train.loggers={name}")
        if name == "dvclive":
            from dvc.scm import SCMError
            from dvclive import Live

            try:
                live = Live(str(live_folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
            except SCMError as error:  # before the first commit
                raise ValueError(
                    f"DVCLive cannot use the git repository here ({error}); commit, or set train.loggers=[]"
                ) from error
            trackers.append(DVCLiveTracker(live=live))
        elif name == "tensorboard":
            for old in (run_folder / name).glob("events.out.tfevents.*"):  # its rows are replayed into a new file
                old.unlink()
            trackers.append(TensorBoardTracker(name, run_folder))
        else:
            (run_folder / name).mkdir(parents=True, exist_ok=True)
            run = {"id": run_folder.name, "name": run_folder.name[:8], "resume": "allow"}
            trackers.append(WandBTracker("jepa-cache", dir=str(run_folder / name), config=dict(settings), **run))
        trackers[-1].start()
    return trackers
