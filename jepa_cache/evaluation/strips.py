"""The windows that are shown as strips: tokens from the cache, frames from the recording where it is at hand."""

from __future__ import annotations

import torch

from jepa_cache.data.frames import read_frames
from jepa_cache.data.loader import WindowLoader, to_device
from jepa_cache.evaluation.plots import Strip, token_colours
from jepa_cache.evaluation.subject import Subject
from jepa_cache.evaluation.windows import WindowErrors
from jepa_cache.predictor.rollout import as_reps, open_loop


@torch.no_grad()
def build_strip(position: int, errors: WindowErrors, subject: Subject) -> Strip:
    """Everything needed to draw the window at `position` of the measured ones."""
    dataset, normalize_reps, device = subject.dataset, subject.normalize_reps, subject.device
    settings, manifest = subject.config.evaluate, dataset.manifest
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    number = errors.numbers[position]
    batch = to_device(WindowLoader(dataset, errors.index, subject.scaler).read([number]), torch.device("cpu"))
    h = as_reps(batch.tokens, normalize_reps)
    predicted = open_loop(
        subject.predictor,
        h[:, :context].to(device),
        batch.actions[:, : stop - 1].to(device),
        batch.states[:, : stop - 1].to(device),
        settings.horizon,
        normalize_reps=normalize_reps,
    )[0].cpu()
    true = h[0, :stop]
    true_colours, predicted_colours = token_colours(true.numpy(), predicted.numpy(), manifest.grid)
    window = errors.index[number]
    segment = errors.index.segments[window.segment]
    return Strip(
        title=f"{segment.episode}, steps {window.start - segment.start} to {window.start - segment.start + stop - 1}"
        + ("" if manifest.encoder_trained else " (encoder untrained)"),
        frames=read_frames(subject.config, dataset, [segment._replace(start=window.start, stop=window.start + stop)])[
            0
        ],
        true=true_colours,
        predicted=predicted_colours,
        error=(predicted - true[context:]).abs().mean(dim=-1).reshape(-1, *manifest.grid).numpy(),
    )
