"""The progress bar of stage one: frames, their rate, the time that is left, and what is being waited for."""

from __future__ import annotations

import threading
from typing import Any

from tqdm import tqdm

from jepa_cache.encoding.pipeline import Timing

HERE = "here"  # the work of this process, where there are no workers


class ProgressBar:
    """Shows how far the recordings are, whoever encodes them; may be told from any thread.

    How many frames there are is not known before they are decoded: it is estimated from the bytes that are through.
    """

    def __init__(self, view: str, total_bytes: int) -> None:
        """Show nothing yet.

        Args:
            view: Camera and phase in words.
            total_bytes: Of the recordings.
        """
        self._total_bytes = total_bytes
        self._ended = (0, 0)  # frames, bytes
        self._running: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._bar = tqdm(desc="encoding" if view == "main" else f"encoding {view}", unit=" frames", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.total = self._bar.n
        self._bar.close()

    def show(self, timing: Timing, bytes_through: int) -> None:
        """Say how far this process is, and what it waits for most."""
        self.say(f"limit: {timing.limit}")
        self.report(HERE, timing.num_frames, bytes_through)

    def report(self, key: str, num_frames: int, bytes_through: int) -> None:
        """Say how far a piece of work is that has not ended."""
        with self._lock:
            self._running[key] = (num_frames, bytes_through)
            self._show()

    def end(self, key: str, num_frames: int, num_bytes: int) -> None:
        """Say that a piece of work has ended: the frames that were encoded, and the bytes that need no more work."""
        with self._lock:
            self._running.pop(key, None)
            self._ended = (self._ended[0] + num_frames, self._ended[1] + num_bytes)
            self._show()

    def say(self, what: str) -> None:
        """Show words behind the numbers."""
        self._bar.set_postfix_str(what, refresh=False)

    def wait(self, unit: str) -> None:
        """Show that another encoder is being waited for."""
        self._bar.set_postfix_str(f"waiting for another encoder: unit {unit}")

    def _show(self) -> None:
        num_frames, num_bytes = (sum(numbers) for numbers in zip(self._ended, *self._running.values(), strict=True))
        if num_bytes:
            self._bar.total = max(num_frames, round(num_frames * self._total_bytes / num_bytes))
        self._bar.update(num_frames - self._bar.n)
