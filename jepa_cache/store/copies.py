"""Recordings that are in a data set more than once, whatever their keys: the same actions, states and pictures."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jepa_cache.store import layout
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot


class Recording(NamedTuple):
    """One recording in store number `store` of a manifest: its key, and its runs of steps [start, stop)."""

    store: int
    key: str
    runs: tuple[tuple[int, int], ...]


def recall_copies(manifest: Manifest) -> str | None:
    """What `note_copies` was told of a manifest on this machine; None where nobody has looked."""
    name = f"copies:{manifest.digest}"
    return DigestTable().recall([name]).get(name)


def note_copies(manifest: Manifest, told: str) -> None:
    """Remember a sentence on the recordings of a manifest that are equal; an empty one where there are none."""
    DigestTable().note({f"copies:{manifest.digest}": told})


def find_equal(
    manifest: Manifest,
    root: CacheRoot,
    recordings: Iterable[Recording],
    read_rows: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> list[list[Recording]]:
    """The recordings of one part that are equal, in groups of two and more.

    Equal are those with the same actions, states and runs whose pictures have the same brightness at all steps. Tokens
    are not compared: the place in a batch may change their last bits.

    `read_rows` gives the actions [n, A] and states [n, S] of a store.

    Cost: actions and states of all stores, and the step tables of those that are alike in them.
    """
    alike: dict[bytes, list[Recording]] = {}
    for recording in recordings:
        hasher = hashlib.sha256(manifest.stores[recording.store][0].fingerprint.encode())
        _add_rows(hasher, recording, read_rows(recording.store))
        alike.setdefault(hasher.digest(), []).append(recording)

    @functools.lru_cache(maxsize=8)  # those that are alike often lie in one store
    def read_luma(store: int) -> list[np.ndarray]:
        part, entry = manifest.stores[store]
        steps = read_table(root.tokens(part.fingerprint, entry.unit_digest), layout.STEPS_FILE)
        return [steps.column(name).to_numpy() for name in ("luma_mean", "luma_std")]

    equal: dict[tuple[bytes, bytes], list[Recording]] = {}
    for digest, some in alike.items():
        for recording in some if len(some) > 1 else ():
            hasher = hashlib.sha256()
            _add_rows(hasher, recording, read_luma(recording.store))
            equal.setdefault((digest, hasher.digest()), []).append(recording)
    return [some for some in equal.values() if len(some) > 1]


def _add_rows(hasher: hashlib._Hash, recording: Recording, columns: Iterable[np.ndarray]) -> None:
    for values in columns:
        for start, stop in recording.runs:
            hasher.update(f"{stop - start}\n".encode())
            hasher.update(np.ascontiguousarray(values[start:stop]))
