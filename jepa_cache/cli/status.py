"""`jepa-cache status`: what of the data set is in the cache, and for what is stale: which field of the recipe changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jepa_cache.encoding.status import PartStatus
    from jepa_cache.store.manifest import Manifest


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
    report(lambda: look_up(open_checkout(arguments)), as_json=as_json)


def look_up(checkout: Checkout) -> Outcome:
    """The state of every unit that the present settings ask for."""
    from jepa_cache.encoding.inventory import take_inventory
    from jepa_cache.encoding.status import STATES, find_status
    from jepa_cache.store.collection import list_manifests

    inventory = take_inventory(checkout.config, checkout.paths, checkout.base)
    manifests = {listing.digest: listing.manifest for listing in list_manifests(checkout.root) if listing.manifest}
    parts = find_status(inventory, checkout.root, manifests)
    manifest, reason = compare_manifest(checkout, parts)
    complete = all(part.count("done") == len(part.units) for part in parts)
    ready = complete and reason == "" and not any(part.num_without_actions for part in parts)
    document = {
        "ready": ready,
        "root": checkout.root.name,
        "dataset": checkout.config.dataset.name,
        "encoder": checkout.config.encoder.name,
        "parts": [describe_part(part) for part in parts],
        "manifest": {"digest": manifest.digest if manifest else None, "current": reason == "", "reason": reason},
        "notes": inventory.notes,
    }
    lines = [f"cache root {checkout.root.name}", *(f"note: {note}" for note in inventory.notes)]
    for part in parts:
        counts = ", ".join(f"{part.count(state)} {state}" for state in STATES if part.count(state) or state == "done")
        lines.append(
            f"{part.part.preset.name} ({part.part.view}), recipe {part.part.tokens}: {counts} of {len(part.units)} units; "
            f"{part.num_steps} steps, {describe_bytes(part.num_bytes)}"
        )
        lines += list_reasons(part)
    lines.append(f"manifest {MANIFEST}: {reason or 'current'}")
    lines.append("nothing to do" if ready else "next: python stages/encode.py")
    return Outcome(document, lines, FINE if ready else PROBLEM)


def compare_manifest(checkout: Checkout, parts: Sequence[PartStatus]) -> tuple[Manifest | None, str]:
    """The checkout's manifest, and why it does not list what the present settings ask for; empty when it does."""
    from jepa_cache.store.manifest import why_held_back

    if not (checkout.repository / MANIFEST).exists():
        return None, "absent; stage one writes it"
    try:
        manifest = checkout.read_manifest(None)
    except ValueError as error:
        return None, f"damaged: {error}"
    listed = {(part.fingerprint, entry.unit_digest): entry.tokens_digest for part, entry in manifest.stores}
    asked = {(part.part.tokens, digest): part.digests.get(digest) for part in parts for _, digest in part.part.units}
    if {fingerprint for fingerprint, _ in listed} != {fingerprint for fingerprint, _ in asked}:
        return manifest, f"it lists stores of another recipe or other cameras and phases ({manifest.fingerprint})"
    reasons = [reason] if (reason := why_held_back(checkout.repository / MANIFEST)) else []
    if {part.action_fingerprint for part in manifest.parts} != {part.part.actions for part in parts}:
        reasons.append(f"it was made for another action space ({manifest.action_space})")
    if gone := listed.keys() - asked.keys():
        reasons.append(f"it lists {len(gone)} units that are not among the recordings any more (removed or edited)")
    if new := asked.keys() - listed.keys():
        reasons.append(f"it lacks {len(new)} of {len(asked)} units")
    other = [key for key in asked.keys() & listed.keys() if asked[key] not in (None, listed[key])]
    if other:
        reasons.append(
            f"{len(other)} stores were made again since and differ from what it lists (device or libraries?)"
        )
    return manifest, "; ".join(reasons)


def list_reasons(part: PartStatus) -> list[str]:
    """Lines under a part: why units are not done, what changed in the recipe, and what is recorded but never a reason."""
    lines = []
    for other in part.why:
        lines.append(f"  why: {other.num_units} units are stored under recipe {other.fingerprint}, which differs in")
        lines += [f"    {change}" for change in other.changes]
    lines += shorten([f"  unreadable {unit.key}: {unit.reason}" for unit in part.part.unreadable], indent="  ")
    shown = [f"  {unit.state} {unit.name}: {unit.reason}" for unit in part.units if unit.state != "done"]
    lines += shorten(shown, indent="  ")
    if part.num_without_actions:
        lines.append(
            f"  {part.num_without_actions} units lack actions in this action space: seconds, no video is opened"
        )
    if part.num_without_controls:
        lines.append(
            f"  {part.num_without_controls} units lack their controls: read again from the recordings when needed"
        )
    made = ", ".join(
        f"{name} {'/'.join(sorted(part.made_with[name]))}" for name in ("device", "decoder") if name in part.made_with
    )
    if made:
        lines.append(f"  made with {made}")
    lines += [f"  {text}: recorded, no reason to encode again" for text in part.differing]
    return lines


def describe_part(status: PartStatus) -> dict[str, Any]:
    """One part as JSON."""
    from jepa_cache.encoding.status import STATES

    return {
        "dataset": status.part.preset.name,
        "camera": status.part.camera,
        "phase": status.part.phase,
        "fingerprint": status.part.tokens,
        "recipe": status.part.recipe,
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
