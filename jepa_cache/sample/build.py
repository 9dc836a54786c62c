"""Builds the synthetic sample data set: tar shards of rendered episodes, and an index of the quirks that were put into each."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from jepa_cache.files import replaced_files
from jepa_cache.sample.episode import Recording, record_episode
from jepa_cache.sample.player import FPS_HZ, SampleConfig

INDEX = "index.json"
Recorded = TypeVar("Recorded")


def build_sample(out: Path, config: SampleConfig, *, num_workers: int) -> Path:
    """Render the synthetic data set into `out` as tar shards and an index, and return the index's path.

    All is published at once in place of an earlier data set, `index.json` last, so its presence means complete. One worker renders in
    this process. The bytes depend on the settings and library versions only, not on the workers.

    Cost: the 19,248 frames of the default settings take 80 to 110 s of CPU time, split among the workers, and 75 MB.
    """
    tars, num_episodes = [], config.num_episodes
    recorded = record_all(partial(record_episode, config), num_episodes, min(num_workers, num_episodes))
    recordings = iter(tqdm(recorded, total=num_episodes, desc="sample (synthetic)", unit="episode"))
    with replaced_files(out, INDEX, ["sample-*.tar"]) as fresh:
        for _ in range(0, num_episodes, config.episodes_per_tar):
            path = fresh / f"sample-{len(tars):06d}.tar"
            truths = _pack(path, islice(recordings, config.episodes_per_tar))
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            tars.append({"name": path.name, "sha256": digest, "num_bytes": len(content), "episodes": truths})
        write_index(fresh, config, fps_hz=FPS_HZ, tars=tars)
    return out / INDEX


def write_index(folder: Path, config: Any, **content: Any) -> None:
    """Write what a set of recordings was made with, and what is true of each."""
    index = {"synthetic": True, "config": asdict(config), **content}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def record_all(record: Callable[[int], Recorded], num_episodes: int, num_workers: int) -> Iterator[Recorded]:
    """Episodes 0 and on in order, as `record` makes them: in this process, or in several workers, which must be able to import it."""
    numbers = range(num_episodes)
    if num_workers == 1:
        yield from map(record, numbers)
        return
    # Spawned, not forked: the caller may hold threads (tqdm, torch) or an OpenGL context.
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(record, numbers)


def _pack(path: Path, recordings: Iterable[Recording]) -> list[dict[str, object]]:
    """Write episodes into one tar shard, and return their truths."""
    import webdataset  # Here: it imports torch, on which every spawned worker would spend seconds.

    truths = []
    # Fixed time and owner (TarWriter's own default), or the same episodes would give other bytes on every run.
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for recording in recordings:
            writer.write({"__key__": recording.key, "mp4": recording.video, "jsonl": recording.lines})
            truths.append(recording.truth)
    return truths
