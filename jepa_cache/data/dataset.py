"""A data set in the cache, opened through its manifest. Read this file first.

windows    runs of T steps inside a segment, and which is drawn when
filters    which steps windows may hold
scaler     standardisation of actions and states
loader     batches of windows, read ahead
cameras    steps that several cameras see as one
ablations  the same windows with other actions
frames     the video frames of cached steps
"""

from __future__ import annotations

import fnmatch
import hashlib
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jepa_cache.actions import ActionSpace, get_action_space, is_space
from jepa_cache.config.loading import data_base, manifest_path
from jepa_cache.config.schema import Config, FilterConfig, SplitConfig
from jepa_cache.data.cameras import Segment, join_cameras
from jepa_cache.data.filters import NO_FILTER, cut_runs, join_steps, keep_steps, keep_ticks, needs_controls, ranges_path
from jepa_cache.poses import read_ranges
from jepa_cache.store import layout
from jepa_cache.store.check import Recording, find_equal
from jepa_cache.store.controls import iter_controls, read_actions
from jepa_cache.store.layout import check_identity, read_store_file
from jepa_cache.store.manifest import Manifest, read_manifest, why_held_back
from jepa_cache.store.quantisation import Channels, get_codec
from jepa_cache.store.reader import ArrayReader, read_keys, read_table
from jepa_cache.store.remote import resolve_cache_root
from jepa_cache.store.root import CacheRoot

TRAIN, VAL = "train", "val"


def split_of(episode: str, *, val_share: float, seed: int) -> str:
    """Return the split of one episode, decided by a hash of its key, so that adding recordings never moves one.

    `val_share` is the expected share of held-out episodes, in [0, 1].
    """
    return VAL if _draw(episode, seed) < val_share else TRAIN


