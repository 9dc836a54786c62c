"""What the loop eats and what it says of its speed: batches on the device, samples per second, waiting for the loader."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from jepa_cache.config.schema import Config, TrainConfig
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.loader import Batch, WindowLoader
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.splits import TRAIN, VAL
from jepa_cache.data.windows import WindowGroup, WindowIndex, WindowSampler, spread_windows

VALIDATION_WINDOWS_PER_EPISODE = 4


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; on the CPU it is the same memory. The copy has ended when this returns."""
    return batch._replace(
        tokens=batch.tokens.to(device), actions=batch.actions.to(device), states=batch.states.to(device)
    )


class Feed:
    """Batches on the device: training ones in the sampler's order, validation ones from every held-out episode."""

    def __init__(self, config: Config, dataset: CachedDataset, scaler: Scaler, accelerator: Accelerator) -> None:
        """Index the windows of both splits.

        Args:
            config: Its `train` and `split` sections count.
            dataset: The cached features.
            scaler: Fitted on the training episodes.
            accelerator: Its device, rank and number of processes.

        Raises:
            ValueError: When no training segment holds a window.
        """
        self._settings, self._device = config.train, accelerator.device
        pin = accelerator.device.type == "cuda"
        index = WindowIndex(dataset.segments_of(TRAIN, config.split, config.filter), self._settings.window_steps)
        self.num_windows = len(index)
        self.loader = WindowLoader(
            dataset, index, scaler, num_threads=self._settings.num_loader_threads, pin_memory=pin
        )
        self.sampler = WindowSampler(
            len(index),
            self._settings.batch_size,
            seed=self._settings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            groups=_mixture_groups(dataset, index),
        )
        self.validation: list[int] = []
        held_out = dataset.segments_of(VAL, config.split, config.filter)
        if any(segment.stop - segment.start >= self._settings.window_steps for segment in held_out):
            val_index = WindowIndex(held_out, self._settings.window_steps)
            self.validation = spread_windows(val_index, VALIDATION_WINDOWS_PER_EPISODE)
            self._val_loader = WindowLoader(dataset, val_index, scaler)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The training batches that are left after `first_step` train steps, `grad_accumulation` for each."""
        per_step = self._settings.grad_accumulation
        turns = range(first_step * per_step, self._settings.num_steps * per_step)
        for batch in self.loader.iterate(self.sampler.numbers(turn) for turn in turns):
            yield move_batch(batch, self._device)

    def validation_batches(self) -> Iterator[Batch]:
        """Each validation window once."""
        size = self._settings.batch_size
        chunks = [self.validation[start : start + size] for start in range(0, len(self.validation), size)]
        for batch in self._val_loader.iterate(chunks):
            yield move_batch(batch, self._device)


def _mixture_groups(dataset: CachedDataset, index: WindowIndex) -> list[WindowGroup]:
    """Windows and weight of every data set, in the order of the index."""
    counts: dict[str, int] = {part.dataset: 0 for part in dataset.manifest.parts}
    weights = {part.dataset: part.weight for part in dataset.manifest.parts}
    for segment, count in zip(index.segments, index.counts(), strict=True):
        counts[dataset.manifest.stores[segment.store][0].dataset] += count
    return [WindowGroup(count, weights[name]) for name, count in counts.items()]


class Meter:
    """Rates since the last row: samples per second and the share of time spent waiting for the loader."""

    def __init__(self, loader: WindowLoader, settings: TrainConfig, first_step: int) -> None:
        """Begin to count after `first_step` train steps."""
        self._loader, self._step = loader, first_step
        self._windows_per_step = settings.batch_size * settings.grad_accumulation
        self._time, self._wait = time.perf_counter(), loader.wait_s

    def row(self, step: int, epoch: float) -> dict[str, float]:
        """The first columns of the row of train step `step`; begins to count anew."""
        now, wait = time.perf_counter(), self._loader.wait_s
        elapsed = now - self._time
        row = {
            "step": step,
            "epoch": epoch,
            "samples_per_s": (step - self._step) * self._windows_per_step / elapsed,
            "loader_wait_share": (wait - self._wait) / elapsed,
        }
        self._time, self._wait, self._step = now, wait, step
        return row
