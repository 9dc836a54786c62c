"""Batches of windows, read ahead by threads into buffers that are allocated once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import Window, WindowIndex
from jepa_cache.store.quantisation import Codec, scales_dtype, scales_shape


class TokenScales(NamedTuple):
    """What turns the codes of B windows into values.

    Attributes:
        tokens: [B, T, N] float32, or [B, T, N, D / 64] float16 for int4.
        channels: [B, D] float32, of the store that each window is from; of joined cameras [B, cameras, D].
        means: [B, D] float32, likewise.
        codec: By which the codes are stored.
    """

    tokens: Tensor
    channels: Tensor
    means: Tensor
    codec: Codec


def dequantise(tokens: Tensor, scales: TokenScales | None) -> Tensor:
    """Turn codes as they are stored into values [B, T, N, D] float32: `store.quantisation.decode`, bit for bit.

    On the device of the batch, so that a GPU is sent the stored bytes. Without scales the values themselves are stored,
    and returned.
    """
    if scales is None:
        return tokens
    codes = scales.codec.unpack_tensor(tokens)
    num_groups = scales.tokens.shape[3] if scales.tokens.ndim == 4 else 1
    codes.unflatten(-1, (num_groups, -1)).mul_(scales.tokens.float().reshape(*codes.shape[:3], num_groups, 1))
    # Two roundings, as the formula has: a fused multiply-add would have one.
    channels, means = (part.view(len(codes), 1, -1, 1, codes.shape[-1]) for part in (scales.channels, scales.means))
    codes.unflatten(2, (channels.shape[2], -1)).mul_(channels).add_(means)
    return codes


class Batch(NamedTuple):
    """B windows of T steps.

    Attributes:
        tokens: [B, T, N, D], raw encoder output: as stored (int4 [B, T, N, D / 2]), after `to_device` values.
        actions: [B, T-1, A] float32, scaled; `actions[:, t]` leads from step t to t+1 of the window, however far these lie apart.
        states: [B, T, S] float32, scaled.
        numbers: [B] window numbers in the index.
        scales: Of the tokens, where these are codes.
    """

    tokens: Tensor
    actions: Tensor
    states: Tensor
    numbers: np.ndarray
    scales: TokenScales | None = None


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device, its tokens as values; the copies have ended on return.

    Tensors that are on the device already and values that need no formula stay the same memory.
    """
    return _as_values(_move(batch, device))


def _move(batch: Batch, device: torch.device, *, non_blocking: bool = False) -> Batch:
    """Copy a batch as it is stored."""
    tokens, actions, states = (part.to(device, non_blocking=non_blocking) for part in batch[:3])
    scales = batch.scales
    if scales is not None:
        scales = TokenScales(*(part.to(device, non_blocking=non_blocking) for part in scales[:3]), scales.codec)
    return Batch(tokens, actions, states, batch.numbers, scales)


def _as_values(batch: Batch) -> Batch:
    return batch._replace(tokens=dequantise(batch.tokens, batch.scales), scales=None)


