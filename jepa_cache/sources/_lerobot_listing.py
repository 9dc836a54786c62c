"""Which files of a LeRobot data set make a unit, and which episodes lie in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_cache.config.machine import state_folder
from jepa_cache.files import atomic_file
from jepa_cache.sources import Unit
from jepa_cache.sources._lerobot_columns import find_indices
from jepa_cache.sources._lerobot_layout import Place, list_places, read_layout


class Listing:
    """The listed episodes of one data set by the files they lie in; holds as long as nothing in meta/ changes.

    Attributes:
        root: The data set's folder.
        layout: What info.json says.
        lists: The files that list the episodes.
        places: The episodes, in the order of the lists.
        by_file: Parquet file, or video where an episode of v2 has no parquet file, to its episodes.
    """

    def __init__(self, root: Path, camera: str) -> None:
        """Read meta/ of the data set at `root`.

        Raises:
            ValueError: meta/ cannot be used, or has no such camera.
        """
        self._stamp = _stamp(root)
        self.root = root
        self.layout = read_layout(root)
        self.layout.check_camera(camera)
        self.lists = self.layout.lists()
        self.places = list_places(self.layout, camera)
        self.by_file: dict[Path, list[Place]] = {}
        for place in self.places:
            self.by_file.setdefault(place.data, []).append(place)
            if not self.layout.packed and not place.data.is_file():
                self.by_file.setdefault(place.video, []).append(place)

    def is_of(self, root: Path) -> bool:
        """Whether this is the list of `root`, and still true."""
        return self.root == root and self._stamp == _stamp(root)

    def missing(self) -> list[Place]:
        """Listed episodes that no unit of files covers."""
        return [
            place
            for place in self.places
            if not place.data.is_file() and (self.layout.packed or not place.video.is_file())
        ]

    def list_units(self, selections: Sequence[str]) -> list[Unit]:
        """A unit for each parquet file with its videos, and one, made of the lists, for episodes without files.

        Each also has a file, written on this machine, of what meta/ says of it and its numbers depend on: a data set whose
        meta/ was corrected has other units, and one that only grew has not.
        """
        units = []
        shared = {"fps": self.layout.fps, "indices": find_indices(selections, self.layout.features)}
        missing = {place.index for place in self.missing()}
        groups: dict[Path, dict[Path, None]] = {}
        for place in self.places:
            if place.index not in missing:
                groups.setdefault(place.data, {})[place.video] = None
        for data, videos in groups.items():
            files = [path for path in (data, *sorted(videos)) if path.is_file()]
            places = self.by_file[data] if self.layout.packed else ()
            spans = [(place.index, place.num_rows, place.span_s) for place in places]
            files.append(_write_once({**shared, "episodes": spans}))
            units.append(Unit(f"{self.layout.name}/{data.relative_to(self.root).as_posix()}", tuple(files)))
        if missing:
            files = (*self.lists, _write_once({"missing": sorted(missing)}))
            units.append(Unit(f"{self.layout.name}: {len(missing)} listed episodes without files", files))
        return units


def _write_once(content: dict[str, Any]) -> Path:
    """A file of this content, named by it, in the folder of what this machine remembers."""
    data = json.dumps(content, sort_keys=True).encode()
    path = state_folder() / "lerobot" / f"{hashlib.sha256(data).hexdigest()[:32]}.json"
    if not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    return path


def _stamp(root: Path) -> list[tuple[str, int, int]]:
    paths = sorted(path for path in (root / "meta").rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
