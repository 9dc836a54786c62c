"""Stage one as a whole: find what is missing under the recipe, encode just that, list everything in a manifest."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jepa_cache.actions import ActionSpace, get_action_space
from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config
from jepa_cache.encoder.weights import resolve_weights, weights_identity
from jepa_cache.encoding.aggregation import is_current, write_unit_actions
from jepa_cache.encoding.decoding import DecodeSettings
from jepa_cache.encoding.pipeline import Timing, encode_units
from jepa_cache.encoding.recipes import action_recipe, token_recipe
from jepa_cache.encoding.units import digest_units, list_units
from jepa_cache.episode import Episode
from jepa_cache.sources import Source, Unit, build_source
from jepa_cache.store.controls import ControlsWriter, is_readable
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.manifest import Manifest, ManifestEntry
from jepa_cache.store.reader import StoreDamagedError
from jepa_cache.store.recipe import fingerprint
from jepa_cache.store.root import CacheRoot, remove_folder
from jepa_cache.store.verify import check_store, read_store_file


@dataclass(frozen=True)
class EncodeResult:
    """What stage one did: the manifest, how many units were found ready, and the timing of the encoded ones."""

    manifest: Manifest
    num_units: int
    num_encoded: int
    timing: Timing | None


def encode_dataset(config: Config, inputs: Sequence[str], *, base: Path, root: CacheRoot) -> EncodeResult:
    """Bring the cache up to date with the recordings and return the manifest.

    Idempotent: a unit whose store is there and whole under the recipe is not read again, whoever made it. A store with
    files missing or cut short is encoded again, by name.

    Args:
        config: Resolved settings.
        inputs: Folders, files, globs, brace ranges; replace the data set preset's list when not empty.
        base: Folder that relative paths are meant from.
        root: Cache root.

    Raises:
        ValueError: No input, weights that cannot be had, an overflow, or too large a share of unusable recordings.
    """
    source = build_source(config.dataset.source, config.dataset.source_options)
    space = get_action_space(config.encode.action_space)
    units = digest_units(list_units(source, config, inputs, base))
    preset, weights = config.encoder, None
    if config.encode.weights != preset.weights:
        preset = replace(preset, weights=config.encode.weights, weights_sha256=None)
    if preset.weights is not None:
        weights = resolve_weights(preset.weights, base=base)
    recipe = token_recipe(
        config.encode, preset, source.recipe, weights_identity(preset, weights, digest=DigestTable().digest)
    )
    token_print, source_print = fingerprint(recipe), fingerprint(dict(source.recipe))

    missing = [(unit, digest) for unit, digest in units if not _is_whole(root.tokens(token_print, digest))]
    timing = None
    if missing:
        timing = _encode_missing(
            config,
            preset,
            weights,
            source,
            missing,
            root,
            recipe=recipe,
            token_print=token_print,
            source_print=source_print,
        )
    actions = action_recipe(config.encode, preset, source.recipe, space)
    action_print = fingerprint(actions)
    for unit, digest in units:
        _ensure_actions(root, source, space, unit, digest, token_print, source_print, action_print)

    manifest = _build_manifest(config, units, root, recipe, token_print, actions, action_print, source_print)
    _check_skipped(manifest, config.encode.max_skipped_share)
    return EncodeResult(manifest, len(units), len(missing), timing)


def _is_whole(store: Path) -> bool:
    """Whether a store is there with all its files; a damaged one is named and removed, to be encoded again."""
    if not store.is_dir():
        return False
    try:
        check_store(store)
    except StoreDamagedError as error:
        print(f"damaged, encoding it again: {error}")
        remove_folder(store)
        return False
    return True


def _encode_missing(
    config: Config,
    preset: Any,
    weights: Path | None,
    source: Source,
    missing: Sequence[tuple[Unit, str]],
    root: CacheRoot,
    *,
    recipe: dict[str, Any],
    token_print: str,
    source_print: str,
) -> Timing:
    import torch

    from jepa_cache.encoder.checkpoints import load_encoder_state
    from jepa_cache.encoder.frozen import FrozenEncoder

    encode = config.encode
    torch.set_num_threads(default_num_threads())
    device = encode.device if encode.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = FrozenEncoder(
        preset, load_encoder_state(preset, weights), device=device, compute_dtype=encode.compute_dtype
    )
    if not preset.trained:
        print(
            f"encoder {preset.name!r} has seeded random weights: its features are for trying things out, not for results"
        )
    settings = DecodeSettings(
        fps=encode.fps,
        mode=encode.mode,
        frames_per_clip=encode.frames_per_clip,
        tubelet_size=preset.tubelet_size,
        batch_size=encode.batch_size,
        decoder=encode.decoder,
        num_decoders=encode.num_decoders,
    )
    provenance = {
        "batch_size": encode.batch_size,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": {name: version(name) for name in ("torch", "numpy", "zarr", "av")}
        | {"python": platform.python_version()},
    }
    total_bytes = sum(unit.path.stat().st_size for unit, _ in missing)
    with tqdm(desc="encoding", unit=" frames", dynamic_ncols=True) as bar:

        def show(timing: Timing, bytes_through: int) -> None:
            if bytes_through:  # the number of frames is not known before they are decoded
                bar.total = max(timing.num_frames, round(timing.num_frames * total_bytes / bytes_through))
            bar.set_postfix_str(f"limit: {timing.limit}", refresh=False)
            bar.update(timing.num_frames - bar.n)

        timing = encode_units(
            missing,
            source,
            encoder,
            settings,
            root,
            dtype=encode.dtype,
            fingerprint=token_print,
            source_fingerprint=source_print,
            card={"recipe": recipe},
            provenance=provenance,
            on_progress=show,
        )
        bar.total = timing.num_frames
    return timing


def _ensure_actions(
    root: CacheRoot,
    source: Source,
    space: ActionSpace,
    unit: Unit,
    digest: str,
    token_print: str,
    source_print: str,
    action_print: str,
) -> None:
    """Aggregate the unit's actions unless they are there; controls that were deleted are read from the recordings again."""
    store, tokens = root.actions(action_print, digest), root.tokens(token_print, digest)
    if _is_whole(store):
        if is_current(store, tokens):
            return
        remove_folder(store)
    controls = root.controls(source_print, digest)
    if not is_readable(controls):
        with ControlsWriter(controls) as writer:
            for recording in source.iter_episodes(unit):
                if isinstance(recording, Episode):
                    writer.append(recording.key, recording.controls)
    write_unit_actions(store, tokens, controls, space)


