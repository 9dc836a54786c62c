"""Actions and states at the steps of a store, from the controls that were kept: no video, no encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.actions import ActionSpace
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls, write_actions
from jepa_cache.store.layout import StoreDamagedError, read_store_file
from jepa_cache.store.reader import read_table


def aggregate_store(
    tokens_store: Path, controls_file: Path, space: ActionSpace
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Actions and states for every step of one token store.

    Args:
        tokens_store: Published store, of which only the step and segment tables are read.
        controls_file: Controls of the same unit.
        space: Rule of aggregation.

    Returns:
        actions [n, A] float32 (row i leads to step i+1, the last row of each segment NaN), states [n, S] float32, and for
        every episode that this action space cannot describe the reason; its rows are NaN.

    Raises:
        StoreDamagedError: The two are of other units.
    """
    ticks = read_table(tokens_store, layout.STEPS_FILE).column("tick").to_numpy()
    segments = read_table(tokens_store, layout.SEGMENTS_FILE).to_pylist()
    actions = np.full((len(ticks), len(space.actions)), np.nan, np.float32)
    states = np.full((len(ticks), len(space.states)), np.nan, np.float32)
    excluded: dict[str, str] = {}
    wanted: dict[str, list[dict[str, Any]]] = {}
    for segment in segments:
        wanted.setdefault(segment["episode"], []).append(segment)
    for episode, controls in iter_controls(controls_file):
        runs = wanted.pop(episode, [])
        try:
            for segment in runs:
                start, stop = segment["start"], segment["stop"]
                result = space.aggregate(controls, ticks[start:stop])
                actions[start : stop - 1] = result.actions
                states[start:stop] = result.states
        except ValueError as error:
            excluded[episode] = f"action space {space.name}: {error}"
            for segment in runs:
                actions[segment["start"] : segment["stop"]] = np.nan
                states[segment["start"] : segment["stop"]] = np.nan
    if wanted:
        raise StoreDamagedError(
            f"{tokens_store} holds {sorted(wanted)[0]!r}, of which the controls of its unit, {controls_file}, know nothing: it is "
            "another unit's store. Delete both and run `python stages/encode.py`, which makes them again"
        )
    return actions, states, excluded


def write_unit_actions(final: Path, tokens_store: Path, controls_file: Path, space: ActionSpace) -> None:
    """Aggregate one unit and publish the result; the store's metadata names columns and excluded episodes."""
    actions, states, excluded = aggregate_store(tokens_store, controls_file, space)
    metadata = {
        "actions": [column._asdict() for column in space.actions],
        "states": [column._asdict() for column in space.states],
        "excluded": excluded,
        "num_steps": len(actions),
        "steps_digest": read_store_file(tokens_store).metadata["steps_digest"],
    }
    write_actions(final, actions, states, metadata)
