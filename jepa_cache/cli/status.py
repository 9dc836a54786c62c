"""`jepa-cache status`: what of the data set is in the cache, and for what is stale: which field of the recipe changed."""

from __future__ import annotations

import functools
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jepa_cache.cli.outcome import (
    FINE,
    MANIFEST,
    PROBLEM,
    Checkout,
    Outcome,
    describe_bytes,
    open_checkout,
    report,
    shorten,
)
from jepa_cache.encoding.groups import EncodingGroup, Inventory, scan_units
from jepa_cache.encoding.units import is_unread
from jepa_cache.sources import Unit
from jepa_cache.store.collection import list_manifests
from jepa_cache.store.digests import Remembered
from jepa_cache.store.layout import StoreDamagedError, StoreFile, read_store_file
from jepa_cache.store.manifest import Manifest, why_held_back
from jepa_cache.store.recipe import recipe_changes, unit_id
from jepa_cache.store.root import CacheRoot

DONE, MISSING, STALE, DAMAGED, UNREAD = "done", "missing", "stale", "damaged", "unread"
STATES = (DONE, MISSING, STALE, DAMAGED, UNREAD)


class UnitStatus(NamedTuple):
    """One unit of a group: its state, and why it is not done."""

    name: str
    digest: str
    state: str  # one of STATES
    reason: str


class StaleStores(NamedTuple):
    """Stores of units that are stale: the recipe they were made under, and each field that differs from the present one."""

    fingerprint: str
    num_units: int
    changes: list[str]


@dataclass
class GroupStatus:
    """One group: its units, what the done ones hold, and why the stale ones are stale."""

    group: EncodingGroup
    units: list[UnitStatus] = field(default_factory=list)
    why: list[StaleStores] = field(default_factory=list)
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


def status(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="recordings, as encode.py takes them; key=value overrides")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Say what is done, missing, stale or damaged under the present settings, and which field of the recipe changed.

    Reads no tokens, loads no encoder and hashes at most 256 MiB of recordings that are new or changed.

    Exit code 0: everything is there and listed in the manifest; 1: stage one has something to do; 2: could not be checked.

    Args:
        arguments: Recordings and overrides.
        as_json: Print JSON.
    """
    report(lambda: collect_status(open_checkout(arguments)), as_json=as_json)


def collect_status(checkout: Checkout) -> Outcome:
    """The state of every unit that the present settings ask for."""
    inventory = scan_units(checkout.config, checkout.paths, checkout.base)
    groups = find_status(inventory, checkout.root)
    manifest, reason = compare_manifest(checkout, groups)
    complete = all(it.count("done") == len(it.units) for it in groups)
    ready = complete and reason == "" and not any(it.num_without_actions for it in groups)
    document = {
        "ready": ready,
        "root": checkout.root.name,
        "dataset": checkout.config.dataset.name,
        "encoder": checkout.config.encoder.name,
        "parts": [describe_group(it) for it in groups],
        "manifest": {"digest": manifest.digest if manifest else None, "current": reason == "", "reason": reason},
        "notes": inventory.notes,
    }
    lines = [f"cache root {checkout.root.name}", *(f"note: {note}" for note in inventory.notes)]
    for it in groups:
        counts = ", ".join(f"{it.count(state)} {state}" for state in STATES if it.count(state) or state == "done")
        lines.append(
            f"{it.group.preset.name} ({it.group.view}), recipe {it.group.fingerprint}: {counts} of {len(it.units)} units; "
            f"{it.num_steps} steps, {describe_bytes(it.num_bytes)}"
        )
        lines += list_reasons(it)
    lines.append(f"manifest {MANIFEST}: {reason or 'current'}")
    lines.append("nothing to do" if ready else "next: python stages/encode.py")
    return Outcome(document, lines, FINE if ready else PROBLEM)


def compare_manifest(checkout: Checkout, groups: Sequence[GroupStatus]) -> tuple[Manifest | None, str]:
    """The checkout's manifest, and why it does not list what the present settings ask for; empty when it does."""
    if not (checkout.repository / MANIFEST).exists():
        return None, "absent; stage one writes it"
    try:
        manifest = checkout.read_manifest(None)
    except ValueError as error:
        return None, f"damaged: {error}"
    listed = {(part.fingerprint, entry.unit_digest): entry.tokens_digest for part, entry in manifest.stores}
    expected = {
        (it.group.fingerprint, unit.digest): it.digests.get(unit.digest) for it in groups for unit in it.group.units
    }
    if {fingerprint for fingerprint, _ in listed} != {fingerprint for fingerprint, _ in expected}:
        return manifest, f"it lists stores of another recipe or other cameras and phases ({manifest.fingerprint})"
    reasons = [reason] if (reason := why_held_back(checkout.repository / MANIFEST)) else []
    if {part.action_fingerprint for part in manifest.parts} != {it.group.action_fingerprint for it in groups}:
        reasons.append(f"it was made for another action space ({manifest.action_space})")
    if gone := listed.keys() - expected.keys():
        reasons.append(f"it lists {len(gone)} units that are not among the recordings any more (removed or edited)")
    if new := expected.keys() - listed.keys():
        reasons.append(f"it lacks {len(new)} of {len(expected)} units")
    other = [key for key in expected.keys() & listed.keys() if expected[key] not in (None, listed[key])]
    if other:
        reasons.append(
            f"{len(other)} stores were made again since and differ from what it lists (device or libraries?)"
        )
    return manifest, "; ".join(reasons)


