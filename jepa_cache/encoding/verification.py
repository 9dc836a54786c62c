"""Stores against their recordings: random steps are encoded again and compared, damaged stores are removed and made again."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.encoder import KINDS
from jepa_cache.encoding.groups import EncodingGroup, Inventory, group_units_by_recipe, open_encoder
from jepa_cache.encoding.run import bring_up_to_date
from jepa_cache.encoding.steps import plan_episode
from jepa_cache.encoding.task import describe_machine, ensure_controls, load_encoder, resolve_device
from jepa_cache.encoding.units import is_unread
from jepa_cache.episode import Episode
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit
from jepa_cache.store import layout
from jepa_cache.store.check import Finding, Scope, check_units, forget_stale, note_stale
from jepa_cache.store.layout import REMEDY, read_store_file
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
        batch_difference: Largest absolute difference between this batch shape and a batch of one, before storing.
    """

    unit: str
    episode: str
    step: int
    equal: bool
    difference: float
    relative_error: float
    batch_difference: float


@dataclass
class Comparison:
    """All steps that were encoded again, and what is another machine or library now than when the stores were made."""

    seed: int
    steps: list[StepResult] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

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
            "batch_shape_difference": max((step.batch_difference for step in self.steps), default=0.0),
            "changes_since": self.changes,
            "seed": self.seed,
            "steps": [step._asdict() for step in self.steps],
        }


class _Chosen(NamedTuple):
    """Steps of one store, and the recording that they are encoded from."""

    group: EncodingGroup
    unit: Unit
    store: Path
    steps: list[int]


def compare_online(
    manifest: Manifest,
    config: Config,
    inventory: Inventory,
    root: CacheRoot,
    *,
    base: Path,
    num_steps: int,
    seed: int,
    damaged: Collection[StoreKey | None] = (),
) -> Comparison:
    """Encode random steps of a manifest again, each in the batch that it was in, and compare.

    Stores that hold something else are remembered by `store.check.note_stale`, so that they can be made again.

    Args:
        manifest: Whose stores.
        config: Settings under which they were made.
        inventory: Present groups and recordings.
        root: Cache root.
        base: Folder that relative weights are meant from.
        num_steps: How many.
        seed: Of the choice.
        damaged: Stores of which none is chosen.

    Raises:
        ValueError: The present settings make another recipe, or the recordings are not found.
    """
    chosen = _choose(manifest, inventory, root, num_steps, seed, damaged)
    opened, num_threads = inventory.groups[0].encoder, default_num_threads()
    if opened.preset.weights is not None:
        weights = KINDS[opened.preset.kind].find(opened.preset.weights, base=base)
        opened = opened._replace(weights=weights)
    encoder = load_encoder(opened, config.encode, device=resolve_device(config.encode.device), num_threads=num_threads)
    comparison, changes = Comparison(seed), {}
    for item in chosen:
        with root.pulled([item.store]):
            made = read_store_file(item.store).provenance
            batch_size = int(made["batch_size"])
            now = describe_machine(encoder, batch_size, num_threads)
            changes |= dict.fromkeys(recipe_changes(_common(made, now), _common(now, made)))
            of_store = Comparison(seed, list(_compare_store(item, config, encoder, batch_size)))
        comparison.steps += of_store.steps
        if wrong := of_store.wrong:
            note_stale(
                root,
                item.store,
                f"{item.store} is of another recording or of other weights than its name says: step {wrong[0].step} is not what "
                f"the encoder gives (relative error {wrong[0].relative_error:.2g}); {REMEDY}",
            )
    comparison.changes = list(changes)
    return comparison


