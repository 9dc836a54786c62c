"""Which units of input a run is about: found by name, known by the digest of their content."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jepa_cache.config.schema import DatasetPreset
from jepa_cache.config.terminal import printable
from jepa_cache.episode import Skipped
from jepa_cache.media.remote import DownloadError
from jepa_cache.media.tar import real_path
from jepa_cache.sources import Source, Unit, describe_unreadable, find_obstacle, suggest_source
from jepa_cache.store.digests import DigestTable

SAMPLE_FOLDER = Path("shards/sample")


def list_units(source: Source, preset: DatasetPreset, inputs: Sequence[str], base: Path) -> list[Unit]:
    """The units to encode; the synthetic sample never mixes with other recordings.

    Args:
        source: Finds the units.
        preset: Names inputs and says whether it is the sample.
        inputs: Replace the preset's list when not empty.
        base: Folder that relative paths are meant from.

    Raises:
        ValueError: Nothing is found, or the sample and other recordings would be mixed.
    """
    named = tuple(inputs) or preset.inputs
    check_rendered(preset, inputs, base)
    try:
        units = source.list_units(named, base)
    except ValueError as error:
        for hint in _hints(source, named, base):
            error.add_note(hint)
        raise
    sample_folder = (base / SAMPLE_FOLDER).resolve()
    sample = [unit for unit in units if sample_folder in real_path(unit.path).parents]
    others = [unit for unit in units if unit not in sample]
    if preset.sample is None:
        if sample and not others:
            raise ValueError(
                f"{', '.join(named)} holds only the synthetic sample recordings, but dataset is {preset.name!r}; "
                "name your own tar shards, or choose dataset=sample"
            )
        if sample:
            print(f"left out: {len(sample)} synthetic tar shards under {SAMPLE_FOLDER} (dataset is {preset.name!r})")
        return others
    if sample and others:
        raise ValueError(
            f"{', '.join(named)} holds the synthetic sample and {len(others)} other tar shards (first: {others[0].path}); "
            f"choose dataset=vpt for yours, or name {SAMPLE_FOLDER} alone"
        )
    if others:
        print(
            "note: dataset is 'sample', but these are other recordings; set dataset: vpt in params.yaml to name them so"
        )
    return units


def check_rendered(preset: DatasetPreset, inputs: Sequence[str], base: Path) -> None:
    """Check that the sample's recordings are there when they are what is asked for.

    Args:
        preset: Says whether it is the sample.
        inputs: Replace the preset's list when not empty.
        base: The workspace.

    Raises:
        ValueError: They were never rendered in this workspace.
    """
    if preset.sample is not None and not inputs and not any((base / SAMPLE_FOLDER).glob("*.tar")):
        raise ValueError(
            f"the sample recordings are not rendered yet: {base / SAMPLE_FOLDER} holds no *.tar; `python stages/sample.py` "
            "renders them in seconds. For recordings of yours set `dataset` in params.yaml"
        )


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
    """Units by content.

    Attributes:
        units: One for each content, with its sha256; by digest, so that file names and their order change nothing.
        copies: Further units with the content of one of them.
        unreadable: Units of which not every file can be read, by name, and why.
    """

    units: list[tuple[Unit, str]]
    copies: list[tuple[Unit, str]]
    unreadable: list[Skipped]


def digest_units(units: Sequence[Unit]) -> Digested:
    """sha256 of each unit; units with the same content count once."""
    digested = sort_units(hash_units(DigestTable(), tqdm(units, desc="checking recordings", unit="file", delay=2)))
    first = {digest: unit for unit, digest in digested.units}
    for unit, digest in digested.copies:
        print(printable(f"left out: {unit.path} has the same content as {first[digest].path}"))
    return digested


def hash_units(table: DigestTable, units: Iterable[Unit]) -> Iterator[tuple[Unit, str | Skipped]]:
    """Each unit with its sha256, or with why it cannot be read. Cost: reads what is new."""
    waiting: deque[Unit] = deque()
    iterator = iter(units)

    def take() -> Iterator[Sequence[Path]]:
        for unit in iterator:
            waiting.append(unit)
            if find_obstacle(unit) is not None:
                return
            yield unit.files

    while True:
        reason = None
        try:
            for digest in table.digest_units(take()):
                yield waiting.popleft(), digest
        except (OSError, DownloadError) as error:
            reason = describe_unreadable(error)
        if not waiting:
            return
        unit = waiting.popleft()
        yield unit, Skipped(unit.name, reason or find_obstacle(unit) or "it has changed while it was looked at")


def sort_units(looked_up: Iterable[tuple[Unit, str | Skipped]]) -> Digested:
    """Units by what was found out of their content."""
    first: dict[str, Unit] = {}
    copies, unreadable = [], []
    for unit, digest in looked_up:
        if isinstance(digest, Skipped):
            unreadable.append(digest)
        elif first.setdefault(digest, unit) is not unit:
            copies.append((unit, digest))
    return Digested([(first[digest], digest) for digest in sorted(first)], copies, unreadable)


def check_unchanged(unit: Unit, digest: str) -> None:
    """Check that a unit which was read is still the one that was found. Cost: one stat per file.

    Raises:
        ValueError: When its files have another content now, so that what was read may belong to neither.
    """
    if DigestTable().digest_unit(unit.files) != digest:
        raise ValueError(f"{unit.path} was changed while it was being encoded; run the same command again")
