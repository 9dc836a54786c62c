"""Which units of input a run is about: found by name, known by the digest of their content."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jepa_cache.config.paths import printable
from jepa_cache.config.schema import DatasetPreset
from jepa_cache.episode import Skipped
from jepa_cache.media.remote import DownloadError
from jepa_cache.media.tar import real_path
from jepa_cache.sources import Source, Unit, describe_unreadable, find_obstacle, suggest_source
from jepa_cache.store.digests import DigestTable, join_digests

# What stages/sample.py renders; index.json comes last.
SAMPLE_FOLDERS = (Path("shards/sample"), Path("shards/sample_robot"))
UNREAD = "unread:"


def list_units(source: Source, preset: DatasetPreset, inputs: Sequence[str], base: Path) -> list[Unit]:
    """The units to encode; the synthetic sample never mixes with other recordings.

    Raises:
        ValueError: Nothing is found, the sample was never rendered, or it and other recordings would be mixed.
    """
    named = tuple(inputs) or preset.inputs
    if preset.sample is not None and not inputs:
        _check_rendered(base / preset.inputs[0], preset)
    try:
        units = source.list_units(named, base)
    except ValueError as error:
        for hint in _hints(source, named, base):
            error.add_note(hint)
        raise
    sample = _find_sample(units, base)
    others = [unit for unit in units if unit not in sample] if sample else units
    if preset.sample is None:
        if sample and not others:
            raise ValueError(
                f"{', '.join(named)} holds only synthetic sample recordings, but dataset is {preset.name!r}; "
                "name your own recordings, or choose dataset=sample or dataset=sample_robot"
            )
        if sample:
            print(
                f"skipped: {len(sample)} synthetic recordings under {' and '.join(map(str, SAMPLE_FOLDERS))} (dataset is {preset.name!r})"
            )
        return others
    if sample and others:
        raise ValueError(
            f"{', '.join(named)} holds the synthetic sample and {len(others)} other recordings (first: {others[0].path}); "
            f"choose dataset={preset.source} for yours, or name {preset.inputs[0]} alone"
        )
    if others:
        print(
            f"note: dataset is {preset.name!r}, but these are other recordings; set dataset: {preset.source} in params.yaml "
            "to name them so"
        )
    return units


def join_units(source: Source, units: Sequence[Unit], size: int) -> list[Unit]:
    """Units of about `size` recordings, of sources whose units are one recording each and that can split them again.

    A unit ends after a recording whose name's hash says so, hence where it ends follows from its own recordings, and one more recording
    changes one unit. What cannot be read stays alone, so that it takes no other with it.
    """
    if size == 1 or not hasattr(source, "split_files"):
        return list(units)
    joined, open_units = [], []
    for unit in units:
        if find_obstacle(unit) is not None or not all(
            isinstance(file, Path) and os.access(file, os.R_OK) for file in unit.files
        ):
            joined.append(unit)
            continue
        open_units.append(unit)
        if int.from_bytes(hashlib.sha256(unit.name.encode()).digest()[:8], "big") % size == 0:
            joined.append(_join(open_units))
            open_units = []
    return [*joined, _join(open_units)] if open_units else joined


def name_skipped(source: Source, unit: Unit, key: str) -> str:
    """What a skipped recording is called now, where its store was made under an earlier name; of joined units the name that the store has."""
    if not hasattr(source, "name_skipped") or (
        hasattr(source, "split_files") and len(source.split_files(unit.files)) > 1
    ):
        return key
    return source.name_skipped(unit, key)


def _join(units: Sequence[Unit]) -> Unit:
    if len(units) == 1:
        return units[0]
    files = tuple(file for unit in units for file in unit.files)
    return Unit(f"{units[0].name} to {units[-1].name} ({len(units)} recordings)", files)


def _check_rendered(folder: Path, preset: DatasetPreset) -> None:
    """Refuse a sample that is not whole, or was rendered by other settings: presets share folders, and their settings are edited."""
    index = folder / "index.json"
    if not index.is_file() or all(path == index for path in folder.iterdir()):
        raise ValueError(
            f"the sample recordings are not rendered yet: {folder} holds no whole set of them; "
            f"`python stages/sample.py dataset={preset.name}` renders them in minutes. For recordings of yours set `dataset` in params.yaml"
        )
    rendered = json.loads(index.read_text(encoding="utf-8") or "{}").get("config", preset.sample)
    if differing := [name for name, value in preset.sample.items() if rendered.get(name) != value]:
        told = ", ".join(f"{name} {rendered.get(name)!r}, now {preset.sample[name]!r}" for name in differing)
        raise ValueError(
            f"{folder} was rendered by other settings than those of configs/dataset/{preset.name}.yaml ({told}); "
            f"`python stages/sample.py dataset={preset.name}` renders it anew, or name the folder to encode it as it is"
        )


def _find_sample(units: Sequence[Unit], base: Path) -> list[Unit]:
    """Those units that lie in a sample's folder, whatever links lead there."""
    folders = {(base / folder).resolve() for folder in SAMPLE_FOLDERS if (base / folder).is_dir()}
    if not folders:  # else ten thousand units would follow their links for nothing
        return []
    return [unit for unit in units if not folders.isdisjoint(real_path(unit.path).parents)]