def list_reasons(status: GroupStatus) -> list[str]:
    """Lines under a group: why units are not done, what changed in the recipe, and what is recorded but never a reason."""
    lines = []
    for other in status.why:
        lines.append(f"  why: {other.num_units} units are stored under recipe {other.fingerprint}, which differs in")
        lines += [f"    {change}" for change in other.changes]
    lines += shorten([f"  unreadable {unit.key}: {unit.reason}" for unit in status.group.unreadable], indent="  ")
    shown = [f"  {unit.state} {unit.name}: {unit.reason}" for unit in status.units if unit.state != "done"]
    lines += shorten(shown, indent="  ")
    if status.num_without_actions:
        lines.append(
            f"  {status.num_without_actions} units lack actions in this action space: seconds, no video is opened"
        )
    if status.num_without_controls:
        lines.append(
            f"  {status.num_without_controls} units lack their controls: read again from the recordings when needed"
        )
    made = ", ".join(
        f"{name} {'/'.join(sorted(status.made_with[name]))}"
        for name in ("device", "decoder")
        if name in status.made_with
    )
    if made:
        lines.append(f"  made with {made}")
    lines += [f"  {text}: recorded, no reason to encode again" for text in status.differing]
    return lines


def describe_group(status: GroupStatus) -> dict[str, Any]:
    """One group as JSON."""
    return {
        "dataset": status.group.preset.name,
        "camera": status.group.camera,
        "phase": status.group.phase,
        "fingerprint": status.group.fingerprint,
        "recipe": status.group.recipe,
        "num_units": len(status.units),
        **{state: status.count(state) for state in STATES},
        "num_steps": status.num_steps,
        "num_bytes": status.num_bytes,
        "without_actions": status.num_without_actions,
        "without_controls": status.num_without_controls,
        "units": [unit._asdict() for unit in status.units],
        "why": [other._asdict() for other in status.why],
        "made_with": {name: dict(sorted(values.items())) for name, values in sorted(status.made_with.items())},
        "differs_now": status.differing,
    }


def find_status(inventory: Inventory, root: CacheRoot) -> list[GroupStatus]:
    """Look at every store that the present settings ask for. Cost: a small file and some stats per store; no data."""

    @functools.cache
    def listed() -> dict[tuple[str, str], str]:
        """Manifest by fingerprint and digest of the units that it lists: such a store without a place was deleted."""
        return {
            (part.fingerprint, entry.unit_digest): digest
            for digest, manifest in list_manifests(root).items()
            if isinstance(manifest, Manifest)
            for part, entry in manifest.stores
        }

    root.refresh()
    others = _OtherStores(root, {group.fingerprint for group in inventory.groups})
    return [_look_at(group, root, inventory.remembered, listed, others) for group in inventory.groups]


def _look_at(
    group: EncodingGroup,
    root: CacheRoot,
    remembered: Remembered,
    listed: Callable[[], Mapping[tuple[str, str], str]],
    others: _OtherStores,
) -> GroupStatus:
    status, stale = GroupStatus(group), Counter()
    for unit in group.units:
        if is_unread(unit):
            reason = "changed since it was last read" if remembered.earlier(unit.files) else "never read before"
            status.units.append(UnitStatus(unit.name, "", UNREAD, reason))
            continue
        seen = _look_at_store(status, root, unit)
        if seen is not None:
            status.units.append(seen)
            continue
        state, reasons = MISSING, []
        nearest = others.nearest(group.recipe, unit.digest)
        if nearest is not None:
            state = STALE
            stale[nearest] += 1
            reasons.append(f"encoded under recipe {nearest}")
        for earlier in remembered.earlier(unit.files):
            if earlier != unit.digest and (
                root.fetch(root.tokens(group.fingerprint, earlier)) or others.nearest(group.recipe, earlier)
            ):
                state = STALE
                reasons.append(f"edited since it was encoded: sha256 {earlier[:12]}... -> {unit.digest[:12]}...")
        if (manifest := listed().get((group.fingerprint, unit.digest))) is not None:
            reasons.append(f"its store was deleted: manifest {manifest} lists it")
        status.units.append(UnitStatus(unit.name, unit.digest, state, "; ".join(reasons) or "never encoded"))
    for fingerprint, count in stale.most_common():
        changes = recipe_changes(others.recipes[fingerprint], group.recipe)
        status.why.append(StaleStores(fingerprint, count, changes))
    return status


def _look_at_store(status: GroupStatus, root: CacheRoot, unit: Unit) -> UnitStatus | None:
    """What a store says; None when there is none."""
    group = status.group
    store = group.tokens(root, unit)
    try:
        tokens = root.find_store(store)
    except ValueError as error:  # damaged, or of another version of this program
        return UnitStatus(unit.name, unit.digest, DAMAGED, str(error))
    if tokens is None:
        return None
    status.num_steps += tokens.metadata["num_steps"]
    status.num_bytes += tokens.num_bytes
    status.num_without_controls += not root.fetch(group.controls(root, unit))
    status.num_without_actions += not _has_actions(root, group.actions(root, unit), tokens)
    status.digests[unit.digest] = tokens.digest
    for name, value in _made_with(tokens.provenance):
        status.made_with.setdefault(name, Counter())[value] += 1
    return UnitStatus(unit.name, unit.digest, DONE, "")


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
