"""What a training reports: one CSV with everything, and DVCLive for `dvc exp show` and `dvc plots`."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

from jepa_cache.store.root import atomic_file

COLUMNS = (
    "step",
    "epoch",
    "total",
    "jloss",
    "sloss",
    "lr",
    "grad_norm",
    "samples_per_s",
    "loader_wait_share",
    "val_jloss",
    "val_sloss",
)


class Recorder:
    """Appends rows to a CSV that outlives the process, and mirrors them to DVCLive.

    After a resume, rows beyond the checkpoint are dropped and the rest is replayed into DVCLive, so both read as if the
    training had never stopped.
    """

    def __init__(self, csv_path: Path, live_folder: Path, *, resumed_step: int) -> None:
        """Open both.

        Args:
            csv_path: Beside the checkpoints.
            live_folder: DVCLive's, in the workspace.
            resumed_step: Train steps already done; 0 for a fresh run.
        """
        from dvclive import Live

        logging.getLogger("dvclive").setLevel(logging.ERROR)
        self.path = csv_path
        rows = [row for row in read_rows(csv_path) if int(row["step"]) <= resumed_step]
        self._live = Live(str(live_folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)
        with atomic_file(csv_path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            self._mirror({name: float(value) for name, value in row.items() if value != ""})
        if rows:
            self._live.make_summary()

    def log(self, row: dict[str, Any]) -> None:
        """Add one row; columns that are absent stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        self._mirror(row)
        self._live.make_summary()

    def close(self) -> None:
        """Let DVCLive write its summary."""
        self._live.end()

    def _mirror(self, row: dict[str, Any]) -> None:
        self._live.step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._live.log_metric(name, float(value))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier CSV; a last line cut off by a crash is dropped."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))
