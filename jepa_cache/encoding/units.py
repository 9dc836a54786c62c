"""Which units of input a run is about: found by name, known by the digest of their content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from jepa_cache.config.schema import DatasetPreset
from jepa_cache.sources import Source, Unit
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
    units = source.list_units(named, base)
    sample_folder = (base / SAMPLE_FOLDER).resolve()
    sample = [unit for unit in units if sample_folder in unit.path.resolve().parents]
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


def digest_units(units: Sequence[Unit]) -> list[tuple[Unit, str]]:
    """sha256 of each unit; files with the same content count once."""
    digests: dict[str, Unit] = {}
    lookup = DigestTable()
    bar = tqdm(units, desc="checking recordings", unit="file", delay=2)
    for unit, digest in zip(units, lookup.digest_units(unit.files for unit in bar), strict=True):
        if digest in digests:
            print(f"left out: {unit.path} has the same content as {digests[digest].path}")
        else:
            digests[digest] = unit
    # By digest, so that file names and their order change nothing.
    return [(digests[digest], digest) for digest in sorted(digests)]


def check_unchanged(unit: Unit, digest: str) -> None:
    """Check that a unit which was read is still the one that was found. Cost: one stat per file.

    Raises:
        ValueError: When its files have another content now, so that what was read may belong to neither.
    """
    if DigestTable().digest_unit(unit.files) != digest:
        raise ValueError(f"{unit.path} was changed while it was being encoded; run the same command again")
