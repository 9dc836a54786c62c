"""The first recordings of a data set, for trying things out: what lies behind them is neither read nor hashed.

A unit that has to be cut becomes files of its own in this machine's state folder, with the first recordings in them. They have a
digest of their own, so a part of a unit can never be taken for the whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from jepa_cache.config.machine import state_folder
from jepa_cache.files import held_file, make_folder
from jepa_cache.sources import Head, Source, Unit, find_obstacle

MARKER = "unit.json"


def take_recordings(source: Source, units: Sequence[Unit], most: int) -> tuple[list[Unit], tuple[str, ...]]:
    """The units that hold the first recordings, the last of them cut where it holds more than are left.

    Args:
        source: Of the units; where it has no `take_first`, each unit counts as one recording and is taken whole.
        units: In the order of the source.
        most: Recordings, unusable ones included.

    Returns:
        The units, and a note for the manifest where anything was left out.
    """
    taken: list[Unit] = []
    left = most
    for unit in units:
        if left <= 0:
            break
        head = _take(source, unit, left)
        taken.append(head.unit)
        left -= head.num_recordings
    if taken == list(units):
        return taken, ()
    note = f"encode.max_episodes is {most}: only the first {most - max(left, 0)} recordings are in here"
    if unread := len(units) - len(taken):
        note += f"; {unread} of {len(units)} units were not read at all"
    return taken, (note,)


def _take(source: Source, unit: Unit, most: int) -> Head:
    """The head of a unit, made once: a bucket would be asked for the same recordings in every run."""
    take_first = getattr(source, "take_first", None)
    if take_first is None or find_obstacle(unit) is not None:
        return Head(unit, 1)
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in unit.files]
    key = hashlib.sha256(json.dumps([source.recipe, stamps, most], sort_keys=True).encode()).hexdigest()[:32]
    folder = state_folder() / "first" / key
    make_folder(folder.parent)
    with held_file(folder.with_suffix(".lock")):
        if (known := _read(folder)) is not None:
            return known
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            head = take_first(unit, most, folder)
        except OSError:  # no permission, say; met again when the unit is hashed, and named there
            head = Head(unit, 1)
        if head.unit == unit:
            shutil.rmtree(folder)
        else:
            made = {"name": head.unit.name, "files": [str(file) for file in head.unit.files]}
            (folder / MARKER).write_text(json.dumps({**made, "num_recordings": head.num_recordings}))
        return head


def _read(folder: Path) -> Head | None:
    """What was made earlier, if it is whole; the marker comes last."""
    if not (folder / MARKER).is_file():
        return None
    made = json.loads((folder / MARKER).read_text())
    files = tuple(Path(name) for name in made["files"])
    if not all(file.is_file() for file in files):
        return None
    return Head(Unit(made["name"], files), made["num_recordings"])
