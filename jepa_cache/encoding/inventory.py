"""What a run would be about, found out without reading recordings: parts and recipes, and units known from earlier looks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jepa_cache.actions import get_action_space
from jepa_cache.config.schema import Config, EncoderPreset
from jepa_cache.encoder.weights import find_weights, weights_identity
from jepa_cache.encoding.parts import Part, plan_parts, used_encoder
from jepa_cache.encoding.reading import find_readings
from jepa_cache.encoding.units import Digested, hash_units, sort_units
from jepa_cache.episode import Skipped
from jepa_cache.sources import Source, Unit, find_obstacle
from jepa_cache.store.digests import DigestTable, Remembered, join_digests

# New and changed files are hashed up to here, some tenths of a second; terabytes are left to stage one.
HASH_BYTES = 256 << 20
UNREAD = "unread:"


class Inventory(NamedTuple):
    """The parts of a run as the present settings and recordings make them.

    Attributes:
        parts: As stage one would have them. A unit whose content is not known has a digest that `is_unread`.
        encoder: With the weights that are used.
        weights: Their file; None for seeded ones, and for such as would have to be downloaded.
        notes: What the reader should know.
        remembered: What the digest table knew before this look.
    """

    parts: list[Part]
    encoder: EncoderPreset
    weights: Path | None
    notes: list[str]
    remembered: Remembered


def take_inventory(config: Config, inputs: Sequence[str], base: Path, *, most_bytes: int = HASH_BYTES) -> Inventory:
    """Find parts, recipes and units; downloads nothing and reads no recording that was hashed before.

    Args:
        config: Resolved settings.
        inputs: Replace the presets' lists when not empty.
        base: Folder that relative paths are meant from.
        most_bytes: Bytes of recordings that may be read to learn whether they are read otherwise than by the first release, which
            names their stores; those that were never looked at count as plain ones beyond.

    Raises:
        ValueError: As `plan_parts`; or a weights file that does not exist.
    """
    encoder, notes = used_encoder(config), []
    weights, identity = None, ""
    table = DigestTable()
    if encoder.weights is not None:
        weights = find_weights(encoder.weights, base=base, kind=encoder.kind)
    if encoder.weights is not None and weights is None:
        identity = f"not on this machine: {encoder.weights}"
        notes.append(
            f"the weights {encoder.weights} are not on this machine, so it cannot be known which stores were made with them; "
            "`python stages/encode.py` downloads them, encode.weights=PATH names a file"
        )
    else:
        identity = weights_identity(encoder, weights, digest=table.digest)
    lookup = _Lookup(table)
    space = get_action_space(config.encode.action_space)
    parts = plan_parts(
        config,
        encoder,
        identity,
        space,
        inputs,
        base,
        digest=lookup,
        read=functools.partial(_look_up_readings, most_bytes=most_bytes),
    )
    num_unread = len({unit for part in parts for unit, digest in part.units if is_unread(digest)})
    if num_unread:
        notes.append(
            f"{num_unread} units are new or have changed and were not read yet (more than {HASH_BYTES >> 20} MiB): "
            "`python stages/encode.py` reads them, and finds those again whose content it knows"
        )
    return Inventory(parts, encoder, weights, notes, lookup.remembered)


def is_unread(digest: str) -> bool:
    """Whether this stands for content that nobody has looked at."""
    return digest.startswith(UNREAD)


def _look_up_readings(source: Source, units: Sequence[tuple[Unit, str]], decoder: str, *, most_bytes: int) -> list[int]:
    """`find_readings` of the units whose content is known; 1 for the others."""
    known = [(unit, digest) for unit, digest in units if not is_unread(digest)]
    readings = dict(
        zip((digest for _, digest in known), find_readings(source, known, decoder, most_bytes=most_bytes), strict=True)
    )
    return [readings.get(digest, 1) for _, digest in units]


class _Lookup:
    """Names the content of units by what is remembered; hashes what is new until `HASH_BYTES` are read."""

    def __init__(self, table: DigestTable) -> None:
        self._table = table
        self.remembered = table.remember()
        self._left = HASH_BYTES

    def __call__(self, units: Sequence[Unit]) -> Digested:
        known: dict[Unit, str | Skipped] = {}
        new = []
        for unit in units:
            if (obstacle := find_obstacle(unit)) is not None:
                known[unit] = Skipped(unit.name, obstacle)
                continue
            digests = [self.remembered.digest(file) for file in unit.files]
            num_bytes = sum(
                file.stat().st_size for file, digest in zip(unit.files, digests, strict=True) if digest is None
            )
            if None not in digests:
                known[unit] = join_digests(digests)
            elif num_bytes <= self._left:
                self._left -= num_bytes
                new.append(unit)
            else:
                known[unit] = f"{UNREAD}{unit.path}"
        known |= hash_units(self._table, tqdm(new, desc="checking recordings", unit="unit", delay=2))
        return sort_units((unit, known[unit]) for unit in units)
