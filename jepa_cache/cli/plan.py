"""`jepa-cache plan`: what encoding would take, before anything is spent."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jepa_cache.cli.outcome import FINE, PROBLEM, Checkout, Outcome, describe_bytes, open_checkout, report
from jepa_cache.config.machine import existing_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jepa_cache.encoding.costs import BreakEven
    from jepa_cache.encoding.planning import Amount, PartPlan
    from jepa_cache.store.root import CacheRoot

MAX_SHOWN = 20  # unusable recordings


def plan(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="recordings, as encode.py takes them; key=value overrides")
    ] = None,
    *,
    frames_per_s: Annotated[
        float | None, typer.Option(min=1e-9, help="rate for the hours, where none was measured on this machine")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Say what encoding would take: episodes, frames, steps, bytes per stored dtype, files, operations, hours, disk.

    Reads the headers of recordings, no videos, and downloads nothing. Hours are given only at a rate that stage one measured
    on this machine with this encoder, or that --frames-per-s names.

    Exit code 0: it fits; 1: the disk of the cache root is too small; 2: wrong usage, or it could not be counted.

    Args:
        arguments: Recordings and overrides.
        frames_per_s: Rate for the hours.
        as_json: Print JSON.
    """
    report(lambda: estimate(open_checkout(arguments), frames_per_s), as_json=as_json)


def estimate(checkout: Checkout, frames_per_s: float | None) -> Outcome:
    """Count recordings, bytes, operations and time, and compare with the disk."""
    from jepa_cache.actions import get_action_space
    from jepa_cache.encoding.costs import compare_runs, count_encoder
    from jepa_cache.encoding.inventory import take_inventory
    from jepa_cache.encoding.planning import Amount, plan_encode
    from jepa_cache.encoding.rates import find_rate
    from jepa_cache.store.quantisation import get_codec, step_bytes

    config, encode = checkout.config, checkout.config.encode
    inventory = take_inventory(config, checkout.paths, checkout.base, most_bytes=0)  # headers tell all that it needs
    space = get_action_space(encode.action_space)
    parts = plan_encode(inventory, encode, space, checkout.root)
    encoder = inventory.encoder
    done, to_do = (sum((getattr(part, name) for part in parts), Amount()) for name in ("done", "to_do"))
    total = done + to_do
    needed = sum(part.to_write.num_bytes for part in parts)
    if get_codec(encode.dtype).max_code is not None:  # a unit waits in float16 until its statistics are complete
        needed += max(part.largest_steps for part in parts) * step_bytes(
            "float16", encode.num_tokens_of(encoder), encoder.embed_dim
        )
    free = free_bytes(checkout.root)
    fits = free is None or needed <= free
    cost = count_encoder(encoder, encode)
    rate = find_rate(config)
    given = frames_per_s or (rate.frames_per_s if rate else None)
    runs = compare_runs(
        encoder,
        config.predictor,
        config.train,
        encode,
        num_frames=round(total.num_frames),
        num_actions=len(space.actions),
        num_states=len(space.states),
    )
    estimated = [part for part in parts if part.num_measured < part.to_do.num_units]
    document: dict[str, Any] = {
        "fits": fits,
        "root": checkout.root.name,
        "dataset": config.dataset.name,
        "encoder": encoder.name,
        "all": _describe(total),
        "done": _describe(done),
        "to_do": _describe(to_do),
        "estimated": bool(estimated),
        "dtype": encode.dtype,
        "bytes": _sum_sizes(parts),
        "disk": {"needed_bytes": needed, "free_bytes": free},
        "encoder_flops": {
            "per_frame": cost.operations / cost.num_frames,
            "to_do": to_do.num_frames / cost.num_frames * cost.operations,
        },
        "rate": {
            "frames_per_s": given,
            "measured": None if frames_per_s or rate is None else rate._asdict(),
            "hours": to_do.num_frames / given / 3600 if given else None,
        },
        "break_even": _describe_runs(runs, config.predictor.name),
        "unusable": [recording._asdict() for part in parts for recording in part.unusable],
        "notes": inventory.notes,
    }
    return Outcome(document, _list_lines(document, parts, runs), FINE if fits else PROBLEM)


def free_bytes(root: CacheRoot) -> int | None:
    """Free bytes on the disk of a cache root that need not exist yet; None for a bucket, which has no end."""
    if root.name != str(root.path):
        return None
    return shutil.disk_usage(existing_folder(root.path)).free


def _sum_sizes(parts: Sequence[PartPlan]) -> dict[str, dict[str, int]]:
    """Bytes and files of all units in every stored dtype."""
    rest = sum(part.rest.num_bytes for part in parts)
    sizes = {}
    for dtype in parts[0].sizes:
        tokens = sum(part.sizes[dtype].num_bytes for part in parts)
        files = sum(part.sizes[dtype].num_files + part.rest.num_files for part in parts)
        sizes[dtype] = {"tokens": tokens, "actions_and_controls": rest, "total": tokens + rest, "files": files}
    return sizes


