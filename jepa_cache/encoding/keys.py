"""Which recordings of a part share a key or a content: one key for two recordings is refused, equal ones are named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jepa_cache.encoding.parts import Part
from jepa_cache.store import layout
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot

MAX_SHOWN = 10


class Place(NamedTuple):
    """One recording in the cache: its key, and the name and digest of its unit."""

    key: str
    unit: str
    digest: str

    def __str__(self) -> str:
        return f"{self.key} in {self.unit}"


def compare_recordings(root: CacheRoot, part: Part) -> list[str]:
    """Sentences that name the recordings of a part that are equal: the same pictures at their steps and the same controls.

    Raises:
        ValueError: Units hold different recordings under one key, which everything later would take for one episode.

    Cost: the step table of every store, and the controls of those that may be equal or share a key.
    """
    by_key: dict[str, list[Place]] = {}
    by_steps: dict[bytes, list[Place]] = {}
    for unit, digest in part.units:
        for key, steps in _iter_steps(root, part, digest):
            place = Place(key, unit.name, digest)
            by_key.setdefault(key, []).append(place)
            by_steps.setdefault(steps, []).append(place)
    equal = [group for places in by_steps.values() if len(places) > 1 for group in _group(root, part, places)]
    same = {place: number for number, group in enumerate(equal) for place in group}
    clashes = [
        places
        for places in by_key.values()
        if len(places) > 1 and len({same.get(place, place) for place in places}) > 1
    ]
    if clashes:
        raise ValueError(
            f"{len(clashes)} keys name different recordings in several units: {_shorten(clashes, ' and ')}. They would count as one "
            "episode. Rename one of each (a folder of its own in the tar is enough) or leave its unit out; what was encoded is kept"
        )
    if not equal:
        return []
    num_copies = sum(len(group) - 1 for group in equal)
    return [f"{num_copies} recordings have the same content as another one: {_shorten(equal, ' = ')}"]


def _iter_steps(root: CacheRoot, part: Part, digest: str) -> Iterator[tuple[str, bytes]]:
    """Key and a digest of the brightness of the pictures at all steps, for each episode of a store."""
    store = root.tokens(part.tokens, digest)
    steps = read_table(store, layout.STEPS_FILE)
    luma = np.stack([steps.column(name).to_numpy() for name in ("luma_mean", "luma_std")])
    runs: dict[str, list[np.ndarray]] = {}
    for row in read_table(store, layout.SEGMENTS_FILE).to_pylist():
        runs.setdefault(row["episode"], []).append(luma[:, row["start"] : row["stop"]])
    for key, pieces in runs.items():
        yield key, hashlib.sha256(np.ascontiguousarray(np.concatenate(pieces, axis=1))).digest()


def _group(root: CacheRoot, part: Part, places: Sequence[Place]) -> list[list[Place]]:
    """The places whose controls are equal, in groups of two and more."""
    groups: dict[bytes, list[Place]] = {}
    for digest in sorted({place.digest for place in places}):
        path = root.controls(part.controls, digest)
        root.fetch(path)
        keys = {place.key: place for place in places if place.digest == digest}
        for key, controls in iter_controls(path):
            if key in keys:
                groups.setdefault(_digest_controls(controls), []).append(keys[key])
    return [group for group in groups.values() if len(group) > 1]


def _digest_controls(controls: Mapping[str, np.ndarray]) -> bytes:
    hasher = hashlib.sha256()
    for name in sorted(controls):
        values = np.ascontiguousarray(controls[name])
        hasher.update(f"{name} {values.dtype.str} {len(values)}\n".encode())
        hasher.update(values.data)
    return hasher.digest()


def _shorten(groups: Sequence[Sequence[Place]], joint: str) -> str:
    shown = [
        joint.join(map(str, group[:MAX_SHOWN])) + (" ..." if len(group) > MAX_SHOWN else "")
        for group in groups[:MAX_SHOWN]
    ]
    return "; ".join(shown) + (f"; and {len(groups) - MAX_SHOWN} more" if len(groups) > MAX_SHOWN else "")
