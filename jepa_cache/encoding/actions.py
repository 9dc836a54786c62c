"""Actions and states at the steps of a store, from the controls that were kept: no video, no encoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from jepa_cache.actions import ActionSpace
from jepa_cache.encoding.groups import EncodingGroup
from jepa_cache.encoding.task import read_whole, remove_damaged
from jepa_cache.encoding.units import check_unchanged
from jepa_cache.episode import Episode
from jepa_cache.sources import Unit, take_key
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls, list_episodes, publish_controls, write_actions
from jepa_cache.store.layout import StoreDamagedError, StoreFile
from jepa_cache.store.reader import read_keys, read_table
from jepa_cache.store.root import CacheRoot


def ensure_actions(root: CacheRoot, group: EncodingGroup, unit: Unit, tokens: StoreFile | None = None) -> StoreFile:
    """Sum up the unit's actions unless they exist; what the store.json of the actions says.

    Token stores of two recipes share their actions as long as their steps are the same. They are not where a video can
    be decoded under one recipe only, for its episode is then missing in the other.
    """
    store, tokens_store = group.actions(root, unit), group.tokens(root, unit)
    steps_digest = (tokens or root.find_store(tokens_store)).metadata["steps_digest"]

    def fits(found: StoreFile | None) -> bool:
        return found is not None and found.metadata.get("steps_digest") == steps_digest

    if fits(found := read_whole(root, store)):
        return found
    with root.claimed(store):
        if fits(found := remove_damaged(root, store, "making")):  # another encoder made them meanwhile
            return found
        if found is not None:
            root.remove(store)
        space = group.space
        actions, states, excluded = aggregate_store(tokens_store, ensure_controls(root, group, unit), space)
        metadata = {
            "actions": [column._asdict() for column in space.actions],
            "states": [column._asdict() for column in space.states],
            "excluded": excluded,
            "num_steps": len(actions),
            "steps_digest": steps_digest,
        }
        write_actions(store, actions, states, metadata)
        root.publish(store)
    return root.find_store(store)


def read_first_keys(root: CacheRoot, controls: Path) -> list[str]:
    """What the recordings of a unit were called when its controls were written, in their order; none where there are no whole ones.

    Stores of other recipes take these names, whatever folders are called since: controls and actions are theirs too, and one recording
    is on one side of the split in all of them.
    """
    with suppress(StoreDamagedError):
        root.fetch(controls)
    return list_episodes(controls) or []


def ensure_controls(root: CacheRoot, group: EncodingGroup, unit: Unit) -> Path:
    """The unit's controls, beside its tokens; read from the recordings again where they are missing or damaged. Decodes nothing."""
    controls = group.controls(root, unit)
    with suppress(StoreDamagedError):  # in the bucket; a whole copy here is as good
        root.fetch(controls)
    if list_episodes(controls) is None:
        root.remove(controls)
        tokens = group.tokens(root, unit)
        left, skipped = read_keys(tokens) if root.fetch(tokens) else ([], [])
        recordings = (it for it in group.source.iter_episodes(unit) if isinstance(it, Episode))
        named = ((take_key(it.key, left, skipped) or it.key, it.controls) for it in recordings)
        write_controls(root, controls, named, unit)
    return controls


def write_controls(
    root: CacheRoot, path: Path, controls: Iterable[tuple[str, Mapping[str, np.ndarray]]], unit: Unit | None = None
) -> None:
    """Write and publish the controls of a unit unless they are there; damaged ones in a bucket are replaced."""
    try:
        if root.fetch(path):
            return
    except StoreDamagedError:  # in the bucket
        root.remove(path)

    def checked() -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
        yield from controls
        if unit is not None:  # before anything is published
            check_unchanged(unit)

    publish_controls(path, checked())
    root.publish(path)


def aggregate_store(
    tokens_store: Path, controls_file: Path, space: ActionSpace
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Actions [n, A] and states [n, S], float32, for the n steps of one token store.

    Row i of the actions leads to step i+1, the last row of each segment is NaN. The last value has the reason for every
    episode that this action space cannot describe; its rows are NaN. StoreDamagedError where the files are of two
    units.
    """
    ticks = read_table(tokens_store, layout.STEPS_FILE).column("tick").to_numpy()
    actions = np.full((len(ticks), len(space.actions)), np.nan, np.float32)
    states = np.full((len(ticks), len(space.states)), np.nan, np.float32)
    excluded: dict[str, str] = {}
    wanted: dict[str, list[tuple[int, int]]] = {}
    for segment in read_table(tokens_store, layout.SEGMENTS_FILE).to_pylist():
        wanted.setdefault(segment["episode"], []).append((segment["start"], segment["stop"]))
    for episode, controls in iter_controls(controls_file):
        runs = wanted.pop(episode, [])
        try:
            for start, stop in runs:
                result = space.aggregate(controls, ticks[start:stop])
                actions[start : stop - 1], states[start:stop] = result.actions, result.states
        except ValueError as error:
            excluded[episode] = f"action space {space.name}: {error}"
            for start, stop in runs:
                actions[start:stop] = states[start:stop] = np.nan
    if wanted:
        raise StoreDamagedError(
            f"{tokens_store} holds {sorted(wanted)[0]!r}, of which the controls of its unit, {controls_file}, know nothing: it is "
            "another unit's store. Delete both and run `python stages/encode.py`, which makes them again"
        )
    return actions, states, excluded
