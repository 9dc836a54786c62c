"""`jepa-cache repair`: damaged or missing stores of a manifest are made again, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import FINE, PROBLEM, Checkout, Outcome, open_checkout, report


def repair(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="recordings, as encode.py takes them; key=value overrides")
    ] = None,
    *,
    read_data: Annotated[
        bool, typer.Option("--read-data", help="compare every file with its sha256 too; twice the time")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="read everything, not only what verify left open")] = False,
    manifest: Annotated[Path | None, typer.Option(help="other than outputs/encode/manifest.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Make damaged or missing stores of a manifest again from their recordings; nothing else is touched.

    Looks for damage as `jepa-cache verify` does; after a verify that found some it reads only that, and what was touched since.
    The settings must be those that the stores were made with.

    Exit code 0: everything is as the manifest says; 1: something could not be repaired, or came out with another digest; 2: wrong
    usage, or it could not be checked.

    Args:
        arguments: Recordings and overrides.
        read_data: Compare whole files.
        fresh: Read everything.
        manifest: Which one.
        as_json: Print JSON.
    """
    report(lambda: mend(open_checkout(arguments), manifest, read_data=read_data, fresh=fresh), as_json=as_json)


def mend(checkout: Checkout, path: Path | None, *, read_data: bool, fresh: bool) -> Outcome:
    """Find and repair."""
    from jepa_cache.encoding.verification import repair_manifest
    from jepa_cache.store.audit import Scope
    from jepa_cache.store.rounds import audit_manifest
    from jepa_cache.store.usage import in_use

    manifest, root = checkout.read_manifest(path), checkout.root
    with in_use(root):
        with tqdm(desc="verify", unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5) as bar:
            found = audit_manifest(manifest, root, Scope(read_data=read_data), bar, fresh=fresh)
        result = repair_manifest(
            manifest, found.findings, checkout.config, checkout.paths, base=checkout.base, root=root
        )
    fine = not (result.lost or result.differing or result.left)
    document = {
        "ok": fine,
        "manifest": manifest.digest,
        "root": root.name,
        "findings": [{**finding._asdict(), "place": str(finding.place)} for finding in found.findings],
        "repaired": [str(place) for place in result.repaired],
        "lost": result.lost,
        "differing": result.differing,
        "left": result.left,
    }
    lines = [f"found: {finding.problem}" for finding in found.findings]
    lines += [f"repaired: {place}" for place in result.repaired]
    lines += [
        f"NOT REPAIRED: the recording of unit {digest} is not among the inputs and not where it was last seen; name it: "
        "jepa-cache repair PATH"
        for digest in result.lost
    ]
    lines += [
        f"ANOTHER DIGEST: {text}. The tokens differ from those that the manifest lists, so it cannot be used with them: run "
        "`python stages/encode.py` to list what is there now, and train again"
        for text in result.differing
    ]
    lines += [f"NOT REPAIRED: {text}" for text in result.left]
    lines.append(
        "nothing to repair: all is as it was written"
        if not found.findings
        else f"{len(result.repaired)} repaired, everything is as the manifest says"
        if fine
        else f"{len(result.repaired)} repaired, {len(result.lost) + len(result.differing) + len(result.left)} not"
    )
    return Outcome(document, lines, FINE if fine else PROBLEM)
