"""Stores against their recordings: random steps are encoded again and compared, damaged stores are rebuilt."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jepa_cache.config.schema import Config, EncodeConfig
from jepa_cache.encoding.actions import ensure_controls
from jepa_cache.encoding.groups import EncodingGroup, group_units_by_recipe, open_encoder, scan_units
from jepa_cache.encoding.run import bring_up_to_date
from jepa_cache.encoding.task import describe_machine, load_encoder, read_whole
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit, iter_as_stored
from jepa_cache.store import layout
from jepa_cache.store.check import Finding, check_units
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, write_manifest
from jepa_cache.store.quantisation import Channels, decode, encode, get_codec
from jepa_cache.store.reader import ArrayReader, read_keys, read_table
from jepa_cache.store.recipe import StoreKey, recipe_changes
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from torch import Tensor

    from jepa_cache.encoder.frozen import FrozenEncoder

# Root mean square of a step's differences relative to its values. Rounding in bfloat16 gives some 0.01, the tokens of
# another recording about 1.
MAX_RELATIVE_ERROR = 0.1


class StepResult(NamedTuple):
    """One step that was encoded again."""

    unit: str
    episode: str
    step: int  # row in the store
    equal: bool  # the bits in the store are those that come out now
    difference: float  # largest absolute difference between the stored values and those that would be stored now
    relative_error: float  # root mean square of that difference relative to the values


@dataclass
class Comparison:
    """All steps that were encoded again, and what is another machine or library now than when the stores were made."""

    seed: int
    steps: list[StepResult] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    stale: list[Finding] = field(default_factory=list)  # the stores of the units whose steps are wrong

    @property
    def wrong(self) -> list[StepResult]:
        """Steps that no rounding explains; a difference that is no number is one."""
        return [step for step in self.steps if not step.relative_error <= MAX_RELATIVE_ERROR]

    def describe(self) -> dict[str, object]:
        """The comparison as JSON."""
        return {
            "num_steps": len(self.steps),
            "num_equal": sum(step.equal for step in self.steps),
            "bit_equal": all(step.equal for step in self.steps),
            "largest_difference": max((step.difference for step in self.steps), default=0.0),
            "largest_relative_error": max((step.relative_error for step in self.steps), default=0.0),
            "changes_since": self.changes,
            "seed": self.seed,
            "steps": [step._asdict() for step in self.steps],
        }


def compare_online(
    manifest: Manifest,
    config: Config,
    inputs: Sequence[str],
    root: CacheRoot,
    *,
    base: Path,
    num_steps: int,
    seed: int,
    damaged: Collection[StoreKey | None] = (),
) -> Comparison:
    """Encode random steps of a manifest again, each in the batch that it was in, and compare.

    Raises:
        ValueError: The present settings make another recipe, or the recordings are not found.
    """
    groups = scan_units(config, inputs, base)[0]
    units = _find_units(manifest, groups)
    if not units:
        raise ValueError(
            "none of the recordings in the manifest is among the inputs (or none was read yet: run `python stages/encode.py`)"
        )
    units = [it for it in units if it.keys[0] not in damaged]
    starts = np.cumsum([0, *(it.entry.num_steps for it in units)])
    steps = np.sort(random.Random(seed).sample(range(starts[-1]), min(num_steps, starts[-1])))
    numbers = np.searchsorted(starts, steps, side="right") - 1
    num_threads = groups[0].num_threads
    encoder = load_encoder(groups[0].encoder, config.encode, num_threads)
    comparison = Comparison(seed)
    for number in np.unique(numbers):
        it, rows = units[number], (steps[numbers == number] - starts[number]).tolist()
        store = root.store(it.keys[0])
        with root.pulled([store]):
            made = read_store_file(store).provenance
            then = {"batch_size": int(made["batch_size"]), "fill_batches": made.get("fill_batches", False)}
            encode = replace(config.encode, **then)
            now = describe_machine(encoder, encode, num_threads)
            changes = recipe_changes({name: made.get(name) for name in now}, now)
            compared = Comparison(seed, list(_compare_store(it, store, rows, encoder, encode)))
        comparison.steps += compared.steps
        comparison.changes += [change for change in changes if change not in comparison.changes]
        if wrong := compared.wrong:
            problem = (
                f"{store} is of another recording or of other weights than its name says: step {wrong[0].step} is not what "
                f"the encoder gives (relative error {wrong[0].relative_error:.2g})"
            )
            # Its actions and controls are of the same recording; they go before the tokens, by which it is known,
            # should a repair be killed.
            comparison.stale += [Finding(key, root.store(key), problem, stale=True) for key in reversed(it.keys)]
    return comparison


class _Listed(NamedTuple):
    """A unit of a manifest whose recording is at hand."""

    part: ManifestPart
    entry: ManifestEntry
    group: EncodingGroup
    unit: Unit

    @property
    def keys(self) -> tuple[StoreKey, ...]:
        """Of its tokens, actions and controls."""
        return self.part.keys(self.entry)


def _find_units(manifest: Manifest, groups: Sequence[EncodingGroup]) -> list[_Listed]:
    """The units of a manifest that are among those of the present groups.

    Raises:
        ValueError: The present settings make no store that it lists.
    """

    def recipes(it: ManifestPart | EncodingGroup) -> tuple[str, str, str]:
        return it.fingerprint, it.action_fingerprint, it.source_fingerprint

    if not {recipes(part) for part in manifest.parts} & {recipes(group) for group in groups}:
        then = {"tokens": manifest.recipe, "actions": manifest.parts[0].action_recipe}
        now = [{"tokens": group.recipe, "actions": group.action_recipe} for group in groups]
        changes = min((recipe_changes(then, it) for it in now), key=len)
        raise ValueError(
            f"the present settings do not make the stores of the manifest ({'; '.join(changes)}). "
            "Nothing was removed; give the settings and recordings that they were made with, as key=value and paths"
        )
    at_hand = {(*recipes(group), unit.digest): (group, unit) for group in groups for unit in group.units}
    return [
        _Listed(part, entry, *at_hand[key])
        for part, entry in manifest.stores
        if (key := (*recipes(part), entry.unit_digest)) in at_hand
    ]


def _compare_store(
    listed: _Listed, store: Path, rows: Sequence[int], encoder: FrozenEncoder, encode: EncodeConfig
) -> Iterator[StepResult]:
    """Encode some steps of a store again, in the batches that stage one cut; for those of other episodes in them stand repeated ones."""
    group, batch_size = listed.group, encode.batch_size
    starts: dict[str, int] = {}  # of each episode, its first step in the store
    wanted: dict[str, list[int]] = {}
    segments = read_table(store, layout.SEGMENTS_FILE).to_pylist()
    for row in segments:
        starts.setdefault(row["episode"], row["start"])
        if steps := [step for step in rows if row["start"] <= step < row["stop"]]:
            wanted.setdefault(row["episode"], []).extend(steps)
    for episode in iter_as_stored(group.source, listed.unit, *read_keys(store)):
        if not (steps := wanted.pop(episode.key, None)):
            continue
        num_frames = len(episode.frame_ticks)
        plan = group.plan(num_frames, episode.fps, episode.frame_times_s)
        start, per_input = starts[episode.key], len(plan.anchors) // len(plan.inputs)
        # Of the inputs that batches are cut from: the place of the episode's first, and how many there are.
        first, count = (
            (start // per_input, segments[-1]["stop"] // per_input) if encode.fill_batches else (0, len(plan.inputs))
        )
        batches: dict[int, list[int]] = {}
        for step in steps:
            batches.setdefault((first + (step - start) // per_input) // batch_size, []).append(step)
        with open_video(
            episode.video, group.encode.decoder, first_frame=episode.first_frame, num_frames=num_frames
        ) as video:
            for batch, members in batches.items():
                begin, size = max(0, batch * batch_size - first), min(batch_size, count - batch * batch_size)
                inputs = plan.inputs[begin : (batch + 1) * batch_size - first]
                pixels = encoder.preprocess(video.read(inputs.reshape(-1)))
                pixels = pixels.reshape(*inputs.shape, *pixels.shape[1:])[np.arange(size) % len(inputs)]
                tokens = encoder.encode(pixels).flatten(0, 1)
                for step in members:
                    online = tokens[step - start - begin * per_input]
                    stored = _compare_step(store, step, online, group.encode.dtype)
                    yield StepResult(listed.unit.name, episode.key, step, *stored)
    if wanted:
        raise ValueError(f"{listed.unit.path} does not hold the episode {next(iter(wanted))!r} that its store lists")


def _compare_step(store: Path, step: int, online: Tensor, dtype: str) -> tuple[bool, float, float]:
    """Whether the stored bits are those that come out now; the largest difference, and the relative error."""
    from jepa_cache.encoder.frozen import to_stored

    codec, channels = get_codec(dtype), None
    fresh = [to_stored(online[None], codec.cast)[0]]  # the codes, and where they are codes their scales
    stored = [_read(store, layout.TOKENS, step)]
    if codec.max_code is not None:
        channels = Channels(_read(store, layout.CHANNEL_SCALES), _read(store, layout.CHANNEL_MEANS))
        fresh = list(encode(fresh[0], dtype, channels))
        stored.append(_read(store, layout.TOKEN_SCALES, step))
    equal = all(np.array_equal(old, new) for old, new in zip(stored, fresh, strict=True))
    old, new = (decode(it[0], dtype, it[1] if channels else None, channels) for it in (stored, fresh))
    difference, size = (float(np.sqrt(np.square(it, dtype=np.float64).mean())) for it in (old - new, new))
    return equal, float(np.abs(old - new).max()), difference / size if size else difference


def _read(store: Path, name: str, row: int | None = None) -> np.ndarray:
    """An array of a store, or one row of it."""
    with ArrayReader(store, name) as reader:
        out = np.empty(reader.shape if row is None else (1, *reader.shape[1:]), reader.dtype)
        reader.read(row or 0, out)
    return out if row is None else out[0]


@dataclass
class Repair:
    """What was made again, and what is still not as the manifest says."""

    repaired: list[Path] = field(default_factory=list)  # stores, controls and manifests that are whole again
    lost: list[str] = field(default_factory=list)  # sha256 of units whose recordings are not among the inputs
    differing: list[str] = field(default_factory=list)  # in words, what came out with another digest than is listed
    left: list[str] = field(default_factory=list)  # in words, what is still damaged

    @property
    def complete(self) -> bool:
        """Whether everything is as the manifest says."""
        return not (self.lost or self.differing or self.left)


def repair_manifest(
    manifest: Manifest,
    findings: Sequence[Finding],
    config: Config,
    inputs: Sequence[str],
    *,
    base: Path,
    root: CacheRoot,
) -> Repair:
    """Make what was found damaged or missing again, from the recordings.

    A damaged store is removed only when its recording, the weights and the settings that it was made with are at hand.

    Raises:
        ValueError: The settings make another recipe, or recordings or weights cannot be had.
    """
    repair = Repair()
    damaged = {finding.key: finding for finding in findings if finding.key is not None}
    if len(damaged) < len(findings):
        path = root.manifest(manifest.digest)
        write_manifest(manifest, [path])
        root.publish(path)
        repair.repaired.append(path)
    affected = {entry.unit_digest for part, entry in manifest.stores if damaged.keys() & set(part.keys(entry))}
    if not affected:
        return repair
    groups = group_units_by_recipe(config, open_encoder(config, base), inputs, base)
    units = [it for it in _find_units(manifest, groups) if damaged.keys() & set(it.keys)]
    repair.lost = sorted(affected - {it.entry.unit_digest for it in units})
    for it in units:
        for finding in [finding for key, finding in damaged.items() if key in it.keys]:
            _remove_damaged(root, it, finding)
    bring_up_to_date(config, inputs, base, root)
    for it in units:
        ensure_controls(root, it.group, it.unit)  # which stage one does not miss where the actions are there
    left = {finding.key: finding.problem for finding in check_units([it[:2] for it in units], root)}
    for it in units:
        for key, listed in zip(it.keys, (it.entry.tokens_digest, it.entry.actions_digest, None), strict=True):
            found = read_whole(root, root.store(key)) if listed and key in damaged else None
            if found is not None and found.digest != listed:
                repair.differing.append(f"{root.store(key)} has digest {found.digest}, the manifest lists {listed}")
                left.pop(key, None)
            elif key in damaged and key not in left:
                repair.repaired.append(root.store(key))
    repair.left = list(left.values())
    return repair


def _remove_damaged(root: CacheRoot, listed: _Listed, finding: Finding) -> None:
    """Remove a store under its claim and after another look: its maker may have put it right meanwhile."""
    with root.claimed(finding.path):
        again = check_units([listed[:2]], root, read_data=True)
        if finding.stale or any(it.path == finding.path for it in again):
            root.remove(finding.path)
