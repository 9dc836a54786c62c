"""Which tensors an encoder has, under their official names; drawing them from a seed, and comparing a file's with them.

Imports no torch: the identity of weights is asked for before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from jepa_cache.config.schema import LEVEL_LAYERS

if TYPE_CHECKING:
    from torch import Tensor

    from jepa_cache.config.schema import EncoderPreset

INIT_STD = 0.02


class CheckpointError(ValueError):
    """A weights file does not hold the encoder that the preset describes; the message lists how."""


def level_layers(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs V-JEPA 2.1 norms as its levels.

    Raises:
        ValueError: no released encoder has such a depth, so nothing says which.

    Source: V-JEPA 2.1, arXiv 2603.14482, upstream encoder.
    """
    if depth not in LEVEL_LAYERS:
        raise ValueError(
            f"a V-JEPA 2.1 encoder has a depth of {', '.join(map(str, LEVEL_LAYERS))}, for which the blocks of its four levels "
            f"are known; got depth {depth}. Set such a depth in the encoder preset"
        )
    return LEVEL_LAYERS[depth]


def parameter_shapes(preset: EncoderPreset) -> dict[str, tuple[int, ...]]:
    """List an encoder's parameters under their official names, in the order of the module's own.

    Returns:
        name -> shape.

    Raises:
        ValueError: a V-JEPA 2.1 encoder of a depth without known levels.
    """
    dim, patch = preset.embed_dim, preset.patch_size
    kernel = (dim, 3, preset.tubelet_size, patch, patch)
    blocks = dict(_block_shapes(preset))
    if preset.kind != "vjepa2_1":
        return {**_named("patch_embed.proj", kernel), **blocks, **_named("norm", (dim,))}
    shapes: dict[str, tuple[int, ...]] = {"img_mod_embed": (1, 1, dim), "video_mod_embed": (1, 1, dim)}
    shapes |= _named("patch_embed.proj", kernel) | _named("patch_embed_img.proj", (dim, 3, 1, patch, patch)) | blocks
    for level in range(len(level_layers(preset.depth))):
        shapes |= _named(f"norms_block.{level}", (dim,))
    return shapes


def _block_shapes(preset: EncoderPreset) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, hidden = preset.embed_dim, preset.mlp_dim
    for index in range(preset.depth):
        for name, shape in (
            ("norm1", (dim,)),
            ("attn.qkv", (3 * dim, dim)),
            ("attn.proj", (dim, dim)),
            ("norm2", (dim,)),
            ("mlp.fc1", (hidden, dim)),
            ("mlp.fc2", (dim, hidden)),
        ):
            yield from _named(f"blocks.{index}.{name}", shape).items()


def _named(layer: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{layer}.weight": weight, f"{layer}.bias": weight[:1]}


def random_state(preset: EncoderPreset) -> dict[str, np.ndarray]:
    """Draw seeded, untrained weights by the official initialisation; only for presets that name a seed (`tiny`).

    Matrices and the patch projection are normal with deviation 0.02 (upstream's truncation at +-2 never acts), biases
    0, norms 1; attn.proj and mlp.fc2 of block l (from 1) are divided by sqrt(2 l).

    Returns:
        official name -> float32 array, the same on every machine for one seed.

    Raises:
        ValueError: the preset names no seed.

    Source: V-JEPA 2, arXiv 2506.09985, upstream initialisation.
    """
    if preset.random_seed is None:
        raise ValueError(
            f"encoder preset '{preset.name}' names no random_seed, so it has no random weights. Name a file with "
            f"encode.weights=PATH"
        )
    generator = np.random.Generator(np.random.PCG64(preset.random_seed))
    state = {}
    for name, shape in parameter_shapes(preset).items():
        if name.endswith(".bias"):
            state[name] = np.zeros(shape, np.float32)
        elif "norm" in name:
            state[name] = np.ones(shape, np.float32)
        else:
            std = INIT_STD
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                std /= np.sqrt(2.0 * (int(name.split(".")[1]) + 1))
            state[name] = (generator.standard_normal(shape) * std).astype(np.float32)
    return state


def check_state(preset: EncoderPreset, state: Mapping[str, Tensor | np.ndarray], *, origin: str) -> None:
    """Compare a state dict with a preset, strictly.

    Args:
        preset: what is expected.
        state: official name -> tensor.
        origin: where the state came from, for the message.

    Raises:
        CheckpointError: names every missing, unexpected and wrongly shaped tensor.
    """
    expected = parameter_shapes(preset)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    lines = [f"missing     {name} {list(expected[name])}" for name in expected if name not in found]
    lines += [f"unexpected  {name} {list(found[name])}" for name in sorted(found) if name not in expected]
    lines += [
        f"wrong shape {name} {list(found[name])}, expected {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if not lines:
        return
    raise CheckpointError(
        f"the weights in {origin} are not those of encoder preset '{preset.name}' (embed_dim {preset.embed_dim}, depth "
        f"{preset.depth}, mlp_dim {preset.mlp_dim}); {len(lines)} tensors differ:\n  "
        + "\n  ".join(lines)
        + f"\n  {_name_other_kind(preset, found)}Choose the encoder preset that fits the file, or another file with "
        "encode.weights=PATH"
    )


def _name_other_kind(preset: EncoderPreset, found: Mapping[str, tuple[int, ...]]) -> str:
    """Say it where a file holds the other of the two architectures."""
    if not any(name.startswith("blocks.") for name in found):
        return ""
    is_21 = any(name.startswith(("norms_block.", "patch_embed_img.")) for name in found)
    if is_21 and preset.kind == "vjepa2":
        return "This is a V-JEPA 2.1 encoder, which is another architecture (presets vit..._v21, kind: vjepa2_1). "
    if not is_21 and preset.kind == "vjepa2_1":
        return "This is a V-JEPA 2 encoder, which is another architecture (presets without _v21, kind: vjepa2). "
    return ""
