"""The windows that are shown: tokens from the cache, frames from the recording where it is at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jepa_cache.data.frames import read_frames
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.colours import TokenColours, fit_colours
from jepa_cache.evaluation.context import ChosenWindows, EvaluationContext
from jepa_cache.evaluation.plots import Strip
from jepa_cache.evaluation.windows import WindowErrors

CPU = torch.device("cpu")

NUM_FITTED = 8  # windows that the colours are fitted on


def spread_positions(count: int, num: int) -> list[int]:
    """Up to `num` positions spread over a list of `count`, away from its ends."""
    return sorted({(2 * i + 1) * count // (2 * num) for i in range(num)})


def fit_window_colours(errors: WindowErrors, evaluation: EvaluationContext) -> TokenColours:
    """Colours fitted on the true tokens of up to 8 windows, spread over all that were measured."""
    index, numbers = errors.chosen
    numbers = [numbers[position] for position in spread_positions(len(numbers), NUM_FITTED)]
    return fit_colours(evaluation.read_windows(index, numbers, CPU)[1].flatten(0, 1).numpy())


@torch.no_grad()
def build_strips(
    positions: Sequence[int], errors: WindowErrors, evaluation: EvaluationContext, colours: TokenColours
) -> list[Strip]:
    """Everything needed to draw the windows at `positions` of the measured ones, all painted in `colours`."""
    dataset, device = evaluation.dataset, evaluation.device
    settings, manifest = evaluation.config.evaluate, dataset.manifest
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    chosen = ChosenWindows(errors.chosen.index, [errors.chosen.numbers[position] for position in positions])
    runs = [
        segment._replace(start=window.start, stop=window.start + stop)
        for segment, window in zip(chosen.segments, chosen.windows, strict=True)
    ]
    batch, h = evaluation.read_windows(*chosen, CPU)
    h = h[:, :stop]
    predicted = evaluation.model.open_loop(
        h[:, :context].to(device),
        batch.actions[:, : stop - 1].to(device),
        batch.states[:, : stop - 1].to(device),
        settings.horizon,
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
            zip(chosen.segments, read_frames(evaluation.config, dataset, runs), strict=True)
        )
    ]
