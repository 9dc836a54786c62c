"""Stored tokens against the encoder itself: random steps are encoded again from their recordings."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from jepa_cache.store.audit import note_stale
from jepa_cache.store.damage import WAY_OUT
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.quantisation import Channels, decode, encode, get_scheme
from jepa_cache.store.reader import ArrayReader, read_table
from jepa_cache.store.recipe import recipe_changes
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.verify import read_store_file

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


@dataclass(frozen=True)
class Comparison:
    """All steps that were encoded again, and what is another machine or library now than when the stores were made."""

    steps: list[StepResult]
    changes: list[str]
    seed: int

    @property
    def wrong(self) -> list[StepResult]:
        """Steps that no rounding explains."""
        return [step for step in self.steps if not step.relative_error <= MAX_RELATIVE_ERROR]


class _Chosen(NamedTuple):
    part: Part
    unit: Unit
    store: Path
    steps: list[int]


def compare_online(
    manifest: Manifest, config: Config, inventory: Inventory, root: CacheRoot, *, base: Path, num_steps: int, seed: int
) -> Comparison:
    """Encode random steps of a manifest again, each in the batch that it was in, and compare.

    Stores that hold something else are remembered, so that `jepa-cache repair` makes them again.

    Args:
        manifest: Whose stores.
        config: Settings under which they were made.
        inventory: Present parts and recordings.
        root: Cache root.
        base: Folder that relative weights are meant from.
        num_steps: How many.
        seed: Of the choice.

    Raises:
        ValueError: The present settings make another recipe, the recordings are not found, or a store is damaged.
    """
    chosen = _choose(manifest, inventory, root, num_steps, seed)
    encode_config, preset = config.encode, inventory.encoder
    weights = resolve_weights(preset.weights, base=base, kind=preset.kind) if preset.weights is not None else None
    encoder = load_encoder(
        preset,
        weights,
        inventory.parts[0].recipe["encoder"]["weights"],
        encode_config,
        device=resolve_device(encode_config.device),
        num_threads=default_num_threads(),
    )
    results, changes = [], {}
    for item in chosen:
        with root.pulled([item.store]):
            made = read_store_file(item.store).provenance
            now = describe_machine(encoder, int(made["batch_size"]), default_num_threads())
            changes |= dict.fromkeys(recipe_changes(_common(made, now), _common(now, made)))
            of_unit = _compare_unit(item, config, encoder, int(made["batch_size"]))
        if wrong := Comparison(of_unit, [], seed).wrong:
            problem = (
                f"step {wrong[0].step} is not what the encoder gives (relative error {wrong[0].relative_error:.2g})"
            )
            note_stale(
                root,
                item.store,
                f"{item.store} is of another recording or of other weights than its name says: {problem}; {WAY_OUT}",
            )
        results += of_unit
    return Comparison(results, list(changes), seed)


def _choose(manifest: Manifest, inventory: Inventory, root: CacheRoot, num_steps: int, seed: int) -> list[_Chosen]:
    parts = {part.tokens: part for part in inventory.parts}
    for listed in manifest.parts:
        if listed.fingerprint not in parts:
            nearest = min((recipe_changes(listed.recipe, part.recipe) for part in inventory.parts), key=len)
            raise ValueError(
                f"the manifest lists stores of recipe {listed.fingerprint}, which the present settings do not make "
                f"({'; '.join(nearest)}). Give the settings that they were made with"
            )
    found, sizes = [], []
    for listed in manifest.parts:
        part = parts[listed.fingerprint]
        units = {digest: unit for unit, digest in part.units if not is_unread(digest)}
        for entry in listed.entries:
            if entry.unit_digest in units and entry.num_steps:
                store = root.tokens(part.tokens, entry.unit_digest)
                found.append(_Chosen(part, units[entry.unit_digest], store, []))
                sizes.append(entry.num_steps)
    if not found:
        raise ValueError(
            "none of the recordings in the manifest is among the inputs (or none was read yet: run `python stages/encode.py`)"
        )
    ends = np.cumsum(sizes)
    picks = random.Random(seed).sample(range(int(ends[-1])), min(num_steps, int(ends[-1])))
    for pick in sorted(picks):
        number = int(np.searchsorted(ends, pick, side="right"))
        found[number].steps.append(pick - int(ends[number] - sizes[number]))
    return [item for item in found if item.steps]


def _compare_unit(item: _Chosen, config: Config, encoder: FrozenEncoder, batch_size: int) -> list[StepResult]:
    segments = read_table(item.store, layout.SEGMENTS_FILE).to_pylist()
    first: dict[str, int] = {}
    wanted: dict[str, list[int]] = {}
    for row in segments:
        first.setdefault(row["episode"], row["start"])
        wanted.setdefault(row["episode"], []).extend(step for step in item.steps if row["start"] <= step < row["stop"])
    results = []
    for recording in item.part.source.iter_episodes(item.unit):
        if isinstance(recording, Episode) and wanted.get(recording.key):
            steps = [step - first[recording.key] for step in wanted.pop(recording.key)]
            results += _compare_episode(item, recording, first[recording.key], steps, config, encoder, batch_size)
    missing = [episode for episode, steps in wanted.items() if steps]
    if missing:
        raise ValueError(f"{item.unit.path} does not hold the episode {missing[0]!r} that its store lists")
    return results


def _compare_episode(
    item: _Chosen,
    episode: Episode,
    offset: int,
    steps: Sequence[int],
    config: Config,
    encoder: FrozenEncoder,
    batch_size: int,
) -> list[StepResult]:
    """Compare steps of one episode, counted from its first; the batches are cut as stage one cuts them."""
    settings = config.encode
    tubelet_size, phase = encoder.preset.tubelet_size, item.part.phase
    plan = plan_episode(
        len(episode.frame_ticks),
        episode.fps,
        settings,
        tubelet_size=tubelet_size,
        phase=phase,
        times_s=episode.frame_times_s,
    )
    per_input = len(plan.anchors) // len(plan.inputs)
    batches: dict[int, list[int]] = {}
    for step in sorted(steps):
        batches.setdefault(step // per_input // batch_size, []).append(step)
    results = []
    video = open_video(
        episode.video, settings.decoder, first_frame=episode.first_frame, num_frames=len(episode.frame_ticks)
    )
    try:
        for batch, members in batches.items():
            inputs = plan.inputs[batch * batch_size : (batch + 1) * batch_size]
            pixels = encoder.preprocess(video.read(inputs.reshape(-1)))
            pixels = pixels.reshape(*inputs.shape, *pixels.shape[1:])
            together = encoder.encode(pixels).flatten(0, 1)
            for step in members:
                row = step - batch * batch_size * per_input
                alone = encoder.encode(pixels[row // per_input : row // per_input + 1]).flatten(0, 1)[row % per_input]
                batch_difference = float((together[row] - alone).abs().max())
                stored = _compare_step(item.store, offset + step, together[row], settings.dtype)
                results.append(StepResult(item.unit.name, episode.key, offset + step, *stored, batch_difference))
    finally:
        video.close()
    return results


def _compare_step(store: Path, step: int, online: Tensor, dtype: str) -> tuple[bool, float, float]:
    """Whether the stored bits are those that come out now; the largest difference of the values, and the relative error."""
    from jepa_cache.encoder.frozen import to_stored

    stored, fresh = (_read_row(store, layout.TOKENS, step),), (to_stored(online[None], dtype)[0],)
    channels = None
    if get_scheme(dtype).max_code is not None:
        channels = Channels(*(_read_all(store, name) for name in (layout.CHANNEL_SCALES, layout.CHANNEL_MEANS)))
        stored = (*stored, _read_row(store, layout.TOKEN_SCALES, step))
        fresh = encode(fresh[0], dtype, channels)
    equal = all(np.array_equal(old, new) for old, new in zip(stored, fresh, strict=True))
    old, new = (
        decode(values[0], dtype, *values[1:], channels) if channels else decode(values[0], dtype)
        for values in (stored, fresh)
    )
    difference, size = _root_mean_square(old - new), _root_mean_square(new)
    return equal, float(np.abs(old - new).max()), difference / size if size else difference


def _common(mapping: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What both record: an older store may not say everything."""
    return {
        key: _common(value, other[key]) if isinstance(value, Mapping) else value
        for key, value in mapping.items()
        if key in other
    }


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def _read_row(store: Path, name: str, row: int) -> np.ndarray:
    with ArrayReader(store, name) as reader:
        out = np.empty((1, *reader.shape[1:]), reader.dtype)
        reader.read(row, out)
        return out[0]


def _read_all(store: Path, name: str) -> np.ndarray:
    with ArrayReader(store, name) as reader:
        out = np.empty(reader.shape, reader.dtype)
        reader.read(0, out)
        return out


def describe_comparison(comparison: Comparison) -> Mapping[str, object]:
    """The comparison as JSON."""
    steps = comparison.steps
    return {
        "num_steps": len(steps),
        "num_equal": sum(step.equal for step in steps),
        "bit_equal": all(step.equal for step in steps),
        "largest_difference": max((step.difference for step in steps), default=0.0),
        "largest_relative_error": max((step.relative_error for step in steps), default=0.0),
        "batch_shape_difference": max((step.batch_difference for step in steps), default=0.0),
        "changes_since": comparison.changes,
        "seed": comparison.seed,
        "steps": [step._asdict() for step in steps],
    }
