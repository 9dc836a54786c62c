"""Stage one as a whole: find what is missing under the recipe, encode just that, list everything in a manifest."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from jepa_cache.actions import ActionSpace, get_action_space
from jepa_cache.config.machine import default_num_threads
from jepa_cache.config.schema import Config, EncoderPreset
from jepa_cache.encoder.weights import resolve_weights, weights_identity
from jepa_cache.encoding.aggregation import is_current, write_unit_actions
from jepa_cache.encoding.decoding import DecodeSettings
from jepa_cache.encoding.parts import Part, plan_parts
from jepa_cache.encoding.pipeline import Timing, encode_units
from jepa_cache.episode import Episode
from jepa_cache.sources import Unit
from jepa_cache.store.controls import ControlsWriter, is_readable
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.manifest import Manifest, ManifestEntry, ManifestPart
from jepa_cache.store.reader import StoreDamagedError
from jepa_cache.store.root import CacheRoot, remove_folder
from jepa_cache.store.verify import check_store, read_store_file

if TYPE_CHECKING:
    from jepa_cache.encoder.frozen import FrozenEncoder


@dataclass(frozen=True)
class EncodeResult:
    """What stage one did: the manifest, how many units were found ready, and the timing of the encoded ones."""

    manifest: Manifest
    num_units: int
    num_encoded: int
    timing: Timing | None  # None when nothing was encoded


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
    root.check_writable()
    space = get_action_space(config.encode.action_space)
    encoder, weights = config.encoder, None
    if config.encode.weights != encoder.weights:
        encoder = replace(encoder, weights=config.encode.weights, weights_sha256=None)
    if encoder.weights is not None:
        weights = resolve_weights(encoder.weights, base=base)
    identity = weights_identity(encoder, weights, digest=DigestTable().digest)

    parts, manifest_parts = plan_parts(config, encoder, identity, space, inputs, base), []
    timing, num_encoded = Timing(), 0
    frozen: FrozenEncoder | None = None
    for part in parts:
        missing = [(unit, digest) for unit, digest in part.units if not _is_whole(root.tokens(part.tokens, digest))]
        if missing:
            frozen = frozen or _load_encoder(config, encoder, weights)
            timing += _encode_missing(config, frozen, part, missing, root)
            num_encoded += len(missing)
        for unit, digest in part.units:
            _ensure_actions(root, part, space, unit, digest)
        manifest_parts.append(_describe_part(part, root))

    side = encoder.resolution // encoder.patch_size
    manifest = Manifest(
        dataset=config.dataset.name,
        num_tokens=encoder.num_tokens,
        width=encoder.embed_dim,
        grid=(side, side),
        mode=config.encode.mode,
        encoder=encoder.name,
        encoder_trained=encoder.trained,
        comparable=config.encode.mode != "clip",
        action_space=space.name,
        parts=tuple(manifest_parts),
    )
    _check_skipped(manifest, config.encode.max_skipped_share)
    return EncodeResult(manifest, sum(len(part.units) for part in parts), num_encoded, timing if num_encoded else None)


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


def _load_encoder(config: Config, encoder: EncoderPreset, weights: Path | None) -> FrozenEncoder:
    import torch

    from jepa_cache.encoder.checkpoints import load_encoder_state
    from jepa_cache.encoder.frozen import FrozenEncoder

    torch.set_num_threads(default_num_threads())
    wanted = config.encode.device
    device = wanted if wanted != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if not encoder.trained:
        print(
            f"encoder {encoder.name!r} has seeded random weights: its features are for trying things out, not for results"
        )
    state = load_encoder_state(encoder, weights)
    return FrozenEncoder(encoder, state, device=device, compute_dtype=config.encode.compute_dtype)


def _encode_missing(
    config: Config, encoder: FrozenEncoder, part: Part, missing: Sequence[tuple[Unit, str]], root: CacheRoot
) -> Timing:
    import torch

    encode = config.encode
    settings = DecodeSettings(
        fps=encode.fps,
        mode=encode.mode,
        frames_per_clip=encode.frames_per_clip,
        tubelet_size=encoder.preset.tubelet_size,
        phase=part.phase,
        batch_size=encode.batch_size,
        decoder=encode.decoder,
        num_decoders=encode.num_decoders,
    )
    provenance = {
        "batch_size": encode.batch_size,
        "device": "cpu" if encoder.device.type == "cpu" else torch.cuda.get_device_name(encoder.device),
        "versions": {name: version(name) for name in ("torch", "numpy", "zarr", "av")}
        | {"python": platform.python_version()},
    }
    total_bytes = sum(unit.num_bytes for unit, _ in missing)
    what = "encoding" if part.view == "main" else f"encoding {part.view}"
    with tqdm(desc=what, unit=" frames", dynamic_ncols=True) as bar:

        def show(timing: Timing, bytes_through: int) -> None:
            if bytes_through:  # the number of frames is not known before they are decoded
                bar.total = max(timing.num_frames, round(timing.num_frames * total_bytes / bytes_through))
            bar.set_postfix_str(f"limit: {timing.limit}", refresh=False)
            bar.update(timing.num_frames - bar.n)

        timing = encode_units(
            missing,
            part.source,
            encoder,
            settings,
            root,
            dtype=encode.dtype,
            fingerprint=part.tokens,
            source_fingerprint=part.controls,
            card={"recipe": part.recipe},
            provenance=provenance,
            on_progress=show,
        )
        bar.total = timing.num_frames
    return timing


def _ensure_actions(root: CacheRoot, part: Part, space: ActionSpace, unit: Unit, digest: str) -> None:
    """Aggregate the unit's actions unless they are there; controls that were deleted are read from the recordings again."""
    store, tokens = root.actions(part.actions, digest), root.tokens(part.tokens, digest)
    if _is_whole(store):
        if is_current(store, tokens):
            return
        remove_folder(store)
    controls = root.controls(part.controls, digest)
    if not is_readable(controls):
        with ControlsWriter(controls) as writer:
            for recording in part.source.iter_episodes(unit):
                if isinstance(recording, Episode):
                    writer.append(recording.key, recording.controls)
    write_unit_actions(store, tokens, controls, space)


def _describe_part(part: Part, root: CacheRoot) -> ManifestPart:
    entries, skipped, notes = [], [], []
    for _, digest in part.units:
        tokens = read_store_file(root.tokens(part.tokens, digest))
        aggregated = read_store_file(root.actions(part.actions, digest))
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
