"""The thread that does stage one's disk work, in order and in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jepa_cache.store.writer import TokenWriter

WRITES_AHEAD = 4  # calls that may wait for the disk


class WriterThread:
    """Runs calls one after the other; `write(function, *arguments)` waits only while too many are queued.

    After a call that failed none is run any more, so that nothing is published on top of a hole; what it raised is
    raised by the next `write`, or at the end of the block.

    Attributes:
        wait_s: Seconds that callers had to wait.
    """

    def __init__(self) -> None:
        """Start nothing yet; the thread lives as long as the `with` block."""
        self.wait_s = 0.0
        self._failed = False
        self._pending: list[Future] = []
        self._open: list[TokenWriter] = []

    def __enter__(self) -> WriterThread:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._wait_for(0)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            for writer in list(self._open):
                self._leave(writer)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Queue a call.

        Raises:
            Exception: What an earlier call raised.
        """
        self._pending.append(self._pool.submit(self._run, function, *arguments))
        self._wait_for(WRITES_AHEAD)

    def open(self, writer: TokenWriter) -> None:
        """Enter a writer; it is left when closed, or when the block ends."""
        self._open.append(writer)
        self(writer.__enter__)

    def close(self, writer: TokenWriter) -> None:
        """Leave a writer after what was queued before."""
        self(self._leave, writer)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:
            return
        try:
            function(*arguments)
        except BaseException:
            self._failed = True
            raise

    def _leave(self, writer: TokenWriter) -> None:
        writer.__exit__(None, None, None)
        self._open.remove(writer)

    def _wait_for(self, num_left: int) -> None:
        begun = time.perf_counter()
        while len(self._pending) > num_left:
            self._pending.pop(0).result()
        self.wait_s += time.perf_counter() - begun
