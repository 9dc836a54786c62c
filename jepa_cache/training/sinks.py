"""Where a training's rows are shown besides its CSV: DVCLive, TensorBoard, Weights & Biases."""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jepa_cache.files import full_disk_named

_EXTRA = "it is not installed; pip install 'jepa-cache[loggers]', or leave it out of train.loggers"


class Sink(Protocol):
    """One of them; gets every row of the CSV once, also the ones replayed after a resume."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of train step `step`."""

    def close(self) -> None:
        """Write out what is pending."""


class DVCLiveSink:
    """The metrics and plots that `dvc exp show` and `dvc plots` read."""

    def __init__(self, folder: Path) -> None:
        """Start anew in `folder`."""
        from dvclive import Live

        logging.getLogger("dvclive").setLevel(logging.ERROR)
        self._live = Live(str(folder), dvcyaml=None, save_dvc_exp=False, report=None, monitor_system=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._live.step = step
        with full_disk_named(Path(self._live.dir)):
            for name, value in values.items():
                self._live.log_metric(name, value)
            self._live.make_summary()

    def close(self) -> None:
        """See `Sink`."""
        self._live.end()


class TensorBoardSink:
    """An event file; a resumed training replays its rows into a new one, so the old one is removed first."""

    def __init__(self, folder: Path) -> None:
        """Start anew in `folder`.

        Raises:
            ValueError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"train.loggers names tensorboard, but {_EXTRA}") from error
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases with the training's own id, so that a resumed one goes on in it.

    Where and how (WANDB_MODE=offline, WANDB_PROJECT, ...) is said by W&B's own environment variables.
    """

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any]) -> None:
        """Open the run.

        Raises:
            ValueError: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"train.loggers names wandb, but {_EXTRA}") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="jepa-cache", id=run, name=run[:8], dir=str(folder), resume="allow", config=dict(settings)
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()


def _name_user() -> None:
    """Let the number of a user without a name (`docker run --user`) stand for it: DVC asks for the name, and would end in an error."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())


def open_sinks(
    loggers: Sequence[str], *, live_folder: Path, run_folder: Path, settings: Mapping[str, Any]
) -> list[Sink]:
    """The sinks that `train.loggers` names.

    Args:
        loggers: Of `config.schema.LOGGERS`.
        live_folder: DVCLive's, in the workspace.
        run_folder: Of the run; TensorBoard's and W&B's files lie in it. Its name is the run's id.
        settings: Shown by W&B.

    Raises:
        ValueError: One needs a package that is not installed, or DVC runs this stage and its metrics are not among them.
    """
    if os.environ.get("DVC_STAGE") and "dvclive" not in loggers:
        raise ValueError(
            f"train.loggers is {list(loggers)}, but under DVC it must name dvclive, whose files are outputs of this stage; add it"
        )
    _name_user()
    makers = {
        "dvclive": lambda: DVCLiveSink(live_folder),
        "tensorboard": lambda: TensorBoardSink(run_folder / "tensorboard"),
        "wandb": lambda: WandbSink(run_folder / "wandb", run_folder.name, settings),
    }
    return [makers[name]() for name in loggers]
