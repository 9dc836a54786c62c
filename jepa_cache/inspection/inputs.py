"""The units that an inspection reads: those of the source, and loose pairs of files that nobody has packed yet."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jepa_cache.media.tar import SUFFIXES, LeftOut, find_episodes
from jepa_cache.sources import Source, Unit


def iter_units(source: Source, inputs: Sequence[str], base: Path, left_out: list[LeftOut]) -> Iterator[Unit]:
    """Yield the units of some inputs; a folder of loose mp4 + jsonl pairs gives one unit per pair.

    Each loose pair is packed into a tar shard in a temporary folder, which is gone when the next one is asked for.

    Args:
        source: Finds the units; only `vpt` has loose pairs.
        inputs: Folders, files, globs and brace ranges, relative to `base`.
        base: The folder that relative inputs start from.
        left_out: Receives the files of loose folders that have no partner.

    Raises:
        ValueError: An input finds nothing.
    """
    packed = [given for given in inputs if not _is_loose(source, base / Path(given).expanduser())]
    if packed:
        yield from source.list_units(packed, base)
    for given in inputs:
        if given in packed:
            continue
        episodes, without_partner = find_episodes(base / Path(given).expanduser(), SUFFIXES)
        left_out += without_partner
        for key, files in episodes.items():
            with tempfile.TemporaryDirectory(prefix="jepa-cache-inspect-") as folder:
                path = Path(folder) / "loose.tar"
                with tarfile.open(path, "w") as tar:
                    for suffix, file in files.items():
                        tar.add(file.resolve(), f"{key}.{suffix}", recursive=False)
                (unit,) = source.list_units([str(path)], base)
                yield unit._replace(name=files["mp4"].name)


def _is_loose(source: Source, path: Path) -> bool:
    if source.recipe.get("source") != "vpt" or not path.is_dir() or any(path.rglob("*.tar")):
        return False
    return any(path.rglob("*.mp4")) and any(path.rglob("*.jsonl"))
