"""What of a data set is in the cache under the present settings, and for what is not: what changed."""

from __future__ import annotations

import functools
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from jepa_cache.encoding.inventory import Inventory, is_unread
from jepa_cache.encoding.parts import Part
from jepa_cache.sources import Unit
from jepa_cache.store.digests import Remembered
from jepa_cache.store.layout import StoreDamagedError, StoreFile, read_store_file
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.recipe import recipe_changes, unit_id
from jepa_cache.store.root import CacheRoot

DONE, MISSING, STALE, DAMAGED, UNREAD = "done", "missing", "stale", "damaged", "unread"
STATES = (DONE, MISSING, STALE, DAMAGED, UNREAD)


class UnitStatus(NamedTuple):
    """One unit of a part: its state, and why it is not done."""

    name: str
    digest: str
    state: str  # one of STATES
    reason: str


class OtherRecipe(NamedTuple):
    """Stores of units that are stale: the recipe they were made under, and each field that differs from the present one."""

    fingerprint: str
    num_units: int
    changes: list[str]


@dataclass
class PartStatus:
    """One part: its units, what the done ones hold, and why the stale ones are stale."""

    part: Part
    units: list[UnitStatus] = field(default_factory=list)
    why: list[OtherRecipe] = field(default_factory=list)
    num_steps: int = 0
    num_bytes: int = 0
    num_without_actions: int = 0  # done, but their actions must be summed up (seconds, no video)
    num_without_controls: int = 0  # done, but their controls must be read from the recordings again (no decoding)
    digests: dict[str, str] = field(default_factory=dict)  # of the units that are done: those of their stores
    made_with: dict[str, Counter[str]] = field(default_factory=dict)  # device, decoder, library: value to stores

    def count(self, state: str) -> int:
        """Units in one state."""
        return sum(unit.state == state for unit in self.units)

    @property
    def differing(self) -> list[str]:
        """What is recorded of the making of the done stores and is another now; never a reason to encode again."""
        libraries = [name for name in self.made_with if name not in ("device", "decoder", "batch_size")]
        return [
            f"{count} of {self.count(DONE)} stores were made with {name} {value}, now {now}"
            for name, now in ((name, _present_version(name)) for name in sorted(libraries))
            for value, count in sorted(self.made_with[name].items())
            if value != now
        ]


def find_status(inventory: Inventory, root: CacheRoot, manifests: Mapping[str, Manifest]) -> list[PartStatus]:
    """Look at every store that the present settings ask for. Cost: a small file and some stats per store; no data.

    Args:
        inventory: Present parts and units.
        root: Cache root.
        manifests: Those in the root, by digest: a store that one of them lists and that is not there was deleted.
    """
    listed: dict[tuple[str, str], str] = {
        (part.fingerprint, entry.unit_digest): digest
        for digest, manifest in manifests.items()
        for part, entry in manifest.stores
    }
    root.refresh()
    others = _OtherStores(root, {part.tokens for part in inventory.parts})
    return [_look_at(part, root, inventory.remembered, listed, others) for part in inventory.parts]


def _look_at(
    part: Part,
    root: CacheRoot,
    remembered: Remembered,
    listed: Mapping[tuple[str, str], str],
    others: _OtherStores,
) -> PartStatus:
    status, stale = PartStatus(part), Counter()
    for unit, digest in part.units:
        store = root.tokens(part.tokens, digest)
        if is_unread(digest):
            reason = "changed since it was last read" if remembered.earlier(unit.files) else "never read before"
            status.units.append(UnitStatus(unit.name, "", UNREAD, reason))
            continue
        seen = _look_at_store(status, root, unit, digest, store)
        if seen is not None:
            status.units.append(seen)
            continue
        state, reasons = MISSING, []
        nearest = others.nearest(part.recipe, digest)
        if nearest is not None:
            state = STALE
            stale[nearest] += 1
            reasons.append(f"encoded under recipe {nearest}")
        for earlier in remembered.earlier(unit.files):
            if earlier != digest and (
                root.fetch(root.tokens(part.tokens, earlier)) or others.nearest(part.recipe, earlier)
            ):
                state = STALE
                reasons.append(f"edited since it was encoded: sha256 {earlier[:12]}... -> {digest[:12]}...")
        if (part.tokens, digest) in listed:
            reasons.append(f"its store was deleted: manifest {listed[part.tokens, digest]} lists it")
        status.units.append(UnitStatus(unit.name, digest, state, "; ".join(reasons) or "never encoded"))
    for fingerprint, count in stale.most_common():
        changes = recipe_changes(others.recipes[fingerprint], part.recipe)
        status.why.append(OtherRecipe(fingerprint, count, changes))
    return status


def _look_at_store(status: PartStatus, root: CacheRoot, unit: Unit, digest: str, store: Path) -> UnitStatus | None:
    """What a store says; None when there is none."""
    part = status.part
    try:
        tokens = root.find_store(store)
    except ValueError as error:  # damaged, or of another version of this program
        return UnitStatus(unit.name, digest, DAMAGED, str(error))
    if tokens is None:
        return None
    status.num_steps += tokens.metadata["num_steps"]
    status.num_bytes += tokens.num_bytes
    status.num_without_controls += not root.fetch(root.controls(part.controls, digest))
    status.num_without_actions += not _has_actions(root, root.actions(part.actions, digest), tokens)
    status.digests[digest] = tokens.digest
    for name, value in _made_with(tokens.provenance):
        status.made_with.setdefault(name, Counter())[value] += 1
    return UnitStatus(unit.name, digest, DONE, "")


def _has_actions(root: CacheRoot, store: Path, tokens: StoreFile) -> bool:
    try:
        found = root.find_store(store)
        return found is not None and found.metadata.get("steps_digest") == tokens.metadata["steps_digest"]
    except StoreDamagedError:
        return False


class _OtherStores:
    """The stores of other recipes than the present ones, listed once."""

    def __init__(self, root: CacheRoot, present: set[str]) -> None:
        self.recipes: dict[str, Mapping[str, Any]] = {}
        self._names: dict[str, set[str]] = {}
        for folder in _folders(root.path / "tokens"):
            if folder.name not in present:
                names = {name for name in os.listdir(folder) if name.endswith(".zarr") and not name.startswith(".")}  # noqa: PTH208
                recipe = _read_recipe(folder, sorted(names))
                if recipe is not None:
                    self.recipes[folder.name], self._names[folder.name] = recipe, names

    def nearest(self, recipe: Mapping[str, Any], digest: str) -> str | None:
        """Of the recipes under which a unit is stored the one with the fewest differences."""
        name = f"{unit_id(digest)}.zarr"
        found = [fingerprint for fingerprint, names in self._names.items() if name in names]
        return min(found, key=lambda it: (len(recipe_changes(self.recipes[it], recipe)), it), default=None)


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []


def _read_recipe(folder: Path, names: Sequence[str]) -> Mapping[str, Any] | None:
    for name in names:
        try:
            return read_store_file(folder / name).metadata["recipe"]
        except (ValueError, KeyError):
            continue  # a damaged one; another of the same recipe will do
    return None


def _made_with(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((name, str(provenance[name])) for name in ("device", "batch_size") if name in provenance)
    yield from (("decoder", name) for name in provenance.get("decoders", {}))
    yield from ((name, str(value)) for name, value in provenance.get("versions", {}).items())


@functools.cache
def _present_version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