def _draw(episode: str, seed: int) -> float:
    """A number in [0, 1) that is an episode's own."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{episode}".encode()).digest()[:8], "big") / 2**64


def choose_held_out(episodes: Iterable[str], config: SplitConfig) -> set[str]:
    """The held-out ones of a data set's episodes.

    Raises:
        ValueError: `held_out` has a pattern that fits no key, or fits all of them.
    """
    keys = sorted(set(episodes))
    if config.held_out:
        found = {pattern: set(fnmatch.filter(keys, pattern)) for pattern in config.held_out}
        held_out = set().union(*found.values())
        if empty := [pattern for pattern, some in found.items() if not some]:
            raise ValueError(
                f"split.held_out: {empty[0]!r} fits no episode; their keys are such as {', '.join(keys[:3])}"
            )
        if len(held_out) == len(keys):
            raise ValueError(f"split.held_out fits all {len(keys)} episodes, so none is left to train on")
        return held_out
    if _is_exact(len(keys), config):
        number = min(max(2, round(config.val_share * len(keys))), len(keys) - 1)
        return set(sorted(keys, key=lambda key: _draw(key, config.seed))[:number])
    return {key for key in keys if split_of(key, val_share=config.val_share, seed=config.seed) == VAL}


def _is_exact(num_episodes: int, config: SplitConfig) -> bool:
    return 0 < num_episodes < config.exact_below and 0 < config.val_share < 1 and not config.held_out


def open_dataset(config: Config, repository: Path) -> CachedDataset:
    """Open the data set that encode/manifest.json of the project's outputs lists, if it is the one that params.yaml asks for.

    Raises:
        ValueError: When the manifest is missing, older than an encode that failed, or made with other settings, or its
            stores are gone.
    """
    path = manifest_path(config, repository)
    if (reason := why_held_back(path)) is not None:
        raise ValueError(reason)
    manifest = read_manifest(path)
    if differing := find_differences(config, manifest):
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differing)}); give those here too (key=value, a file of settings, params.yaml), or run "
            "`python stages/encode.py` again with the present ones"
        )
    base = data_base(repository)
    root = resolve_cache_root(config.cache.root, base)
    how = {"verify_checksums": config.cache.verify_checksums, "joins_cameras": config.cache.join_cameras}
    return CachedDataset(manifest, root, base=base, **how)


def find_differences(config: Config, manifest: Manifest) -> list[str]:
    """List each setting of stage one that the manifest was not made with, with both values.

    A newer RECIPE_VERSION of a source is no difference, nor is an option that one of the two does not know: old caches
    stay usable.
    """
    encode, recipe, parts = config.encode, manifest.recipe, manifest.parts
    sampling, encoder = recipe["sampling"], recipe["encoder"]
    pairs: dict[str, tuple[Any, Any]] = {
        "dataset": (config.dataset.name, manifest.dataset),
        "encoder": (config.encoder.name, manifest.encoder),
        "encode.mode": (encode.mode, manifest.mode),
        "encode.fps": (encode.fps, sampling["fps"]),
        "encode.action_space": (
            manifest.action_space if is_space(encode.action_space, manifest.action_space) else encode.action_space,
            manifest.action_space,
        ),
        **{f"encode.{key}": (getattr(encode, key), recipe[key]) for key in ("compute_dtype", "dtype", "decoder")},
        "encode.pool": (encode.pool, recipe.get("pool", 1)),  # absent where off
        "encode.cameras": (list(encode.cameras), _unique(part.camera for part in parts if part.camera)),
    }
    if not isinstance(encode.phases, str):
        pairs["encode.phases"] = (_unique(encode.phases), _unique(part.phase for part in parts))
    if "single_frame" in encoder:
        pairs["encode.single_frame"] = (encode.single_frame, encoder["single_frame"])
    if encode.mode == "clip":
        pairs["encode.frames_per_clip"] = (encode.frames_per_clip, sampling["frames_per_clip"])
    presets = {preset.name: preset for preset, _ in config.members} if config.dataset.name == manifest.dataset else {}
    for part in parts:
        then = part.recipe["source"]
        for key, value in presets[part.dataset].source_options.items() if part.dataset in presets else ():
            # Maps are left to `status`; the camera of a part with a name of its own is that of encode.cameras.
            if key in then and not isinstance(value, dict) and not (key == "camera" and part.camera):
                pairs[f"source_options.{key} of {part.dataset}"] = (value, then[key])
    return [f"{key} is {now!r}, the manifest has {then!r}" for key, (now, then) in pairs.items() if now != then]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


class CachedDataset:
    """Read access to everything a manifest lists; safe to use from several threads.

    Holds actions and states in memory (a few hundred bytes a step); tokens are read on demand.
    """

    def __init__(
        self,
        manifest: Manifest,
        root: CacheRoot,
        *,
        base: Path | None = None,
        verify_checksums: bool = True,
        joins_cameras: bool = False,
    ) -> None:
        """Open the stores; files that filters name are meant from `base`, None being the folder of all data.

        Under `joins_cameras` a step has the tokens of all cameras, one below the other in the grid; numbers of stores and all but the
        tokens are those of the first camera.

        Raises:
            ValueError: When a store that the manifest lists is gone or is another one now, the tokens in a bucket do
                not fit onto this machine, or cameras cannot be joined.
        """
        keys = [part.keys(entry) for part, entry in manifest.stores]
        self._token_paths: list[Path] = [root.store(tokens) for tokens, _, _ in keys]
        self._action_paths: list[Path] = [root.store(actions) for _, actions, _ in keys]
        paths = [*self._token_paths, *self._action_paths]
        root.prefetch(paths)
        if missing := [path for path in paths if not root.fetch(path)]:
            raise ValueError(
                f"{len(missing)} of the stores in the manifest are not in {root.name} (first: {missing[0]}); "
                "run `python stages/encode.py` to make them again, or set cache.root to where they are"
            )
        self.manifest = manifest
        self._held = ExitStack()
        self._held.enter_context(root.pulled(self._token_paths))
        self.dtype: str = manifest.recipe["dtype"]  # in which tokens are stored
        self.scheme = get_codec(self.dtype)
        self.space: ActionSpace = get_action_space(manifest.action_space)
        self.segments: list[Segment] = []
        # Of each store by episode: the true rate of steps, its video's frame rate over its stride.
        self.step_hz: list[dict[str, float]] = []
        self._readers: dict[tuple[int, str], ArrayReader] = {}
        self._channels: dict[int, Channels] = {}
        self._controls: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._root, self._base = root, base or data_base()
        self._cut: dict[tuple[str, SplitConfig, FilterConfig], list[Segment]] = {}
        self._verify_checksums = verify_checksums
        self._copies: dict[str, str] | None = None
        named: set[tuple[str, str]] | None = None  # columns, as all stores do
        for number, entry in enumerate(manifest.entries):
            tokens = self._token_paths[number]
            stated = check_identity(tokens, read_store_file(tokens), entry.tokens_digest)
            names = set(stated.provenance.get(layout.COLUMN_NAMES, {}).items())
            named = names if named is None else named & names
            actions = self._action_paths[number]
            excluded = check_identity(actions, read_store_file(actions), entry.actions_digest).metadata["excluded"]
            named_columns = ("episode", "start", "stop", "step_hz")
            table = read_table(tokens, layout.SEGMENTS_FILE, stated, named_columns).to_pydict()
            self.step_hz.append(dict(zip(table["episode"], table["step_hz"], strict=True)))
            rows = zip(table["episode"], table["start"], table["stop"], strict=True)
            self.segments += [Segment(number, *row) for row in rows if row[0] not in excluded]
        self.column_names = dict(sorted(named or ()))  # as the data set calls them
        self.space = self.space.named(self.column_names)
        self.cameras: tuple[str, ...] = ()  # that a step has the tokens of, where they are joined
        self._others: dict[int, np.ndarray] = {}
        if joins_cameras:
            ticks = lambda store: self.steps(store).column("tick").to_numpy()  # noqa: E731
            self.cameras, self.segments, self._others = join_cameras(manifest, self.segments, ticks)
            (rows, columns), num_views = manifest.grid, len(self.cameras)
            self.manifest = replace(
                manifest, num_tokens=num_views * manifest.num_tokens, grid=(num_views * rows, columns)
            )

    def segments_of(self, split: str, config: SplitConfig, filters: FilterConfig = NO_FILTER) -> list[Segment]:
        """Return the segments of the episodes in one split ("train" or "val"), cut by the filters; worked out once.

        Episodes that a list of ranges does not know are skipped, as openpi does; how many is said on stderr. Recordings
        of one content are on one side, and of held-out ones only the first is taken: others would count as further
        evidence.

        Raises:
            ValueError: A filter needs a record that an episode does not have, or `keep_ranges` fits no episode.
        """
        key = split, config, filters
        if key not in self._cut:
            copies = self.find_copies()
            held_out = choose_held_out(self._originals(), config)
            chosen = [
                segment
                for segment in self.segments
                if (copies.get(segment.episode, segment.episode) in held_out) == (split == VAL)
                and (split == TRAIN or segment.episode not in copies)
            ]
            self._cut[key] = chosen if filters == NO_FILTER else self._cut_segments(split, chosen, filters)
        return list(self._cut[key])

    def _originals(self) -> set[str]:
        copies = self.find_copies()
        return {copies.get(segment.episode, segment.episode) for segment in self.segments}

    def describe_split(self, config: SplitConfig) -> dict[str, Any]:
        """What of a split's settings decides which episodes of this data set are held out, for a run's description."""
        exact = {"exact_below": config.exact_below} if _is_exact(len(self._originals()), config) else {}
        named = {"held_out": list(config.held_out)} if config.held_out else {}
        return {"val_share": config.val_share, "seed": config.seed, **named, **exact}

    def _cut_segments(self, split: str, chosen: Sequence[Segment], filters: FilterConfig) -> list[Segment]:
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
                f"filter.keep_ranges: {len(beyond)} {split} segments have fewer ticks than the list keeps of them (first: {beyond[0]}); was it "
                "made of another release?",
                file=sys.stderr,
            )
        return cut

    def find_copies(self) -> dict[str, str]:
        """Episodes that are another's recording once more, and the first of its keys; looked for once, and said on stderr.

        See `store.check.find_equal`. Of an episode that is there in several views the first is compared.
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
        if unknown := [episode for episode in episodes if episode not in ranges]:
            print(
                f"filter.keep_ranges: {len(unknown)} of {len(episodes)} {split} episodes are not in {path.name} and are skipped "
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
        steps, episode = self.steps(store), runs[0].episode
        try:
            keep, joined = keep_steps(steps, filters), np.ones(len(steps), bool)
            ticks = steps.column("tick").to_numpy()
            controls = self.read_native_controls(store) if needs_controls(filters) else {}
            for segment in runs if controls else ():
                episode = segment.episode
                known = None if ranges is None else ranges.get(episode, [])
                left = keep_ticks(controls[episode], filters, known)
                if (last := max((end for _, end in known or ()), default=0)) > len(left):
                    beyond.append(f"{episode}, {len(left)} ticks, kept to {last}")
                run = slice(segment.start, segment.stop)
                keep[run] &= left[ticks[run]]
                joined[run] = join_steps(left, ticks[run])
        except ValueError as error:
            raise ValueError(f"episode {episode!r}: {error}") from error
        return keep, joined

    def steps(self, store: int) -> pa.Table:
        """Return the step table of a store, `store.layout.STEPS_SCHEMA`: one row a step."""
        return read_table(self._token_paths[store], layout.STEPS_FILE)

    def step_rates(self, segments: Sequence[Segment]) -> tuple[float, float, float]:
        """The least, the middle and the greatest true rate of steps of some segments, Hz."""
        rates = sorted(self.step_hz[segment.store][segment.episode] for segment in segments)
        return rates[0], rates[len(rates) // 2], rates[-1]

    def read_tokens(self, store: int, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, N, D] with the tokens of the steps from `start` on as they are stored: int4 [T, N, D / 2].

        Raises:
            StoreDamagedError: Naming the chunk, its episodes and the way out; so do the next two.
        """
        self._read(layout.TOKENS, store, start, out)

    def read_token_scales(self, store: int, start: int, out: np.ndarray) -> None:
        """Fill `out` [T, N] float32 with the scales of the same steps, where codes are stored; int4 [T, N, D / 64] float16."""
        self._read(layout.TOKEN_SCALES, store, start, out)

    def _read(self, name: str, store: int, start: int, out: np.ndarray) -> None:
        if not self.cameras:
            self._reader(store, name).read(start, out)
            return
        num_tokens = out.shape[1] // len(self.cameras)
        piece = np.empty((len(out), num_tokens, *out.shape[2:]), out.dtype)
        for view, (of, row) in enumerate([(store, start), *self._others[store][start].tolist()]):
            self._reader(of, name).read(row, piece)
            out[:, view * num_tokens : (view + 1) * num_tokens] = piece

    def channels(self, store: int, start: int = 0) -> Channels:
        """Return the channels' scales and means of a store, where codes are stored: [D] float32 each; of joined cameras [cameras, D], at a step."""
        views = [store, *(self._others[store][start, :, 0].tolist() if self.cameras else ())]
        found = [self._channels.get(view) or self._read_channels(view) for view in views]
        return Channels(*map(np.stack, zip(*found, strict=True))) if self.cameras else found[0]

    def _read_channels(self, store: int) -> Channels:
        arrays = []
        for name in (layout.CHANNEL_SCALES, layout.CHANNEL_MEANS):
            arrays.append(np.empty(self.manifest.width, np.float32))
            self._reader(store, name).read(0, arrays[-1])
        self._channels[store] = Channels(*arrays)
        return self._channels[store]

    def controls(self, store: int, step_length: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Return unscaled actions [n, A] and states [n, S] of a store, float32.

        Row i of the actions leads from step i to i + step_length; it is NaN where no segment reaches so far. Worked out once.
        """
        if (known := self._controls.get((store, step_length))) is not None:
            return known
        with self._lock:
            if (store, 1) not in self._controls:
                self._controls[store, 1] = read_actions(self._action_paths[store])
            if (store, step_length) not in self._controls:
                actions, states = self._controls[store, 1]
                self._controls[store, step_length] = _compose_rows(actions, step_length, self.space), states
            return self._controls[store, step_length]

    def controls_of(self, segment: Segment) -> tuple[np.ndarray, np.ndarray]:
        """Return unscaled actions [n-1, A], without the last row, which leads nowhere, and states [n, S] of a segment.

        Raises:
            ValueError: One of them is not finite, as in stores of releases that did not look.
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

    def recordings(self, store: int) -> tuple[list[str], list[str]]:
        """Keys of the recordings of a store in the order of its unit, and of those that were skipped, as they were called when it was made."""
        return read_keys(self._token_paths[store])

    def read_native_controls(self, store: int) -> dict[str, dict[str, np.ndarray]]:
        """Return the raw controls of a store, episode to name to [M]; a StoreDamagedError where the file is not whole."""
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
        # Without the lock where it is open already: a window of a small encoder is read in 10 microseconds.
        if (reader := self._readers.get((store, name))) is not None:
            return reader
        with self._lock:
            if (store, name) not in self._readers:
                self._readers[store, name] = ArrayReader(
                    self._token_paths[store], name, verify_checksums=self._verify_checksums
                )
            return self._readers[store, name]


def _compose_rows(actions: np.ndarray, step_length: int, space: ActionSpace) -> np.ndarray:
    """Of actions [n, A] of single steps those [n, A] float32 that lead over `step_length`; NaN where one of them is."""
    composed = np.full_like(actions, np.nan)
    if len(actions) >= step_length:
        runs = np.lib.stride_tricks.sliding_window_view(actions, step_length, axis=0).swapaxes(1, 2)  # [n-k+1, k, A]
        leads = np.isfinite(runs).all(axis=(1, 2))
        if leads.any():
            composed[: len(runs)][leads] = space.compose(runs[leads])
    return composed
