"""A request to stop from outside: what SLURM and other schedulers send before they take a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers the first SIGTERM or SIGUSR1 that comes inside its block, so that the loop can end at a train step.

    Attributes:
        name: Of the signal, None while none has come.
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
