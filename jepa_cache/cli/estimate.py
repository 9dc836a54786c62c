"""`jepa-cache estimate`: what encoding would cost, before anything is spent.

Episodes, frames and steps come from the headers of recordings; bytes follow from the steps, within 5 %.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import (
    AsJson,
    Checkout,
    Outcome,
    Recordings,
    align,
    describe_bytes,
    open_checkout,
    report,
    shorten,
)
from jepa_cache.config.schema import EncodeConfig, EncoderPreset
from jepa_cache.encoding.groups import EncodingGroup, scan_units
from jepa_cache.encoding.task import read_whole
from jepa_cache.encoding.units import is_unread
from jepa_cache.episode import Skipped
from jepa_cache.files import existing_folder
from jepa_cache.media.probe import VIDEO_SUFFIXES, header_counts, iter_tar_videos
from jepa_cache.sources import Unit, describe_unreadable, find_obstacle, iter_recordings
from jepa_cache.store.layout import CHUNK_STEPS, SHARD_STEPS
from jepa_cache.store.quantisation import CODECS, fits, get_codec, step_bytes

# Units whose headers are read; of more an even choice is read, and the rest follows by bytes.
MAX_HEADERS = 2000
# Pictures in records (RLDS) have no header: so many units are read whole, and the rest follows by bytes.
MAX_WHOLE = 2
# Bytes of JSON and Parquet, measured on the sample data set; they matter for tiny tokens only.
UNIT_BYTES, CODES_BYTES, STEP_ROW_BYTES = 9_960, 10_660, 14
# Of actions and controls; ticks of VPT's 37 columns.
REST_BYTES, COLUMN_BYTES, EPISODE_BYTES, TICK_BYTES = 8_760, 110, 6_000, 19.5

Amount = Counter[str]
"""Units, episodes, unusable recordings, sampled frames, steps, ... Native ticks are taken for as many as video frames."""
COUNTED = ("units", "episodes", "unusable", "frames", "steps")


def estimate(
    arguments: Recordings = None,
    *,
    frames_per_s: Annotated[float | None, typer.Option(min=1e-9, help="rate for the hours")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what encoding would take: episodes, frames, steps, bytes per stored dtype, files, hours, disk.

    Reads the headers of recordings, no videos, and downloads nothing. Hours are given only at the rate of
    --frames-per-s; stage one prints the one that it reaches.

    Exit code 0: it fits; 1: the disk of the cache root is too small; 2: wrong usage, or it could not be counted.
    """
    report(lambda: estimate_checkout(open_checkout(arguments), frames_per_s), as_json=as_json, typed=arguments)


def estimate_checkout(checkout: Checkout, frames_per_s: float | None = None) -> Outcome:
    """Count recordings, bytes and time, and compare with the disk."""
    config, encode, root = checkout.config, checkout.config.encode, checkout.root
    groups, notes = scan_units(config, checkout.paths, checkout.base, most_bytes=0)  # headers tell all that it needs
    encoder, space = groups[0].encoder.preset, groups[0].space
    done, to_do, unusable, lines = Amount(), Amount(), [], [f"note: {note}" for note in notes]
    for group in groups:
        store = {unit: None if is_unread(unit) else read_whole(root, group.tokens(root, unit)) for unit in group.units}
        missing = [unit for unit in group.units if store[unit] is None]
        done += estimate_group(group, [unit for unit in group.units if store[unit] is not None], unusable)
        of_group = estimate_group(group, missing, unusable)
        unusable += group.unreadable
        to_do["largest"] = max(to_do["largest"], of_group.pop("largest"))
        to_do += of_group + Amount(unusable=len(group.unreadable))
        words = f"{group.preset.name} ({group.view}), recipe {group.fingerprint}"
        lines.append(f"{words}: {len(group.units) - len(missing)} units done, {len(missing)} to do")
        if of_group["measured"] < len(missing):
            lines.append(f"  estimated by bytes from {of_group['measured']:.0f} of them")
    total, num_columns = done + to_do, len(space.actions) + len(space.states)
    needed = _size(to_do, encode.dtype, encode, encoder, num_columns)["total"]
    if get_codec(encode.dtype).max_code is not None:  # a unit waits in float16 until its statistics are complete
        needed += round(to_do["largest"] * step_bytes("float16", encode.num_tokens_of(encoder), encoder.embed_dim))
    in_bucket = root.name != str(root.path)  # which has no end
    free = None if in_bucket else shutil.disk_usage(existing_folder(root.path)).free
    counts = {"all": total, "done": done, "to_do": to_do}
    frames_per_step = 1 if encode.mode == "frame" else encoder.tubelet_size
    train = config.train
    num_windows = train.num_steps * train.batch_size * train.grad_accumulation
    num_touched = num_windows * train.window_steps * frames_per_step
    document: dict[str, Any] = {
        "fits": free is None or needed <= free,
        "root": root.name,
        "dataset": config.dataset.name,
        "encoder": encoder.name,
        **{name: {key: round(amount[key]) for key in COUNTED} for name, amount in counts.items()},
        "estimated": to_do["measured"] < to_do["units"],
        "dtype": encode.dtype,
        "bytes": {
            name: _size(total, name, encode, encoder, num_columns) for name in CODECS if fits(name, encoder.embed_dim)
        },
        "disk": {"needed_bytes": needed, "free_bytes": free},
        "hours": to_do["frames"] / frames_per_s / 3600 if frames_per_s else None,
        "break_even": {"frames_touched_per_run": num_touched, "runs": total["frames"] / num_touched},
        "unusable": [recording._asdict() for recording in unusable],
        "notes": notes,
    }
    return Outcome(document, lines + _list_lines(document), document["fits"])


