"""Stage one as a whole: find what is missing under the recipe, encode just that, list everything in a manifest.

Read on in this order: `units` finds recordings and digests them; `groups` puts them under recipes; `task` claims and fills what is missing,
by `pipeline`, which overlaps `decoding` (of the frames that `steps` chooses), the encoder and the writing; `actions` sums up actions and
states; `workers` does the same on several processes. `verification` encodes again what is doubted or damaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jepa_cache.config.schema import Config
from jepa_cache.config.terminal import printable
from jepa_cache.encoding.groups import EncodingGroup, check_controls, group_units_by_recipe, open_encoder
from jepa_cache.encoding.pipeline import HERE, ProgressBar, Timing
from jepa_cache.encoding.task import (
    Unreadable,
    compare_recordings,
    ensure_actions,
    fill_group,
    load_encoder,
    read_whole,
    resolve_device,
    wait_for_others,
)
from jepa_cache.encoding.workers import Workers, encode_on_workers
from jepa_cache.episode import Skipped
from jepa_cache.sources import Unit
from jepa_cache.store.layout import StoreFile
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart, replaced, write_manifest
from jepa_cache.store.root import CacheRoot

MAX_SHOWN = (
    10  # skipped recordings of one reason, and implausible values; the manifest and `jepa-cache inspect` list all
)


@dataclass(frozen=True)
class EncodeResult:
    """What stage one did.

    Attributes:
        manifest: The manifest.
        num_units: Units that have stores.
        num_encoded: Those of them that were encoded in this run.
        timing: Of these; None where there are none.
        notes: On recordings with the same content; empty where a manifest of just these was written before.
        implausible: Values that their units do not allow, by recording.
    """

    manifest: Manifest
    num_units: int
    num_encoded: int
    timing: Timing | None
    notes: tuple[str, ...] = ()
    implausible: tuple[str, ...] = ()


class _GroupReport(NamedTuple):
    """A group as the manifest lists it, what its skipped recordings are called now, and implausible values."""

    part: ManifestPart
    names: dict[str, str]
    implausible: list[str]


def encode_dataset(
    config: Config,
    inputs: Sequence[str],
    *,
    base: Path,
    root: CacheRoot,
    workers: Workers | None = None,
    output: Path | None = None,
) -> EncodeResult:
    """Bring the cache up to date with the recordings and write the manifest, into the root and to `output`.

    Idempotent: a unit whose store is whole under the recipe is not read again, whoever made it. A store with files missing or cut short is
    encoded again, by name. Several encoders may work on one root: each unit is encoded by one of them, and what a dead one left is taken
    over. Meanwhile `gc` removes nothing, and after a kill it keeps for some days what this encode had made. Until it has ended well, a manifest that was
    at `output` before counts as out of date.

    Args:
        config: Resolved settings.
        inputs: Folders, files, globs, brace ranges; replace the data set preset's list when not empty.
        base: Folder that relative paths are meant from.
        root: Cache root.
        workers: Processes that encode, one unit each at a time; None encodes in this one.
        output: Where stage two looks for the manifest; None writes it into the root alone.

    Raises:
        ValueError: No input, weights that cannot be had, an overflow, too large a share of unusable recordings, different recordings under
            one key, or a clean-up of the root that is running.
    """
    with replaced(output) if output else nullcontext(), root.shared_lock():
        result = bring_up_to_date(config, inputs, base, root, workers)
        listed = root.manifest(result.manifest.digest)
        write_manifest(result.manifest, [listed, *([output] if output else [])])
        root.publish(listed)
    return result


def bring_up_to_date(
    config: Config, inputs: Sequence[str], base: Path, root: CacheRoot, workers: Workers | None = None
) -> EncodeResult:
    """What `encode_dataset` does under the lock of the root, which the caller holds; the manifest is written nowhere."""
    if kept := root.remove_stale_temporaries():
        print(
            f"note: {len(kept)} temporaries of another user's encoder, which died, may not be removed: {kept[0]}, ..."
        )
    encoder = open_encoder(config, base)
    groups = group_units_by_recipe(config, encoder, inputs, base)
    stores: dict[tuple[str, str], StoreFile] = {}  # of units by fingerprint and digest
    missing = []
    for group in groups:
        root.prefetch([group.tokens(root, unit) for unit in group.units])
        root.prefetch([group.actions(root, unit) for unit in group.units])
        units = [unit for unit in group.units if not _look_at(stores, root, group, unit)]
        if units:
            missing.append(group.of_units(units))
    if missing:
        for group in missing:
            check_controls(group)
        if not encoder.preset.trained:
            print(
                f"encoder {encoder.preset.name!r} has seeded random weights: its features are for trying things out, not for results"
            )
    if workers is None:
        timing, num_encoded, unreadable = encode_here(missing, root)
    else:
        timing, num_encoded, unreadable = encode_on_workers(missing, root, workers)
    for group in missing:
        for unit in group.units:
            if not _look_at(stores, root, group, unit) and (group.fingerprint, unit.digest) not in unreadable:
                raise ValueError(
                    f"{group.tokens(root, unit)} was removed while others were encoded; run the same command again"
                )
    reports = [_describe_group(group, root, stores, unreadable) for group in groups]
    manifest = Manifest(
        dataset=config.dataset.name,
        num_tokens=config.encode.num_tokens_of(encoder.preset),
        width=encoder.preset.embed_dim,
        grid=config.encode.grid_of(encoder.preset),
        mode=config.encode.mode,
        encoder=encoder.preset.name,
        encoder_trained=encoder.preset.trained,
        comparable=config.encode.mode != "clip",
        action_space=config.encode.action_space,
        parts=tuple(report.part for report in reports),
    )
    names = {key: name for report in reports for key, name in report.names.items()}
    _check_skipped(manifest, config.encode.max_skipped_share, names)
    notes = []
    if not root.fetch(root.manifest(manifest.digest)):  # else they were compared when that was written
        for group in groups:
            units = [unit for unit in group.units if (group.fingerprint, unit.digest) not in unreadable]
            notes += compare_recordings(root, group.of_units(units))
    implausible = [text for report in reports for text in report.implausible]
    return EncodeResult(
        manifest,
        sum(len(group.units) for group in groups) - len(unreadable),
        num_encoded,
        timing if num_encoded else None,
        notes=tuple(dict.fromkeys(notes)),
        implausible=tuple(dict.fromkeys(implausible)),  # each camera and phase finds the same
    )


def _look_at(stores: dict[tuple[str, str], StoreFile], root: CacheRoot, group: EncodingGroup, unit: Unit) -> bool:
    """Put what the token store of a unit says into `stores`; whether it is whole."""
    found = read_whole(root, group.tokens(root, unit))
    if found is None:
        return False
    # Each store is read once. Without recipe and file list ten thousand of them take megabytes.
    metadata = {key: value for key, value in found.metadata.items() if key != "recipe"}
    stores[group.fingerprint, unit.digest] = found._replace(metadata=metadata, files={}, crc32c={})
    return True


def encode_here(groups: Sequence[EncodingGroup], root: CacheRoot) -> tuple[Timing, int, Unreadable]:
    """Encode in this process; what other encoders hold comes last, when they have finished it or died."""
    timing, num_encoded, encoder = Timing(), 0, None
    unreadable: Unreadable = {}
    for group in groups:
        device = resolve_device(group.encode.device)
        encoder = encoder or load_encoder(group.encoder, group.encode, device=device, num_threads=group.num_threads)
        with ProgressBar(group.view, group.num_bytes) as bar:
            while group.units:
                filled = fill_group(group, encoder, root, bar.show)
                timing += filled.timing
                num_encoded += filled.num_encoded
                unreadable |= {(group.fingerprint, digest): reason for digest, reason in filled.unreadable.items()}
                rest = group.of_units(filled.busy)
                bar.end(HERE, filled.timing.num_frames, group.num_bytes - rest.num_bytes)
                group = rest
                if filled.busy:
                    stores = [(unit.name, group.tokens(root, unit)) for unit in group.units]
                    wait_for_others(root, stores, bar.wait)
    return timing, num_encoded, unreadable


def _describe_group(
    group: EncodingGroup, root: CacheRoot, stores: Mapping[tuple[str, str], StoreFile], unreadable: Unreadable
) -> _GroupReport:
    """Sum up actions where they are missing, and say what the manifest lists of a group."""
    name_skipped = getattr(group.source, "name_skipped", lambda unit, key: key)
    entries, skipped, notes, lost = [], [], list(group.notes), list(group.unreadable)
    names: dict[str, str] = {}
    implausible: list[str] = []
    without_episode: dict[str, list[dict[str, str]]] = {}
    for unit in group.units:
        if (reason := unreadable.get((group.fingerprint, unit.digest))) is not None:
            lost.append(Skipped(unit.name, reason))
            continue
        tokens = stores[group.fingerprint, unit.digest]
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
        implausible += tokens.provenance.get("implausible", ())  # not in stores of earlier releases
        # The manifest keeps the name of the store: a folder that is renamed makes no other training set.
        names |= {recording["key"]: name_skipped(unit, recording["key"]) for recording in tokens.metadata["skipped"]}
        if tokens.metadata["num_episodes"] == 0:
            without_episode[unit.digest] = tokens.metadata["skipped"]
    # A page of an error under twenty names is twenty losses.
    for unit in group.copies:
        lost += [Skipped(unit.name, recording["reason"]) for recording in without_episode.get(unit.digest, ())]
    skipped += [recording._asdict() for recording in sorted(lost)]
    part = ManifestPart(
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
    return _GroupReport(part, names, implausible)


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


def describe_result(result: EncodeResult, root: CacheRoot) -> str:
    """What was made, how long it took, what limited it, and where it lies."""
    manifest, timing = result.manifest, result.timing
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    lines = [f"note: {note}" for note in (*manifest.notes, *result.notes)]
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
