"""How large a data set is before it is encoded: episodes, frames, steps, bytes and files, from headers and indexes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from jepa_cache.actions import ActionSpace
from jepa_cache.config.schema import EncodeConfig, EncoderPreset
from jepa_cache.encoding.inventory import Inventory, is_unread
from jepa_cache.encoding.modes import plan_episode
from jepa_cache.encoding.parts import Part
from jepa_cache.episode import Skipped
from jepa_cache.media.probe import VIDEO_SUFFIXES, header_counts, iter_tar_videos
from jepa_cache.sources import Unit, describe_unreadable, find_obstacle, iter_recordings
from jepa_cache.store.layout import STEPS_FILE
from jepa_cache.store.quantisation import CODECS, check_width
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.sizing import Size, measure_actions, measure_controls, measure_tokens

# Units whose headers are read; of more an even choice is read, and the rest follows by bytes.
MAX_HEADERS = 2000
# Pictures in records (RLDS) have no header: so many units are read whole, and the rest follows by bytes.
MAX_WHOLE = 2


@dataclass
class Amount:
    """What recordings give: sampled frames, steps, and native ticks, about one for each video frame."""

    num_units: float = 0
    num_episodes: float = 0
    num_unusable: float = 0
    num_frames: float = 0
    num_steps: float = 0
    num_ticks: float = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, factor: float) -> Amount:
        """So many times as much."""
        return Amount(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass
class PartPlan:
    """One part: what is done, what is to do, and what its stores take.

    Attributes:
        part: The part.
        done: Units whose token stores are there.
        to_do: The others.
        sizes: Stored dtype to the token stores of all units.
        rest: Actions and controls of all units.
        to_write: Tokens, actions and controls that are to be made, tokens in the dtype of the settings.
        num_measured: Units of those to do that were looked at; the others were estimated by their bytes.
        unusable: The recordings in them that cannot be used, with the reason.
        largest_steps: Of one unit to do.
    """

    part: Part
    done: Amount
    to_do: Amount
    sizes: dict[str, Size]
    rest: Size
    to_write: Size
    num_measured: int
    largest_steps: int
    unusable: list[Skipped]


def plan_encode(inventory: Inventory, encode: EncodeConfig, space: ActionSpace, root: CacheRoot) -> list[PartPlan]:
    """Measure every part of a run.

    Cost: of each unit to do the headers of its videos; its records too where it is no tar shard.
    """
    return [_plan_part(part, inventory.encoder, encode, space, root) for part in inventory.parts]


def _plan_part(
    part: Part, encoder: EncoderPreset, encode: EncodeConfig, space: ActionSpace, root: CacheRoot
) -> PartPlan:
    done, units = [], []
    for unit, digest in part.units:
        amount = None if is_unread(digest) else _measure_store(root, root.tokens(part.tokens, digest), encode, encoder)
        if amount is None:
            units.append((unit, digest))
        else:
            done.append(amount)
    chosen = _choose(units)
    bar = tqdm(chosen, desc="reading headers", unit="unit", delay=2, disable=None)
    unusable = list(part.unreadable)
    amounts = [_measure_unit(part, unit, encode, encoder, unusable) for unit, _ in bar]
    factor = _count_bytes(units) / max(1, _count_bytes(chosen)) if len(chosen) < len(units) else 1.0
    to_do = sum(amounts, Amount()).scaled(factor)
    to_do.num_units = len(units)
    to_do.num_unusable += len(part.unreadable)

    num_tokens = encode.num_tokens_of(encoder)

    def measure(amount: Amount, dtype: str) -> Size:
        num_segments = amount.num_steps if encode.mode == "clip" else amount.num_episodes
        return measure_tokens(dtype, int(amount.num_steps), int(num_segments), num_tokens, encoder.embed_dim)

    def measure_rest(amount: Amount, digest: str | None = None) -> list[Size]:
        """Actions and controls; of the unit `digest` only those that are not there."""
        sizes = []
        if digest is None or not root.fetch(root.actions(part.actions, digest)):
            sizes.append(measure_actions(int(amount.num_steps), len(space.actions) + len(space.states)))
        if digest is None or not root.fetch(root.controls(part.controls, digest)):
            sizes.append(measure_controls(int(amount.num_episodes + amount.num_unusable), int(amount.num_ticks)))
        return sizes

    dtypes = list_schemes(encoder.embed_dim)
    sizes = {
        dtype: total([[measure(it, dtype)] for it in amounts], factor, [[measure(it, dtype)] for it in done])
        for dtype in dtypes
    }
    rest = total([measure_rest(it) for it in amounts], factor, [measure_rest(it) for it in done])
    missing = [
        [measure(amount, encode.dtype), *measure_rest(amount, digest)]
        for amount, (_, digest) in zip(amounts, chosen, strict=True)
    ]
    to_write = total(missing, factor)
    largest = max((int(amount.num_steps) for amount in amounts), default=0)
    return PartPlan(part, sum(done, Amount()), to_do, sizes, rest, to_write, len(chosen), largest, unusable)


def _measure_store(root: CacheRoot, store: Path, encode: EncodeConfig, encoder: EncoderPreset) -> Amount | None:
    """What a store that is there holds; None where it is missing or damaged, and so is to be made."""
    try:
        found = root.find_store(store)
    except ValueError:
        return None
    if found is None:
        return None
    card = found.metadata
    num_frames = card["num_steps"] * (1 if encode.mode == "frame" else encoder.tubelet_size)
    ticks = int(read_table(store, STEPS_FILE).column("tick").to_numpy()[-1:].sum()) + 1  # of its last episode
    num_ticks = ticks * max(1, card["num_episodes"])
    return Amount(1, card["num_episodes"], len(card["skipped"]), num_frames, card["num_steps"], num_ticks)


def _measure_unit(
    part: Part, unit: Unit, encode: EncodeConfig, encoder: EncoderPreset, unusable: list[Skipped]
) -> Amount:
    amount = Amount(num_units=1)
    for recording in _iter_lengths(part, unit):
        if isinstance(recording, Skipped):
            amount.num_unusable += 1
            unusable.append(recording)
            continue
        key, num_frames, fps = recording
        amount.num_ticks += num_frames
        try:
            plan = plan_episode(num_frames, fps, encode, tubelet_size=encoder.tubelet_size, phase=part.phase)
        except ValueError as error:  # too short or too slow under these settings
            amount.num_unusable += 1
            unusable.append(Skipped(key, str(error)))
            continue
        amount.num_episodes += 1
        amount.num_frames += plan.inputs.size
        amount.num_steps += len(plan.anchors)
    return amount


def _iter_lengths(part: Part, unit: Unit) -> Iterator[tuple[str, int, float] | Skipped]:
    """Key, frames and rate of every recording of a unit; one that cannot be used as skipped."""
    if unit.path.suffix == ".tar" and find_obstacle(unit) is None:
        try:
            for key, info, problem in iter_tar_videos(unit.path):
                yield (key, info.num_frames, info.fps) if info else Skipped(key, problem)
        except OSError as error:
            yield Skipped(unit.name, describe_unreadable(error))
        return
    with header_counts():
        for recording in iter_recordings(part.source, unit):
            if isinstance(recording, Skipped):
                yield recording
            else:
                yield recording.key, len(recording.frame_ticks), recording.fps


def _choose(units: Sequence[tuple[Unit, str]]) -> Sequence[tuple[Unit, str]]:
    """All units, or of very many an even choice."""
    with_headers = all(_has_headers(unit.files) for unit, _ in units)
    most = MAX_HEADERS if with_headers else MAX_WHOLE
    if len(units) <= most:
        return units
    return [units[(2 * i + 1) * len(units) // (2 * most)] for i in range(most)]


def _has_headers(files: Sequence[Path]) -> bool:
    return any(file.suffix.lower().lstrip(".") in ("tar", *VIDEO_SUFFIXES) for file in files)


def _count_bytes(units: Sequence[tuple[Unit, str]]) -> int:
    return sum(unit.num_bytes for unit, _ in units)


def list_schemes(width: int) -> list[str]:
    """Stored dtypes that take tokens of this width."""
    names = []
    for name in CODECS:
        with suppress(ValueError):
            check_width(name, width)
            names.append(name)
    return names


def total(measured: Sequence[Sequence[Size]], factor: float = 1.0, known: Sequence[Sequence[Size]] = ()) -> Size:
    """The sum of what was measured, so many times, and of what is known."""
    sums = [
        sum(getattr(size, name) for sizes in measured for size in sizes) * factor
        + sum(getattr(size, name) for sizes in known for size in sizes)
        for name in Size._fields
    ]
    return Size(*(round(number) for number in sums))
