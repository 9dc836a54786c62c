"""One training in a process of its own, started by `tests.processes.Started`; it may be slowed down, die, or kill itself.

argv: workspace, home, and words: `key=value` settings, `predictor=NAME` (in its full size), `fresh`, `pause`, `slow_end` (before the weights are written), `die_at=K` (process 1, at training step K), `hang_at=K` (the same; the
others wait 10 s for it in place of minutes), `nan_at=K` (its loss there), `kill_at=N` (at the N-th file operation in the runs folder) and `kill_in_write_at=N` (half-way through the N-th checkpoint, when two
training steps more were done). Leaves `home/out/run`, and `home/count` of file operations.
"""

import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from jepa_cache.config.loading import load_config
from jepa_cache.data.dataset import open_dataset
from jepa_cache.data.scaler import read_scaler
from jepa_cache.training import checkpoint, distributed, trainer
from jepa_cache.training.signals import REQUEUE_EXIT_CODE
from tests.caches import make_config
from tests.workspace import SUITE_SETTINGS

OPERATIONS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink")


def main(workspace: str, home: str, *words: str) -> None:
    options = {name: int(value) for name, _, value in (word.partition("=") for word in words) if name.endswith("_at")}
    config = make_config(*(word for word in words if word.startswith(("train.", "cache."))))
    if whole := [word for word in words if word.startswith("predictor=")]:
        config = replace(config, predictor=load_config(SUITE_SETTINGS, whole).predictor)
    dataset, scaler = open_dataset(config, Path(workspace)), read_scaler(Path(workspace) / "outputs/scaler/scaler.json")
    step, save, count, num_steps, num_writes = trainer.train_step, checkpoint.save_file, 0, 0, 0

    def slowed(*arguments):
        nonlocal num_steps
        if arguments[-1] == options.get("die_at") and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if arguments[-1] == options.get("hang_at") and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1 * ("pause" in words))
        report = step(*arguments)
        num_steps += 1
        if arguments[-1] == options.get("nan_at") and os.environ["RANK"] == "1":
            return report._replace(losses=report.losses | {"total": report.losses["total"] * float("nan")})
        return report

    def save_slowly(*arguments, **metadata):
        nonlocal num_writes
        save(*arguments, **metadata)
        num_writes += 1
        if num_writes == options.get("kill_in_write_at"):
            begun, deadline = num_steps, time.monotonic() + 60
            while num_steps < begun + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL if num_steps >= begun + 2 else signal.SIGABRT)

    def watch(event: str, arguments: tuple) -> None:
        """Count file operations below the runs folder, or on names relative to an open folder (what rmtree does)."""
        nonlocal count
        if event not in OPERATIONS:
            return
        name = arguments[1] if event == "os.symlink" else arguments[0]
        path = os.fspath(name) if isinstance(name, str | os.PathLike) else ""
        if path.startswith(f"{home}/runs") or (event in ("os.remove", "os.rmdir") and not path.startswith("/")):
            count += 1
            if count == options.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)

    write = trainer.write_outputs
    trainer.write_outputs = lambda *given: (time.sleep(2 * ("slow_end" in words)), write(*given))[1]
    trainer.train_step, checkpoint.save_file = slowed, save_slowly
    if "hang_at" in options:
        distributed.TIMEOUT = timedelta(seconds=10)
    sys.addaudithook(watch)
    try:
        result = trainer.train(config, dataset, scaler, Path(home) / "out/run", base=Path(home), fresh="fresh" in words)
    except ValueError as error:
        sys.exit(f"error: {error}")
    (Path(home) / "count").write_text(str(count))
    if result.stopped_by is not None:
        sys.exit(REQUEUE_EXIT_CODE)


if __name__ == "__main__":
    main(*sys.argv[1:])
