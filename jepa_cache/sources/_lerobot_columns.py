"""Which numbers of a LeRobot row become which controls: `observation.state[0:7]`, `action[gripper]`, `is_episode_successful`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.config.parsing import nearest
from jepa_cache.episode import RecordingError

PATTERN = re.compile(r"(?P<column>[^\[\]]+)(\[(?P<part>[^\[\]]+)\])?")
SLICE = re.compile(r"(?P<start>[0-9]{0,6}):(?P<stop>[0-9]{0,6})")
FLAGS = ("gui", "success")


class Selection(NamedTuple):
    """A column and what of it: an index, a slice, a name from info.json, or all (None)."""

    text: str
    column: str
    part: int | slice | str | None


def parse_selection(text: str) -> Selection:
    """Read `column`, `column[3]`, `column[0:7]` or `column[name]`.

    Raises:
        ValueError: Something else.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"lerobot source: {text!r} is no selection; write column, column[3], column[0:7] or column[name]"
        )
    part = match["part"]
    if part is None:
        return Selection(text, match["column"], None)
    if part.isdecimal():
        return Selection(text, match["column"], int(part))
    if (bounds := SLICE.fullmatch(part)) is not None:
        start, stop = (int(bounds[end]) if bounds[end] else None for end in ("start", "stop"))
        return Selection(text, match["column"], slice(start, stop))
    return Selection(text, match["column"], part)


def find_indices(texts: Sequence[str], features: Mapping[str, Any]) -> dict[str, int | None]:
    """Of the selections by name, which number of the column each means by info.json; None where it gives no such name."""
    indices = {}
    for selection in map(parse_selection, texts):
        if isinstance(selection.part, str):
            names = _read_names(features.get(selection.column))
            indices[selection.text] = names.index(selection.part) if selection.part in names else None
    return indices


def select(selection: Selection, rows: Mapping[str, np.ndarray], features: Mapping[str, Any]) -> np.ndarray:
    """The selected numbers of each row.

    Args:
        selection: What to take.
        rows: Column to [M, W].
        features: `features` of info.json, for names.

    Returns:
        [M, K].

    Raises:
        RecordingError: The column is narrower, or has no number of that name.
    """
    values = rows[selection.column]
    part = selection.part
    if isinstance(part, str):
        names = _read_names(features.get(selection.column))
        if part not in names:
            raise RecordingError(f"{selection.text}: meta/info.json gives no such name{nearest(part, names)}")
        part = names.index(part)
    if isinstance(part, int):
        part = slice(part, part + 1)
    width = values.shape[1]
    start, stop, _ = (part or slice(None)).indices(1 << 20)
    if part is not None and ((part.stop is not None and part.stop > width) or start >= min(stop, width)):
        raise RecordingError(f"{selection.text}: the column has {width} numbers, counted from 0")
    return values[:, part] if part is not None else values


def build_controls(
    rows: Mapping[str, np.ndarray],
    features: Mapping[str, Any],
    *,
    actions: tuple[str, ...],
    states: tuple[str, ...],
    columns: Mapping[str, str],
) -> dict[str, np.ndarray]:
    """Controls [M]: action_0.. and state_0.. in the order selected, and the columns that have a name of their own.

    Raises:
        RecordingError: A selection does not fit, or a named column selects more than one number.
    """
    controls = {}
    for prefix, texts in (("action", actions), ("state", states)):
        numbers = [column for text in texts for column in select(parse_selection(text), rows, features).T]
        controls |= {f"{prefix}_{index}": column.copy() for index, column in enumerate(numbers)}
    for name, text in columns.items():
        values = select(parse_selection(text), rows, features)
        if values.shape[1] != 1:
            raise RecordingError(f"{name}: {text} selects {values.shape[1]} numbers; one is needed, e.g. {text}[0]")
        kind = bool if name in FLAGS else np.float32 if name == "idle" else np.float64
        controls[name] = values[:, 0].astype(kind)
    return controls


def _read_names(feature: Any) -> list[str]:
    """The names of a feature's numbers: a list, or lists in an object ({"motors": [...]})."""
    names = feature.get("names") if isinstance(feature, Mapping) else None
    if isinstance(names, Mapping):
        names = [name for part in names.values() if isinstance(part, list) for name in part]
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
