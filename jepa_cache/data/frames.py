"""The video frames that steps in the cache were made of, from the recordings where those are still on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import CachedDataset, Segment
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit, build_source, iter_as_stored
from jepa_cache.store.digests import DigestTable


def read_frames(
    config: Config, dataset: CachedDataset, runs: Sequence[Segment], step_length: int = 1
) -> list[np.ndarray | None]:
    """Decode the anchor frames of every `step_length`-th step of some runs.

    Returns:
        For each run [T, h, w, 3] uint8, or None where its recording is not on this machine any more, was changed, or cannot be told
        from others of its unit after names changed.

    Raises:
        ValueError: A recording is there, but cannot be decoded.

    Cost: reads the whole unit (tar shard) of each run, once.
    """
    frames: list[np.ndarray | None] = [None] * len(runs)
    for store in sorted({run.store for run in runs}):
        part, entry = dataset.manifest.stores[store]
        files = DigestTable().find_unit(entry.unit_digest)
        if files is None:
            continue
        preset = next(preset for preset, _ in config.members if preset.name == part.dataset)
        source = build_source(preset.source, preset.source_options | ({"camera": part.camera} if part.camera else {}))
        numbers = dataset.steps(store).column("frame").to_numpy()
        wanted: dict[str, list[int]] = {}
        for position, run in enumerate(runs):
            if run.store == store:
                wanted.setdefault(run.episode, []).append(position)
        for recording in iter_as_stored(source, Unit(files[0].name, files), *dataset.recordings(store)):
            if recording.key in wanted:
                positions = wanted.pop(recording.key)
                spans = [numbers[runs[position].start : runs[position].stop : step_length] for position in positions]
                needed = np.unique(np.concatenate(spans))  # Ascending and each once, as a video is read.
                with open_video(
                    recording.video,
                    config.encode.decoder,
                    first_frame=recording.first_frame,
                    num_frames=len(recording.frame_ticks),
                ) as video:
                    decoded = video.read(needed)
                for position, span in zip(positions, spans, strict=True):
                    frames[position] = decoded[np.searchsorted(needed, span)]
                if not wanted:
                    break
    return frames