class _Sent(NamedTuple):
    """A batch that is on its way to a GPU, or there (None)."""

    batch: Batch
    copied: torch.cuda.Event | None


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
    ) -> None:
        """Refuse a scaler that was fitted for another action space or sampling.

        `num_threads` read, and as many batches are in flight beyond the one in use.
        """
        if scaler.action_fingerprint != dataset.manifest.action_fingerprint:
            raise ValueError(
                f"the scaler was fitted for action recipe {scaler.action_fingerprint}, but the manifest has "
                f"{dataset.manifest.action_fingerprint}; run `python stages/fit_scaler.py` again"
            )
        scaler.check_columns(dataset.space)
        for step_length in {*index.step_lengths} - {1}:  # What the space has not is refused before any window is read.
            action = dataset.space.compose(np.zeros((abs(step_length), len(dataset.space.actions))))
            if step_length < 0:
                dataset.space.invert(action)
        self._dataset, self._index, self._scaler = dataset, index, scaler
        self._num_threads = num_threads
        self.wait_s = 0.0  # time that `iterate` made its caller wait
        self._copying: torch.cuda.Stream | None = None  # of batches to a GPU, beside its kernels
        self._arrivals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def take_copy_wait_s(self) -> float:
        """Return for how long kernels waited for copies of batches to the GPU since the last call; the GPU must be done with them."""
        waited = sum(began.elapsed_time(ended) for began, ended in self._arrivals) / 1000
        self._arrivals = []
        return waited

    def iterate(
        self, batches: Iterator[Sequence[int]] | Sequence[Sequence[int]], device: torch.device | None = None
    ) -> Iterator[Batch]:
        """Yield a batch for every list of window numbers: as it is stored, or as values on a device where one is given.

        To a GPU batches are copied from page-locked memory on a stream of their own, the next one while kernels work on this one, where it
        has been read.
        """
        numbers, self._arrivals = iter(batches), []  # validations, one after the other, ask for none of their waits
        ahead = device is not None and device.type == "cuda"
        pending: list[tuple[int, Future[Batch]]] = []  # with the numbers of their buffers
        sent: list[_Sent] = []
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="load") as pool:
            buffers: list[Batch | None] = [None] * (self._num_threads + 2)
            copied: list[torch.cuda.Event | None] = [None] * len(buffers)  # a buffer may be filled again then
            turn = 0

            def send() -> None:
                slot, future = pending.pop(0)
                begun = time.perf_counter()
                batch = future.result()
                self.wait_s += time.perf_counter() - begun
                sent.append(self._send(batch, device) if ahead else _Sent(batch, None))
                copied[slot] = sent[-1].copied

            try:
                while True:
                    while len(pending) <= self._num_threads and (chosen := next(numbers, None)) is not None:
                        slot = turn % len(buffers)
                        buffers[slot] = self._buffer(len(chosen), buffers[slot], pinned=ahead)
                        filling = pool.submit(self._fill, buffers[slot], np.asarray(chosen), copied[slot])
                        pending.append((slot, filling))
                        turn += 1
                    if not sent and not pending:
                        return
                    if not sent:
                        send()
                    if ahead and pending and pending[0][1].done():
                        send()
                    batch = sent.pop(0)
                    yield (
                        self._receive(batch)
                        if ahead
                        else batch.batch
                        if device is None
                        else to_device(batch.batch, device)
                    )
            finally:
                for _, future in pending:
                    future.cancel()

    def _send(self, batch: Batch, device: torch.device) -> _Sent:
        """Begin to copy a batch out of its page-locked buffer, as it is stored."""
        self._copying = self._copying or torch.cuda.Stream(device)
        with torch.cuda.stream(self._copying):
            return _Sent(_move(batch, device, non_blocking=True), self._copying.record_event())

    def _receive(self, sent: _Sent) -> Batch:
        """Let the kernels that follow wait for a copy, and turn it into values by them."""
        batch, copied = sent
        stream, began, ended = torch.cuda.current_stream(), *(torch.cuda.Event(enable_timing=True) for _ in "be")
        began.record(stream)
        stream.wait_event(copied)
        ended.record(stream)
        self._arrivals.append((began, ended))
        for tensor in (batch.tokens, batch.actions, batch.states, *(batch.scales or ())[:3]):
            tensor.record_stream(stream)  # its memory was taken for the other stream
        return _as_values(batch)

    def read(self, numbers: Sequence[int]) -> Batch:
        """Return one batch, read now, in buffers of its own."""
        return self._fill(self._buffer(len(numbers)), np.asarray(numbers))

    def _buffer(self, batch_size: int, old: Batch | None = None, *, pinned: bool = False) -> Batch:
        if old is not None and len(old.tokens) == batch_size:
            return old
        manifest, space, num_steps = self._dataset.manifest, self._dataset.space, self._index.num_steps
        dtype, scheme, width = self._dataset.dtype, self._dataset.scheme, manifest.width
        empty, scales = partial(torch.empty, dtype=torch.float32, pin_memory=pinned), None
        if scheme.max_code is not None:
            rows = scales_shape(dtype, batch_size * num_steps, manifest.num_tokens, width)[1:]
            views = [len(self._dataset.cameras)] if self._dataset.cameras else []
            scales = TokenScales(
                tokens=empty((batch_size, num_steps, *rows), dtype=getattr(torch, scales_dtype(dtype).name)),
                channels=empty((batch_size, *views, width)),
                means=empty((batch_size, *views, width)),
                codec=scheme,
            )
        shape = (batch_size, num_steps, manifest.num_tokens, width // scheme.codes_per_item)
        return Batch(
            tokens=empty(shape, dtype=getattr(torch, scheme.torch_dtype)),
            actions=empty((batch_size, num_steps - 1, len(space.actions))),
            states=empty((batch_size, num_steps, len(space.states))),
            numbers=np.empty(0, np.int64),
            scales=scales,
        )

    def _read_steps(self, read: Callable[[int, int, np.ndarray], None], window: Window, out: np.ndarray) -> None:
        """Fill `out` [T, ...] with the steps of a window, and read no other."""
        if window.step_length == 1:
            read(window.store, window.start, out)
            return
        for place in range(len(out)):
            read(window.store, window.start + place * window.step_length, out[place : place + 1])

    def _fill(self, buffer: Batch, numbers: np.ndarray, free: torch.cuda.Event | None = None) -> Batch:
        if free is not None:  # its last batch may be on its way still
            free.synchronize()
        # numpy has no bfloat16 and float8: it fills their bits.
        tokens = buffer.tokens.view(torch.uint8).numpy().view(self._dataset.scheme.dtype)
        raw_actions, raw_states, num_steps = buffer.actions.numpy(), buffer.states.numpy(), self._index.num_steps
        backwards = []
        for row, number in enumerate(numbers):
            window = self._index[int(number)]
            self._read_steps(self._dataset.read_tokens, window, tokens[row])
            if buffer.scales is not None:
                self._read_steps(self._dataset.read_token_scales, window, buffer.scales.tokens[row].numpy())
                channels = self._dataset.channels(window.store, window.start)
                buffer.scales.channels[row] = torch.from_numpy(channels.scales)
                buffer.scales.means[row] = torch.from_numpy(channels.means)
            actions, states = self._dataset.controls(window.store, abs(window.step_length))
            rows = window.rows(num_steps)
            raw_states[row] = states[rows]
            if window.step_length > 0:
                raw_actions[row] = actions[rows][:-1]
            else:  # Backwards, from a step to the one whose action led to it.
                raw_actions[row] = actions[rows][1:]
                backwards.append(row)
        if backwards:
            raw_actions[backwards] = self._dataset.space.invert(raw_actions[backwards])
        # All windows at once: one by one this took longer than reading the tokens of a small encoder.
        raw_actions[...] = self._scaler.actions.apply(raw_actions)
        raw_states[...] = self._scaler.states.apply(raw_states)
        return buffer._replace(numbers=numbers)
