"""What the loop eats and what it says of its speed: batches on the device, samples per second, waiting for the loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from jepa_cache.config.schema import Config, TrainConfig
from jepa_cache.data.ablations import SHUFFLED, action_ablations
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.loader import Batch, WindowLoader, to_device
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.splits import TRAIN, VAL
from jepa_cache.data.windows import WindowGroup, WindowIndex, WindowSampler, spread_windows
from jepa_cache.training.processes import mean_over_processes, sum_over_processes
from jepa_cache.training.stepping import StepReport

VALIDATION_WINDOWS_PER_EPISODE = 4


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
        self._settings, self._device, self._dataset = config.train, accelerator.device, dataset
        self._rank, self._num_processes = accelerator.process_index, accelerator.num_processes
        pin = accelerator.device.type == "cuda"
        index = WindowIndex(dataset.segments_of(TRAIN, config.split, config.filter), self._settings.window_steps)
        self.num_windows = len(index)
        self._index = index
        self.datasets = list(dict.fromkeys(part.dataset for part in dataset.manifest.parts))
        self.loader = WindowLoader(
            dataset, index, scaler, num_threads=self._settings.num_loader_threads, pin_memory=pin
        )
        self.sampler = WindowSampler(
            len(index),
            self._settings.batch_size,
            seed=self._settings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            groups=mixture_groups(dataset, index),
        )
        self.validation: list[int] = []
        self.compares = False  # whether there are episodes enough to give windows another's actions
        held_out = dataset.segments_of(VAL, config.split, config.filter)
        if any(segment.stop - segment.start >= self._settings.window_steps for segment in held_out):
            val_index = WindowIndex(held_out, self._settings.window_steps)
            self.validation = spread_windows(val_index, VALIDATION_WINDOWS_PER_EPISODE)
            self._val_index = val_index
            self._val_loader = WindowLoader(dataset, val_index, scaler)
            self.compares = len({val_index.segments[val_index[n].segment].episode for n in self.validation}) > 1
            if self.compares:
                self._shuffled = dict(zip(self.validation, self._shuffle(scaler), strict=True))

    def _shuffle(self, scaler: Scaler) -> np.ndarray:
        given = action_ablations(self._dataset, scaler, self._val_index, self.validation, seed=self._settings.seed)
        return given[SHUFFLED]

    def shuffled_actions(self, numbers: np.ndarray) -> torch.Tensor:
        """For validation windows [B] the scaled actions [B, T-1, A] of a window of another episode, the same every time."""
        return torch.from_numpy(np.stack([self._shuffled[int(number)] for number in numbers])).to(self._device)

    def batches(self, first_step: int, num_steps: int) -> Iterator[Batch]:
        """The training batches that are left after `first_step` of `num_steps` train steps, `grad_accumulation` for each."""
        per_step = self._settings.grad_accumulation
        turns = range(first_step * per_step, num_steps * per_step)
        for batch in self.loader.iterate(self.sampler.numbers(turn) for turn in turns):
            yield to_device(batch, self._device)

    def validation_batches(self) -> Iterator[Batch]:
        """Each validation window once over all processes; this one's share."""
        size = self._settings.batch_size
        chunks = [self.validation[start : start + size] for start in range(0, len(self.validation), size)]
        for batch in self._val_loader.iterate(chunks[self._rank :: self._num_processes]):
            yield to_device(batch, self._device)

    def datasets_of(self, numbers: np.ndarray, *, held_out: bool = False) -> np.ndarray:
        """For each window number [B] the position in `datasets` of the data set that it is drawn from."""
        index = self._val_index if held_out else self._index
        stores = [index[int(number)].store for number in numbers]
        return np.array([self.datasets.index(self._dataset.manifest.stores[store][0].dataset) for store in stores])

    def describe(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Window numbers [B] of training windows in words: data set, episode, first step and number of steps."""
        described = []
        for number in numbers:
            window = self._index[int(number)]
            segment = self._index.segments[window.segment]
            described.append(
                {
                    "window": int(number),
                    "dataset": self._dataset.manifest.stores[window.store][0].dataset,
                    "episode": segment.episode,
                    "start": window.start - segment.start,
                    "num_steps": self._index.num_steps,
                }
            )
        return described


def mixture_groups(dataset: CachedDataset, index: WindowIndex) -> list[WindowGroup]:
    """Windows and weight of every data set, in the order of the index: what a sampler draws by."""
    counts: dict[str, int] = {part.dataset: 0 for part in dataset.manifest.parts}
    weights = {part.dataset: part.weight for part in dataset.manifest.parts}
    for segment, count in zip(index.segments, index.counts(), strict=True):
        counts[dataset.manifest.stores[segment.store][0].dataset] += count
    return [WindowGroup(count, weights[name]) for name, count in counts.items()]


class Meter:
    """What a row says of the train steps since the last one: rates, losses of each data set, memory."""

    def __init__(self, feed: Feed, settings: TrainConfig, first_step: int, accelerator: Accelerator) -> None:
        """Begin to count after `first_step` train steps."""
        self._feed, self._step, self._accelerator = feed, first_step, accelerator
        self._batches_per_step = settings.grad_accumulation
        self._windows_per_step = settings.batch_size * settings.grad_accumulation * accelerator.num_processes
        self._time, self._wait = time.perf_counter(), feed.loader.wait_s
        self._by_dataset = torch.zeros(2, len(feed.datasets), device=accelerator.device)  # sums and counts of jloss

    def add(self, report: StepReport) -> None:
        """Count the windows of a train step for their data sets."""
        if len(self._feed.datasets) > 1:
            owners = torch.from_numpy(self._feed.datasets_of(report.windows)).to(self._by_dataset.device)
            self._by_dataset[0].index_add_(0, owners, report.jloss_by_window.float())
            self._by_dataset[1].index_add_(0, owners, torch.ones_like(report.jloss_by_window, dtype=torch.float32))

    def row(self, report: StepReport, step: int, lr: float) -> dict[str, float]:
        """The row of train step `step`, the same on every process; begins to count anew."""
        now, wait = time.perf_counter(), self._feed.loader.wait_s
        elapsed = now - self._time
        total, jloss, sloss, *by_horizon = mean_over_processes(self._accelerator, report.losses).tolist()
        row = {
            "step": step,
            "epoch": self._feed.sampler.epoch(step * self._batches_per_step),
            "total": total,
            "jloss": jloss,
            "sloss": sloss,
            "lr": lr,
            "grad_norm": float(report.grad_norm),
            "samples_per_s": (step - self._step) * self._windows_per_step / elapsed,
            "loader_wait_share": (wait - self._wait) / elapsed,
            **{f"sloss_h{number}": value for number, value in enumerate(by_horizon, start=1)},
        }
        if len(self._feed.datasets) > 1:
            sums, counts = sum_over_processes(self._accelerator, self._by_dataset).tolist()
            shares = zip(self._feed.datasets, sums, counts, strict=True)
            row |= {f"jloss.{name}": total / count for name, total, count in shares if count}
        if self._accelerator.device.type == "cuda":
            row["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._accelerator.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self._accelerator.device)
        self._time, self._wait, self._step = now, wait, step
        self._by_dataset.zero_()
        return row
