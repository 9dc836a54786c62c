"""A data set in the cache, opened through its manifest: segments with their episodes, actions, states, tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jepa_cache.actions import ActionSpace, get_action_space
from jepa_cache.config.loading import data_base
from jepa_cache.config.schema import Config, FilterConfig, SplitConfig
from jepa_cache.data.filters import NO_FILTER, cut_runs, keep_steps, keep_ticks
from jepa_cache.data.splits import split_of
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls, read_actions
from jepa_cache.store.manifest import Manifest, find_missing, read_manifest
from jepa_cache.store.reader import StoreDamagedError, TokenReader, read_table
from jepa_cache.store.root import CacheRoot, resolve_cache_root
from jepa_cache.store.verify import read_store_file


class Segment(NamedTuple):
    """Steps [start, stop) of store number `store`, all of one episode."""

    store: int
    episode: str
    start: int
    stop: int


def open_dataset(config: Config, repository: Path) -> CachedDataset:
    """Open the data set that outputs/encode/manifest.json lists, after checking that it is the one params.yaml asks for.

    Raises:
        ValueError: When the manifest is missing, was made with other settings, or its stores are gone.
    """
    path = repository / "outputs/encode/manifest.json"
    manifest = read_manifest(path)
    sampling = manifest.recipe["sampling"]
    asked = {
        "dataset": (config.dataset.name, manifest.dataset),
        "encoder": (config.encoder.name, manifest.encoder),
        "encode.mode": (config.encode.mode, manifest.mode),
        "encode.fps": (config.encode.fps, sampling["fps"]),
        "encode.action_space": (config.encode.action_space, manifest.action_space),
        **{
            f"encode.{key}": (getattr(config.encode, key), manifest.recipe[key])
            for key in ("compute_dtype", "dtype", "decoder")
        },
    }
    if config.encode.mode == "clip":
        asked["encode.frames_per_clip"] = (config.encode.frames_per_clip, sampling["frames_per_clip"])
    differing = [f"{key} is {now!r}, the manifest has {then!r}" for key, (now, then) in asked.items() if now != then]
    if differing:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differing)}); run `python stages/encode.py` again"
        )
    return CachedDataset(manifest, resolve_cache_root(config.cache_root, data_base(repository)))


class CachedDataset:
    """Read access to everything a manifest lists; safe to use from several threads.

    Holds actions and states in memory (a few hundred bytes a step); tokens are read on demand.
    """

    def __init__(self, manifest: Manifest, root: CacheRoot) -> None:
        """Open the stores.

        Raises:
            ValueError: When a store that the manifest lists is gone or is another one now.
        """
        missing = find_missing(manifest, root)
        if missing:
            raise ValueError(
                f"{len(missing)} of the stores in the manifest are not in {root.path} (first: {missing[0]}); "
                "run `python stages/encode.py` to make them again, or set cache.root to where they are"
            )
        self.manifest = manifest
        self.space: ActionSpace = get_action_space(manifest.action_space)
        self.segments: list[Segment] = []
        self._token_paths: list[Path] = []
        self._action_paths: list[Path] = []
        self._readers: dict[int, TokenReader] = {}
        self._controls: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._root = root
        for number, (part, entry) in enumerate(manifest.stores):
            tokens = root.tokens(part.fingerprint, entry.unit_digest)
            actions = root.actions(part.action_fingerprint, entry.unit_digest)
            for path, digest in ((tokens, entry.tokens_digest), (actions, entry.actions_digest)):
                if read_store_file(path).digest != digest:
                    raise StoreDamagedError(
                        f"{path} is not the store that the manifest lists (its digest differs); run `python stages/encode.py`"
                    )
            excluded = read_store_file(actions).card["excluded"]
            self._token_paths.append(tokens)
            self._action_paths.append(actions)
            self.segments += [
                Segment(number, row["episode"], row["start"], row["stop"])
                for row in read_table(tokens, layout.SEGMENTS_FILE).to_pylist()
                if row["episode"] not in excluded
            ]

    def segments_of(self, split: str, config: SplitConfig, filters: FilterConfig = NO_FILTER) -> list[Segment]:
        """Segments of the episodes in one split ("train" or "val"), cut by the filters."""
        chosen = [
            segment
            for segment in self.segments
            if split_of(segment.episode, val_share=config.val_share, seed=config.seed) == split
        ]
        if filters == NO_FILTER:
            return chosen
        keep: dict[int, np.ndarray] = {}
        cut = []
        for segment in chosen:
            if segment.store not in keep:
                keep[segment.store] = self._kept_steps(segment.store, filters)
            runs = cut_runs(segment.start, segment.stop, keep[segment.store], filters.min_steps)
            cut += [segment._replace(start=start, stop=stop) for start, stop in runs]
        return cut

    def _kept_steps(self, store: int, filters: FilterConfig) -> np.ndarray:
        part, entry = self.manifest.stores[store]
        steps = read_table(self._token_paths[store], layout.STEPS_FILE)
        keep = keep_steps(steps, filters)
        if filters.drop_idle or filters.only_success:
            ticks = steps.column("tick").to_numpy()
            controls = dict(iter_controls(self._root.controls(part.source_fingerprint, entry.unit_digest)))
            for segment in (segment for segment in self.segments if segment.store == store):
                run = slice(segment.start, segment.stop)
                keep[run] &= keep_ticks(controls[segment.episode], filters)[ticks[run]]
        return keep

    def read_tokens(self, store: int, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, N, D] float16 with the raw tokens of the steps from `start` on.

        Raises:
            StoreDamagedError: Naming the chunk, the episode and the way out.
        """
        try:
            self._reader(store).read(start, out)
        except StoreDamagedError as error:
            episodes = {
                s.episode for s in self.segments if s.store == store and s.start < start + len(out) and start < s.stop
            }
            error.add_note(f"while reading episode {', '.join(sorted(episodes))}")
            raise

    def controls(self, store: int) -> tuple[np.ndarray, np.ndarray]:
        """Unscaled actions [n, A] and states [n, S] of a store, float32."""
        with self._lock:
            if store not in self._controls:
                self._controls[store] = read_actions(self._action_paths[store])
            return self._controls[store]

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _reader(self, store: int) -> TokenReader:
        with self._lock:
            if store not in self._readers:
                self._readers[store] = TokenReader(self._token_paths[store])
            return self._readers[store]


def count_episodes(segments: Sequence[Segment]) -> int:
    """Different episodes among segments."""
    return len({segment.episode for segment in segments})
