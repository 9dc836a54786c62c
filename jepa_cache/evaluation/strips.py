"""The windows that are shown as strips: tokens from the cache, frames from the recording where it is at hand."""

from __future__ import annotations

import numpy as np
import torch

from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset, Segment
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.scaler import Scaler
from jepa_cache.episode import Episode
from jepa_cache.evaluation.plots import Strip, token_colours
from jepa_cache.evaluation.run import WindowErrors
from jepa_cache.media.video import open_video
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import as_reps, open_loop
from jepa_cache.sources import Unit, build_source
from jepa_cache.store import layout
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot


@torch.no_grad()
def build_strip(
    position: int,
    errors: WindowErrors,
    predictor: ACPredictor,
    config: Config,
    dataset: CachedDataset,
    scaler: Scaler,
    root: CacheRoot,
    *,
    normalize_reps: bool,
) -> Strip:
    """Everything needed to draw the window at `position` of the measured ones."""
    settings, manifest = config.evaluate, dataset.manifest
    context, stop = settings.num_context_steps, settings.num_context_steps + settings.horizon
    number = errors.numbers[position]
    batch = WindowLoader(dataset, errors.index, scaler).read([number])
    device = next(predictor.parameters()).device
    h = as_reps(batch.tokens, normalize_reps)
    predicted = open_loop(
        predictor,
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
        frames=_read_frames(config, dataset, root, segment, window.start, stop),
        true=true_colours,
        predicted=predicted_colours,
        error=(predicted - true[context:]).abs().mean(dim=-1).reshape(-1, *manifest.grid).numpy(),
    )


def _read_frames(
    config: Config, dataset: CachedDataset, root: CacheRoot, segment: Segment, start: int, num_steps: int
) -> np.ndarray | None:
    """Anchor frames [T, h, w, 3] of a window; None when its recording is not on this machine any more."""
    part, entry = dataset.manifest.stores[segment.store]
    files = DigestTable().find_unit(entry.unit_digest)
    if files is None:
        return None
    steps = read_table(root.tokens(part.fingerprint, entry.unit_digest), layout.STEPS_FILE)
    frames = steps.column("frame").to_numpy()[start : start + num_steps]
    preset = next(preset for preset, _ in config.members if preset.name == part.dataset)
    options = preset.source_options | ({"camera": part.camera} if part.camera else {})
    source = build_source(preset.source, options)
    for recording in source.iter_episodes(Unit(files[0].name, files)):
        if isinstance(recording, Episode) and recording.key == segment.episode:
            video = open_video(recording.video, config.encode.decoder, first_frame=recording.first_frame)
            try:
                return video.read(frames)
            finally:
                video.close()
    raise ValueError(
        f"{files[0]} has the digest of the unit that held episode {segment.episode!r}, but does not hold it"
    )
