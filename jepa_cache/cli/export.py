"""`jepa-cache export cache`: the stores of a manifest as a root of their own, to carry elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from jepa_cache.cli.export_predictor import export_predictor
from jepa_cache.cli.outcome import MANIFEST, Checkout, Outcome, describe_bytes, help_of, open_checkout, report
from jepa_cache.store.export import README, export_manifest
from jepa_cache.store.manifest import why_held_back
from jepa_cache.store.quantisation import step_bytes

export = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Take something out, to carry elsewhere.")


@export.callback()
def _group() -> None:
    """Take something out, to carry elsewhere."""


def export_cache(
    out: Annotated[Path, typer.Argument(help="folder of the new root; absent or empty")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as cache.root=/data/cache")] = None,
    *,
    manifest: Annotated[Path | None, typer.Option(help="other than outputs/encode/manifest.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Copy everything that a manifest lists into OUT as a root of its own, with the manifest, a README and checksums.

    Every byte of the copy is compared with its checksum; an interrupted export is finished by the same command. Use the
    result with cache.root=OUT; its README.md says how. To export less, encode less: the stores are found again.

    Exit code 0: exported; 1: refused (OUT holds something else); 2: wrong usage, or a store is missing or damaged.

    Args:
        out: Folder of the new root.
        overrides: Such as cache.root.
        manifest: Which one.
        as_json: Print JSON.
    """
    report(lambda: copy_cache(open_checkout(overrides), out, manifest), as_json=as_json)


export.command("cache", help=help_of(export_cache))(export_cache)
export.command("predictor", help=help_of(export_predictor))(export_predictor)


def copy_cache(checkout: Checkout, out: Path, path: Path | None) -> Outcome:
    """Copy the stores of a manifest."""
    if checkout.paths:
        raise ValueError(f"export takes one folder and key=value overrides; got {checkout.paths[0]!r} as well")
    if path is None and (reason := why_held_back(checkout.repository / MANIFEST)) is not None:
        raise ValueError(reason)
    manifest, root = checkout.read_manifest(path), checkout.root
    total = manifest.num_steps * step_bytes(manifest.recipe["dtype"], manifest.num_tokens, manifest.width)
    with (
        root.shared_lock(),
        tqdm(desc="export", total=total, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5) as bar,
    ):
        result = export_manifest(manifest, root, out, bar.update)
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    document = {
        "out": str(out),
        "manifest": manifest.digest,
        "num_units": len(manifest.entries),
        "num_episodes": num_episodes,
        "num_steps": manifest.num_steps,
        "num_bytes": result.num_bytes,
        "num_files": len(result.sums) + 1,
    }
    return Outcome(
        document,
        [
            f"exported {len(manifest.entries)} units to {out}: {num_episodes} episodes, {manifest.num_steps} steps, "
            f"{describe_bytes(result.num_bytes)}, every byte checked",
            f"{out / README} says how to use it; fill in the licence of the recordings before you pass it on",
        ],
    )
