"""Stored tokens against the encoder itself: random steps are encoded again from their recordings."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.encoder.weights import resolve_weights
from jepa_cache.encoding.filling import describe_machine, load_encoder, resolve_device
from jepa_cache.encoding.inventory import Inventory, is_unread
from jepa_cache.encoding.modes import plan_episode
from jepa_cache.encoding.parts import Part
from jepa_cache.episode import Episode
from jepa_cache.media.video import open_video
from jepa_cache.sources import Unit
from jepa_cache.store import layout
from jepa_cache.store.check import note_stale
from jepa_cache.store.layout import REMEDY, read_store_file
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.quantisation import Channels, decode, encode, get_scheme
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

    part: Part
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
        inventory: Present parts and recordings.
        root: Cache root.
        base: Folder that relative weights are meant from.
        num_steps: How many.
        seed: Of the choice.
        damaged: Stores of which none is chosen.

    Raises:
        ValueError: The present settings make another recipe, or the recordings are not found.
    """
    chosen = _choose(manifest, inventory, root, num_steps, seed, damaged)
    preset = inventory.encoder
    weights = resolve_weights(preset.weights, base=base, kind=preset.kind) if preset.weights is not None else None
    encoder = load_encoder(
        preset,
        weights,
        inventory.parts[0].recipe["encoder"]["weights"],
        config.encode,
        device=resolve_device(config.encode.device),
        num_threads=default_num_threads(),
    )
    comparison, changes = Comparison(seed), {}
    for item in chosen:
        with root.pulled([item.store]):
            made = read_store_file(item.store).provenance
            batch_size = int(made["batch_size"])
            now = describe_machine(encoder, batch_size, default_num_threads())
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
    parts = {part.tokens: part for part in inventory.parts}
    found: list[tuple[_Chosen, int]] = []
    for listed in manifest.parts:
        part = parts.get(listed.fingerprint)
        if part is None:
            nearest = min((recipe_changes(listed.recipe, part.recipe) for part in inventory.parts), key=len)
            raise ValueError(
                f"the manifest lists stores of recipe {listed.fingerprint}, which the present settings do not make "
                f"({'; '.join(nearest)}). Give the settings that they were made with"
            )
        units = {digest: unit for unit, digest in part.units if not is_unread(digest)}
        found += [
            (_Chosen(part, units[entry.unit_digest], root.store(listed.keys(entry)[0]), []), entry.num_steps)
            for entry in listed.entries
            if entry.unit_digest in units
        ]
    if not found:
        raise ValueError(
            "none of the recordings in the manifest is among the inputs (or none was read yet: run `python stages/encode.py`)"
        )
    steps = [(item, step) for item, count in found for step in range(count)]
    bad = {root.store(key) for key in damaged if key is not None}
    steps = [(item, step) for item, step in steps if item.store not in bad]
    for number in sorted(random.Random(seed).sample(range(len(steps)), min(num_steps, len(steps)))):
        steps[number][0].steps.append(steps[number][1])
    return [item for item, _ in found if item.steps]


def _compare_store(item: _Chosen, config: Config, encoder: FrozenEncoder, batch_size: int) -> Iterator[StepResult]:
    first: dict[str, int] = {}
    wanted: dict[str, list[int]] = {}
    for row in read_table(item.store, layout.SEGMENTS_FILE).to_pylist():
        start = first.setdefault(row["episode"], row["start"])
        steps = [step - start for step in item.steps if row["start"] <= step < row["stop"]]
        wanted.setdefault(row["episode"], []).extend(steps)
    wanted = {key: steps for key, steps in wanted.items() if steps}
    for episode in item.part.source.iter_episodes(item.unit):
        if isinstance(episode, Episode) and (steps := wanted.pop(episode.key, None)):
            for step, together, difference in _encode_steps(
                episode, steps, item.part.phase, config, encoder, batch_size
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

    fresh: tuple[np.ndarray, ...] = (to_stored(online[None], dtype)[0],)
    stored, channels = (_read(store, layout.TOKENS, step)[0],), None
    if get_scheme(dtype).max_code is not None:
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