def estimate_group(group: EncodingGroup, units: Sequence[Unit], unusable: list[Skipped]) -> Amount:
    """What some units of a group give; `measured` of them are looked at, of which the largest has `largest` steps.

    Recordings that cannot be used go to `unusable`.

    Cost: of each unit the headers of its videos; its records too where it is no tar shard.
    """
    suffixes = [{file.suffix.lower().lstrip(".") for file in unit.files} for unit in units]
    most = MAX_HEADERS if all(found & {"tar", *VIDEO_SUFFIXES} for found in suffixes) else MAX_WHOLE
    chosen = units if len(units) <= most else [units[(2 * i + 1) * len(units) // (2 * most)] for i in range(most)]
    total, largest = Amount(), 0
    for unit in tqdm(chosen, desc="reading headers", unit="unit", delay=2, disable=None):
        num_steps = 0
        for recording in _iter_lengths(group, unit):
            try:
                if isinstance(recording, Skipped):
                    raise ValueError(recording.reason)
                _, num_frames, fps = recording
                total["ticks"] += num_frames
                plan = group.plan(num_frames, fps)
            except ValueError as error:  # also too short or too slow under these settings
                total["unusable"] += 1
                unusable.append(Skipped(recording[0], str(error)))
                continue
            total.update(episodes=1, frames=plan.inputs.size)
            num_steps += len(plan.anchors)
        chunks, shards = -(-num_steps // CHUNK_STEPS), -(-num_steps // SHARD_STEPS)
        total.update(steps=num_steps, stored_steps=chunks * CHUNK_STEPS, shards=shards)
        largest = max(largest, num_steps)
    if len(chosen) < len(units):
        factor = sum(unit.num_bytes for unit in units) / max(1, sum(unit.num_bytes for unit in chosen))
        total = Amount({name: count * factor for name, count in total.items()})
    total.update(units=len(units), measured=len(chosen), largest=largest)
    return total


def _iter_lengths(group: EncodingGroup, unit: Unit) -> Iterator[tuple[str, int, float] | Skipped]:
    """Key, frames and rate of every recording of a unit; one that cannot be used as skipped."""
    if unit.path.suffix == ".tar" and find_obstacle(unit) is None:
        try:
            for key, info, problem in iter_tar_videos(unit.path):
                yield (key, info.num_frames, info.fps) if info else Skipped(key, problem)
        except OSError as error:
            yield Skipped(unit.name, describe_unreadable(error))
        return
    with header_counts():
        for recording in iter_recordings(group.source, unit):
            if isinstance(recording, Skipped):
                yield recording
            else:
                yield recording.key, len(recording.frame_ticks), recording.fps


def _size(amount: Amount, dtype: str, encode: EncodeConfig, encoder: EncoderPreset, num_columns: int) -> dict[str, int]:
    """Bytes and files of the stores; `num_columns` are those of actions and states."""
    codes = get_codec(dtype).max_code is not None
    per_step = step_bytes(dtype, encode.num_tokens_of(encoder), encoder.embed_dim)
    per_unit = UNIT_BYTES + codes * (CODES_BYTES + 8 * encoder.embed_dim)
    tokens = amount["stored_steps"] * per_step + amount["steps"] * STEP_ROW_BYTES + amount["units"] * per_unit
    rest = amount["units"] * (REST_BYTES + COLUMN_BYTES * num_columns) + 4 * num_columns * amount["steps"]
    rest += EPISODE_BYTES * (amount["episodes"] + amount["unusable"]) + TICK_BYTES * amount["ticks"]
    files = amount["shards"] * (1 + codes) + amount["units"] * (12 + 5 * codes)
    named = {"tokens": tokens, "actions_and_controls": rest, "total": tokens + rest, "files": files}
    return {name: round(number) for name, number in named.items()}


def _list_lines(document: dict[str, Any]) -> list[str]:
    lines = shorten([f"unusable: {it['key']}: {it['reason']}" for it in document["unusable"]])
    counts = [[words, *map(str, document[name].values())] for name, words in (("all", "all"), ("to_do", "to do"))]
    lines += align([["", *COUNTED], *counts])
    sizes = [
        [dtype, *(describe_bytes(size[name]) for name in ("tokens", "total")), f"{size['files']} files"]
        for dtype, size in document["bytes"].items()
    ]
    lines += align([["stored as", "tokens", "with actions, controls", ""], *sizes])
    hours, disk, touched = (document[name] for name in ("hours", "disk", "break_even"))
    paid = "within the first run" if touched["runs"] <= 1 else f"after {touched['runs']:.1f} runs"
    lines += [
        "time: not known; --frames-per-s gives a rate" if hours is None else f"time: {hours:.2f} h at the rate given",
        f"one training run touches {touched['frames_touched_per_run']} frames: without the cache the encoder would run on each, so "
        f"the cache pays for itself {paid}",
    ]
    free = "no limit known" if disk["free_bytes"] is None else f"{describe_bytes(disk['free_bytes'])} free"
    lines.append(f"{document['root']}: {free}, {describe_bytes(disk['needed_bytes'])} needed in {document['dtype']}")
    if not document["fits"]:
        lines.append(
            "refused: it does not fit. Set cache.root to a larger disk, store fewer bytes (encode.dtype), remove what is not "
            "needed (jepa-cache gc), or encode fewer recordings"
        )
    return lines
