"""A request to stop from outside: Ctrl-C, and what SLURM and other schedulers send before they take a machine away.

Imports no torch, so that a stage can answer a signal while torch is still being imported.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
SCHEDULER = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """The first SIGTERM, SIGUSR1 or Ctrl-C, so that the loop can end at a training step; Ctrl-C after it ends at once.

    Attributes:
        name: Of the signal, None while none has come.
    """

    name: str | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; a Ctrl-C after another one raises KeyboardInterrupt."""
        if number == signal.SIGINT:
            if self.name is not None:
                raise KeyboardInterrupt
            _say("Ctrl-C: a checkpoint is written after this training step; Ctrl-C again ends at once without one")
        self.name = self.name or signal.Signals(number).name


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for a request to stop during the block."""
    request = StopRequest()
    with _handled((*SCHEDULER, signal.SIGINT), request.note):
        yield request


@contextmanager
def requeued_at_once() -> Iterator[None]:
    """End with `REQUEUE_EXIT_CODE` on a signal while no training step runs and nothing is to be saved."""

    def end(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        _say(
            f"stopped by {name} while no training step was running; the same command resumes. Exit code {REQUEUE_EXIT_CODE}"
        )
        raise SystemExit(REQUEUE_EXIT_CODE)

    with _handled((*SCHEDULER, signal.SIGINT), end):
        yield


@contextmanager
def _handled(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # Python allows handlers in the main thread only; what is ignored, as Ctrl-C in a shell's background, stays so.
    main = threading.current_thread() is threading.main_thread()
    heard = [number for number in numbers if main and signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_for_requeue(stopped_by: str, step: str) -> NoReturn:
    """End the process after a training that a signal stopped at a training step, so that a scheduler starts the same command again."""
    print(f"stopped by {stopped_by} at training step {step}; the same command resumes. Exit code {REQUEUE_EXIT_CODE}")
    raise SystemExit(REQUEUE_EXIT_CODE)


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # print may be interrupted in itself
