"""Stage one as a whole: find what is missing under the recipe, encode just that, list everything in a manifest.

Read on in this order: `units` finds recordings and digests them; `groups` puts them under recipes; `task` loads the
encoder and claims units; `pipeline` fills their stores: it overlaps `decoding` (of the frames that `steps` chooses),
the encoder and the writing; `actions` sums up actions and states; `workers` does the same on several processes.
`verification` encodes again what is doubted or damaged.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jepa_cache.config.paths import printable
from jepa_cache.config.schema import Config
from jepa_cache.encoding.actions import ensure_actions
from jepa_cache.encoding.groups import EncodingGroup, check_controls, group_units_by_recipe, open_encoder
from jepa_cache.encoding.pipeline import FillResult, Timing, fill_group
from jepa_cache.encoding.steps import describe_slower
from jepa_cache.encoding.task import load_encoder, read_whole, wait_for_others
from jepa_cache.encoding.units import name_skipped
from jepa_cache.encoding.workers import EncodeFailedError, connect, encode_on_workers
from jepa_cache.episode import Skipped
from jepa_cache.sources import Unit
from jepa_cache.store.check import Recording, find_equal, note_copies, recall_copies
from jepa_cache.store.controls import read_actions
from jepa_cache.store.layout import SEGMENTS_FILE, SLOWER, StoreFile
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, replaced, write_manifest
from jepa_cache.store.reader import read_table
from jepa_cache.store.root import CacheRoot

MAX_SHOWN = 10
"""Skipped recordings of one reason, copies, and implausible values; the manifest and `jepa-cache inspect` list all."""

Stores = dict[tuple[str, str], StoreFile]
"""What the token stores of units say, by fingerprint and digest."""


@dataclass(frozen=True)
class EncodeResult:
    """What stage one did."""

    manifest: Manifest
    num_units: int  # that have stores
    num_encoded: int  # of them in this run
    timing: Timing | None  # of these; None where there are none
    copies: str  # a sentence on recordings with the same content; empty where there are none
    slower: str  # a sentence on steps that come at another rate than asked; empty where there are none
    implausible: tuple[str, ...]  # values that their units do not allow, by recording


def encode_dataset(
    config: Config,
    inputs: Sequence[str],
    *,
    base: Path,
    root: CacheRoot,
    workers: int | str | None = None,
    output: Path | None = None,
) -> EncodeResult:
    """Bring the cache up to date with the recordings and write the manifest, into the root and to `output`.

    Idempotent: a unit whose store is whole under the recipe is not read again, whoever made it. A store with files
    missing or cut short is encoded again, by name. Several encoders may work on one root: each unit is encoded by one
    of them, and what a dead one left is taken over. Meanwhile `gc` removes nothing. Until it has ended well, a manifest
    that was at `output` before counts as out of date.

    `inputs` (folders, files, globs, brace ranges; relative ones start from `base`) replace the preset's list when not
    empty. `workers` are processes of this machine, or the address of a Dask scheduler; None encodes in this process.

    Raises:
        ValueError: No input, weights that cannot be had, an overflow, too large a share of unusable recordings,
            different recordings under one key, or a clean-up of the root that is running.
    """
    with replaced(output) if output else nullcontext(), root.shared_lock():
        result = bring_up_to_date(config, inputs, base, root, workers)
        listed = root.manifest(result.manifest.digest)
        write_manifest(result.manifest, [listed, *([output] if output else [])])
        root.publish(listed)
    return result


def bring_up_to_date(
    config: Config, inputs: Sequence[str], base: Path, root: CacheRoot, workers: int | str | None = None
) -> EncodeResult:
    """What `encode_dataset` does under the lock of the root, which the caller holds; writes no manifest."""
    if kept := root.remove_stale_temporaries():
        print(
            f"note: {len(kept)} temporaries of another user's encoder, which died, may not be removed: {kept[0]}, ..."
        )
    encoder = open_encoder(config, base)
    groups = group_units_by_recipe(config, encoder, inputs, base)
    stores: Stores = {}
    missing = []
    for group in groups:
        root.prefetch([path(root, unit) for path in (group.tokens, group.actions) for unit in group.units])
        if units := [unit for unit in group.units if _look_at(stores, root, group, unit) is None]:
            missing.append(group.of_units(units))
    for group in missing:
        check_controls(group)
    if missing and encoder.preset.random_seed is not None:
        print(
            f"encoder {encoder.preset.name!r} has seeded random weights: its features are for trying things out, not for results"
        )
    filled = encode_missing(missing, root, workers)
    names: dict[str, str] = {}
    manifest = Manifest(
        dataset=config.dataset.name,
        num_tokens=config.encode.num_tokens_of(encoder.preset),
        width=encoder.preset.embed_dim,
        grid=config.encode.grid_of(encoder.preset),
        mode=config.encode.mode,
        encoder=encoder.preset.name,
        encoder_trained=encoder.preset.trained,
        comparable=config.encode.mode != "clip",
        action_space=groups[0].space.name,
        parts=tuple(_list_group(group, root, stores, filled, names) for group in groups),
        encoder_origin=encoder.preset.origin,
    )
    _check_skipped(manifest, config.encode.max_skipped_share, names)
    implausible = [text for found in stores.values() for text in found.provenance.get("implausible", ())]
    slower = (tuple(pair) for found in stores.values() for pair in found.provenance.get(SLOWER, ()))
    return EncodeResult(
        manifest,
        num_units=len(stores),
        num_encoded=filled.num_encoded,
        timing=filled.timing if filled.num_encoded else None,
        copies=find_copies(manifest, root, groups),
        slower=describe_slower(slower, config.encode.fps),
        implausible=tuple(dict.fromkeys(implausible)),  # each camera and phase finds the same
    )


def _look_at(stores: Stores, root: CacheRoot, group: EncodingGroup, unit: Unit) -> StoreFile | None:
    """What the token store of a unit says, from `stores` or put there; None where it is not whole."""
    key = group.fingerprint, unit.digest
    if key not in stores and (found := read_whole(root, group.tokens(root, unit))) is not None:
        # Each store is read once. Without recipe and file list ten thousand of them take megabytes.
        metadata = {name: value for name, value in found.metadata.items() if name != "recipe"}
        stores[key] = found._replace(metadata=metadata, files={}, crc32c={})
    return stores.get(key)


def encode_missing(groups: Sequence[EncodingGroup], root: CacheRoot, workers: int | str | None) -> FillResult:
    """Encode units here or on workers; what other encoders hold comes last, when they have finished it or died.

    Raises:
        EncodeFailedError: Listing the units that workers could not encode, after all others have ended.
        ValueError: No scheduler or worker answers, or none offers what the groups need.
    """
    total, failures, encoder = FillResult(), [], None
    if not groups:
        return total
    encode, num_threads = groups[0].encode, groups[0].num_threads
    units = [unit for group in groups for unit in group.units]
    num_bytes = {unit.digest: unit.num_bytes for unit in units}
    total_bytes = sum(num_bytes[unit.digest] for unit in units)
    with (
        tqdm(total=total_bytes, desc="encoding", unit="B", unit_scale=True, dynamic_ncols=True) as bar,
        nullcontext() if workers is None else connect(workers, encode.device, num_threads) as connection,
    ):
        if connection is None:
            encoder = load_encoder(groups[0].encoder, encode, num_threads)
        begun = time.perf_counter()

        def show(num_bytes: int, timing: Timing) -> None:
            rate = (total.timing.num_frames + timing.num_frames) / (time.perf_counter() - begun)
            bar.set_postfix_str(f"{rate:.3g} frames/s, limit: {timing.limit}", refresh=False)
            bar.update(num_bytes)

        while groups:
            busy: list[EncodingGroup] = []
            if connection is None:
                results = ((group, fill_group(group, encoder, root, show)) for group in groups)
            else:
                results = encode_on_workers(groups, root, connection)
            for group, result in results:
                if isinstance(result, str):
                    failures.append(f"{group.units[0].path}: {result}")
                    continue
                total.add(result)
                if result.busy:
                    busy.append(group.of_units(result.busy))
                elif connection is not None:
                    bar.update(num_bytes[group.units[0].digest])
            groups = busy
            if groups:
                wait_for_others(
                    root, groups, lambda unit: bar.set_postfix_str(f"waiting for another encoder: unit {unit}")
                )
                bar.set_postfix_str("")
        total.timing.elapsed_s = time.perf_counter() - begun
    if failures:
        raise EncodeFailedError(
            f"{len(failures)} of {len(units)} units could not be encoded; the others are in the cache, and the same command "
            "tries only these again:" + "".join(f"\n  {failure}" for failure in sorted(failures))
        )
    return total


def _list_group(
    group: EncodingGroup, root: CacheRoot, stores: Stores, filled: FillResult, names: dict[str, str]
) -> ManifestPart:
    """What the manifest lists of a group; sums up missing actions. `names` gets present names of the skipped."""
    entries, skipped, notes, lost = [], [], list(group.notes), list(group.unreadable)
    without_episode: dict[str, list[dict[str, str]]] = {}
    for unit in group.units:
        if (reason := filled.unreadable.get((group.fingerprint, unit.digest))) is not None:
            lost.append(Skipped(unit.name, reason))
            continue
        if (tokens := _look_at(stores, root, group, unit)) is None:
            store = group.tokens(root, unit)
            raise ValueError(f"{store} was removed while others were encoded; run the same command again")
        aggregated = ensure_actions(root, group, unit, tokens)
        excluded = aggregated.metadata["excluded"]
        measured = tokens.metadata.get("reconstruction") or {"max_abs": None, "relative_rmse": None}
        entries.append(
            ManifestEntry(
                unit_digest=unit.digest,
                tokens_digest=tokens.digest,
                actions_digest=aggregated.digest,
                num_steps=tokens.metadata["num_steps"],
                num_segments=tokens.metadata["num_segments"],
                num_episodes=tokens.metadata["num_episodes"] - len(excluded),
                reconstruction_rmse=measured["relative_rmse"],
                reconstruction_max_abs=measured["max_abs"],
            )
        )
        skipped += tokens.metadata["skipped"] + [{"key": key, "reason": reason} for key, reason in excluded.items()]
        notes += tokens.metadata["notes"]
        # The manifest keeps the name of the store: a folder that is renamed makes no other training set.
        keys = [recording["key"] for recording in tokens.metadata["skipped"]]
        names |= {key: name_skipped(group.source, unit, key) for key in keys}
        if tokens.metadata["num_episodes"] == 0:
            without_episode[unit.digest] = tokens.metadata["skipped"]
    # A page of an error under twenty names is twenty losses.
    for unit in group.copies:
        lost += [Skipped(unit.name, recording["reason"]) for recording in without_episode.get(unit.digest, ())]
    skipped += [recording._asdict() for recording in sorted(lost)]
    return ManifestPart(
        dataset=group.preset.name,
        weight=group.weight,
        camera=group.camera,
        phase=group.phase,
        fingerprint=group.fingerprint,
        recipe=group.recipe,
        action_fingerprint=group.action_fingerprint,
        action_recipe=group.action_recipe,
        source_fingerprint=group.source_fingerprint,
        skipped=tuple(skipped),
        notes=tuple(notes),
        entries=tuple(entries),
    )


def _check_skipped(manifest: Manifest, max_share: float, names: Mapping[str, str]) -> None:
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    num_skipped = len(manifest.skipped)
    by_reason: dict[str, list[str]] = {}
    for recording in manifest.skipped:
        key = recording["key"]
        by_reason.setdefault(recording["reason"], []).append(names.get(key, key))
    for reason, keys in by_reason.items():
        more = f" and {len(keys) - MAX_SHOWN} more" if len(keys) > MAX_SHOWN else ""
        print(printable(f"skipped: {', '.join(keys[:MAX_SHOWN])}{more}: {reason}"))
    if num_episodes == 0:
        first = manifest.skipped[0]["reason"] if manifest.skipped else "the units hold none"
        raise ValueError(
            f"no usable recording: all {num_skipped} were skipped (reasons above; first: {first}). Mend them, "
            "or where the reason is a setting such as encode.action_space or encode.fps, change it; what was encoded is kept"
        )
    share = num_skipped / (num_episodes + num_skipped)
    if share > max_share:
        raise ValueError(
            f"{num_skipped} of {num_episodes + num_skipped} recordings were skipped ({share:.0%}), more than "
            f"encode.max_skipped_share={max_share:g} allows (reasons above). Mend or remove them, or raise the share; "
            "what was encoded is kept"
        )


def find_copies(manifest: Manifest, root: CacheRoot, groups: Sequence[EncodingGroup]) -> str:
    """A sentence that names the recordings of a manifest that are equal; empty where there are none.

    Raises:
        ValueError: Units hold different recordings under one key, which everything later would take for one episode.

    Cost: the first time the tables and actions of every store, see `store.check`; the state folder remembers the
    sentence.
    """
    if (told := recall_copies(manifest)) is not None:
        return told
    names, stores = {unit.digest: unit.name for group in groups for unit in group.units}, manifest.stores
    by_key: dict[tuple[str, str], list[Recording]] = {}
    for number, (part, entry) in enumerate(stores):
        runs: dict[str, list[tuple[int, int]]] = {}
        for row in read_table(root.tokens(part.fingerprint, entry.unit_digest), SEGMENTS_FILE).to_pylist():
            runs.setdefault(row["episode"], []).append((row["start"], row["stop"]))
        for key, of_key in runs.items():
            by_key.setdefault((part.fingerprint, key), []).append(Recording(number, key, tuple(of_key)))

    @functools.lru_cache(maxsize=1)
    def read_rows(number: int) -> tuple[np.ndarray, np.ndarray]:
        part, entry = stores[number]
        return read_actions(root.actions(part.action_fingerprint, entry.unit_digest))

    def describe(groups: Sequence[Sequence[Recording]], joint: str) -> str:
        shown = [
            joint.join(f"{it.key} in {names[stores[it.store][1].unit_digest]}" for it in group[:MAX_SHOWN])
            + (" ..." if len(group) > MAX_SHOWN else "")
            for group in groups[:MAX_SHOWN]
        ]
        more = [f"and {len(groups) - MAX_SHOWN} more"] if len(groups) > MAX_SHOWN else []
        return "; ".join(shown + more)

    recordings = sorted(itertools.chain(*by_key.values()), key=lambda it: it.store)  # so that each is read once
    equal = find_equal(manifest, root, recordings, read_rows)
    number_of = {recording: number for number, same in enumerate(equal) for recording in same}
    if clashes := [same for same in by_key.values() if len({number_of.get(it, it) for it in same}) > 1]:
        raise ValueError(
            f"keys that name different recordings in several units: {len(clashes)} ({describe(clashes, ' and ')}). They would "
            "count as one episode. Rename one of each (a folder of its own in the tar is enough) or remove its unit; what was encoded is kept"
        )
    num_copies = sum(len(same) - 1 for same in equal)
    told = f"recordings that repeat another one: {num_copies} ({describe(equal, ' = ')})" if equal else ""
    note_copies(manifest, told)
    return told


def join_alike(notes: Sequence[str]) -> list[str]:
    """Of notes `recording: text` that say the same of several recordings, the first, and of how many more it holds."""
    alike: dict[str, list[str]] = {}
    for note in filter(None, notes):
        alike.setdefault(note.partition(": ")[2] or note, []).append(note)
    return [same[0] + (f" (and so of {len(same) - 1} more)" if len(same) > 1 else "") for same in alike.values()]


def describe_result(result: EncodeResult, root: CacheRoot) -> str:
    """What was made, how long it took, what limited it, and where it lies."""
    manifest, timing = result.manifest, result.timing
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    lines = [f"note: {note}" for note in join_alike([*manifest.notes, result.copies, result.slower])]
    lines += [f"implausible: {text}" for text in result.implausible[:MAX_SHOWN]]
    if len(result.implausible) > MAX_SHOWN:
        lines.append(f"implausible: and {len(result.implausible) - MAX_SHOWN} more, see `jepa-cache inspect`")
    if timing is None:
        lines.append(
            f"nothing to encode: all {result.num_units} units are in the cache under recipe {manifest.fingerprint}"
        )
    else:
        lines.append(
            f"encoded {result.num_encoded} of {result.num_units} units: {timing.num_episodes} episodes, "
            f"{timing.num_frames} frames, {timing.num_bytes / 1e6:.1f} MB of tokens in {timing.elapsed_s:.1f} s "
            f"({timing.num_frames / max(timing.elapsed_s, 1e-9):.0f} frames/s)"
        )
        lines.append(
            f"limit: {timing.limit} (waited {timing.decode_s:.1f} s for decoding, spent {timing.encode_s:.1f} s in the "
            f"encoder, waited {timing.write_s:.1f} s for the disk)"
        )
    lines.append(
        f"cache: {num_episodes} episodes, {manifest.num_steps} steps of {manifest.num_tokens} x {manifest.width} tokens, "
        f"{len(manifest.skipped)} skipped, in {root.name}"
    )
    if not manifest.comparable:
        lines.append(
            "clip mode: early steps have seen later frames, so scores are not comparable with frame or tubelet mode"
        )
    return "\n".join(lines)
