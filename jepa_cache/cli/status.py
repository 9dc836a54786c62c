"""`jepa-cache status`: what of the data set is in the cache, and for what is stale: which field of the recipe changed."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jepa_cache.cli.outcome import (
    AsJson,
    Checkout,
    Outcome,
    Recordings,
    describe_bytes,
    open_checkout,
    report,
    shorten,
)
from jepa_cache.encoding.groups import EncodingGroup, scan_units
from jepa_cache.encoding.units import is_unread
from jepa_cache.sources import Unit
from jepa_cache.store.check import recall_copies
from jepa_cache.store.collection import list_manifests
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.layout import StoreDamagedError, StoreFile, read_store_file
from jepa_cache.store.manifest import Manifest, why_held_back
from jepa_cache.store.recipe import recipe_changes, unit_id
from jepa_cache.store.root import CacheRoot

DONE, MISSING, STALE, DAMAGED, UNREAD = "done", "missing", "stale", "damaged", "unread"
STATES = (DONE, MISSING, STALE, DAMAGED, UNREAD)


def status(arguments: Recordings = None, *, as_json: AsJson = False) -> None:
    """Say what is done, missing, stale or damaged under the present settings, and which field of the recipe changed.

    Reads no tokens, loads no encoder and hashes at most 256 MiB of recordings that are new or changed.

    Exit code 0: everything is there and listed in the manifest; 1: stage one has something to do; 2: could not be
    checked.
    """
    report(lambda: collect_status(open_checkout(arguments)), as_json=as_json, typed=arguments)


def collect_status(checkout: Checkout) -> Outcome:
    """The state of every unit that the present settings ask for. Cost: a small file and some stats per store; no data."""
    groups, notes = scan_units(checkout.config, checkout.paths, checkout.base)
    scan = _Scan(checkout.root, groups)
    parts = [scan.describe(group) for group in groups]
    manifest, reason = _compare_manifest(checkout, groups, scan.digests)
    notes += [copies] if manifest and not reason and (copies := recall_copies(manifest)) else []
    ready = reason == "" and all(it["done"] == it["num_units"] and not it["without_actions"] for it in parts)
    document = {
        "ready": ready,
        "root": checkout.root.name,
        "dataset": checkout.config.dataset.name,
        "encoder": checkout.config.encoder.name,
        "parts": parts,
        "manifest": {"digest": manifest.digest if manifest else None, "current": reason == "", "reason": reason},
        "notes": notes,
    }
    lines = [f"cache root {checkout.root.name}", *(f"note: {note}" for note in notes)]
    lines += [line for group, part in zip(groups, parts, strict=True) for line in _list_lines(group, part)]
    lines += [
        f"manifest {checkout.config.outputs}/encode/manifest.json: {reason or 'current'}",
        "nothing to do" if ready else "next: python stages/encode.py",
    ]
    return Outcome(document, lines, ready)


def _compare_manifest(
    checkout: Checkout, groups: Sequence[EncodingGroup], digests: Mapping[tuple[str, str], str]
) -> tuple[Manifest | None, str]:
    """The checkout's manifest, and why it does not list what the present settings ask for; empty when it does."""
    if not checkout.manifest_path.exists():
        return None, "absent; stage one writes it"
    try:
        manifest = checkout.read_manifest(None)
    except ValueError as error:
        return None, f"damaged: {error}"
    listed = {(part.fingerprint, entry.unit_digest): entry.tokens_digest for part, entry in manifest.stores}
    expected = {(group.fingerprint, unit.digest) for group in groups for unit in group.units}
    if {fingerprint for fingerprint, _ in listed} != {fingerprint for fingerprint, _ in expected}:
        return manifest, f"it lists stores of another recipe or other cameras and phases ({manifest.fingerprint})"
    reasons = [reason] if (reason := why_held_back(checkout.manifest_path)) else []
    if {part.action_fingerprint for part in manifest.parts} != {group.action_fingerprint for group in groups}:
        reasons.append(f"it was made for another action space ({manifest.action_space})")
    if gone := listed.keys() - expected:
        reasons.append(f"it lists {len(gone)} units that are not among the recordings any more (removed or edited)")
    if new := expected - listed.keys():
        reasons.append(f"it lacks {len(new)} of {len(expected)} units")
    if other := [key for key in listed.keys() & digests.keys() if digests[key] != listed[key]]:
        reasons.append(
            f"{len(other)} stores were made again since and differ from what it lists (device or libraries?)"
        )
    return manifest, "; ".join(reasons)


def _list_lines(group: EncodingGroup, part: Mapping[str, Any]) -> list[str]:
    """A group in words: counts, why units are not done, and what changed in the recipe."""
    counts = ", ".join(f"{part[state]} {state}" for state in STATES if part[state] or state == DONE)
    lines = [
        f"{group.preset.name} ({group.view}), recipe {group.fingerprint}: {counts} of {part['num_units']} units; "
        f"{part['num_steps']} steps, {describe_bytes(part['num_bytes'])}"
    ]
    for other in part["why"]:
        differs = f"{other['num_units']} units are stored under recipe {other['fingerprint']}, which differs in"
        lines += [f"  why: {differs}", *(f"    {change}" for change in other["changes"])]
    lines += shorten([f"  unreadable {unit.key}: {unit.reason}" for unit in group.unreadable], indent="  ")
    shown = [f"  {unit['state']} {unit['name']}: {unit['reason']}" for unit in part["units"] if unit["state"] != DONE]
    lines += shorten(shown, indent="  ")
    for what, how in (
        ("actions", "actions in this action space: seconds, no video is opened"),
        ("controls", "their controls: read again from the recordings when needed"),
    ):
        if number := part[f"without_{what}"]:
            lines.append(f"  {number} units lack {how}")
    return lines


