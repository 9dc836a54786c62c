"""Damaged and missing stores of a manifest: they are removed, and stage one, which is idempotent, fills the holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jepa_cache.actions import get_action_space
from jepa_cache.config.schema import Config
from jepa_cache.encoding.filling import ensure_controls
from jepa_cache.encoding.parts import Part, open_encoder, plan_parts
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.store.check import Finding, Scope, check_units, forget_stale
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, write_manifest
from jepa_cache.store.recipe import StoreKey, recipe_changes
from jepa_cache.store.root import CacheRoot


@dataclass
class Repair:
    """What was made again, and what is still not as the manifest says.

    Attributes:
        repaired: Stores, controls and manifests that are whole again.
        lost: Units whose recordings are not among the inputs, by their sha256.
        differing: Stores that came out with another digest than the manifest lists, in words.
        left: What is still damaged, in words.
    """

    repaired: list[Path] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything is as the manifest says."""
        return not (self.lost or self.differing or self.left)


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
        findings: Of `store.check`.
        config: Settings; they must make the manifest's recipes.
        inputs: Where the recordings lie; replace the presets' lists when not empty.
        base: Folder that relative paths are meant from.
        root: Cache root, of which the caller holds the shared lock.

    Raises:
        ValueError: The settings make another recipe, or recordings or weights cannot be had.
    """
    repair = Repair()
    damaged = {finding.key: finding.path for finding in findings if finding.key is not None}
    if any(finding.key is None for finding in findings):
        path = root.manifest(manifest.digest)
        write_manifest(manifest, [path])
        root.publish(path)
        repair.repaired.append(path)
    affected = [(part, entry) for part, entry in manifest.stores if damaged.keys() & set(part.keys(entry))]
    if not affected:
        return repair
    groups = _group_recordings(config, inputs, base, {part.fingerprint: part for part, _ in affected})
    at_hand = {
        (fingerprint, digest): (group, unit) for fingerprint, group in groups.items() for unit, digest in group.units
    }
    found = [(part, entry) for part, entry in affected if (part.fingerprint, entry.unit_digest) in at_hand]
    repair.lost = sorted({entry.unit_digest for _, entry in affected} - {entry.unit_digest for _, entry in found})
    for part, entry in found:
        for key in [key for key in damaged if key in part.keys(entry)]:
            _remove_damaged(root, part, entry, damaged[key])
    made = _digests(encode_dataset(config, inputs, base=base, root=root).manifest)
    for part, entry in found:
        group, unit = at_hand[part.fingerprint, entry.unit_digest]
        ensure_controls(
            root, group, unit, entry.unit_digest
        )  # which stage one does not miss where the actions are there
    listed = _digests(manifest)
    differing = {key for key in damaged if made.get(key, listed.get(key)) != listed.get(key)}
    repair.differing = [f"{damaged[key]} has digest {made[key]}, the manifest lists {listed[key]}" for key in differing]
    left = [finding for finding in check_units(found, root, Scope()) if finding.key not in differing]
    repair.left = [finding.problem for finding in left]
    whole = {key for part, entry in found for key in part.keys(entry)} - differing - {finding.key for finding in left}
    repair.repaired += [path for key, path in damaged.items() if key in whole]
    return repair


def _group_recordings(
    config: Config, inputs: Sequence[str], base: Path, listed: dict[str, ManifestPart]
) -> dict[str, Part]:
    """The present recordings, by the token fingerprint under which the present settings store them.

    Raises:
        ValueError: The settings do not make the listed stores.
    """
    encoder, _, identity = open_encoder(config, base)
    space = get_action_space(config.encode.action_space)
    groups = {group.tokens: group for group in plan_parts(config, encoder, identity, space, inputs, base)}
    for fingerprint, part in listed.items():
        group = groups.get(fingerprint)
        if group is None or (group.actions, group.controls) != (part.action_fingerprint, part.source_fingerprint):
            then = {"tokens": part.recipe, "actions": part.action_recipe}
            now = [{"tokens": group.recipe, "actions": group.action_recipe} for group in groups.values()]
            changes = min((recipe_changes(then, recipes) for recipes in now), key=len, default=[])
            raise ValueError(
                f"the present settings do not make the stores of the manifest ({'; '.join(changes) or 'no recording fits'}). "
                "Nothing was removed; give the settings and recordings that they were made with, as key=value and paths"
            )
    return groups


def _remove_damaged(root: CacheRoot, part: ManifestPart, entry: ManifestEntry, path: Path) -> None:
    """Remove a store under its claim and after another look: its maker may have put it right meanwhile."""
    with root.claimed(path):
        if any(finding.path == path for finding in check_units([(part, entry)], root, Scope(read_data=True))):
            root.remove(path)
            forget_stale(root, path)


def _digests(manifest: Manifest) -> dict[StoreKey, str]:
    return {
        key: digest
        for part, entry in manifest.stores
        for key, digest in zip(part.keys(entry), (entry.tokens_digest, entry.actions_digest), strict=False)
    }
