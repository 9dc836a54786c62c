"""`jepa-cache gc`: what no manifest of the cache root needs, and its removal."""

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
    from collections.abc import Collection

    from jepa_cache.store.collection import Contents, Listing
    from jepa_cache.store.manifest import Manifest


def gc(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as cache.root=/data/cache")] = None,
    *,
    delete: Annotated[
        bool, typer.Option("--delete", help="remove what is listed; without it nothing is changed")
    ] = False,
    forget: Annotated[
        list[str] | None, typer.Option(metavar="DIGEST", help="treat this manifest or unfinished encode as not there")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """List what no manifest of the cache root needs, with its bytes; --delete removes it.

    Every encode leaves its manifest in the root, and an interrupted one a record of what it was going to make: their stores
    are kept. `--forget DIGEST` drops one of them, so that what it alone needs is listed (and with --delete removed) too.

    Exit code 0: listed or removed; 1: refused (an encode is running, or a manifest cannot be read); 2: wrong usage, or the
    root cannot be read.

    Args:
        overrides: Such as cache.root.
        delete: Remove what is listed.
        forget: Manifests to drop, by the beginning of their digests.
        as_json: Print JSON.
    """
    report(lambda: clean_up(open_checkout(overrides), delete=delete, forget=forget or []), as_json=as_json)


def clean_up(checkout: Checkout, *, delete: bool, forget: list[str]) -> Outcome:
    """List, or remove, what nothing needs."""
    from jepa_cache.store.collection import find_listings, list_root, remove_unneeded

    if checkout.paths:
        raise ValueError(f"gc takes key=value overrides only; got {checkout.paths[0]!r}")
    if not checkout.root.path.is_dir() and checkout.root.name == str(checkout.root.path):
        raise ValueError(
            f"there is no cache root {checkout.root.path}: nothing was encoded into it yet (`python stages/encode.py` does), or "
            "the cache lies elsewhere: set cache.root or $JEPA_CACHE_HOME"
        )
    own_manifest = read_own(checkout)
    own = own_manifest.digest if own_manifest else None
    contents = list_root(checkout.root, own_manifest)
    forgotten = {listing.digest for listing in find_listings(contents, forget)}
    if own in forgotten:
        return _refuse(f"{own} is the manifest of this checkout ({MANIFEST}); encode something else first")
    if delete:
        contents = remove_unneeded(checkout.root, forgotten, own_manifest)
    unneeded = contents.unneeded(forgotten)
    temporaries = [(str(path), size) for path, size in contents.temporaries] + list(contents.abandoned.items())
    num_bytes = contents.num_bytes(unneeded) + sum(size for _, size in temporaries)
    unreadable = [listing for listing in contents.listings if listing.problem and listing.digest not in forgotten]
    document = {
        "root": checkout.root.name,
        "deleted": delete,
        "num_bytes": num_bytes,
        "kept_bytes": contents.num_bytes(contents.stores.keys() - unneeded.keys()),
        "unneeded": [{**key._asdict(), "path": str(path), "num_bytes": size} for key, (path, size) in unneeded.items()],
        "temporaries": [{"path": path, "num_bytes": size} for path, size in temporaries],
        "listings": [_describe(listing, contents, forgotten, own) for listing in contents.listings],
        "unknown": [str(path) for path in contents.unknown],
    }
    lines = [f"cache root {checkout.root.name}, {describe_bytes(document['kept_bytes'])} kept"]
    lines += [_line(entry) for entry in document["listings"]]
    verb = "removed" if delete else "not needed"
    lines += shorten([f"{verb}: {it['path']} ({describe_bytes(it['num_bytes'])})" for it in document["unneeded"]])
    lines += [f"left alone, not of this program: {path}" for path in contents.unknown]
    lines += [f"another user's, which may not be removed: {path}" for path in contents.kept]
    if temporaries:
        lines.append(f"{verb}: {len(temporaries)} temporaries of writers that died")
    lines.append(f"{verb}: {describe_bytes(num_bytes)} in all")
    if unreadable and not delete:
        lines.append(
            f"the manifest {unreadable[0].digest} cannot be read, so --delete would refuse: {unreadable[0].problem}"
        )
    elif num_bytes and not delete:
        lines.append(
            "nothing was changed; remove it with: jepa-cache gc --delete" + "".join(f" --forget {it}" for it in forget)
        )
    return Outcome(document, lines, PROBLEM if unreadable else FINE)


def read_own(checkout: Checkout) -> Manifest | None:
    """The manifest that stage one wrote in this checkout; None where there is none that can be read."""
    try:
        return checkout.read_manifest(None)
    except ValueError:
        return None


def _refuse(reason: str) -> Outcome:
    return Outcome({"error": reason}, [f"refused: {reason}"], PROBLEM)


def _describe(listing: Listing, contents: Contents, forgotten: Collection[str], own: str | None) -> dict[str, Any]:
    others = contents.needed({listing.digest, *forgotten})
    manifest = listing.manifest
    return {
        "digest": listing.digest,
        "dataset": listing.dataset,
        "encoder": manifest.encoder if manifest else None,
        "sampling": {**manifest.recipe["sampling"], "phase": [part.phase for part in manifest.parts]}
        if manifest
        else None,
        "dtype": manifest.recipe["dtype"] if manifest else None,
        "action_space": manifest.action_space if manifest else None,
        "num_steps": manifest.num_steps if manifest else None,
        "num_units": len({key for key in listing.needs if key.kind == "tokens"}),
        "num_missing": len(listing.needs - contents.stores.keys()),
        "written": str(listing.written),
        "num_bytes": contents.num_bytes(listing.needs),
        "only_bytes": contents.num_bytes(listing.needs - others),
        "unfinished": manifest is None and not listing.problem,
        "forgotten": listing.digest in forgotten,
        "of_this_checkout": listing.digest == own,
        "problem": listing.problem,
    }


def _line(entry: dict[str, Any]) -> str:
    sizes = f"needs {describe_bytes(entry['num_bytes'])}, {describe_bytes(entry['only_bytes'])} of it alone"
    mark = "".join([" (forgotten)" * entry["forgotten"], " (of this checkout)" * entry["of_this_checkout"]])
    missing = f", {entry['num_missing']} stores missing" if entry["num_missing"] else ""
    if entry["problem"]:
        return f"manifest {entry['digest']}{mark}: cannot be read: {entry['problem']}"
    if entry["unfinished"]:
        return (
            f"unfinished encode {entry['digest']}{mark}: {entry['dataset']}, {entry['num_units']} units, begun "
            f"{entry['written']}; {sizes}{missing}"
        )
    sampling = entry["sampling"]
    return (
        f"manifest {entry['digest']}{mark}: {entry['dataset']}, {entry['encoder']}, {sampling['mode']} at {sampling['fps']:g} "
        f"Hz, {entry['dtype']}, {entry['action_space']}, {entry['num_units']} units, {entry['num_steps']} steps, written "
        f"{entry['written']}; {sizes}{missing}"
    )