def _hints(source: Source, named: Sequence[str], base: Path) -> list[str]:
    """Ways out where inputs find nothing: not there, below the present folder, or in the form of another data set."""
    hints = []
    for text in named:
        here, meant = (folder / Path(text).expanduser() for folder in (Path.cwd(), base))
        if here.exists() and not meant.exists():
            hints.append(f"{here.resolve()} is there: name it so, in full")
        elif not meant.exists() and meant.parent.is_dir() and not set(text) & set("*?[{:"):
            near = difflib.get_close_matches(meant.name, sorted(path.name for path in meant.parent.iterdir()), n=1)
            hints.append(f"{meant} does not exist" + (f"; did you mean {near[0]!r}?" if near else ""))
        elif meant.is_dir() and (way_out := suggest_source(meant, str(source.recipe["source"]))) is not None:
            hints.append(way_out)
    return hints


class Digested(NamedTuple):
    """Units with the digest of their content."""

    units: list[Unit]  # one for each content, by digest, so that file names and their order change nothing
    copies: list[Unit]  # further ones with the content of one of these
    unreadable: list[Skipped]  # of which not every file can be read, by name, and why


class UnitDigester:
    """Gives units their sha256: looks up what has not changed, and hashes the rest while `budget_bytes` last."""

    def __init__(self, budget_bytes: float = math.inf) -> None:
        self._table, self._budget_bytes = DigestTable(), budget_bytes

    def __call__(self, units: Sequence[Unit]) -> Digested:
        """Digest units; those with the same content count once. One beyond the budget gets a digest that `is_unread`."""
        first: dict[str, Unit] = {}
        copies, unreadable, remembered = [], [], self._table.remember()
        with self._table.hashing() as digest_files:
            for unit in tqdm(units, desc="checking recordings", unit="unit", delay=2):
                if (obstacle := find_obstacle(unit)) is not None:
                    unreadable.append(Skipped(unit.name, obstacle))
                    continue
                try:
                    digests = [remembered.digest(file) for file in unit.files]
                    if None not in digests and (digest := join_digests(digests)) in remembered.earlier(unit.files):
                        pass
                    elif self._is_affordable(unit, digests):
                        digest = digest_files(unit.files)
                    else:
                        digest = f"{UNREAD}{unit.path}"
                except (OSError, DownloadError) as error:
                    unreadable.append(Skipped(unit.name, describe_unreadable(error)))
                    continue
                digested = unit._replace(digest=digest)
                if first.setdefault(digest, digested) is not digested:
                    copies.append(digested)
        for unit in copies:
            print(printable(f"skipped: {unit.path} has the same content as {first[unit.digest].path}"))
        return Digested([first[digest] for digest in sorted(first)], copies, unreadable)

    def _is_affordable(self, unit: Unit, digests: Sequence[str | None]) -> bool:
        num_bytes = sum(file.stat().st_size for file, it in zip(unit.files, digests, strict=True) if it is None)
        if num_bytes > self._budget_bytes:
            return False
        self._budget_bytes -= num_bytes
        return True


def is_unread(unit: Unit) -> bool:
    """Whether nobody has read the content of this unit yet."""
    return unit.digest.startswith(UNREAD)


def check_unchanged(unit: Unit) -> None:
    """Check that a unit which was read is still the one that was found. Cost: one stat per file.

    Raises:
        ValueError: When its files have another content now, so that what was read may belong to neither.
    """
    if DigestTable().digest_unit(unit.files) != unit.digest:
        raise ValueError(f"{unit.path} was changed while it was being encoded; run the same command again")
