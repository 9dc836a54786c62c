"""`jepa-cache estimate`: what encoding would cost, before anything is spent.

Episodes, frames and steps come from the headers of recordings; bytes follow from the steps; operations from the products of matrices, of
which a multiplication and an addition count 2. Norms, activations, rotary positions and the optimiser are not counted: below 1 % at these widths.
T steps of a window, N tokens per step, D token width, L = N + 2 tokens of a step in the predictor (with its action and its state).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

import typer
from tqdm import tqdm

from jepa_cache.cli.outcome import FINE, PROBLEM, Checkout, Outcome, describe_bytes, open_checkout, report
from jepa_cache.config.machine import existing_folder
from jepa_cache.config.schema import EncodeConfig, EncoderPreset, PredictorPreset, TrainConfig
from jepa_cache.encoding.groups import EncodingGroup, scan_units
from jepa_cache.encoding.steps import plan_episode
from jepa_cache.encoding.units import is_unread
from jepa_cache.episode import Skipped
from jepa_cache.media.probe import VIDEO_SUFFIXES, header_counts, iter_tar_videos
from jepa_cache.sources import Unit, describe_unreadable, find_obstacle, iter_recordings
from jepa_cache.store.layout import CHUNK_STEPS, SHARD_STEPS, STEPS_FILE
from jepa_cache.store.quantisation import CODECS, check_width, get_codec, step_bytes
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot

MAX_SHOWN = 20  # unusable recordings
# Units whose headers are read; of more an even choice is read, and the rest follows by bytes.
MAX_HEADERS = 2000
# Pictures in records (RLDS) have no header: so many units are read whole, and the rest follows by bytes.
MAX_WHOLE = 2
# Bytes of JSON and Parquet, measured on the sample data set; they matter for tiny tokens only.
STORE_BYTES, CODES_BYTES, STEP_ROW_BYTES = 8_900, 9_600, 14
SHARD_BYTES = 1_060  # its index, and its entry in store.json
ACTIONS_BYTES, COLUMN_BYTES = 4_360, 110
CONTROLS_BYTES, EPISODE_BYTES, TICK_BYTES = 4_400, 6_000, 19.5  # of VPT's 37 columns
MEASURED_S = 1.0
CONDITIONING_TOKENS = 2  # action and state
BACKWARD = 2  # the backward pass costs two forward ones


def estimate(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="recordings, as encode.py takes them; key=value overrides")
    ] = None,
    *,
    frames_per_s: Annotated[float | None, typer.Option(min=1e-9, help="rate for the hours")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="run the encoder here for about a second, for the hours")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Say what encoding would take: episodes, frames, steps, bytes per stored dtype, files, operations, hours, disk.

    Reads the headers of recordings, no videos, and downloads nothing. Hours are given only at the rate of --frames-per-s, or of the encoder
    alone with --measure, which knows nothing of decoding and of the disk.

    Exit code 0: it fits; 1: the disk of the cache root is too small; 2: wrong usage, or it could not be counted.

    Args:
        arguments: Recordings and overrides.
        frames_per_s: Rate for the hours.
        measure: Measure that rate.
        as_json: Print JSON.
    """
    report(lambda: estimate_checkout(open_checkout(arguments), frames_per_s, measure=measure), as_json=as_json)


