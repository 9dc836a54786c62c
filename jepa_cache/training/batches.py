"""Batches on the device: training windows in the sampler's order, and windows of every held-out episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from jepa_cache.config.schema import Config, TrainConfig
from jepa_cache.data.ablations import SHUFFLED, action_ablations
from jepa_cache.data.dataset import TRAIN, VAL, CachedDataset, Segment, split_of
from jepa_cache.data.loader import Batch, WindowLoader
from jepa_cache.data.scaler import Scaler
from jepa_cache.data.windows import (
    LEAST_HELD_OUT,
    WindowGroup,
    WindowIndex,
    WindowSampler,
    count_episodes,
    spread_windows,
)
from jepa_cache.predictor.compressed import Blocks, CompressedPredictor
from jepa_cache.training.latents import FIT_STEPS, FIT_WINDOWS, LatentDataset, TokenReader, halve

VALIDATION_WINDOWS_PER_EPISODE = 4
STOP_STREAM = (
    2**32
)  # beyond the seeds of splits: which training episodes are put aside must not depend on which are held out


class TrainingData:
    """The windows of both splits, as batches on the device.

    Attributes:
        num_windows: Training windows.
        datasets: Names of the members of a mixture, else the one data set.
        validation: Numbers of the held-out windows, or of those put aside by `stop_share`; empty where no such episode is long enough.
        compares: Whether there are held-out episodes enough to give windows the actions of another one.
    """

    def __init__(self, config: Config, dataset: CachedDataset, scaler: Scaler, accelerator: Accelerator) -> None:
        """Index the windows of both splits; a ValueError where no training segment holds one."""
        settings, device = config.train, accelerator.device
        self._settings, self._device, self._dataset, self._scaler = settings, device, dataset, scaler
        self._rank, self._num_processes = accelerator.process_index, accelerator.num_processes
        self.datasets = list(dict.fromkeys(part.dataset for part in dataset.manifest.parts))
        segments, held_out = _split(dataset, config)
        self._index = index = WindowIndex(
            segments, settings.window_steps, settings.step_lengths, settings.time_reversal
        )
        self.num_windows = len(index)
        self.sampler = WindowSampler(
            len(index),
            settings.batch_size,
            seed=settings.seed,
            rank=self._rank,
            world_size=self._num_processes,
            groups=mixture_groups(dataset, index),
        )
        self.validation: list[int] = []
        self.compares = False
        self._val_index: WindowIndex | None = None
        if lengths := validation_step_lengths(held_out, settings):
            self._val_index = index = WindowIndex(held_out, settings.window_steps, lengths)
            self.validation = spread_windows(index, max(1, VALIDATION_WINDOWS_PER_EPISODE // len(lengths)))
            self.compares = len({index.segments[index[n].segment].episode for n in self.validation}) > 1
            if self.compares:
                others = action_ablations(dataset, scaler, index, self.validation, seed=settings.seed)[SHUFFLED]
                self._shuffled = torch.empty(others.shape, pin_memory=device.type == "cuda")
                self._shuffled.copy_(torch.from_numpy(others))
                self._places = {number: place for place, number in enumerate(self.validation)}
        self._open(dataset)

    def _open(self, dataset: CachedDataset | LatentDataset) -> None:
        """Read windows from `dataset` from now on."""
        num_threads = self._settings.num_loader_threads
        self.loader = WindowLoader(dataset, self._index, self._scaler, num_threads=num_threads)
        if self._val_index is not None:
            self._val_loader = WindowLoader(dataset, self._val_index, self._scaler, num_threads=num_threads)

    def compress(self, predictor: CompressedPredictor, *, fit: bool) -> None:
        """Read latents from now on, which are computed here, once; `fit` fits the components to all training steps first."""
        if fit:
            predictor.compressor.fit(self._blocks(self._index.segments), predictor.whitening)
        held_out = self._val_index.segments if self._val_index else []
        self._open_latents(predictor, [*self._index.segments, *held_out])

    def compress_half(self, predictor: CompressedPredictor, *, read: bool) -> set[str]:
        """Fit the components to half of the training episodes and the kept share to the others; `read` latents of these components then.

        On steps that components were fitted to, what they do not hold is the noise that they were not fitted to: of ten episodes the
        share that stays seemed to be -0.1 of it, and on others it was 0.8. So whatever is chosen beside the components is chosen here.

        Returns:
            The episodes that the components were not fitted to; all of them where there is one episode, or the others hold no window.
        """
        settings, segments = self._settings, self._index.segments
        fitted, apart = halve(segments, self._dataset.find_copies())
        span = settings.window_steps - 1
        longest = max((it.stop - it.start for it in apart), default=0)
        lengths = [step_length for step_length in settings.step_lengths if span * step_length < longest]
        if not lengths:
            fitted, apart, lengths = segments, segments, settings.step_lengths
        predictor.compressor.fit(self._blocks(fitted), predictor.whitening)
        windows = self._reader(WindowIndex(apart, settings.window_steps, lengths, settings.time_reversal))
        predictor.fit_share(tokens for _, tokens in windows.read(FIT_WINDOWS))
        if read:
            self._open_latents(predictor, segments)
        return {segment.episode for segment in apart}

    def _reader(self, index: WindowIndex) -> TokenReader:
        how = {"normalize_reps": self._settings.normalize_reps, "device": self._device}
        return TokenReader(self._dataset, self._scaler, index, **how)

    def _blocks(self, segments: Sequence[Segment]) -> Blocks:
        steps = self._reader(WindowIndex(segments, 1))
        return lambda: (tokens for _, tokens in steps.read(FIT_STEPS))

    def _open_latents(self, predictor: CompressedPredictor, segments: Sequence[Segment]) -> None:
        self._open(LatentDataset(self._dataset, predictor.compressor, self._reader(WindowIndex(segments, 1))))

    def shuffled_actions(self, numbers: np.ndarray) -> torch.Tensor:
        """Return for a batch [B] of `validation_batches` the scaled actions [B, T-1, A] of another episode, the same every time."""
        first = self._places[int(numbers[0])]
        return self._shuffled[first : first + len(numbers)].to(self._device, non_blocking=True)

    def batches(self, first_step: int, num_steps: int) -> Iterator[Batch]:
        """Return the batches of the training steps that follow `first_step`, `grad_accumulation` for each."""
        per_step = self._settings.grad_accumulation
        turns = range(first_step * per_step, num_steps * per_step)
        return self.loader.iterate(map(self.sampler.numbers, turns), self._device)

    def batches_in_order(self) -> Iterator[Batch]:
        """Return every training window once, in the order of their numbers."""
        size = self._settings.batch_size
        chunks = (range(start, min(start + size, self.num_windows)) for start in range(0, self.num_windows, size))
        return self.loader.iterate(chunks, self._device)

    def episodes_of(self, numbers: np.ndarray) -> list[str]:
        """Return the key of the episode that each training window [n] lies in."""
        return [self._index.segments[self._index[int(number)].segment].episode for number in numbers]

    def recordings_of(self, numbers: np.ndarray) -> list[str]:
        """Return the same, where episodes that are copies of one recording have one key."""
        copies = self._dataset.find_copies()
        return [copies.get(name, name) for name in self.episodes_of(numbers)]

    def validation_batches(self) -> Iterator[Batch]:
        """Return this process's share of the validation windows; over all processes each window once."""
        size = self._settings.batch_size
        chunks = [self.validation[start : start + size] for start in range(0, len(self.validation), size)]
        return self._val_loader.iterate(chunks[self._rank :: self._num_processes], self._device)

    def datasets_of(self, numbers: np.ndarray, *, held_out: bool = False) -> np.ndarray:
        """Return for each window number [B] the position in `datasets` of the data set that it is drawn from."""
        index = self._val_index if held_out else self._index
        stores = [index[int(number)].store for number in numbers]
        return np.array([self.datasets.index(self._dataset.manifest.stores[store][0].dataset) for store in stores])

    def describe(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Say of training windows [B] their data set, episode, first step, number of steps and steps of the cache between them."""
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
                    "step_length": window.step_length,
                }
            )
        return described


def validation_step_lengths(held_out: Sequence[Segment], settings: TrainConfig) -> list[int]:
    """Step lengths of the validation: those of the training, forward in time, that two held-out episodes hold, else that one does.

    So that every window can be given the actions of another episode over as many steps.
    """
    holding = {
        step_length: count_episodes(
            [it for it in held_out if it.stop - it.start > (settings.window_steps - 1) * step_length]
        )
        for step_length in settings.step_lengths
    }
    least = min(LEAST_HELD_OUT, max(holding.values()))
    return [step_length for step_length, count in holding.items() if count >= max(1, least)]


def _split(dataset: CachedDataset, config: Config) -> tuple[list[Segment], list[Segment]]:
    """Segments to train on, and those to validate on: the held-out ones, or under `stop_share` some training episodes."""
    segments = dataset.segments_of(TRAIN, config.split, config.filter)
    share = config.train.stop_share
    if not share:
        return segments, dataset.segments_of(VAL, config.split, config.filter)
    copies = dataset.find_copies()
    aside = {
        segment.episode: split_of(
            copies.get(segment.episode, segment.episode), val_share=share, seed=config.split.seed + STOP_STREAM
        )
        for segment in segments
    }
    parts = {split: [segment for segment in segments if aside[segment.episode] == split] for split in (TRAIN, VAL)}
    for split, segments in parts.items():
        if not segments:
            raise ValueError(
                f"train.stop_share {share:g} of the {len(aside)} training episodes leaves {'none to train on' if split == TRAIN else 'none aside'}; "
                "set it between, add recordings, or set it to 0 to validate on the held-out episodes"
            )
    return parts[TRAIN], parts[VAL]


def mixture_groups(dataset: CachedDataset, index: WindowIndex) -> list[WindowGroup]:
    """Return number of windows and weight of every data set, in the order of the index: what a sampler draws by."""
    counts: dict[str, int] = {part.dataset: 0 for part in dataset.manifest.parts}
    weights = {part.dataset: part.weight for part in dataset.manifest.parts}
    for segment, count in zip(index.segments, index.counts(), strict=True):
        counts[dataset.manifest.stores[segment.store][0].dataset] += count
    return [WindowGroup(count, weights[name]) for name, count in counts.items()]
