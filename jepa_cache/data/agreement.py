"""Whether a manifest is the one that the settings ask for: a cache of other settings is never trained on unnoticed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jepa_cache.config.schema import Config
from jepa_cache.store.manifest import Manifest

Pair = tuple[Any, Any]


def find_differences(config: Config, manifest: Manifest) -> list[str]:
    """Each setting of stage one that the manifest was not made with, with both values; empty where all agree.

    A newer RECIPE_VERSION of a source is no difference, nor is an option that one of the two does not know: old caches
    stay usable.
    """
    sampling = manifest.recipe["sampling"]
    encode = config.encode
    asked: dict[str, Pair] = {
        "dataset": (config.dataset.name, manifest.dataset),
        "encoder": (config.encoder.name, manifest.encoder),
        "encode.mode": (encode.mode, manifest.mode),
        "encode.fps": (encode.fps, sampling["fps"]),
        "encode.action_space": (encode.action_space, manifest.action_space),
        **{
            f"encode.{key}": (getattr(encode, key), manifest.recipe[key])
            for key in ("compute_dtype", "dtype", "decoder")
        },
        "encode.pool": (encode.pool, manifest.recipe.get("pool", 1)),  # absent where off
        "encode.cameras": (list(encode.cameras), _unique(part.camera for part in manifest.parts if part.camera)),
    }
    if not isinstance(encode.phases, str):
        asked["encode.phases"] = (_unique(encode.phases), _unique(part.phase for part in manifest.parts))
    if "single_frame" in manifest.recipe["encoder"]:
        asked["encode.single_frame"] = (encode.single_frame, manifest.recipe["encoder"]["single_frame"])
    if encode.mode == "clip":
        asked["encode.frames_per_clip"] = (encode.frames_per_clip, sampling["frames_per_clip"])
    if asked["dataset"][0] == asked["dataset"][1]:
        asked |= _compare_sources(config, manifest)
    return [f"{key} is {now!r}, the manifest has {then!r}" for key, (now, then) in asked.items() if now != then]


def _compare_sources(config: Config, manifest: Manifest) -> dict[str, Pair]:
    """The options that a preset sets for its source, which say what a frame or a row is; maps are left to `status`."""
    presets = {preset.name: preset for preset, _ in config.members}
    pairs: dict[str, Pair] = {}
    for part in manifest.parts:
        if (preset := presets.get(part.dataset)) is None:
            continue
        then = part.recipe["source"]
        for key, value in preset.source_options.items():
            # The camera of a part with a name of its own is that of encode.cameras.
            if key in then and not isinstance(value, dict) and not (key == "camera" and part.camera):
                pairs[f"source_options.{key} of {preset.name}"] = (value, then[key])
    return pairs


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