def _choose(
    manifest: Manifest,
    inventory: Inventory,
    root: CacheRoot,
    num_steps: int,
    seed: int,
    damaged: Collection[StoreKey | None],
) -> list[_Chosen]:
    groups = {group.fingerprint: group for group in inventory.groups}
    found: list[tuple[_Chosen, int]] = []
    for listed in manifest.parts:
        group = groups.get(listed.fingerprint)
        if group is None:
            nearest = min((recipe_changes(listed.recipe, group.recipe) for group in inventory.groups), key=len)
            raise ValueError(
                f"the manifest lists stores of recipe {listed.fingerprint}, which the present settings do not make "
                f"({'; '.join(nearest)}). Give the settings that they were made with"
            )
        units = {unit.digest: unit for unit in group.units if not is_unread(unit)}
        found += [
            (_Chosen(group, units[entry.unit_digest], root.store(listed.keys(entry)[0]), []), entry.num_steps)
            for entry in listed.entries
            if entry.unit_digest in units
        ]
    if not found:
        raise ValueError(
            "none of the recordings in the manifest is among the inputs (or none was read yet: run `python stages/encode.py`)"
        )
    bad = {root.store(key) for key in damaged if key is not None}
    found = [(item, count) for item, count in found if item.store not in bad]
    ends = list(itertools.accumulate((count for _, count in found), initial=0))
    for pick in sorted(random.Random(seed).sample(range(ends[-1]), min(num_steps, ends[-1]))):
        number = bisect.bisect_right(ends, pick) - 1
        found[number][0].steps.append(pick - ends[number])
    return [item for item, _ in found if item.steps]


def _compare_store(item: _Chosen, config: Config, encoder: FrozenEncoder, batch_size: int) -> Iterator[StepResult]:
    first: dict[str, int] = {}
    wanted: dict[str, list[int]] = {}
    for row in read_table(item.store, layout.SEGMENTS_FILE).to_pylist():
        start = first.setdefault(row["episode"], row["start"])
        steps = [step - start for step in item.steps if row["start"] <= step < row["stop"]]
        wanted.setdefault(row["episode"], []).extend(steps)
    wanted = {key: steps for key, steps in wanted.items() if steps}
    for episode in item.group.source.iter_episodes(item.unit):
        if isinstance(episode, Episode) and (steps := wanted.pop(episode.key, None)):
            for step, together, difference in _encode_steps(
                episode, steps, item.group.phase, config, encoder, batch_size
            ):
                row = first[episode.key] + step
                stored = _compare_step(item.store, row, together, config.encode.dtype)
                yield StepResult(item.unit.name, episode.key, row, *stored, difference)
    if wanted:
        raise ValueError(f"{item.unit.path} does not hold the episode {next(iter(wanted))!r} that its store lists")


