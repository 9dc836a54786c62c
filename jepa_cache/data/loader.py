"""Batches of windows, read ahead by threads into buffers that are allocated once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import WindowIndex


class Batch(NamedTuple):
    """B windows of T steps.

    Attributes:
        tokens: [B, T, N, D] float16, raw encoder output.
        actions: [B, T-1, A] float32, scaled; `actions[:, t]` leads from step t to t+1.
        states: [B, T, S] float32, scaled.
        numbers: [B] window numbers in the index.
    """

    tokens: Tensor
    actions: Tensor
    states: Tensor
    numbers: np.ndarray


class WindowLoader:
    """Reads batches of windows; owns the buffers, knows nothing of order.

    `iterate` hands out batches in order while threads fill the next ones. A batch's tensors are valid until the next one
    is taken: its buffer is filled again then.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        index: WindowIndex,
        scaler: Scaler,
        *,
        num_threads: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Prepare the scaled controls' source and the thread pool.

        Args:
            dataset: Where tokens are read.
            index: Windows by number.
            scaler: Applied to actions and states.
            num_threads: Reading threads, and batches in flight beyond the one in use.
            pin_memory: Page-locked buffers, for copies to a CUDA device.

        Raises:
            ValueError: When the scaler was fitted for another action space or sampling.
        """
        if scaler.action_fingerprint != dataset.manifest.action_fingerprint:
            raise ValueError(
                f"the scaler was fitted for action recipe {scaler.action_fingerprint}, but the manifest has "
                f"{dataset.manifest.action_fingerprint}; run `python stages/fit_scaler.py` again"
            )
        self._dataset, self._index, self._scaler = dataset, index, scaler
        self._num_threads, self._pin_memory = num_threads, pin_memory
        self.wait_s = 0.0  # time that `iterate` made its caller wait

    def iterate(self, batches: Iterator[Sequence[int]] | Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield a Batch for every list of window numbers."""
        numbers = iter(batches)
        pending: list[Future[Batch]] = []
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="load") as pool:
            buffers: list[Batch | None] = [None] * (self._num_threads + 2)
            turn = 0
            try:
                while True:
                    while len(pending) <= self._num_threads and (chosen := next(numbers, None)) is not None:
                        slot = turn % len(buffers)
                        buffers[slot] = self._buffer(len(chosen), buffers[slot])
                        pending.append(pool.submit(self._fill, buffers[slot], np.asarray(chosen)))
                        turn += 1
                    if not pending:
                        return
                    begun = time.perf_counter()
                    batch = pending.pop(0).result()
                    self.wait_s += time.perf_counter() - begun
                    yield batch
            finally:
                for future in pending:
                    future.cancel()

    def read(self, numbers: Sequence[int]) -> Batch:
        """One batch, read now, in buffers of its own."""
        return self._fill(self._buffer(len(numbers), None), np.asarray(numbers))

    def _buffer(self, batch_size: int, old: Batch | None) -> Batch:
        if old is not None and len(old.tokens) == batch_size:
            return old
        manifest, space, num_steps = self._dataset.manifest, self._dataset.space, self._index.num_steps
        shape = (batch_size, num_steps, manifest.num_tokens, manifest.width)
        return Batch(
            tokens=torch.empty(shape, dtype=torch.float16, pin_memory=self._pin_memory),
            actions=torch.empty((batch_size, num_steps - 1, len(space.actions)), pin_memory=self._pin_memory),
            states=torch.empty((batch_size, num_steps, len(space.states)), pin_memory=self._pin_memory),
            numbers=np.empty(0, np.int64),
        )

    def _fill(self, buffer: Batch, numbers: np.ndarray) -> Batch:
        tokens, num_steps = buffer.tokens.numpy(), self._index.num_steps
        for row, number in enumerate(numbers):
            window = self._index[int(number)]
            self._dataset.read_tokens(window.store, window.start, tokens[row])
            actions, states = self._dataset.controls(window.store)
            stop = window.start + num_steps
            buffer.actions[row] = torch.from_numpy(self._scaler.actions.apply(actions[window.start : stop - 1]))
            buffer.states[row] = torch.from_numpy(self._scaler.states.apply(states[window.start : stop]))
        return buffer._replace(numbers=numbers)
