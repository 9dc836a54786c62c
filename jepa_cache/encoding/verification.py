"""Stores against their recordings: random steps are encoded again and compared, damaged stores are rebuilt."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.config.schema import Config
from jepa_cache.encoding.actions import ensure_controls
from jepa_cache.encoding.groups import EncodingGroup, group_units_by_recipe, open_encoder, scan_units
from jepa_cache.encoding.run import bring_up_to_date
from jepa_cache.encoding.task import describe_machine, load_encoder, resolve_device
from jepa_cache.episode import Episode
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit
from jepa_cache.store import layout
from jepa_cache.store.check import Finding, Scope, check_units
from jepa_cache.store.layout import read_store_file
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, write_manifest
from jepa_cache.store.quantisation import Channels, decode, encode, get_codec
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import StoreKey, recipe_changes
from jepa_cache.store.root import CacheRoot

if TYPE_CHECKING:
    from torch import Tensor

    from jepa_cache.encoder.frozen import FrozenEncoder

# Root mean square of a step's differences relative to its values. Rounding in bfloat16 gives some 0.01, the tokens of another
# recording about 1.
MAX_RELATIVE_ERROR = 0.1


class StepResult(NamedTuple):
    """One step that was encoded again.

    Attributes:
        unit: Name of its unit.
        episode: Its key.
        step: Row in the store.
        equal: The bits in the store are those that come out now.
        difference: Largest absolute difference between the stored values and those that would be stored now.
        relative_error: Root mean square of that difference relative to the values.
    """

    unit: str
    episode: str
    step: int
    equal: bool
    difference: float
    relative_error: float


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
    units = _find_units(manifest, {group.fingerprint: group for group in groups})
    found = [it for it in units if it.part.keys(it.entry)[0] not in damaged]
    if not units:
        raise ValueError(
            "none of the recordings in the manifest is among the inputs (or none was read yet: run `python stages/encode.py`)"
        )
    starts = np.cumsum([0, *(it.entry.num_steps for it in found)]).tolist()
    chosen: dict[int, list[int]] = {}
    for pick in sorted(random.Random(seed).sample(range(starts[-1]), min(num_steps, starts[-1]))):
        number = bisect.bisect_right(starts, pick) - 1
        chosen.setdefault(number, []).append(pick - starts[number])
    num_threads, device = groups[0].num_threads, resolve_device(config.encode.device)
    encoder = load_encoder(groups[0].encoder, config.encode, device=device, num_threads=num_threads)
    comparison, changes = Comparison(seed), {}
    for number, rows in chosen.items():
        store = found[number].group.tokens(root, found[number].unit)
        with root.pulled([store]):
            made = read_store_file(store).provenance
            batch_size = int(made["batch_size"])
            now = describe_machine(encoder, batch_size, num_threads)
            changes |= dict.fromkeys(recipe_changes(_common(made, now), _common(now, made)))
            of_store = Comparison(seed, list(_compare_store(found[number], store, rows, encoder, batch_size)))
        comparison.steps += of_store.steps
        if wrong := of_store.wrong:
            problem = (
                f"{store} is of another recording or of other weights than its name says: step {wrong[0].step} is not what "
                f"the encoder gives (relative error {wrong[0].relative_error:.2g})"
            )
            # Its actions and controls are of the same recording, and go before the tokens, by which it is known, if a repair is killed.
            keys = reversed(found[number].part.keys(found[number].entry))
            comparison.stale += [Finding(key, root.store(key), problem, stale=True) for key in keys]
    comparison.changes = list(changes)
    return comparison


class _Listed(NamedTuple):
    """A unit of a manifest whose recording is at hand."""

    part: ManifestPart
    entry: ManifestEntry
    group: EncodingGroup
    unit: Unit


def _find_units(
    manifest: Manifest,
    groups: Mapping[str, EncodingGroup],
    keep: Callable[[ManifestPart, ManifestEntry], bool] = lambda *_: True,
) -> list[_Listed]:
    """The units of a manifest, of those to `keep`, whose recordings are in the present groups, by token fingerprint.

    Raises:
        ValueError: The present settings do not make the stores that it lists.
    """
    found = []
    for part in manifest.parts:
        entries = [entry for entry in part.entries if keep(part, entry)]
        group = groups.get(part.fingerprint)
        if entries and (
            group is None
            or (group.action_fingerprint, group.source_fingerprint)
            != (part.action_fingerprint, part.source_fingerprint)
        ):
            then = {"tokens": part.recipe, "actions": part.action_recipe}
            now = [{"tokens": it.recipe, "actions": it.action_recipe} for it in groups.values()]
            changes = min((recipe_changes(then, recipes) for recipes in now), key=len, default=[])
            raise ValueError(
                f"the present settings do not make the stores of the manifest ({'; '.join(changes) or 'no recording fits'}). "
                "Nothing was removed; give the settings and recordings that they were made with, as key=value and paths"
            )
        units = {unit.digest: unit for unit in group.units} if entries else {}
        found += [_Listed(part, it, group, units[it.unit_digest]) for it in entries if it.unit_digest in units]
    return found


def _compare_store(
    listed: _Listed, store: Path, rows: Sequence[int], encoder: FrozenEncoder, batch_size: int
) -> Iterator[StepResult]:
    """Encode some steps of a store again, in the batches that stage one cuts."""
    group, first = listed.group, {}
    wanted: dict[str, list[int]] = {}
    for row in read_table(store, layout.SEGMENTS_FILE).to_pylist():
        first.setdefault(row["episode"], row["start"])
        if steps := [step for step in rows if row["start"] <= step < row["stop"]]:
            wanted.setdefault(row["episode"], []).extend(steps)
    for episode in group.source.iter_episodes(listed.unit):
        if not isinstance(episode, Episode) or not (steps := wanted.pop(episode.key, None)):
            continue
        num_frames = len(episode.frame_ticks)
        plan = group.plan(num_frames, episode.fps, episode.frame_times_s)
        start, per_batch = first[episode.key], len(plan.anchors) // len(plan.inputs) * batch_size
        batches: dict[int, list[int]] = {}
        for step in steps:
            batches.setdefault((step - start) // per_batch, []).append(step)
        with closing(
            open_video(episode.video, group.encode.decoder, first_frame=episode.first_frame, num_frames=num_frames)
        ) as video:
            for batch, members in batches.items():
                inputs = plan.inputs[batch * batch_size : (batch + 1) * batch_size]
                pixels = encoder.preprocess(video.read(inputs.reshape(-1)))
                tokens = encoder.encode(pixels.reshape(*inputs.shape, *pixels.shape[1:])).flatten(0, 1)
                for step in members:
                    online = tokens[step - start - batch * per_batch]
                    stored = _compare_step(store, step, online, group.encode.dtype)
                    yield StepResult(listed.unit.name, episode.key, step, *stored)
    if wanted:
        raise ValueError(f"{listed.unit.path} does not hold the episode {next(iter(wanted))!r} that its store lists")


def _compare_step(store: Path, step: int, online: Tensor, dtype: str) -> tuple[bool, float, float]:
    """Whether the stored bits are those that come out now; the largest difference of the values, and the relative error."""
    from jepa_cache.encoder.frozen import to_stored

    codec = get_codec(dtype)
    fresh: tuple[np.ndarray, ...] = (to_stored(online[None], codec.cast)[0],)
    stored, channels = (_read(store, layout.TOKENS, step)[0],), None
    if codec.max_code is not None:
        channels = Channels(*(_read(store, name) for name in (layout.CHANNEL_SCALES, layout.CHANNEL_MEANS)))
        stored = (*stored, _read(store, layout.TOKEN_SCALES, step)[0])
        fresh = encode(fresh[0], dtype, channels)
    equal = all(np.array_equal(old, new) for old, new in zip(stored, fresh, strict=True))
    old, new = (decode(it[0], dtype, it[1] if channels else None, channels) for it in (stored, fresh))
    difference, size = (float(np.sqrt(np.square(it, dtype=np.float64).mean())) for it in (old - new, new))
    return equal, float(np.abs(old - new).max()), difference / size if size else difference


def _read(store: Path, name: str, row: int | None = None) -> np.ndarray:
    """One row of an array of a store, as an array of one; all of it where no row is named."""
    with ArrayReader(store, name) as reader:
        out = np.empty(reader.shape if row is None else (1, *reader.shape[1:]), reader.dtype)
        reader.read(row or 0, out)
    return out


def _common(mapping: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What both record: an older store may not say everything."""
    return {
        key: _common(value, other[key]) if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if key in other
    }


