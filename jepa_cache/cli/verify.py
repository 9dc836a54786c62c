"""`jepa-cache verify`: whether every byte that the manifest lists is there and unchanged."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import FINE, PROBLEM, Checkout, Outcome, describe_bytes, open_checkout, report, shorten

if TYPE_CHECKING:
    from jepa_cache.encoding.verification import Comparison
    from jepa_cache.store.manifest import Manifest


def verify(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="recordings, for --against-online; key=value overrides")
    ] = None,
    *,
    subset: Annotated[str, typer.Option(metavar="SHARE", help="read this share of the chunks, such as 5%")] = "100%",
    read_data: Annotated[
        bool, typer.Option("--read-data", help="compare every file with its sha256 too; twice the time")
    ] = False,
    against_online: Annotated[
        int, typer.Option(min=0, metavar="N", help="encode N random steps again and compare")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="of the random choices; drawn and told when not given")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on")] = False,
    manifest: Annotated[Path | None, typer.Option(help="other than outputs/encode/manifest.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Check structure, digests and the checksum of every chunk of everything that the manifest lists.

    An interrupted run goes on where it was, and a run after one that found damage looks again at what was damaged and what
    was touched since; after a run without findings, and with --fresh, everything is read again.

    Exit code 0: all is as it was written; 1: something is missing, damaged or not what the encoder gives; 2: wrong usage, or it
    could not be checked (no manifest, another format version, interrupted).

    Args:
        arguments: Recordings and overrides.
        subset: Share of the chunks to read.
        read_data: Compare whole files.
        against_online: Steps to encode again.
        seed: Of the choices.
        fresh: Start over.
        manifest: Which one.
        as_json: Print JSON.
    """
    report(
        lambda: check_all(
            open_checkout(arguments),
            manifest,
            share=parse_share(subset),
            read_data=read_data,
            num_steps=against_online,
            seed=secrets.randbelow(1 << 31) if seed is None else seed,
            fresh=fresh,
        ),
        as_json=as_json,
    )


def parse_share(text: str) -> float:
    """A share such as "5%" or "0.05".

    Raises:
        ValueError: It is no number above 0 and at most 1 (100 %).
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"--subset is a share such as 5% or 0.05, above 0 and at most 100%; got {text!r}")
    return share


def check_all(
    checkout: Checkout,
    path: Path | None,
    *,
    share: float,
    read_data: bool,
    num_steps: int,
    seed: int,
    fresh: bool,
) -> Outcome:
    """Check a manifest's stores, and steps against the encoder."""
    from jepa_cache.encoding.verification import describe_comparison
    from jepa_cache.store.audit import Scope
    from jepa_cache.store.rounds import audit_manifest

    manifest, root = checkout.read_manifest(path), checkout.root
    with tqdm(desc="verify", unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5) as bar:
        result = audit_manifest(manifest, root, Scope(share, read_data, seed), bar, fresh=fresh)
    comparison = _compare(checkout, manifest, num_steps, seed) if num_steps else None
    wrong = comparison.wrong if comparison else []
    document = {
        "ok": not result.findings and not wrong,
        "manifest": manifest.digest,
        "root": root.name,
        "num_units": len(manifest.entries),
        "num_checked": result.num_checked,
        "num_checked_before": result.num_skipped,
        "num_bytes": result.num_bytes,
        "share": share,
        "seed": seed,
        "read_data": read_data,
        "findings": [{**finding._asdict(), "place": str(finding.place)} for finding in result.findings],
        "against_online": describe_comparison(comparison) if comparison else None,
    }
    lines = shorten([finding.problem for finding in result.findings])
    what = f"{share:.3g} of the chunks (seed {seed})" if share < 1 else "every chunk"
    lines.append(
        f"read {describe_bytes(result.num_bytes)} of {result.num_checked} of {len(manifest.entries)} units: {what}"
        + (", every file's sha256" if read_data else "")
        + (f"; {result.num_skipped} were checked before (--fresh starts over)" if result.num_skipped else "")
    )
    lines += describe_steps(comparison) if comparison else []
    if result.findings or wrong:
        lines.append(f"{len(result.findings) + len(wrong)} problems; next: jepa-cache repair")
    else:
        lines.append("all is as it was written")
    return Outcome(document, lines, FINE if document["ok"] else PROBLEM)


def _compare(checkout: Checkout, manifest: Manifest, num_steps: int, seed: int) -> Comparison:
    from jepa_cache.encoding.groups import scan_units
    from jepa_cache.encoding.verification import compare_online

    inventory = scan_units(checkout.config, checkout.paths, checkout.base)
    return compare_online(
        manifest,
        checkout.config,
        inventory,
        checkout.root,
        base=checkout.base,
        num_steps=num_steps,
        seed=seed,
    )


def describe_steps(comparison: Comparison) -> list[str]:
    """The comparison in words."""
    steps = comparison.steps
    num_equal = sum(step.equal for step in steps)
    own = max(step.batch_difference for step in steps)
    lines = [f"encoded {len(steps)} random steps again (seed {comparison.seed}): {num_equal} bit-equal"]
    if num_equal < len(steps):
        lines[0] += f", largest difference {max(step.difference for step in steps):.3g}"
    lines.append(f"the encoder's own largest difference between a batch of one and the recorded batch: {own:.3g}")
    lines += [f"not as recorded: {change}" for change in comparison.changes]
    lines += shorten(
        [
            f"step {step.step} of {step.unit}, episode {step.episode}, is not what the encoder gives (relative error "
            f"{step.relative_error:.2g}); were the settings others, or the recording replaced?"
            for step in comparison.wrong
        ]
    )
    return lines