def _describe(amount: Amount) -> dict[str, int]:
    return {
        "units": round(amount.num_units),
        "episodes": round(amount.num_episodes),
        "unusable": round(amount.num_unusable),
        "frames": round(amount.num_frames),
        "steps": round(amount.num_steps),
    }


def _describe_runs(runs: BreakEven, predictor: str) -> dict[str, Any]:
    return {
        "predictor": predictor,
        "runs": runs.runs,
        "gain_per_run": runs.gain_per_run,
        "build_flops": runs.build,
        "online_encoder_flops_per_run": runs.online,
        "predictor_flops_per_run": runs.predictor,
        "frames": runs.num_frames,
        "frames_touched_per_run": runs.num_touched,
    }


def _list_lines(document: dict[str, Any], parts: Sequence[PartPlan], runs: BreakEven) -> list[str]:
    lines = [f"note: {note}" for note in document["notes"]]
    unusable = document["unusable"]
    lines += [f"unusable: {recording['key']}: {recording['reason']}" for recording in unusable[:MAX_SHOWN]]
    if len(unusable) > MAX_SHOWN:
        lines.append(f"unusable: {len(unusable) - MAX_SHOWN} more, see --json")
    for part in parts:
        words = f"{part.part.preset.name} ({part.part.view}), recipe {part.part.tokens}"
        lines.append(f"{words}: {round(part.done.num_units)} units done, {round(part.to_do.num_units)} to do")
        if part.num_measured < part.to_do.num_units:
            lines.append(f"  estimated by bytes from {part.num_measured} of them")
    lines.append(f"{'':<8} {'units':>8} {'episodes':>9} {'unusable':>9} {'frames':>11} {'steps':>11}")
    for name, words in (("all", "all"), ("to_do", "to do")):
        amount = document[name]
        lines.append(
            f"{words:<8} {amount['units']:>8} {amount['episodes']:>9} {amount['unusable']:>9} {amount['frames']:>11} "
            f"{amount['steps']:>11}"
        )
    lines.append(f"{'all, in':<12} {'tokens':>11} {'with actions, controls':>23} {'files':>8}")
    for dtype, size in document["bytes"].items():
        lines.append(
            f"{dtype:<12} {describe_bytes(size['tokens']):>11} {describe_bytes(size['total']):>23} {size['files']:>8}"
            f"{'  <- encode.dtype' if dtype == document['dtype'] else ''}"
        )
    flops = document["encoder_flops"]
    lines.append(
        f"encoder {document['encoder']}: {flops['to_do']:.3g} operations, {flops['per_frame'] / 1e9:.4g} GFLOP a frame"
    )
    lines.append(_describe_hours(document["rate"]))
    lines += _describe_break_even(document["break_even"], runs)
    disk = document["disk"]
    free = "no limit known" if disk["free_bytes"] is None else f"{describe_bytes(disk['free_bytes'])} free"
    lines.append(f"{document['root']}: {free}, {describe_bytes(disk['needed_bytes'])} needed")
    if not document["fits"]:
        lines.append(
            "refused: it does not fit. Set cache.root to a larger disk, store fewer bytes (encode.dtype), remove what is not "
            "needed (jepa-cache gc), or encode fewer recordings"
        )
    return lines


def _describe_hours(rate: dict[str, Any]) -> str:
    if rate["hours"] is None:
        return (
            "time: not known, as nothing was encoded with this encoder on this machine yet; --frames-per-s gives a rate"
        )
    measured = rate["measured"]
    where = "as given"
    if measured:
        where = (
            f"measured here on {measured['device']} over {measured['num_frames']} frames in {measured['elapsed_s']:.0f} s, limit "
            f"{measured['limit']}"
        )
    return f"time: {rate['hours']:.2f} h at {rate['frames_per_s']:.4g} frames/s ({where})"


def _describe_break_even(entry: dict[str, Any], runs: BreakEven) -> list[str]:
    if not entry["runs"]:
        return []
    touched = entry["frames_touched_per_run"] / max(1, entry["frames"])
    gain = entry["gain_per_run"]
    fewer = f"{gain:.3g} times fewer" if gain >= 1.005 else "less than 0.5 % fewer"
    return [
        f"one training run of predictor {entry['predictor']} touches {entry['frames_touched_per_run']} frames, each {touched:.3g} "
        f"times: {runs.online:.3g} operations to encode them online, {runs.predictor:.3g} for the predictor",
        f"break-even after {entry['runs']:.3g} training runs ({runs.build:.3g} to build the cache / {runs.online:.3g} online); "
        f"after it a run needs {fewer} operations (decoding not counted)",
    ]
