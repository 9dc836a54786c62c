"""A data set in the cache, opened through its manifest: segments with their episodes, actions, states, tokens."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from jepa_cache.actions import ActionSpace, get_action_space
from jepa_cache.config.loading import data_base
from jepa_cache.config.schema import Config, FilterConfig, SplitConfig
from jepa_cache.data.agreement import find_differences
from jepa_cache.data.filters import (
    NO_FILTER,
    cut_runs,
    join_steps,
    keep_steps,
    keep_ticks,
    needs_controls,
    ranges_path,
)
from jepa_cache.data.splits import TRAIN, split_of
from jepa_cache.idle import read_ranges
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls, read_actions
from jepa_cache.store.copies import Recording, find_equal
from jepa_cache.store.layout import StoreFile, check_identity, read_store_file
from jepa_cache.store.manifest import Manifest, find_missing, read_manifest, why_held_back
from jepa_cache.store.quantisation import Channels, get_codec
from jepa_cache.store.reader import ArrayReader, StoreDamagedError, read_table
from jepa_cache.store.remote import resolve_cache_root
from jepa_cache.store.root import CacheRoot


class Segment(NamedTuple):
    """Steps [start, stop) of store number `store`, all of one episode."""

    store: int
    episode: str
    start: int
    stop: int


def open_dataset(config: Config, repository: Path) -> CachedDataset:
    """Open the data set that outputs/encode/manifest.json lists, after checking that it is the one params.yaml asks for.

    Raises:
        ValueError: When the manifest is missing, older than an encode that failed, or made with other settings, or its stores
            are gone.
    """
    path = repository / "outputs/encode/manifest.json"
    if (reason := why_held_back(path)) is not None:
        raise ValueError(reason)
    manifest = read_manifest(path)
    differing = find_differences(config, manifest)
    if differing:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differing)}); run `python stages/encode.py` again"
        )
    base = data_base(repository)
    root = resolve_cache_root(config.cache_root, base)
    return CachedDataset(manifest, root, base=base, verify_checksums=config.verify_checksums)


class CachedDataset:
    """Read access to everything a manifest lists; safe to use from several threads.

    Holds actions and states in memory (a few hundred bytes a step); tokens are read on demand.
    """

    def __init__(
        self, manifest: Manifest, root: CacheRoot, *, base: Path | None = None, verify_checksums: bool = True
    ) -> None:
        """Open the stores.

        Args:
            manifest: What to open.
            root: Where the stores are.
            base: Folder that files named by filters are meant from; None is that of all data.
            verify_checksums: Check the crc32c of each chunk of tokens when it is first read.

        Raises:
            ValueError: When a store that the manifest lists is gone or is another one now, or the tokens in a bucket do not fit
                onto this machine.
        """
        missing = find_missing(manifest, root)
        if missing:
            raise ValueError(
                f"{len(missing)} of the stores in the manifest are not in {root.name} (first: {missing[0]}); "
                "run `python stages/encode.py` to make them again, or set cache.root to where they are"
            )
        self.manifest = manifest
        self._held = ExitStack()
        self._held.enter_context(
            root.pulled([root.tokens(part.fingerprint, entry.unit_digest) for part, entry in manifest.stores])
        )
        self.dtype: str = manifest.recipe["dtype"]  # in which tokens are stored
        self.scheme = get_codec(self.dtype)
        self.space: ActionSpace = get_action_space(manifest.action_space)
        self.segments: list[Segment] = []
        self._token_paths: list[Path] = []
        self._action_paths: list[Path] = []
        self._readers: dict[tuple[int, str], ArrayReader] = {}
        self._channels: dict[int, Channels] = {}
        self._controls: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._root, self._base = root, base or data_base()
        self._cut: dict[tuple[str, SplitConfig, FilterConfig], list[Segment]] = {}
        self._verify_checksums = verify_checksums
        self._copies: dict[str, str] | None = None
        for number, (part, entry) in enumerate(manifest.stores):
            tokens = root.tokens(part.fingerprint, entry.unit_digest)
            actions = root.actions(part.action_fingerprint, entry.unit_digest)
            stated, aggregated = (
                _read_listed(path, digest)
                for path, digest in ((tokens, entry.tokens_digest), (actions, entry.actions_digest))
            )
            excluded = aggregated.metadata["excluded"]
            self._token_paths.append(tokens)
            self._action_paths.append(actions)
            self.segments += [
                Segment(number, row["episode"], row["start"], row["stop"])
                for row in read_table(tokens, layout.SEGMENTS_FILE, stated, ("episode", "start", "stop")).to_pylist()
                if row["episode"] not in excluded
            ]

    def segments_of(self, split: str, config: SplitConfig, filters: FilterConfig = NO_FILTER) -> list[Segment]:
        """Segments of the episodes in one split ("train" or "val"), cut by the filters; worked out once.

        Episodes that a list of ranges does not know are left out, as openpi does; how many is said on stderr. Recordings of one content
        are on one side, and of held-out ones only the first is taken: others would count as further evidence.

        Raises:
            ValueError: A filter needs a record that an episode does not have, or `keep_ranges` fits no episode.
        """
        asked = split, config, filters
        if asked not in self._cut:
            self._cut[asked] = self._cut_segments(*asked)
        return list(self._cut[asked])

    def _cut_segments(self, split: str, config: SplitConfig, filters: FilterConfig) -> list[Segment]:
        copies = self.find_copies()
        chosen = [
            segment
            for segment in self.segments
            if split_of(copies.get(segment.episode, segment.episode), val_share=config.val_share, seed=config.seed)
            == split
            and (split == TRAIN or segment.episode not in copies)
        ]
        if filters == NO_FILTER:
            return chosen
        ranges = self._read_ranges(split, filters, sorted({segment.episode for segment in chosen}))
        cut, beyond = [], []
        for store, group in groupby(chosen, key=lambda segment: segment.store):
            runs = list(group)
            keep, joined = self._kept_steps(store, runs, filters, ranges, beyond)
            for segment in runs:
                pieces = cut_runs(segment.start, segment.stop, keep, joined, filters.min_steps)
                cut += [segment._replace(start=start, stop=stop) for start, stop in pieces]
        if chosen and not cut and split == TRAIN:
            active = [f"{key}={value!r}" for key, value in vars(filters).items() if value != getattr(NO_FILTER, key)]
            raise ValueError(
                f"filter: no step of the {len({segment.episode for segment in chosen})} episodes of the split {split!r} is left by "
                f"{', '.join(active)}; loosen it, or see with `jepa-cache inspect` whether the recordings are what you expect"
            )
        if beyond:
            print(
                f"filter.keep_ranges: {len(beyond)} {split} segments have fewer ticks than the list keeps of them (first: {beyond[0]}); "
                "was it made of another release?",
                file=sys.stderr,
            )
        return cut

    def find_copies(self) -> dict[str, str]:
        """Episodes that are another's recording once more, and the first of its keys; looked for once, and said on stderr.

        See `store.copies.find_equal`. Of an episode that is there in several views the first is compared.
        """
        if self._copies is None:
            recordings: dict[str, Recording] = {}
            for (store, key), group in groupby(self.segments, key=lambda segment: (segment.store, segment.episode)):
                recordings.setdefault(key, Recording(store, key, tuple((it.start, it.stop) for it in group)))
            equal = find_equal(self.manifest, self._root, recordings.values(), self.controls)
            groups = (sorted(recording.key for recording in some) for some in equal)
            self._copies = {copy: first for first, *copies in groups for copy in copies}
            if self._copies:
                copy, original = next(iter(self._copies.items()))
                print(
                    f"recordings that repeat another one: {len(self._copies)} (first: {copy} is {original}). They are on one side of the "
                    "split with it, and count once in evaluation",
                    file=sys.stderr,
                )
        return self._copies

    def _read_ranges(
        self, split: str, filters: FilterConfig, episodes: Sequence[str]
    ) -> dict[str, list[tuple[int, int]]] | None:
        path = ranges_path(filters, self._base)
        if path is None:
            return None
        ranges = read_ranges(path)
        if not any(segment.episode in ranges for segment in self.segments):
            raise ValueError(
                f"filter.keep_ranges: {path} lists {len(ranges)} episodes and none of this data set, whose first is "
                f"{self.segments[0].episode if self.segments else None!r}; its first is {next(iter(ranges), None)!r}"
            )
        unknown = [episode for episode in episodes if episode not in ranges]
        if unknown:
            print(
                f"filter.keep_ranges: {len(unknown)} of {len(episodes)} {split} episodes are not in {path.name} and are left out "
                f"(first: {unknown[0]})",
                file=sys.stderr,
            )
        return ranges

    def _kept_steps(
        self,
        store: int,
        runs: Sequence[Segment],
        filters: FilterConfig,
        ranges: dict[str, list[tuple[int, int]]] | None,
        beyond: list[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the steps [n] of a store, those that may be in a window, and those that the next one may follow."""
        steps = self.steps(store)
        try:
            keep, joined = keep_steps(steps, filters), np.ones(len(steps), bool)
        except ValueError as error:
            raise ValueError(f"episode {runs[0].episode!r}: {error}") from error
        if needs_controls(filters):
            ticks = steps.column("tick").to_numpy()
            controls = self.read_native_controls(store)
            for segment in runs:
                known = None if ranges is None else ranges.get(segment.episode, [])
                try:
                    left = keep_ticks(controls[segment.episode], filters, known)
                except ValueError as error:
                    raise ValueError(f"episode {segment.episode!r}: {error}") from error
                last = max((end for _, end in known or ()), default=0)
                if last > len(left):
                    beyond.append(f"{segment.episode}, {len(left)} ticks, kept to {last}")
                run = slice(segment.start, segment.stop)
                keep[run] &= left[ticks[run]]
                joined[run] = join_steps(left, ticks[run])
        return keep, joined

    def steps(self, store: int) -> pa.Table:
        """The step table of a store, `store.layout.STEPS_SCHEMA`: one row a step."""
        return read_table(self._token_paths[store], layout.STEPS_FILE)

    def step_hz(self, store: int) -> dict[str, float]:
        """True rate of steps of every episode in a store: its video's frame rate over its stride."""
        table = read_table(self._token_paths[store], layout.SEGMENTS_FILE)
        return dict(zip(table.column("episode").to_pylist(), table.column("step_hz").to_pylist(), strict=True))

    def read_tokens(self, store: int, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, N, D] with the tokens of the steps from `start` on as they are stored: int4 [T, N, D / 2].

        Raises:
            StoreDamagedError: Naming the chunk, the episode and the way out.
        """
        self._read(store, layout.TOKENS, start, out)

    def read_token_scales(self, store: int, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, N] float32 with the scales of the same steps, where codes are stored; int4 [T, N, D / 64] float16.

        Raises:
            StoreDamagedError: Naming the chunk, the episode and the way out.
        """
        self._read(store, layout.TOKEN_SCALES, start, out)

    def channels(self, store: int) -> Channels:
        """The channels' scales and means of a store, where codes are stored: [D] float32 each.

        Raises:
            StoreDamagedError: Naming the file and the way out.
        """
        if store not in self._channels:
            arrays = []
            for name in (layout.CHANNEL_SCALES, layout.CHANNEL_MEANS):
                arrays.append(np.empty(self.manifest.width, np.float32))
                self._reader(store, name).read(0, arrays[-1])
            self._channels[store] = Channels(*arrays)
        return self._channels[store]

    def _read(self, store: int, name: str, start: int, out: np.ndarray) -> None:
        try:
            self._reader(store, name).read(start, out)
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

    def controls_of(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Unscaled actions [n-1, A], without the last row, which leads nowhere, and states [n, S] of a segment, float32.

        Raises:
            ValueError: One of them is not finite, as in stores of releases that did not look; the episode and the way out are named.
        """
        actions, states = self.controls(segment.store)
        rows = actions[segment.start : segment.stop - 1], states[segment.start : segment.stop]
        for values, columns in zip(rows, (self.space.actions, self.space.states), strict=True):
            if not np.isfinite(values).all():
                step, column = np.argwhere(~np.isfinite(values))[0]
                raise ValueError(
                    f"episode {segment.episode!r}, step {step}: {columns[column].name} is {values[step, column]:g}, which nothing can be "
                    f"trained on; remove {self._action_paths[segment.store]} and run `python stages/encode.py`, which makes it again "
                    "without that episode"
                )
        return rows

    def read_native_controls(self, store: int) -> dict[str, dict[str, np.ndarray]]:
        """Raw controls of a store: episode to name to [M]; reads a whole file, StoreDamagedError where it is not whole."""
        part, entry = self.manifest.stores[store]
        file = self._root.controls(part.source_fingerprint, entry.unit_digest)
        self._root.fetch(file)
        return dict(iter_controls(file))

    def close(self) -> None:
        """Close all files, and let the stores of a bucket make room for others."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._held.close()

    def _reader(self, store: int, name: str) -> ArrayReader:
        with self._lock:
            if (store, name) not in self._readers:
                self._readers[store, name] = ArrayReader(
                    self._token_paths[store], name, verify_checksums=self._verify_checksums
                )
            return self._readers[store, name]


def _read_listed(store: Path, digest: str) -> StoreFile:
    """What store.json says of a store that must be the one of this digest."""
    stated = check_identity(store, read_store_file(store))
    if stated.digest != digest:
        raise StoreDamagedError(
            f"{store} is not the store that the manifest lists (its digest differs); run `python stages/encode.py`"
        )
    return stated