def _encode_steps(
    episode: Episode, steps: Sequence[int], phase: int, config: Config, encoder: FrozenEncoder, batch_size: int
) -> Iterator[tuple[int, Tensor, float]]:
    """Encode steps of an episode, counted from its first, in the batches that stage one cuts.

    Yields:
        Each step, its tokens [N, D], and their largest difference from those of a batch of one.
    """
    settings, num_frames = config.encode, len(episode.frame_ticks)
    plan = plan_episode(
        num_frames,
        episode.fps,
        settings,
        tubelet_size=encoder.preset.tubelet_size,
        phase=phase,
        times_s=episode.frame_times_s,
    )
    per_input = len(plan.anchors) // len(plan.inputs)
    batches: dict[int, list[int]] = {}
    for step in sorted(steps):
        batches.setdefault(step // per_input // batch_size, []).append(step)
    video = open_video(episode.video, settings.decoder, first_frame=episode.first_frame, num_frames=num_frames)
    try:
        for batch, members in batches.items():
            inputs = plan.inputs[batch * batch_size : (batch + 1) * batch_size]
            pixels = encoder.preprocess(video.read(inputs.reshape(-1)))
            pixels = pixels.reshape(*inputs.shape, *pixels.shape[1:])
            together = encoder.encode(pixels).flatten(0, 1)
            for step in members:
                row = step - batch * batch_size * per_input
                number, inner = divmod(row, per_input)
                alone = encoder.encode(pixels[number : number + 1]).flatten(0, 1)[inner]
                yield step, together[row], float((together[row] - alone).abs().max())
    finally:
        video.close()


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

    Args:
        manifest: Whose stores.
        findings: Of `store.check`.
        config: Settings; they must make the manifest's recipes.
        inputs: Where the recordings lie; replace the presets' lists when not empty.
        base: Folder that relative paths are meant from.
        root: Cache root, of which the caller holds the shared lock.

    Raises:
        ValueError: The settings make another recipe, or recordings or weights cannot be had.
    """
    repair = Repair()
    damaged = {finding.key: finding.path for finding in findings if finding.key is not None}
    if any(finding.key is None for finding in findings):
        path = root.manifest(manifest.digest)
        write_manifest(manifest, [path])
        root.publish(path)
        repair.repaired.append(path)
    affected = [(part, entry) for part, entry in manifest.stores if damaged.keys() & set(part.keys(entry))]
    if not affected:
        return repair
    groups = _group_recordings(config, inputs, base, {part.fingerprint: part for part, _ in affected})
    at_hand = {
        (fingerprint, unit.digest): (group, unit) for fingerprint, group in groups.items() for unit in group.units
    }
    found = [(part, entry) for part, entry in affected if (part.fingerprint, entry.unit_digest) in at_hand]
    repair.lost = sorted({entry.unit_digest for _, entry in affected} - {entry.unit_digest for _, entry in found})
    for part, entry in found:
        for key in [key for key in damaged if key in part.keys(entry)]:
            _remove_damaged(root, part, entry, damaged[key])
    made = _digests(bring_up_to_date(config, inputs, base, root).manifest)
    for part, entry in found:
        group, unit = at_hand[part.fingerprint, entry.unit_digest]
        ensure_controls(root, group, unit)  # which stage one does not miss where the actions are there
    listed = _digests(manifest)
    differing = {key for key in damaged if made.get(key, listed.get(key)) != listed.get(key)}
    repair.differing = [f"{damaged[key]} has digest {made[key]}, the manifest lists {listed[key]}" for key in differing]
    left = [finding for finding in check_units(found, root, Scope()) if finding.key not in differing]
    repair.left = [finding.problem for finding in left]
    whole = {key for part, entry in found for key in part.keys(entry)} - differing - {finding.key for finding in left}
    repair.repaired += [path for key, path in damaged.items() if key in whole]
    return repair


def _group_recordings(
    config: Config, inputs: Sequence[str], base: Path, listed: dict[str, ManifestPart]
) -> dict[str, EncodingGroup]:
    """The present recordings, by the token fingerprint under which the present settings store them.

    Raises:
        ValueError: The settings do not make the listed stores.
    """
    found = group_units_by_recipe(config, open_encoder(config, base), inputs, base)
    groups = {group.fingerprint: group for group in found}
    for fingerprint, part in listed.items():
        group = groups.get(fingerprint)
        if group is None or (group.action_fingerprint, group.source_fingerprint) != (
            part.action_fingerprint,
            part.source_fingerprint,
        ):
            then = {"tokens": part.recipe, "actions": part.action_recipe}
            now = [{"tokens": group.recipe, "actions": group.action_recipe} for group in groups.values()]
            changes = min((recipe_changes(then, recipes) for recipes in now), key=len, default=[])
            raise ValueError(
                f"the present settings do not make the stores of the manifest ({'; '.join(changes) or 'no recording fits'}). "
                "Nothing was removed; give the settings and recordings that they were made with, as key=value and paths"
            )
    return groups


def _remove_damaged(root: CacheRoot, part: ManifestPart, entry: ManifestEntry, path: Path) -> None:
    """Remove a store under its claim and after another look: its maker may have put it right meanwhile."""
    with root.claimed(path):
        if any(finding.path == path for finding in check_units([(part, entry)], root, Scope(read_data=True))):
            root.remove(path)
            forget_stale(root, path)


def _digests(manifest: Manifest) -> dict[StoreKey, str]:
    return {
        key: digest
        for part, entry in manifest.stores
        for key, digest in zip(part.keys(entry), (entry.tokens_digest, entry.actions_digest), strict=False)
    }
