"""The windows that are shown: tokens from the cache, frames from the recording where it is at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jepa_cache.data.frames import read_frames
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.colours import TokenColours, fit_colours
from jepa_cache.evaluation.plots import Strip
from jepa_cache.evaluation.subject import Subject
from jepa_cache.evaluation.windows import WindowErrors
from jepa_cache.predictor.rollout import as_reps, open_loop

CPU = torch.device("cpu")

NUM_FITTED = 8  # windows that the colours are fitted on


def spread_positions(count: int, num: int) -> list[int]:
    """Up to `num` positions spread over a list of `count`, away from its ends."""
    return sorted({(2 * i + 1) * count // (2 * num) for i in range(num)})


def fit_window_colours(errors: WindowErrors, subject: Subject) -> TokenColours:
    """Colours fitted on the true tokens of up to 8 windows, spread over all that were measured."""
    numbers = [errors.numbers[position] for position in spread_positions(len(errors.numbers), NUM_FITTED)]
    batch = to_device(WindowLoader(subject.dataset, errors.index, subject.scaler).read(numbers), CPU)
    return fit_colours(as_reps(batch.tokens, subject.normalize_reps).flatten(0, 1).numpy())


@torch.no_grad()
def build_strips(
    positions: Sequence[int], errors: WindowErrors, subject: Subject, colours: TokenColours
) -> list[Strip]:
    """Everything needed to draw the windows at `positions` of the measured ones, all painted in `colours`."""
    dataset, normalize_reps, device = subject.dataset, subject.normalize_reps, subject.device
    settings, manifest = subject.config.evaluate, dataset.manifest
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    windows = [errors.index[errors.numbers[position]] for position in positions]
    segments = [errors.index.segments[window.segment] for window in windows]
    runs = [
        segment._replace(start=window.start, stop=window.start + stop)
        for segment, window in zip(segments, windows, strict=True)
    ]
    numbers = [errors.numbers[position] for position in positions]
    batch = to_device(WindowLoader(dataset, errors.index, subject.scaler).read(numbers), CPU)
    h = as_reps(batch.tokens, normalize_reps)[:, :stop]
    predicted = open_loop(
        subject.predictor,
        h[:, :context].to(device),
        batch.actions[:, : stop - 1].to(device),
        batch.states[:, : stop - 1].to(device),
        settings.horizon,
        normalize_reps=normalize_reps,
    ).cpu()
    error = (predicted - h[:, context:]).abs().mean(dim=-1).unflatten(-1, manifest.grid).numpy()
    first_rows = first_cached_rows(dataset.segments)
    begins = [run.start - first_rows[run.store, run.episode] for run in runs]
    note = "" if manifest.encoder_trained else " (encoder untrained)"
    return [
        Strip(
            title=f"{segment.episode}, steps {begins[number]} to {begins[number] + stop - 1}{note}",
            frames=frames,
            true=colours.paint(h[number].numpy(), manifest.grid),
            predicted=colours.paint(predicted[number].numpy(), manifest.grid),
            error=error[number],
        )
        for number, (segment, frames) in enumerate(
            zip(segments, read_frames(subject.config, dataset, runs), strict=True)
        )
    ]
