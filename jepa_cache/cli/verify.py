"""`jepa-cache verify`: whether every byte that the manifest lists is there and unchanged; with --repair it is made so again."""

from __future__ import annotations

import secrets
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import AsJson, Checkout, Outcome, Recordings, describe_bytes, open_checkout, report, shorten
from jepa_cache.store.check import check_manifest
from jepa_cache.store.quantisation import step_bytes

if TYPE_CHECKING:
    from jepa_cache.encoding.verification import Comparison, Repair


def verify(
    arguments: Recordings = None,
    *,
    repair: Annotated[bool, typer.Option("--repair", help="make what is damaged or missing again")] = False,
    read_data: Annotated[
        bool, typer.Option("--read-data", help="compare every file with its sha256 too; twice the time")
    ] = False,
    against_online: Annotated[
        int, typer.Option(min=0, metavar="N", help="encode N random steps again and compare")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="of the random steps; drawn and printed when not given")] = None,
    manifest: Annotated[Path | None, typer.Option(help="other than encode/manifest.json of the outputs")] = None,
    as_json: AsJson = False,
) -> None:
    """Check structure, digests and the checksum of every chunk of everything that the manifest lists.

    With --repair damaged and missing stores are removed and encoded again from their recordings. A damaged store is removed
    only where its recording, the weights and the settings that it was made with are at hand.

    Exit code 0: all is as it was written, or is again; 1: something is missing, damaged or not what the encoder gives; 2: wrong
    usage, or it could not be checked (no manifest, another format version, interrupted).
    """
    seed = secrets.randbelow(1 << 31) if seed is None else seed
    report(
        lambda: check_cache(
            open_checkout(arguments),
            manifest,
            read_data=read_data,
            num_steps=against_online,
            seed=seed,
            repair=repair,
        ),
        as_json=as_json,
        typed=arguments,
    )


def check_cache(
    checkout: Checkout, path: Path | None, *, read_data: bool, num_steps: int, seed: int, repair: bool
) -> Outcome:
    """Check a manifest's stores, compare steps with the encoder, and repair what was found."""
    manifest, root = checkout.read_manifest(path), checkout.root
    expected = manifest.num_steps * step_bytes(manifest.recipe["dtype"], manifest.num_tokens, manifest.width)
    comparison = repaired = None
    with root.shared_lock() if repair else nullcontext():
        with tqdm(desc="verify", unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5) as bar:
            bar.total = expected * (1 + read_data)
            findings = check_manifest(manifest, root, read_data=read_data, on_bytes=bar.update)
        if num_steps:
            from jepa_cache.encoding.verification import compare_online

            comparison = compare_online(
                manifest,
                checkout.config,
                checkout.paths,
                root,
                base=checkout.base,
                num_steps=num_steps,
                seed=seed,
                damaged={finding.key for finding in findings},
            )
            findings += comparison.stale
        if repair and findings:
            from jepa_cache.encoding.verification import repair_manifest

            repaired = repair_manifest(
                manifest, findings, checkout.config, checkout.paths, base=checkout.base, root=root
            )
    fine = repaired.complete if repaired else not findings
    document = {
        "ok": fine,
        "manifest": manifest.digest,
        "root": root.name,
        "num_units": len(manifest.entries),
        "num_bytes": int(bar.n),
        "seed": seed,
        "read_data": read_data,
        "findings": [
            {**(key._asdict() if key else {"kind": "manifest"}), "path": str(path), "problem": problem}
            for key, path, problem, _ in findings
        ],
        "against_online": comparison.describe() if comparison else None,
        "repair": {**vars(repaired), "repaired": [str(it) for it in repaired.repaired]} if repaired else None,
    }
    what = "every chunk" + ", every file's sha256" * read_data
    lines = [
        *shorten([finding.problem for finding in findings]),
        f"read {describe_bytes(document['num_bytes'])} of {len(manifest.entries)} units: {what}",
    ]
    lines += _describe_steps(comparison) if comparison and comparison.steps else []
    if repaired:
        lines += _describe_repair(repaired)
    else:
        # What no byte of a store tells is found again by encoding the same steps again.
        again = f" --against-online {num_steps} --seed {seed}" if any(it.stale for it in findings) else ""
        next_step = f"{len(findings)} problems; next: jepa-cache verify --repair{again}"
        lines.append(next_step if findings else "all is as it was written")
    return Outcome(document, lines, fine)


def _describe_steps(comparison: Comparison) -> list[str]:
    steps = comparison.steps
    num_equal = sum(step.equal for step in steps)
    lines = [f"encoded {len(steps)} random steps again (seed {comparison.seed}): {num_equal} bit-equal"]
    if num_equal < len(steps):
        lines[0] += f", largest difference {max(step.difference for step in steps):.3g}"
    lines += [f"not as recorded: {change}" for change in comparison.changes]
    return lines + shorten(
        [
            f"step {step.step} of {step.unit}, episode {step.episode}, is not what the encoder gives (relative error "
            f"{step.relative_error:.2g}); were the settings others, or the recording replaced?"
            for step in comparison.wrong
        ]
    )


def _describe_repair(repair: Repair) -> list[str]:
    lines = [f"repaired: {path}" for path in repair.repaired]
    lines += [
        f"NOT REPAIRED: the recording of unit {digest} is not among the inputs; name it: jepa-cache verify --repair PATH"
        for digest in repair.lost
    ]
    lines += [
        f"ANOTHER DIGEST: {text}. The tokens differ from those that the manifest lists (another device or library may give "
        "other last bits), so it cannot be used with them: run `python stages/encode.py` to list what is there now, and train again"
        for text in repair.differing
    ]
    lines += [f"NOT REPAIRED: {text}" for text in repair.left]
    num_left = len(repair.lost) + len(repair.differing) + len(repair.left)
    rest = f"{num_left} not" if num_left else "everything is as the manifest says"
    return [*lines, f"{len(repair.repaired)} repaired, {rest}"]