@dataclass
class Repair:
    """What was made again, and what is still not as the manifest says.

    Attributes:
        repaired: Stores, controls and manifests that are whole again.
        lost: Units whose recordings are not among the inputs, by their sha256.
        differing: Stores that came out with another digest than the manifest lists, in words.
        left: What is still damaged, in words.
    """

    repaired: list[Path] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

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
    damaged = {finding.key: finding.path for finding in findings if finding.key is not None}
    stale = {finding.path for finding in findings if finding.stale}
    if any(finding.key is None for finding in findings):
        path = root.manifest(manifest.digest)
        write_manifest(manifest, [path])
        root.publish(path)
        repair.repaired.append(path)
    affected = {entry.unit_digest for part, entry in manifest.stores if damaged.keys() & set(part.keys(entry))}
    if not affected:
        return repair
    groups = group_units_by_recipe(config, open_encoder(config, base), inputs, base)
    by_recipe = {group.fingerprint: group for group in groups}
    found = _find_units(manifest, by_recipe, lambda part, entry: bool(damaged.keys() & set(part.keys(entry))))
    repair.lost = sorted(affected - {it.entry.unit_digest for it in found})
    for it in found:
        for key in [key for key in damaged if key in it.part.keys(it.entry)]:
            _remove_damaged(root, it, damaged[key], anyway=damaged[key] in stale)
    made = _digests(bring_up_to_date(config, inputs, base, root).manifest)
    for it in found:
        ensure_controls(root, it.group, it.unit)  # which stage one does not miss where the actions are there
    listed = _digests(manifest)
    differing = {key for key in damaged if made.get(key, listed.get(key)) != listed.get(key)}
    repair.differing = [f"{damaged[key]} has digest {made[key]}, the manifest lists {listed[key]}" for key in differing]
    left = check_units([(it.part, it.entry) for it in found], root, Scope())
    left = [finding for finding in left if finding.key not in differing]
    repair.left = [finding.problem for finding in left]
    whole = {key for it in found for key in it.part.keys(it.entry)} - differing - {finding.key for finding in left}
    repair.repaired += [path for key, path in damaged.items() if key in whole]
    return repair


def _remove_damaged(root: CacheRoot, listed: _Listed, path: Path, *, anyway: bool) -> None:
    """Remove a store under its claim and after another look: its maker may have put it right meanwhile."""
    with root.claimed(path):
        unit = (listed.part, listed.entry)
        if anyway or any(finding.path == path for finding in check_units([unit], root, Scope(read_data=True))):
            root.remove(path)


def _digests(manifest: Manifest) -> dict[StoreKey, str]:
    return {
        key: digest
        for part, entry in manifest.stores
        for key, digest in zip(part.keys(entry), (entry.tokens_digest, entry.actions_digest), strict=False)
    }
