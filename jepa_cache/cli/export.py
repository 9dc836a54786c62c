"""`jepa-cache export cache`: a part of the cache as a root of its own, to carry elsewhere."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from jepa_cache.cli.export_predictor import export_predictor
from jepa_cache.cli.outcome import MANIFEST, Checkout, Outcome, describe_bytes, help_of, open_checkout, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jepa_cache.store.manifest import Manifest

export = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Take something out, to carry elsewhere.")
MIN_PREFIX = 6
SPLITS = ("train", "val")


@export.callback()
def _group() -> None:
    """Take something out, to carry elsewhere."""


def export_cache(
    out: Annotated[Path, typer.Argument(help="folder of the new root; absent or empty")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as cache.root=/data/cache")] = None,
    *,
    episodes: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="units that hold this episode; * and ? match; repeatable")
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option(metavar="UNIT", help="units by the beginning of their sha256 or by file name; repeatable"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="train or val: units that hold an episode of it")] = None,
    manifest: Annotated[Path | None, typer.Option(help="other than outputs/encode/manifest.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Copy a part of the cache into OUT as a root of its own, with manifest, provenance card and checksums.

    Whole units are copied, since a store is never cut: a unit that holds one of the episodes brings all of its episodes. Given
    several kinds of choice, a unit must fit each. Every byte is compared with its checksum; an interrupted export goes on under
    the same command. Use the result with cache.root=OUT; its README.md says how.

    Exit code 0: exported; 1: refused (OUT holds something else, nothing fits); 2: wrong usage, or a store is missing or damaged.

    Args:
        out: Folder of the new root.
        overrides: Such as cache.root, split.seed.
        episodes: Keys.
        units: Digests or names.
        split: "train" or "val".
        manifest: Which one.
        as_json: Print JSON.
    """
    report(
        lambda: copy_out(open_checkout(overrides), out, manifest, episodes or [], units or [], split), as_json=as_json
    )


export.command("cache", help=help_of(export_cache))(export_cache)
export.command("predictor", help=help_of(export_predictor))(export_predictor)


def copy_out(
    checkout: Checkout,
    out: Path,
    path: Path | None,
    episodes: Sequence[str],
    units: Sequence[str],
    split: str | None,
) -> Outcome:
    """Choose units and copy them."""
    from jepa_cache.store.export import export_manifest, select_units
    from jepa_cache.store.manifest import why_held_back
    from jepa_cache.store.usage import in_use
    from jepa_cache.store.verify import read_store_file

    if checkout.paths:
        raise ValueError(f"export takes one folder and key=value overrides; got {checkout.paths[0]!r} as well")
    if split not in (None, *SPLITS):
        raise ValueError(f"--split is train or val; got {split!r}")
    if path is None and (reason := why_held_back(checkout.repository / MANIFEST)) is not None:
        raise ValueError(reason)
    manifest, root = checkout.read_manifest(path), checkout.root
    with in_use(root):
        wanted, asked = choose_units(checkout, manifest, episodes, units, split)
        chosen = select_units(manifest, root, lambda _, entry: entry.unit_digest in wanted)
        sizes = [
            read_store_file(root.tokens(part.fingerprint, entry.unit_digest)).num_bytes for part, entry in chosen.stores
        ]
        selection = {
            "from_manifest": manifest.digest,
            "episodes": list(episodes),
            "units": list(units),
            "split": split,
        }
        with tqdm(
            desc="export", total=sum(sizes), unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5
        ) as bar:
            result = export_manifest(chosen, root, out, selection=selection, on_bytes=bar.update)
    num_episodes = sum(entry.num_episodes for entry in chosen.entries)
    document = {
        "out": str(out),
        "manifest": chosen.digest,
        "num_units": len(chosen.entries),
        "num_episodes": num_episodes,
        "num_episodes_asked": asked,
        "num_steps": chosen.num_steps,
        "num_bytes": result.num_bytes,
        "num_files": len(result.sums) + 1,
    }
    lines = [
        f"exported {len(chosen.entries)} of {len(manifest.entries)} units to {out}: {num_episodes} episodes, {chosen.num_steps} "
        f"steps, {describe_bytes(result.num_bytes)}, every byte checked"
    ]
    if asked is not None and asked < num_episodes:
        lines.append(
            f"{asked} episodes were asked for; their units are whole, so {num_episodes - asked} others came along"
        )
    lines.append(f"{out / 'README.md'} says how to use it; fill in the licence of the recordings before you pass it on")
    return Outcome(document, lines)


def choose_units(
    checkout: Checkout, manifest: Manifest, episodes: Sequence[str], units: Sequence[str], split: str | None
) -> tuple[set[str], int | None]:
    """The sha256 of the units that fit, and how many episodes were asked for; None where none were.

    Raises:
        ValueError: An episode or unit that the manifest does not have.
    """
    wanted = {entry.unit_digest for entry in manifest.entries}
    if units:
        names = _unit_names()
        fitting = {text: {digest for digest in wanted if _is_named(text, digest, names)} for text in units}
        for text, found in fitting.items():
            if not found:
                raise ValueError(
                    f"--units {text!r} fits no unit of the manifest; give {MIN_PREFIX} or more digits of a unit's sha256, or the "
                    "name of a file as stage one read it on this machine"
                )
        wanted &= set().union(*fitting.values())
    if not episodes and split is None:
        return wanted, None
    keys = _episodes(checkout, manifest, wanted)
    for text in episodes:
        if not any(fnmatch.fnmatchcase(key, text) for found in keys.values() for key in found):
            raise ValueError(f"--episodes {text!r} fits no episode of the chosen units")
    asked = {
        digest: {key for key in found if _is_asked(checkout, key, episodes, split)} for digest, found in keys.items()
    }
    return {digest for digest, found in asked.items() if found}, len(set().union(*asked.values()))


def _is_asked(checkout: Checkout, key: str, episodes: Sequence[str], split: str | None) -> bool:
    from jepa_cache.data.splits import split_of

    config = checkout.config.split
    return (not episodes or any(fnmatch.fnmatchcase(key, text) for text in episodes)) and (
        split is None or split_of(key, val_share=config.val_share, seed=config.seed) == split
    )


def _episodes(checkout: Checkout, manifest: Manifest, units: set[str]) -> dict[str, set[str]]:
    from jepa_cache.store.layout import SEGMENTS_FILE
    from jepa_cache.store.reader import read_table

    found: dict[str, set[str]] = {}
    for part, entry in manifest.stores:
        if entry.unit_digest in units:
            store = checkout.root.tokens(part.fingerprint, entry.unit_digest)
            checkout.root.fetch(store)
            found.setdefault(entry.unit_digest, set()).update(
                read_table(store, SEGMENTS_FILE).column("episode").to_pylist()
            )
    return found


def _unit_names() -> dict[str, set[str]]:
    from jepa_cache.store.digests import DigestTable

    names: dict[str, set[str]] = {}
    for files, digests in DigestTable().remember().units.items():
        for digest in digests:
            names.setdefault(digest, set()).update(Path(file).name for file in files)
    return names


def _is_named(text: str, digest: str, names: dict[str, set[str]]) -> bool:
    if len(text) >= MIN_PREFIX and digest.startswith(text):
        return True
    return any(fnmatch.fnmatchcase(name, Path(text).name) for name in names.get(digest, ()))
