"""A part of a cache as a root of its own: copied stores, a manifest, a card that says where they come from, and checksums."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jepa_cache.files import (
    OURS,
    atomic_file,
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    temporary_folder,
)
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.damage import WAY_OUT, StoreDamagedError
from jepa_cache.store.layout import STORE_FILE
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.recipe import canonical_json, file_digest
from jepa_cache.store.root import MARKER, CacheRoot
from jepa_cache.store.usage import RefusedError
from jepa_cache.store.verify import StoreFile, check_store, read_store_file

COPY_BYTES = 4 << 20
CARD, README, CHECKSUMS = "provenance.json", "README.md", "SHA256SUMS"
KINDS = ("tokens", "actions", "controls", "manifests")
UNKNOWN = "unknown"


@dataclass
class Export:
    """What was exported: the manifest of the copies, and the sha256 of every file by its path in the new root."""

    manifest: Manifest
    sums: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    made_with: list[dict[str, Any]] = field(default_factory=list)


def select_units(manifest: Manifest, root: CacheRoot, keep: Callable[[ManifestPart, ManifestEntry], bool]) -> Manifest:
    """The manifest of a part of the units.

    Raises:
        RefusedError: None is left.
        StoreDamagedError: A store is missing or its card cannot be read.
    """
    parts = []
    for part in manifest.parts:
        entries = tuple(entry for entry in part.entries if keep(part, entry))
        skipped: list[dict[str, str]] = []
        notes: list[str] = []
        for entry in entries:
            tokens = read_store_file(root.tokens(part.fingerprint, entry.unit_digest)).card
            excluded = read_store_file(root.actions(part.action_fingerprint, entry.unit_digest)).card["excluded"]
            skipped += tokens["skipped"] + [{"key": key, "reason": reason} for key, reason in excluded.items()]
            notes += tokens["notes"]
        if entries:
            parts.append(replace(part, entries=entries, skipped=tuple(skipped), notes=tuple(notes)))
    if not parts:
        raise RefusedError("no unit of the manifest fits what was asked for, so there is nothing to export")
    return replace(manifest, parts=tuple(parts))


def export_manifest(
    manifest: Manifest, root: CacheRoot, out: Path, *, selection: Mapping[str, Any], on_bytes: Callable[[int], None]
) -> Export:
    """Copy everything that a manifest lists into a new root; each store is compared with its checksums on the way.

    Atomic for each store, and the manifest comes last; an interrupted export goes on under the same command.

    Args:
        manifest: From `select_units`.
        root: Where the stores are.
        out: Folder of the new root; absent, empty, or an unfinished export.
        selection: What was asked for, for the card.
        on_bytes: Is told how many bytes are through.

    Raises:
        RefusedError: `out` holds something else, or lies in `root`.
        StoreDamagedError: A store is missing or damaged; says what to type.
    """
    check_place(out, root, manifest)
    target, export = CacheRoot(out), Export(manifest)
    target.check_writable()
    target.remove_stale_temporaries()
    export.sums[MARKER] = file_digest(out / MARKER)
    for part, entry in manifest.stores:
        unit = entry.unit_digest
        for source, final, digest in (
            (root.tokens(part.fingerprint, unit), target.tokens(part.fingerprint, unit), entry.tokens_digest),
            (
                root.actions(part.action_fingerprint, unit),
                target.actions(part.action_fingerprint, unit),
                entry.actions_digest,
            ),
        ):
            shown = on_bytes if digest == entry.tokens_digest else lambda _: None
            found = _copy_store(root, source, final, digest, shown)
            _note_store(export, out, final, found)
        controls = target.controls(part.source_fingerprint, unit)
        _copy_controls(root, root.controls(part.source_fingerprint, unit), controls)
        export.sums[str(controls.relative_to(out))] = file_digest(controls)
        export.num_bytes += controls.stat().st_size
    listed = target.manifest(manifest.digest)
    documents = {
        listed: manifest.to_bytes(),
        out / CARD: canonical_json(describe_export(export, selection)),
        out / README: write_readme(export, selection).encode(),
    }
    for path, content in documents.items():
        _write(path, content)
        export.sums[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(export.sums.items()))
    _write(out / CHECKSUMS, lines.encode())
    return export


def check_place(out: Path, root: CacheRoot, manifest: Manifest) -> None:
    """Refuse to export where something else lies.

    Raises:
        RefusedError: Naming what is there.
    """
    if out.resolve() == root.path or root.path in out.resolve().parents:
        raise RefusedError(f"{out} lies in the cache root {root.path} itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} is a file; choose a folder")
    names = {path.name for path in out.iterdir() if not OURS.fullmatch(path.name)} if out.is_dir() else set()
    others = sorted(name for name in names if name not in (*KINDS, CARD, README, CHECKSUMS, MARKER))
    manifests = {path.name for path in (out / "manifests").glob("*.json")} if out.is_dir() else set()
    if others or manifests - {f"{manifest.digest}.json"}:
        what = others[0] if others else f"another export ({sorted(manifests)[0]})"
        raise RefusedError(f"{out} is not empty: it holds {what}; choose another folder, or remove it")


def describe_export(export: Export, selection: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance card as JSON; no times, hosts or paths."""
    manifest = export.manifest
    return {
        "program": "jepa-cache",
        "manifest": manifest.digest,
        "selection": dict(selection),
        "dataset": manifest.dataset,
        "num_units": len(manifest.entries),
        "num_episodes": sum(entry.num_episodes for entry in manifest.entries),
        "num_steps": manifest.num_steps,
        "num_bytes": export.num_bytes,
        "encoder": {
            "name": manifest.encoder,
            "weights": manifest.recipe["encoder"]["weights"] if "encoder" in manifest.recipe else UNKNOWN,
            "trained": manifest.encoder_trained,
            "licence": UNKNOWN if manifest.encoder_trained else "none: seeded random weights",
        },
        "parts": [
            {
                "dataset": part.dataset,
                "camera": part.camera,
                "phase": part.phase,
                "licence_of_recordings": UNKNOWN,
                "origin_of_recordings": UNKNOWN,
                "fingerprint": part.fingerprint,
                "recipe": part.recipe,
                "action_recipe": part.action_recipe,
                "units": [
                    {
                        "sha256_of_recordings": entry.unit_digest,
                        "tokens_digest": entry.tokens_digest,
                        "actions_digest": entry.actions_digest,
                    }
                    for entry in part.entries
                ],
            }
            for part in manifest.parts
        ],
        "made_with": export.made_with,
    }


