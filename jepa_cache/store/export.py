"""The stores of a manifest copied into a root of their own, to carry elsewhere, each checked where it arrived."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jepa_cache.files import (
    OURS,
    atomic_file,
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    temporary_folder,
)
from jepa_cache.store.controls import iter_controls
from jepa_cache.store.layout import REMEDY, STORE_FILE, StoreDamagedError, StoreFile, check_store, read_store_file
from jepa_cache.store.manifest import Manifest, write_manifest
from jepa_cache.store.recipe import file_digest
from jepa_cache.store.root import KINDS, MARKER, CacheRoot, RefusedError

README, CHECKSUMS = "README.md", "SHA256SUMS"
UNKNOWN = "unknown"


@dataclass
class Export:
    """What was exported: the sha256 of every file by its path in the new root, and the bytes of the stores."""

    sums: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


def export_manifest(
    manifest: Manifest, root: CacheRoot, out: Path, on_bytes: Callable[[int], object] = lambda _: None
) -> Export:
    """Copy everything that a manifest lists into a new root, and check every byte of the copy.

    Atomic for each store, and the manifest comes last; an interrupted export is finished by the same call.

    Args:
        manifest: What to copy.
        root: Where the stores are; the caller holds its shared lock.
        out: Folder of the new root; absent, empty, or an unfinished export of this manifest.
        on_bytes: Is told how many more bytes of token stores are copied.

    Raises:
        RefusedError: `out` holds something else, or lies in `root`.
        StoreDamagedError: A store is missing or damaged; says what to type.
    """
    _check_target(out, root, manifest)
    target, export = CacheRoot(out), Export()
    target.check_writable()
    target.remove_stale_temporaries()
    for part, entry in manifest.stores:
        tokens, actions, controls = part.keys(entry)
        for key, digest in ((tokens, entry.tokens_digest), (actions, entry.actions_digest)):
            final = target.store(key)
            found = _copy_store(root, root.store(key), final, digest)
            name = final.relative_to(out)
            export.sums |= {str(name / file): record.sha256 for file, record in found.files.items()}
            export.sums[str(name / STORE_FILE)] = file_digest(final / STORE_FILE)
            export.num_bytes += found.num_bytes
            if key == tokens:
                on_bytes(found.num_bytes)
        final = target.store(controls)
        export.sums[str(final.relative_to(out))] = _copy_controls(root, root.store(controls), final)
        export.num_bytes += final.stat().st_size
    with atomic_file(out / README) as path:
        path.write_text(_write_readme(manifest, export))
    write_manifest(manifest, [target.manifest(manifest.digest)])
    for path in (out / MARKER, out / README, target.manifest(manifest.digest)):
        export.sums[str(path.relative_to(out))] = file_digest(path)
    with atomic_file(out / CHECKSUMS) as path:
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(export.sums.items())))
    return export


def _check_target(out: Path, root: CacheRoot, manifest: Manifest) -> None:
    """Refuse to export where something else lies."""
    if out.resolve() == root.path or root.path in out.resolve().parents:
        raise RefusedError(f"{out} lies in the cache root {root.path} itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"{out} is a file; choose a folder")
    names = {path.name for path in out.iterdir() if not OURS.fullmatch(path.name)} if out.is_dir() else set()
    others = sorted(names - {*KINDS, "manifests", README, CHECKSUMS, MARKER})
    others += sorted({path.name for path in (out / "manifests").glob("*.json")} - {f"{manifest.digest}.json"})
    if others:
        raise RefusedError(
            f"{out} is not empty: it holds {others[0]}, which is not of this export; choose another folder, or remove it"
        )


def _copy_store(root: CacheRoot, source: Path, final: Path, digest: str) -> StoreFile:
    if final.is_dir():
        try:
            if (found := check_store(final, read_data=True)).digest == digest:
                return found
        except StoreDamagedError as error:
            print(f"damaged in the export, copying it again: {error}", file=sys.stderr)
        remove_folder(final)
    remove_stale_temporaries(final.parent)
    with root.pulled([source]), temporary_folder(final) as folder:
        found = read_store_file(source)
        if found.digest != digest:
            raise StoreDamagedError(f"{source} is not the store that the manifest lists: its digest differs; {REMEDY}")
        for name in (*found.files, STORE_FILE):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        try:
            check_store(folder, read_data=True)
        except StoreDamagedError as error:
            check_store(source, read_data=True)  # which names what is damaged there
            raise _not_written(source, final) from error
        publish_folder(folder, final)
    return found


def _copy_controls(root: CacheRoot, source: Path, final: Path) -> str:
    """Copy a file of controls; returns its sha256."""
    with root.pulled([source]):
        remove_stale_temporaries(final.parent)
        for _ in iter_controls(source):  # carries a checksum of its own
            pass
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        with atomic_file(final) as path:
            shutil.copyfile(source, path)
            if file_digest(path) != digest:
                raise _not_written(source, final)
    return digest


def _not_written(source: Path, final: Path) -> OSError:
    return OSError(f"{final} was not written as {source} was read (sha256 differs); try again, or another disk")


def _write_readme(manifest: Manifest, export: Export) -> str:
    recipe = manifest.recipe
    trained = "trained" if manifest.encoder_trained else "UNTRAINED, random weights"
    licence = f"{UNKNOWN}: fill in" if manifest.encoder_trained else "none: seeded random weights"
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    return f"""# Tokens of data set {manifest.dataset}, encoder {manifest.encoder} ({trained})

A cache root of jepa-cache, exported from another one.

| | |
|---|---|
| units, episodes, steps | {len(manifest.entries)}, {num_episodes}, {manifest.num_steps} |
| tokens of a step | {manifest.num_tokens} x {manifest.width} |
| bytes | {export.num_bytes} |
| mode, rate | {manifest.mode}, {recipe.get("sampling", {}).get("fps", UNKNOWN)} Hz |
| action space | {manifest.action_space} |
| encoder weights | {recipe["encoder"]["weights"] if "encoder" in recipe else UNKNOWN} |
| licence of the encoder weights | {licence} |
| licence and origin of the recordings | {UNKNOWN}: fill in before you pass this on |

`manifests/{manifest.digest}.json` holds the recipes, and the `store.json` of each store what it was made with. `{CHECKSUMS}` holds
the sha256 of every file (`sha256sum -c {CHECKSUMS}`).

Use it in a checkout of jepa-cache whose settings (`dataset`, `encoder`, `encode.*`) are those of the recipe:

    mkdir -p CHECKOUT/outputs/encode
    cp manifests/{manifest.digest}.json CHECKOUT/outputs/encode/manifest.json
    cd CHECKOUT
    python stages/fit_scaler.py cache.root=THIS_FOLDER
    python stages/train_predictor.py cache.root=THIS_FOLDER

The stores are Zarr v3 with Parquet tables beside; they open without jepa-cache.
"""