@dataclass
class Amount:
    """What recordings give: sampled frames, steps, and native ticks, about one for each video frame."""

    num_units: float = 0
    num_episodes: float = 0
    num_unusable: float = 0
    num_frames: float = 0
    num_steps: float = 0
    num_stored_steps: float = 0  # with those that fill the last chunk of each unit
    num_shards: float = 0
    num_ticks: float = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> Amount:
        """Return this amount multiplied by `factor`."""
        return Amount(*(getattr(self, f.name) * factor for f in fields(self)))

    def store_steps(self, num_steps: int) -> None:
        """Count the steps of one unit."""
        self.num_steps += num_steps
        self.num_stored_steps += -(-num_steps // CHUNK_STEPS) * CHUNK_STEPS
        self.num_shards += -(-num_steps // SHARD_STEPS)

    def size(self, dtype: str, encode: EncodeConfig, encoder: EncoderPreset) -> tuple[int, int]:
        """Bytes and files of the token stores."""
        codes = get_codec(dtype).max_code is not None
        per_step = step_bytes(dtype, encode.num_tokens_of(encoder), encoder.embed_dim)
        num_bytes = self.num_stored_steps * per_step + self.num_steps * STEP_ROW_BYTES
        num_bytes += self.num_units * (STORE_BYTES + codes * (CODES_BYTES + 8 * encoder.embed_dim))
        num_bytes += self.num_shards * (1 + codes) * SHARD_BYTES
        return round(num_bytes), round(self.num_shards * (1 + codes) + self.num_units * (5 + 5 * codes))

    def rest_bytes(self, num_columns: int) -> int:
        """Bytes of actions, states and controls; `num_columns` are those of actions and states."""
        per_unit = ACTIONS_BYTES + COLUMN_BYTES * num_columns + CONTROLS_BYTES
        episodes = self.num_episodes + self.num_unusable
        num_bytes = self.num_units * per_unit + 4 * num_columns * self.num_steps
        return round(num_bytes + EPISODE_BYTES * episodes + TICK_BYTES * self.num_ticks)


class GroupEstimate(NamedTuple):
    """What of a group is done and what is not.

    Attributes:
        group: The group.
        done: Units that have token stores.
        to_do: The others.
        num_measured: Units of those to do that were looked at; the others were estimated by their bytes.
        largest_steps: Of one unit to do.
        unusable: The recordings in them that cannot be used, with the reason.
    """

    group: EncodingGroup
    done: Amount
    to_do: Amount
    num_measured: int
    largest_steps: int
    unusable: list[Skipped]


def estimate_group(group: EncodingGroup, root: CacheRoot) -> GroupEstimate:
    """Measure one group.

    Cost: of each unit to do the headers of its videos; its records too where it is no tar shard.
    """
    done, units = Amount(), []
    for unit in group.units:
        amount = None if is_unread(unit) else _measure_store(root, group, unit)
        if amount is None:
            units.append(unit)
        else:
            done += amount
    with_headers = all(
        any(file.suffix.lower().lstrip(".") in ("tar", *VIDEO_SUFFIXES) for file in unit.files) for unit in units
    )
    most = MAX_HEADERS if with_headers else MAX_WHOLE
    chosen = units if len(units) <= most else [units[(2 * i + 1) * len(units) // (2 * most)] for i in range(most)]
    unusable = list(group.unreadable)
    bar = tqdm(chosen, desc="reading headers", unit="unit", delay=2, disable=None)
    amounts = [_measure_unit(group, unit, unusable) for unit in bar]
    num_bytes, num_chosen = (sum(unit.num_bytes for unit in some) for some in (units, chosen))
    to_do = sum(amounts, Amount()).scaled(num_bytes / max(1, num_chosen) if len(chosen) < len(units) else 1.0)
    to_do.num_units = len(units)
    to_do.num_unusable += len(group.unreadable)
    largest = max((int(amount.num_steps) for amount in amounts), default=0)
    return GroupEstimate(group, done, to_do, len(chosen), largest, unusable)


def _measure_store(root: CacheRoot, group: EncodingGroup, unit: Unit) -> Amount | None:
    """What a token store holds; None where it is missing or damaged, and so is to be made."""
    store = group.tokens(root, unit)
    try:
        found = root.find_store(store)
    except ValueError:
        return None
    if found is None:
        return None
    metadata = found.metadata
    per_step = 1 if group.encode.mode == "frame" else group.encoder.preset.tubelet_size
    ticks = int(read_table(store, STEPS_FILE).column("tick").to_numpy()[-1:].sum()) + 1  # of its last episode
    amount = Amount(1, metadata["num_episodes"], len(metadata["skipped"]), metadata["num_steps"] * per_step)
    amount.num_ticks = ticks * max(1, metadata["num_episodes"])
    amount.store_steps(metadata["num_steps"])
    return amount


def _measure_unit(group: EncodingGroup, unit: Unit, unusable: list[Skipped]) -> Amount:
    amount, num_steps, tubelet_size = Amount(num_units=1), 0, group.encoder.preset.tubelet_size
    for recording in _iter_lengths(group, unit):
        if isinstance(recording, Skipped):
            amount.num_unusable += 1
            unusable.append(recording)
            continue
        key, num_frames, fps = recording
        amount.num_ticks += num_frames
        try:
            plan = plan_episode(num_frames, fps, group.encode, tubelet_size=tubelet_size, phase=group.phase)
        except ValueError as error:  # too short or too slow under these settings
            amount.num_unusable += 1
            unusable.append(Skipped(key, str(error)))
            continue
        amount.num_episodes += 1
        amount.num_frames += plan.inputs.size
        num_steps += len(plan.anchors)
    amount.store_steps(num_steps)
    return amount


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


def measure_rate(group: EncodingGroup) -> float:
    """Frames per second of the encoder alone on this machine, on grey pictures.

    Raises:
        ValueError: Its weights are not on this machine.
    """
    import numpy as np

    from jepa_cache.encoding.task import load_encoder, resolve_device

    opened, encode = group.encoder, group.encode
    if opened.preset.weights is not None and opened.weights is None:
        raise ValueError(
            f"the weights {opened.preset.weights} are not on this machine, so their speed cannot be measured; give --frames-per-s"
        )
    encoder = load_encoder(opened, encode, device=resolve_device(encode.device), num_threads=group.num_threads)
    per_input = count_encoder(opened.preset, encode).num_frames
    side = opened.preset.resolution
    pixels = encoder.preprocess(np.full((per_input * encode.batch_size, side, side, 3), 128, np.uint8))
    pixels = pixels.reshape(encode.batch_size, per_input, *pixels.shape[1:])
    encoder.encode(pixels).cpu()  # the first batch is slower
    begun, num_batches = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - begun) < MEASURED_S:
        encoder.encode(pixels).cpu()
        num_batches += 1
    return num_batches * encode.batch_size * per_input / elapsed_s


def estimate_checkout(checkout: Checkout, frames_per_s: float | None = None, *, measure: bool = False) -> Outcome:
    """Count recordings, bytes, operations and time, and compare with the disk."""
    config, encode = checkout.config, checkout.config.encode
    inventory = scan_units(config, checkout.paths, checkout.base, most_bytes=0)  # headers tell all that it needs
    estimates = [estimate_group(group, checkout.root) for group in inventory.groups]
    encoder, space = inventory.groups[0].encoder.preset, inventory.groups[0].space
    done, to_do = (sum((getattr(it, name) for it in estimates), Amount()) for name in ("done", "to_do"))
    total, num_columns = done + to_do, len(space.actions) + len(space.states)
    needed = to_do.size(encode.dtype, encode, encoder)[0] + to_do.rest_bytes(num_columns)
    if get_codec(encode.dtype).max_code is not None:  # a unit waits in float16 until its statistics are complete
        waiting = max(it.largest_steps for it in estimates)
        needed += waiting * step_bytes("float16", encode.num_tokens_of(encoder), encoder.embed_dim)
    free = free_bytes(checkout.root)
    fits = free is None or needed <= free
    cost = count_encoder(encoder, encode)
    rate = frames_per_s or (measure_rate(inventory.groups[0]) if measure else None)
    runs = compare_runs(
        encoder,
        config.predictor,
        config.train,
        encode,
        num_frames=round(total.num_frames),
        num_actions=len(space.actions),
        num_states=len(space.states),
    )
    document: dict[str, Any] = {
        "fits": fits,
        "root": checkout.root.name,
        "dataset": config.dataset.name,
        "encoder": encoder.name,
        "all": _describe(total),
        "done": _describe(done),
        "to_do": _describe(to_do),
        "estimated": any(it.num_measured < it.to_do.num_units for it in estimates),
        "dtype": encode.dtype,
        "bytes": {
            name: _describe_size(total, name, encode, encoder, num_columns) for name in list_schemes(encoder.embed_dim)
        },
        "disk": {"needed_bytes": needed, "free_bytes": free},
        "encoder_flops": {
            "per_frame": cost.operations / cost.num_frames,
            "to_do": to_do.num_frames / cost.num_frames * cost.operations,
        },
        "rate": {
            "frames_per_s": rate,
            "measured": bool(measure and not frames_per_s),
            "hours": to_do.num_frames / rate / 3600 if rate else None,
        },
        "break_even": _describe_runs(runs, config.predictor.name),
        "unusable": [recording._asdict() for it in estimates for recording in it.unusable],
        "notes": inventory.notes,
    }
    return Outcome(document, _list_lines(document, estimates, runs), FINE if fits else PROBLEM)


def free_bytes(root: CacheRoot) -> int | None:
    """Free bytes on the disk of a cache root that need not exist yet; None for a bucket, which has no end."""
    if root.name != str(root.path):
        return None
    return shutil.disk_usage(existing_folder(root.path)).free


def list_schemes(width: int) -> list[str]:
    """Stored dtypes that take tokens of this width."""
    names = []
    for name in CODECS:
        with suppress(ValueError):
            check_width(name, width)
            names.append(name)
    return names


def _describe_size(
    amount: Amount, dtype: str, encode: EncodeConfig, encoder: EncoderPreset, num_columns: int
) -> dict[str, int]:
    tokens, num_files = amount.size(dtype, encode, encoder)
    rest = amount.rest_bytes(num_columns)
    files = num_files + round(7 * amount.num_units)  # six of the actions, one of the controls
    return {"tokens": tokens, "actions_and_controls": rest, "total": tokens + rest, "files": files}


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


def _list_lines(document: dict[str, Any], estimates: Sequence[GroupEstimate], runs: BreakEven) -> list[str]:
    lines = [f"note: {note}" for note in document["notes"]]
    unusable = document["unusable"]
    lines += [f"unusable: {recording['key']}: {recording['reason']}" for recording in unusable[:MAX_SHOWN]]
    if len(unusable) > MAX_SHOWN:
        lines.append(f"unusable: {len(unusable) - MAX_SHOWN} more, see --json")
    for it in estimates:
        words = f"{it.group.preset.name} ({it.group.view}), recipe {it.group.fingerprint}"
        lines.append(f"{words}: {round(it.done.num_units)} units done, {round(it.to_do.num_units)} to do")
        if it.num_measured < it.to_do.num_units:
            lines.append(f"  estimated by bytes from {it.num_measured} of them")
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
        return "time: not known; --measure runs the encoder for a second, --frames-per-s gives a rate"
    where = (
        "the encoder alone, measured here on grey pictures: decoding may be slower" if rate["measured"] else "as given"
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


@dataclass(frozen=True)
class BreakEven:
    """What one training run costs with the cache and without, in floating-point operations; decoding is not counted.

    Attributes:
        build: Encoding every frame once.
        online: Encoding the frames of every window of one run.
        predictor: Forward and backward passes of one run.
        num_frames: Frames in the data set.
        num_touched: Frames that the windows of one run hold, each counted as often as it is used.
    """

    build: float
    online: float
    predictor: float
    num_frames: int
    num_touched: int

    @property
    def runs(self) -> float | None:
        """Training runs after which building the cache and reading it cost as much as encoding online each time."""
        return self.build / self.online if self.online else None

    @property
    def gain_per_run(self) -> float | None:
        """How many times the operations of a run with the cache one without needs, once the cache is built."""
        return (self.online + self.predictor) / self.predictor if self.predictor else None


class InputCost(NamedTuple):
    """Operations of one encoder input, the sampled frames that it takes, and the steps that it gives."""

    operations: int
    num_frames: int
    num_steps: int


def count_encoder(encoder: EncoderPreset, encode: EncodeConfig) -> InputCost:
    """What one encoder input costs under these settings."""
    num_frames = {"frame": 1, "tubelet": encoder.tubelet_size, "clip": encode.frames_per_clip}[encode.mode]
    num_steps = max(1, num_frames // encoder.tubelet_size)
    tokens, width = num_steps * encoder.num_tokens, encoder.embed_dim
    as_image = encode.mode == "frame" and encode.single_frame == "image"
    patch = 3 * (1 if as_image else encoder.tubelet_size) * encoder.patch_size**2
    block = 2 * tokens * (4 * width**2 + 2 * width * encoder.mlp_dim) + 4 * tokens**2 * width
    return InputCost(2 * tokens * patch * width + encoder.depth * block, num_frames, num_steps)


def count_predictor(
    predictor: PredictorPreset, train: TrainConfig, *, num_tokens: int, width: int, num_actions: int, num_states: int
) -> int:
    """Operations of one window in training: the teacher-forced pass over T-1 steps, the rollout, and their backward passes."""
    dim, num_given = predictor.predictor_dim, train.window_steps - 1
    num_rolled = min(train.auto_steps, num_given) - 1  # the first step is shared with the teacher-forced pass
    length = num_tokens + CONDITIONING_TOKENS
    linear = 2 * length * (4 * dim**2 + 2 * dim * int(dim * predictor.mlp_ratio))
    # A step attends to itself and to all steps before it; the rollout to what was kept of step 0 and to itself.
    seen = num_given * (num_given + 1) // 2 + sum(range(2, num_rolled + 2))
    steps = num_given + num_rolled
    blocks = predictor.depth * (steps * linear + 4 * length**2 * dim * seen)
    ends = steps * 2 * dim * (2 * num_tokens * width + num_actions + num_states)
    total = (1 + BACKWARD) * (blocks + ends)
    total -= num_given * 2 * dim * (num_tokens * width + num_actions + num_states)  # true tokens need no gradient
    if predictor.activation_checkpointing:  # recomputes every block up to its last matrix product
        total += blocks - predictor.depth * steps * 2 * length * dim * int(dim * predictor.mlp_ratio)
    return total


def compare_runs(
    encoder: EncoderPreset,
    predictor: PredictorPreset,
    train: TrainConfig,
    encode: EncodeConfig,
    *,
    num_frames: int,
    num_actions: int,
    num_states: int,
) -> BreakEven:
    """What building the cache, encoding online and training the predictor cost.

    Args:
        encoder: Chosen encoder.
        predictor: Chosen predictor.
        train: Windows, batch and number of train steps.
        encode: Mode, and how tokens are pooled.
        num_frames: Sampled frames in the data set.
        num_actions: A.
        num_states: S.
    """
    cost = count_encoder(encoder, encode)
    num_windows = train.num_steps * train.batch_size * train.grad_accumulation
    touched_steps = num_windows * train.window_steps
    per_window = count_predictor(
        predictor,
        train,
        num_tokens=encode.num_tokens_of(encoder),
        width=encoder.embed_dim,
        num_actions=num_actions,
        num_states=num_states,
    )
    return BreakEven(
        build=num_frames / cost.num_frames * cost.operations,
        online=touched_steps / cost.num_steps * cost.operations,
        predictor=num_windows * per_window,
        num_frames=num_frames,
        num_touched=touched_steps * cost.num_frames // cost.num_steps,
    )