class _Scan:
    """Looks at the stores that the groups ask for, and at those of other recipes."""

    def __init__(self, root: CacheRoot, groups: Sequence[EncodingGroup]) -> None:
        self.digests: dict[tuple[str, str], str] = {}  # of the token stores that are done, by fingerprint and unit
        self._root, self._remembered = root, DigestTable().remember()
        # Other recipes, with the names of their stores.
        self._others: dict[str, tuple[Mapping[str, Any], set[str]]] = {}
        present = {group.fingerprint for group in groups}
        for folder in root.recipe_folders("tokens"):
            if folder.name not in present:
                names = {name for name in os.listdir(folder) if name.endswith(".zarr") and not name.startswith(".")}  # noqa: PTH208
                recipes = (recipe for name in sorted(names) if (recipe := _read_recipe(folder / name)))
                if (recipe := next(recipes, None)) is not None:
                    self._others[folder.name] = recipe, names

    @functools.cached_property
    def _listed(self) -> dict[tuple[str, str], str]:
        """Manifest by fingerprint and digest of the units that it lists: such a store that is gone was deleted."""
        return {
            (part.fingerprint, entry.unit_digest): digest
            for digest, manifest in list_manifests(self._root).items()
            if isinstance(manifest, Manifest)
            for part, entry in manifest.stores
        }

    def describe(self, group: EncodingGroup) -> dict[str, Any]:
        """One group as JSON: its units, what the done ones hold, and why the stale ones are stale."""
        held: Counter[str] = Counter()
        units, stale = [], Counter()
        for unit in group.units:
            digest = unit.digest
            if is_unread(unit):
                digest, state, reason = "", UNREAD, "new or changed, and too large to be read for this"
            else:
                try:
                    tokens = self._root.find_store(group.tokens(self._root, unit))
                    state, reason = DONE, ""
                    if tokens is None:
                        state, reason, nearest = self._explain_missing(group, unit)
                        stale.update([nearest] if nearest else [])
                    else:
                        self.digests[group.fingerprint, digest] = tokens.digest
                        held.update(
                            num_steps=tokens.metadata["num_steps"],
                            num_bytes=tokens.num_bytes,
                            without_actions=not self._has_actions(group, unit, tokens),
                            without_controls=not self._root.fetch(group.controls(self._root, unit)),
                        )
                except ValueError as error:  # damaged, or of another version of this program
                    state, reason = DAMAGED, str(error)
            units.append({"name": unit.name, "digest": digest, "state": state, "reason": reason})
        counts = Counter(unit["state"] for unit in units)
        return {
            "dataset": group.preset.name,
            "camera": group.camera,
            "phase": group.phase,
            "fingerprint": group.fingerprint,
            "recipe": group.recipe,
            "num_units": len(units),
            **{state: counts[state] for state in STATES},
            **{name: held[name] for name in ("num_steps", "num_bytes", "without_actions", "without_controls")},
            "units": units,
            "why": [
                {
                    "fingerprint": name,
                    "num_units": count,
                    "changes": recipe_changes(self._others[name][0], group.recipe),
                }
                for name, count in stale.most_common()
            ],
        }

    def _explain_missing(self, group: EncodingGroup, unit: Unit) -> tuple[str, str, str | None]:
        """State and reason of a unit without a store, and the nearest recipe under which it is stored."""
        state, reasons, nearest = MISSING, [], self._find_nearest(group, unit.digest)
        if nearest is not None:
            state = STALE
            reasons.append(f"encoded under recipe {nearest}")
        for earlier in self._remembered.earlier(unit.files):
            if earlier != unit.digest and (
                self._root.fetch(self._root.tokens(group.fingerprint, earlier)) or self._find_nearest(group, earlier)
            ):
                state = STALE
                reasons.append(f"edited since it was encoded: sha256 {earlier[:12]}... -> {unit.digest[:12]}...")
        if (manifest := self._listed.get((group.fingerprint, unit.digest))) is not None:
            reasons.append(f"its store was deleted: manifest {manifest} lists it")
        return state, "; ".join(reasons) or "never encoded", nearest

    def _find_nearest(self, group: EncodingGroup, digest: str) -> str | None:
        """Of the other recipes under which a unit is stored the one with the fewest differences."""
        name = f"{unit_id(digest)}.zarr"
        found = (
            (len(recipe_changes(recipe, group.recipe)), fingerprint)
            for fingerprint, (recipe, names) in self._others.items()
            if name in names
        )
        return min(found, default=(0, None))[1]

    def _has_actions(self, group: EncodingGroup, unit: Unit, tokens: StoreFile) -> bool:
        try:
            found = self._root.find_store(group.actions(self._root, unit))
            return found is not None and found.metadata.get("steps_digest") == tokens.metadata["steps_digest"]
        except StoreDamagedError:
            return False


def _read_recipe(store: Path) -> Mapping[str, Any] | None:
    with suppress(ValueError, KeyError):  # a damaged one; another of the same recipe will do
        return read_store_file(store).metadata["recipe"]
    return None
