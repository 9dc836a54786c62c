"""`jepa-cache gc`: what no manifest of the cache root needs, and its removal."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from jepa_cache.cli.outcome import (
    AsJson,
    Checkout,
    Outcome,
    Overrides,
    describe_bytes,
    open_checkout,
    report,
    shorten,
)
from jepa_cache.store.collection import GRACE_DAYS, Contents, find_listings, list_root, remove_unneeded
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.root import CacheRoot, RefusedError


def gc(
    overrides: Overrides = None,
    *,
    delete: Annotated[
        bool, typer.Option("--delete", help="remove what is listed; without it nothing is changed")
    ] = False,
    forget: Annotated[
        list[str] | None, typer.Option(metavar="DIGEST", help="treat this manifest as not there; repeatable")
    ] = None,
    grace_days: Annotated[
        float, typer.Option(min=0, help="keep what no manifest lists so long after the last store of its recipe")
    ] = GRACE_DAYS,
    as_json: AsJson = False,
) -> None:
    """List what no manifest of the cache root needs, with its bytes; --delete removes it.

    Every encode leaves its manifest in the root, and the stores that it lists are kept. An encode that is running or was
    interrupted has none yet: stores that no manifest lists are kept for --grace-days after the last store of their recipe.
    `--forget DIGEST` drops a manifest, so that what it alone needs is listed (and with --delete removed) at once.

    Exit code 0: listed or removed; 1: refused (an encode is running, or a manifest cannot be read); 2: wrong usage, or the
    root cannot be read.
    """
    report(
        lambda: _collect(open_checkout(overrides), delete=delete, forget=forget or [], grace_days=grace_days),
        as_json=as_json,
    )


def _collect(checkout: Checkout, *, delete: bool, forget: list[str], grace_days: float) -> Outcome:
    root, own = checkout.root, None
    if checkout.paths:
        raise ValueError(f"gc takes key=value or FILE.yaml only; got {checkout.paths[0]!r}")
    if not root.path.is_dir() and root.name == str(root.path):
        raise ValueError(
            f"there is no cache root {root.path}: nothing was encoded into it yet (`python stages/encode.py` does), or "
            "the cache lies elsewhere: set cache.root or $JEPA_CACHE_HOME"
        )
    with suppress(ValueError):  # stage one wrote none in this checkout, or it cannot be read
        own = checkout.read_manifest(None)
    contents = list_root(root, own, grace_days=grace_days)
    forgotten = find_listings(contents, forget)
    if own is not None and own.digest in forgotten:
        raise RefusedError(
            f"{own.digest} is the manifest of this checkout ({checkout.manifest_path}); encode something else first"
        )
    listings = [_describe(root, digest, contents, forgotten, own) for digest in contents.needs]
    if delete:
        contents = remove_unneeded(root, forgotten, own, grace_days=grace_days)
    unneeded = contents.unneeded(forgotten)
    recent = contents.recent - contents.needed() - unneeded.keys()
    num_bytes = sum(unneeded.values()) + sum(contents.temporaries.values())
    document = {
        "root": root.name,
        "deleted": delete,
        "num_bytes": num_bytes,
        "kept_bytes": contents.num_bytes(contents.stores.keys() - unneeded.keys()),
        "recent_bytes": contents.num_bytes(recent),
        "unneeded": [
            {**key._asdict(), "path": str(root.store(key)), "num_bytes": size} for key, size in unneeded.items()
        ],
        "temporaries": [{"path": path, "num_bytes": size} for path, size in contents.temporaries.items()],
        "listings": listings,
        "unknown": [str(path) for path in contents.unknown],
    }
    unreadable = contents.unreadable(forgotten)
    lines = [f"cache root {root.name}, {describe_bytes(document['kept_bytes'])} kept", *map(_line, listings)]
    if recent:
        lines.append(
            f"kept for {grace_days:g} days after the last store of their recipe, in no manifest: {len(recent)} stores "
            f"({describe_bytes(document['recent_bytes'])}); --grace-days 0 gives them up"
        )
    verb = "removed" if delete else "not needed"
    lines += shorten([f"{verb}: {it['path']} ({describe_bytes(it['num_bytes'])})" for it in document["unneeded"]])
    lines += [f"left alone, not of this program: {path}" for path in contents.unknown]
    lines += [f"another user's, which may not be removed: {path}" for path in contents.kept]
    if contents.temporaries:
        lines.append(f"{verb}: {len(contents.temporaries)} temporaries of writers that died")
    lines.append(f"{verb}: {describe_bytes(num_bytes)} in all")
    if unreadable and not delete:
        lines.append("the manifest {} cannot be read, so --delete would refuse: {}".format(*unreadable[0]))
    elif num_bytes and not delete:
        options = [f" --forget {it}" for it in forget] + [f" --grace-days {grace_days:g}"] * (grace_days != GRACE_DAYS)
        lines.append("nothing was changed; remove it with: jepa-cache gc --delete" + "".join(options))
    return Outcome(document, lines, not unreadable)


def _describe(
    root: CacheRoot, digest: str, contents: Contents, forgotten: Collection[str], own: Manifest | None
) -> dict[str, Any]:
    needs, written = contents.needs[digest], "in this checkout alone"
    with suppress(FileNotFoundError):
        written = str(datetime.fromtimestamp(root.manifest(digest).stat().st_mtime, UTC).date())
    described = {
        "digest": digest,
        "written": written,
        "num_units": sum(key.kind == "tokens" for key in needs),
        "num_missing": len(needs - contents.stores.keys()),
        "num_bytes": contents.num_bytes(needs),
        "only_bytes": contents.num_bytes(needs - contents.needed({digest, *forgotten})),
        "forgotten": digest in forgotten,
        "of_this_checkout": own is not None and digest == own.digest,
        "problem": "",
    }
    if isinstance(manifest := contents.manifests[digest], str):
        return {**described, "problem": manifest}
    return described | {
        "dataset": manifest.dataset,
        "encoder": manifest.encoder,
        "sampling": {**manifest.recipe["sampling"], "phase": [part.phase for part in manifest.parts]},
        "dtype": manifest.recipe["dtype"],
        "action_space": manifest.action_space,
        "num_steps": manifest.num_steps,
    }


def _line(entry: dict[str, Any]) -> str:
    mark = " (forgotten)" * entry["forgotten"] + " (of this checkout)" * entry["of_this_checkout"]
    if entry["problem"]:
        return f"manifest {entry['digest']}{mark}: cannot be read: {entry['problem']}"
    sampling = entry["sampling"]
    missing = f", {entry['num_missing']} stores missing" if entry["num_missing"] else ""
    return (
        f"manifest {entry['digest']}{mark}: {entry['dataset']}, {entry['encoder']}, {sampling['mode']} at {sampling['fps']:g} "
        f"Hz, {entry['dtype']}, {entry['action_space']}, {entry['num_units']} units, {entry['num_steps']} steps, written "
        f"{entry['written']}; needs {describe_bytes(entry['num_bytes'])}, {describe_bytes(entry['only_bytes'])} of it alone{missing}"
    )