def write_readme(export: Export, selection: Mapping[str, Any]) -> str:
    """The card in words, with how to use the root."""
    manifest, recipe = export.manifest, export.manifest.recipe
    card = describe_export(export, selection)
    chosen = {key: " ".join(value) if isinstance(value, list) else value for key, value in selection.items()}
    asked = "; ".join(f"{key} {value}" for key, value in chosen.items() if value)
    trained = "trained" if manifest.encoder_trained else "UNTRAINED, random weights"
    sampling = recipe.get("sampling", {})
    return f"""# Tokens of data set {manifest.dataset}, encoder {manifest.encoder} ({trained})

A cache root of jepa-cache, exported from another one ({asked}). Stores are never cut: whole units were taken.

| | |
|---|---|
| units, episodes, steps | {card["num_units"]}, {card["num_episodes"]}, {card["num_steps"]} |
| tokens of a step | {manifest.num_tokens} x {manifest.width} |
| bytes | {export.num_bytes} |
| mode, rate | {manifest.mode}, {sampling.get("fps", UNKNOWN)} Hz asked for |
| action space | {manifest.action_space} |
| encoder weights | {card["encoder"]["weights"]} |
| licence of the encoder weights | {card["encoder"]["licence"]} |
| licence and origin of the recordings | {UNKNOWN}: fill in before you pass this on |

`{CARD}` holds the recipes and where each store was made, `{CHECKSUMS}` the sha256 of every file (`sha256sum -c {CHECKSUMS}`).

Use it in a checkout of jepa-cache whose settings (`dataset`, `encoder`, `encode.*`) are those of the recipe:

    mkdir -p CHECKOUT/outputs/encode
    cp manifests/{manifest.digest}.json CHECKOUT/outputs/encode/manifest.json
    cd CHECKOUT
    python stages/fit_scaler.py cache.root=THIS_FOLDER
    python stages/train_predictor.py cache.root=THIS_FOLDER

The stores are Zarr v3 with Parquet tables beside; they open without jepa-cache.
"""


def _copy_store(root: CacheRoot, source: Path, final: Path, digest: str, on_bytes: Callable[[int], None]) -> StoreFile:
    if not root.fetch(source):
        raise StoreDamagedError(f"{source} is missing; {WAY_OUT}")
    found = read_store_file(source)
    if found.digest != digest:
        raise StoreDamagedError(f"{source} is not the store that the manifest lists: its digest differs; {WAY_OUT}")
    if final.is_dir():
        try:
            if check_store(final, read_data=True).digest == digest:
                on_bytes(found.num_bytes)
                return found
        except StoreDamagedError as error:
            print(f"damaged in the export, copying it again: {error}", file=sys.stderr)
        remove_folder(final)
    remove_stale_temporaries(final.parent)
    with root.pulled([source]), temporary_folder(final) as folder:
        for name, file in found.files.items():
            if _copy(source / name, folder / name, on_bytes) != file.sha256:
                raise StoreDamagedError(f"{source / name} has changed since it was written (sha256 differs); {WAY_OUT}")
        _copy(source / STORE_FILE, folder / STORE_FILE, lambda _: None)
        publish_folder(folder, final)
    return found


def _copy_controls(root: CacheRoot, source: Path, final: Path) -> None:
    if not root.fetch(source):
        raise StoreDamagedError(f"{source} is missing; {WAY_OUT}")
    remove_stale_temporaries(final.parent)
    for _ in iter_controls(source):  # carries a checksum of its own
        pass
    with atomic_file(final) as path:
        digest = _copy(source, path, lambda _: None)
        if file_digest(path) != digest:
            raise OSError(f"{final} was not written as {source} was read (sha256 differs); try again, or another disk")


def _copy(source: Path, target: Path, on_bytes: Callable[[int], None]) -> str:
    """Copy a file; returns its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    with source.open("rb") as original, target.open("wb") as file:
        while block := original.read(COPY_BYTES):
            hasher.update(block)
            file.write(block)
            on_bytes(len(block))
    return hasher.hexdigest()


def _note_store(export: Export, out: Path, final: Path, found: StoreFile) -> None:
    name = final.relative_to(out)
    export.sums |= {str(name / file): record.sha256 for file, record in found.files.items()}
    export.sums[str(name / STORE_FILE)] = file_digest(final / STORE_FILE)
    export.num_bytes += found.num_bytes + (final / STORE_FILE).stat().st_size
    made_with = {
        key: value for key, value in found.provenance.items() if key != "implausible"
    }  # that is of its recordings
    if made_with and made_with not in export.made_with:
        export.made_with.append(made_with)


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
