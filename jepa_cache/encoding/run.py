"""Stage one as a whole: find what is missing under the recipe, encode just that, list everything in a manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jepa_cache.actions import get_action_space
from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.config.terminal import printable
from jepa_cache.encoding.claims import is_whole, wait_for_others
from jepa_cache.encoding.distribution import encode_on_workers
from jepa_cache.encoding.filling import EncodeTask, Unreadable, ensure_actions, fill_part, load_encoder, resolve_device
from jepa_cache.encoding.keys import compare_recordings
from jepa_cache.encoding.parts import Part, check_controls, open_encoder, plan_parts
from jepa_cache.encoding.pipeline import Timing
from jepa_cache.encoding.progress import HERE, ProgressBar
from jepa_cache.encoding.workers import Workers
from jepa_cache.episode import Skipped
from jepa_cache.store.layout import check_identity, read_store_file
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.root import CacheRoot

MAX_SHOWN = 10  # skipped recordings of one reason; the manifest lists all


@dataclass(frozen=True)
class EncodeResult:
    """What stage one did.

    Attributes:
        manifest: The manifest.
        num_units: Units whose stores are there now.
        num_encoded: Those of them that were encoded in this run.
        timing: Of these; None where there are none.
        notes: On recordings with the same content; empty where a manifest of just these was written before.
    """

    manifest: Manifest
    num_units: int
    num_encoded: int
    timing: Timing | None
    notes: tuple[str, ...] = ()  # on recordings that are alike
    implausible: tuple[str, ...] = ()  # values that their units do not allow, by recording


def encode_dataset(
    config: Config,
    inputs: Sequence[str],
    *,
    base: Path,
    root: CacheRoot,
    workers: Workers | None = None,
) -> EncodeResult:
    """Bring the cache up to date with the recordings and return the manifest.

    Idempotent: a unit whose store is there and whole under the recipe is not read again, whoever made it. A store with
    files missing or cut short is encoded again, by name. Several encoders may work on one root: each unit is encoded by
    one of them, and what a dead one left is taken over.

    Args:
        config: Resolved settings.
        inputs: Folders, files, globs, brace ranges; replace the data set preset's list when not empty.
        base: Folder that relative paths are meant from.
        root: Cache root.
        workers: Processes that encode, one unit each at a time; None encodes in this one.

    Raises:
        ValueError: No input, weights that cannot be had, an overflow, too large a share of unusable recordings, or different
            recordings under one key.
    """
    root.check_writable()
    if kept := root.remove_stale_temporaries():
        print(
            f"note: {len(kept)} temporaries of another user's encoder, which died, may not be removed: {kept[0]}, ..."
        )
    space = get_action_space(config.encode.action_space)
    encoder, weights, identity = open_encoder(config, base)

    parts = plan_parts(config, encoder, identity, space, inputs, base)
    tasks = []
    for part in parts:
        digests = [digest for _, digest in part.units]
        root.prefetch([root.tokens(part.tokens, digest) for digest in digests])
        root.prefetch([root.actions(part.actions, digest) for digest in digests])
        missing = [
            (unit, digest) for unit, digest in part.units if not is_whole(root, root.tokens(part.tokens, digest))
        ]
        if missing:
            task_part = replace(part, units=missing)
            check_controls(config, task_part, space)
            tasks.append(EncodeTask(config.encode, encoder, weights, task_part, default_num_threads()))
    if tasks and not encoder.trained:
        print(
            f"encoder {encoder.name!r} has seeded random weights: its features are for trying things out, not for results"
        )
    if workers is None:
        timing, num_encoded, unreadable = encode_here(tasks, root)
    else:
        timing, num_encoded, unreadable = encode_on_workers(tasks, root, workers, space.name)
    for part in parts:
        for unit, digest in part.units:
            if (part.tokens, digest) not in unreadable:
                ensure_actions(root, part, space, unit, digest)

    names: dict[str, str] = {}
    implausible: list[str] = []
    manifest = Manifest(
        dataset=config.dataset.name,
        num_tokens=config.encode.num_tokens_of(encoder),
        width=encoder.embed_dim,
        grid=config.encode.grid_of(encoder),
        mode=config.encode.mode,
        encoder=encoder.name,
        encoder_trained=encoder.trained,
        comparable=config.encode.mode != "clip",
        action_space=space.name,
        parts=tuple(_describe_part(part, root, unreadable, names, implausible) for part in parts),
    )
    _check_skipped(manifest, config.encode.max_skipped_share, names)
    notes = []
    if not root.fetch(root.manifest(manifest.digest)):  # else it was looked at when that was written
        for part in parts:
            there = [(unit, digest) for unit, digest in part.units if (part.tokens, digest) not in unreadable]
            notes += compare_recordings(root, replace(part, units=there))
    return EncodeResult(
        manifest,
        sum(len(part.units) for part in parts) - len(unreadable),
        num_encoded,
        timing if num_encoded else None,
        notes=tuple(dict.fromkeys(notes)),
        implausible=tuple(dict.fromkeys(implausible)),  # each camera and phase finds the same
    )


def encode_here(tasks: Sequence[EncodeTask], root: CacheRoot) -> tuple[Timing, int, Unreadable]:
    """Encode in this process; what other encoders hold comes last, when they have finished it or died."""
    timing, num_encoded, encoder = Timing(), 0, None
    unreadable: Unreadable = {}
    for task in tasks:
        device = resolve_device(task.encode.device)
        encoder = encoder or load_encoder(
            task.encoder,
            task.weights,
            task.identity,
            task.encode,
            device=device,
            num_threads=task.num_threads,
        )
        with ProgressBar(task.part.view, task.num_bytes) as bar:
            while task.part.units:
                filled = fill_part(task, encoder, root, bar.show)
                timing += filled.timing
                num_encoded += filled.num_encoded
                unreadable |= {(task.part.tokens, digest): reason for digest, reason in filled.unreadable.items()}
                rest = replace(task, part=replace(task.part, units=filled.busy))
                bar.end(HERE, filled.timing.num_frames, task.num_bytes - rest.num_bytes)
                task = rest
                if filled.busy:
                    wait_for_others(root, task.places(root), bar.wait)
    return timing, num_encoded, unreadable


def _describe_part(
    part: Part, root: CacheRoot, unreadable: Unreadable, names: dict[str, str], implausible: list[str]
) -> ManifestPart:
    """What the manifest says of a part.

    `names` receives what skipped recordings are called now, by what their stores call them; `implausible` the values that
    their units do not allow.
    """
    name_skipped = getattr(part.source, "name_skipped", lambda unit, key: key)
    entries, skipped, notes = [], [], list(part.notes)
    without_episode: dict[str, list[dict[str, str]]] = {}
    lost = list(part.unreadable)
    for unit, digest in part.units:
        if (part.tokens, digest) in unreadable:
            lost.append(Skipped(unit.name, unreadable[part.tokens, digest]))
            continue
        tokens, aggregated = (
            check_identity(place, read_store_file(place))
            for place in (root.tokens(part.tokens, digest), root.actions(part.actions, digest))
        )
        excluded = aggregated.metadata["excluded"]
        measured = tokens.metadata.get("reconstruction") or {"max_abs": None, "relative_rmse": None}
        entries.append(
            ManifestEntry(
                unit_digest=digest,
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
            without_episode[digest] = tokens.metadata["skipped"]
    # A page of an error under twenty names is twenty losses.
    for unit, digest in part.copies:
        lost += [Skipped(unit.name, recording["reason"]) for recording in without_episode.get(digest, ())]
    skipped += [recording._asdict() for recording in sorted(lost)]
    return ManifestPart(
        dataset=part.preset.name,
        weight=part.weight,
        camera=part.camera,
        phase=part.phase,
        fingerprint=part.tokens,
        recipe=part.recipe,
        action_fingerprint=part.actions,
        action_recipe=part.action_recipe,
        source_fingerprint=part.controls,
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