def _build_manifest(
    config: Config,
    units: Sequence[tuple[Unit, str]],
    root: CacheRoot,
    recipe: dict[str, Any],
    token_print: str,
    actions: dict[str, Any],
    action_print: str,
    source_print: str,
) -> Manifest:
    entries, skipped, notes = [], [], []
    for _, digest in units:
        tokens = read_store_file(root.tokens(token_print, digest))
        aggregated = read_store_file(root.actions(action_print, digest))
        excluded = aggregated.card["excluded"]
        entries.append(
            ManifestEntry(
                unit_digest=digest,
                tokens_digest=tokens.digest,
                actions_digest=aggregated.digest,
                num_steps=tokens.card["num_steps"],
                num_segments=tokens.card["num_segments"],
                num_episodes=tokens.card["num_episodes"] - len(excluded),
            )
        )
        skipped += tokens.card["skipped"] + [{"key": key, "reason": reason} for key, reason in excluded.items()]
        notes += tokens.card["notes"]
    side = config.encoder.resolution // config.encoder.patch_size
    return Manifest(
        dataset=config.dataset.name,
        fingerprint=token_print,
        recipe=recipe,
        action_fingerprint=action_print,
        action_recipe=actions,
        source_fingerprint=source_print,
        num_tokens=config.encoder.num_tokens,
        width=config.encoder.embed_dim,
        grid=(side, side),
        mode=config.encode.mode,
        encoder=config.encoder.name,
        encoder_trained=config.encoder.trained,
        comparable=config.encode.mode != "clip",
        skipped=tuple(skipped),
        notes=tuple(notes),
        entries=tuple(entries),
    )


def _check_skipped(manifest: Manifest, max_share: float) -> None:
    num_episodes = sum(entry.num_episodes for entry in manifest.entries)
    num_skipped = len(manifest.skipped)
    for recording in manifest.skipped:
        print(f"skipped: {recording['key']}: {recording['reason']}")
    if num_episodes == 0:
        raise ValueError(f"no usable recording: all {num_skipped} were skipped (reasons above)")
    share = num_skipped / (num_episodes + num_skipped)
    if share > max_share:
        raise ValueError(
            f"{num_skipped} of {num_episodes + num_skipped} recordings were skipped ({share:.0%}), more than "
            f"encode.max_skipped_share={max_share:g} allows (reasons above). Mend or remove them, or raise the share; "
            "what was encoded is kept"
        )
