"""Several fixed cameras of one recording as one step: which rows of their stores belong together.

Every camera has its own stores, as its frames were encoded alone. What is joined are steps of one episode, data set and starting
offset whose anchors lie on the same row of the recording's controls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jepa_cache.store.manifest import Manifest


class Segment(NamedTuple):
    """Steps [start, stop) of store number `store`, all of one episode."""

    store: int
    episode: str
    start: int
    stop: int


def join_cameras(
    manifest: Manifest, segments: Sequence[Segment], read_ticks: Callable[[int], np.ndarray]
) -> tuple[tuple[str, ...], list[Segment], dict[int, np.ndarray]]:
    """Join the stores of a manifest's cameras; how many episodes and steps that leaves out is said on stderr.

    Args:
        manifest: Of two cameras or more, the same ones in every data set of a mixture.
        segments: All of them, of all cameras.
        read_ticks: Of a store the row of the controls [n] that each of its steps lies on.

    Returns:
        The cameras; the episodes that all of them saw, in the stores of the first one; and of each of its stores where its steps lie for the
        others, [steps, cameras - 1, 2] store and row, -1 outside of segments.

    Raises:
        ValueError: There is one camera only, data sets of a mixture have other cameras, or no episode is left.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for part in manifest.parts:
        groups.setdefault((part.dataset, part.phase), []).append(str(part.camera))
    found = {tuple(cameras) for cameras in groups.values()}
    cameras = next(iter(found))
    if len(found) > 1 or len(cameras) < 2:
        raise ValueError(
            f"cache.join_cameras makes one step of what several cameras see, the same ones in every data set; the manifest has "
            f"{' and '.join('[' + ', '.join(each) + ']' for each in sorted(found))}. Name them, as in encode.cameras=[exterior_1, exterior_2], "
            "or set cache.join_cameras=false"
        )
    views: dict[tuple[str, int, str], dict[str, list[Segment]]] = {}
    for segment in segments:
        part = manifest.stores[segment.store][0]
        key = part.dataset, part.phase, segment.episode
        views.setdefault(key, {}).setdefault(str(part.camera), []).append(segment)
    ticks = {store: read_ticks(store) for store in {segment.store for segment in segments}}
    others, joined, lacking, apart = {}, [], [], []
    for (*_, episode), seen in views.items():
        if len(seen) < len(cameras):
            lacking.append(f"{episode}, by {' and '.join(camera for camera in cameras if camera in seen)} alone")
            continue
        places = _line_up([seen[camera] for camera in cameras], ticks)
        if not len(places):
            apart.append(episode)
            continue
        # A run ends where one of the cameras goes on in another segment, or misses a step.
        ends = 1 + np.flatnonzero((np.diff(places, axis=0) != (0, 0, 1)).any(axis=(1, 2)))
        for run in np.split(places, ends):
            store, _, start = run[0, 0].tolist()
            joined.append(Segment(store, episode, start, start + len(run)))
            if store not in others:
                others[store] = np.full((len(ticks[store]), len(cameras) - 1, 2), -1)
            others[store][start : start + len(run)] = run[:, 1:, ::2]
    for names, why in (
        (lacking, "were not seen by all of"),
        (apart, "have no two steps on the same row of their controls by"),
    ):
        if names:
            print(
                f"cache.join_cameras: {len(names)} episodes {why} {', '.join(cameras)} and are left out (first: {names[0]})",
                file=sys.stderr,
            )
    before = sum(it.stop - it.start for seen in views.values() if len(seen) == len(cameras) for it in seen[cameras[0]])
    if cut := before - sum(it.stop - it.start for it in joined):
        print(
            f"cache.join_cameras: {cut} of {before} steps of {cameras[0]} have none of another camera beside them",
            file=sys.stderr,
        )
    if not joined:
        raise ValueError(
            f"cache.join_cameras: none of the {len(views)} episodes was seen by all of {', '.join(cameras)} at the same times; encode other "
            "cameras (encode.cameras), or set cache.join_cameras=false"
        )
    return cameras, sorted(joined, key=lambda it: (it.store, it.start)), others


def _line_up(views: Sequence[Sequence[Segment]], ticks: dict[int, np.ndarray]) -> np.ndarray:
    """Steps that lie on the same rows of the controls in all views: [steps, views, 3] of store, segment (its first row) and row."""
    found = []
    for runs in views:
        rows = [(it.store, it.start, row) for it in runs for row in range(it.start, it.stop)]
        places = np.array(rows, np.int64).reshape(-1, 3)
        found.append((np.concatenate([ticks[it.store][it.start : it.stop] for it in runs]), places))
    common = found[0][0]
    for at, _ in found[1:]:
        common = np.intersect1d(common, at)
    picked = [places[np.unique(at, return_index=True)[1]][np.isin(np.unique(at), common)] for at, places in found]
    return np.stack(picked, axis=1)
