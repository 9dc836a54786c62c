"""What a training reports: one CSV with everything, and the sinks that mirror it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_cache.files import atomic_file, full_disk_named
from jepa_cache.training.sinks import Sink

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
    "val_total",
    "val_jloss",
    "val_sloss",
    "val_gap_copy_last",
    "val_gap_shuffled_actions",
)


def columns_for(num_rollout_steps: int, datasets: Sequence[str], *, on_gpu: bool) -> tuple[str, ...]:
    """The columns of a training's CSV.

    Args:
        num_rollout_steps: R; `sloss_h1` to `sloss_hR` are the rollout loss of each of its steps.
        datasets: Members of a mixture; `jloss.<name>` and `val_jloss.<name>` of each. One data set alone has none.
        on_gpu: `gpu_memory_mb`, the most that was allocated since the row before.
    """
    extra = [f"sloss_h{step}" for step in range(1, num_rollout_steps + 1)]
    if len(datasets) > 1:
        extra += [f"{prefix}jloss.{name}" for prefix in ("", "val_") for name in datasets]
    return (*COLUMNS, *extra, *(["gpu_memory_mb"] if on_gpu else []))


class Recorder:
    """Appends rows to a CSV that outlives the process, and mirrors them to sinks.

    After a resume, rows beyond the checkpoint are dropped and the rest is replayed into the sinks, so all read as if the
    training had never stopped.
    """

    def __init__(self, path: Path, columns: Sequence[str], sinks: Sequence[Sink], *, resumed_step: int) -> None:
        """Open the CSV and replay what is in it.

        Args:
            path: Of the CSV, beside the checkpoints.
            columns: Its header.
            sinks: Closed with the recorder.
            resumed_step: Train steps already done; 0 for a fresh run.
        """
        self.path, self._columns, self._sinks = path, tuple(columns), list(sinks)
        rows = [row for row in read_rows(path) if int(row["step"]) <= resumed_step]
        with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            self._mirror({name: value for name, value in row.items() if value != ""})

    def log(self, row: dict[str, Any]) -> None:
        """Add one row; columns that are absent stay empty."""
        with full_disk_named(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._mirror(row)

    def close(self) -> None:
        """Let the sinks write what is pending."""
        for sink in self._sinks:
            sink.close()

    def _mirror(self, row: dict[str, Any]) -> None:
        values = {name: float(value) for name, value in row.items() if name != "step"}
        for sink in self._sinks:
            sink.log(int(row["step"]), values)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier CSV; a last line cut off by a crash is dropped."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if line.endswith("\n")))
