"""Damaged and missing stores of a manifest made again, and nothing else touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jepa_cache.actions import get_action_space
from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.encoding.filling import EncodeTask, ensure_actions, ensure_controls
from jepa_cache.encoding.parts import Part, open_encoder, plan_parts
from jepa_cache.encoding.reading import find_readings
from jepa_cache.encoding.run import encode_here
from jepa_cache.sources import Unit
from jepa_cache.store.audit import Audit, Finding, Scope, forget_stale
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, write_manifest
from jepa_cache.store.recipe import recipe_changes
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.verify import read_store_file


@dataclass
class Repair:
    """What was made again, and what is still not as the manifest says.

    Attributes:
        repaired: Stores, controls and manifests that are whole again.
        lost: Units whose recordings are not found, by their sha256.
        differing: Stores that came out with another digest than the manifest lists.
        left: What is still damaged, in words.
    """

    repaired: list[Path] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def repair_manifest(
    manifest: Manifest,
    findings: Sequence[Finding],
    config: Config,
    inputs: Sequence[str],
    *,
    base: Path,
    root: CacheRoot,
) -> Repair:
    """Make what was found damaged or missing again, from the recordings.

    A damaged store is removed only when its recording, the weights and the settings that it was made with are at hand.

    Args:
        manifest: Whose stores.
        findings: What `store.rounds` found.
        config: Settings; they must make the manifest's recipes.
        inputs: Where the recordings lie; replace the presets' lists when not empty.
        base: Folder that relative paths are meant from.
        root: Cache root.

    Raises:
        ValueError: The settings make another recipe, or recordings or weights cannot be had.
    """
    repair = Repair()
    for finding in findings:
        if finding.kind == "manifest":
            write_manifest(manifest, [finding.place])
            root.publish(finding.place)
            repair.repaired.append(finding.place)
    damaged = [finding for finding in findings if finding.kind != "manifest"]
    if damaged:
        _repair_units(repair, manifest, damaged, config, inputs, base=base, root=root)
    return repair


def _repair_units(
    repair: Repair,
    manifest: Manifest,
    findings: Sequence[Finding],
    config: Config,
    inputs: Sequence[str],
    *,
    base: Path,
    root: CacheRoot,
) -> None:
    encoder, weights, identity = open_encoder(config, base)
    space = get_action_space(config.encode.action_space)
    parts = {part.tokens: part for part in plan_parts(config, encoder, identity, space, inputs, base)}
    for listed in manifest.parts:
        of_part = [finding for finding in findings if finding.fingerprint == listed.fingerprint]
        if not of_part:
            continue
        part = parts.get(listed.fingerprint)
        if part is None or part.actions != listed.action_fingerprint or part.controls != listed.source_fingerprint:
            raise ValueError(_name_changes(listed, list(parts.values())))
        units = _find_units(part, sorted({finding.unit for finding in of_part}), repair)
        _remove(root, listed, [finding for finding in of_part if finding.unit in units])
        missing = [(unit, digest) for digest, unit in units.items() if not root.fetch(root.tokens(part.tokens, digest))]
        if missing:
            task = EncodeTask(config.encode, encoder, weights, replace(part, units=missing), default_num_threads())
            encode_here([task], root)
        for digest, unit in units.items():
            ensure_controls(root, part, unit, digest)
            ensure_actions(root, part, space, unit, digest)
        entries = [entry for entry in listed.entries if entry.unit_digest in units]
        _compare(repair, root, listed, entries, of_part)


def _find_units(part: Part, digests: Sequence[str], repair: Repair) -> dict[str, Unit]:
    """The recordings of these units: among the inputs, else where they were last seen."""
    named = {digest: unit for unit, digest in part.units}
    found, table = {}, DigestTable()
    for digest in digests:
        unit = named.get(digest)
        if unit is None and (files := table.find_unit(digest)):
            seen = Unit(files[0].name, files)
            # One that is read otherwise now gives other stores, which have another name.
            unit = (
                seen if find_readings(part.source, [(seen, digest)], part.recipe["decoder"]) == [part.reading] else None
            )
        if unit is None:
            repair.lost.append(digest)
        else:
            found[digest] = unit
    return found


def _remove(root: CacheRoot, listed: ManifestPart, findings: Sequence[Finding]) -> None:
    """Remove what is damaged, each under its claim and after another look: its maker may have put it right meanwhile."""
    entries = {entry.unit_digest: entry for entry in listed.entries}
    with Audit(root, Scope(read_data=True), lambda _: None) as audit:
        for place, unit in dict.fromkeys((finding.place, finding.unit) for finding in findings):
            with root.claimed(place):
                if any(finding.place == place for finding in audit.check(listed, entries[unit])):
                    root.remove(place)
                    forget_stale(root, place)


def _compare(
    repair: Repair,
    root: CacheRoot,
    listed: ManifestPart,
    entries: Sequence[ManifestEntry],
    findings: Sequence[Finding],
) -> None:
    """Read what was made again, and compare its digest with the manifest's."""
    with Audit(root, Scope(), lambda _: None) as audit:
        for entry in entries:
            places = list(dict.fromkeys(it.place for it in findings if it.unit == entry.unit_digest))
            left = audit.check(listed, entry)
            broken = {finding.place for finding in left}
            repair.repaired += [place for place in places if place not in broken]
            for finding in left:
                digest = {"tokens": entry.tokens_digest, "actions": entry.actions_digest}.get(finding.kind)
                if (
                    digest is not None
                    and finding.place.is_dir()
                    and (now := read_store_file(finding.place)).digest != digest
                ):
                    made = (
                        f"made on {now.provenance['device']} with {now.provenance['versions']}"
                        if now.provenance
                        else ""
                    )
                    repair.differing.append(
                        f"{finding.place} has digest {now.digest}, the manifest lists {digest} {made}".strip()
                    )
                else:
                    repair.left.append(finding.problem)


def _name_changes(listed: ManifestPart, parts: Sequence[Part]) -> str:
    now = [{"tokens": part.recipe, "actions": part.action_recipe} for part in parts]
    then = {"tokens": listed.recipe, "actions": listed.action_recipe}
    changes = min((recipe_changes(then, recipes) for recipes in now), key=len, default=[])
    return (
        f"the present settings do not make the stores of the manifest ({'; '.join(changes) or 'no part fits'}). Nothing was "
        "removed; give the settings and recordings that they were made with, as key=value and paths"
    )
