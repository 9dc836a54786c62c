"""Encoder weights from files: official `.pt` checkpoints and Hugging Face safetensors, always loaded strictly."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from jepa_cache.config.schema import ROTARY
from jepa_cache.encoder.structure import CheckpointError, check_state, random_state
from jepa_cache.encoder.vit import VisionTransformer
from jepa_cache.encoder.vit21 import VisionTransformer21
from jepa_cache.encoder.weights import entry_in_use

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset

log = logging.getLogger(__name__)

# Added by DistributedDataParallel, the multi-sequence wrapper of pretraining, and torch.compile.
_WRAPPERS = {"module", "backbone", "_orig_mod"}
# Position tables [rows, width] of the released V-JEPA 1 encoders: 16 frames at 224 px (8*14*14) and 384 px (8*24*24).
_VJEPA1_TABLES = {(1568, 1024), (1568, 1280), (4608, 1280)}
# What a released V-JEPA 2 encoder can hold as an unused left-over: 16 or 64 frames at 256 px, ViT-g also at 384 px.
_VJEPA2_TABLES = {(steps * 256, width) for steps in (8, 32) for width in (1024, 1280, 1408)} | {
    (steps * 576, 1408) for steps in (8, 32)
}
_HF_NAMES = (
    (r"^encoder\.embeddings\.patch_embeddings\.proj\.", "patch_embed.proj."),
    (r"^encoder\.layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.", r"blocks.\1.attn."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
)
_HF_QUERY = re.compile(r"^(blocks\.\d+\.attn\.)query(\.weight|\.bias)$")


def load_state(path: Path, entry: str | None) -> dict[str, Tensor]:
    """Read an encoder's state dict under the official names.

    Official checkpoints keep the other entries (predictor, optimiser, counters) unread: the file is memory-mapped.

    Args:
        path: an official `.pt` file, or `.safetensors` with Hugging Face's VJEPA2Model names or the official ones.
        entry: top-level entry of a `.pt` file that holds the encoder; None where the file itself is a state dict.

    Returns:
        official name -> tensor, on the CPU, dtype as stored.

    Raises:
        CheckpointError: the file cannot be read, lacks the entry, or holds a V-JEPA 1 encoder.
    """
    if path.suffix == ".safetensors":
        if entry is not None:
            raise CheckpointError(
                f"{path}: safetensors have no entries, but '{entry}' was asked for. Set weights_entry: null"
            )
        return _from_safetensors(path)
    content = _read_pickle(path)
    if entry is not None:
        content = _pick_entry(content, entry, path)
    elif not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path} is no plain state dict. Name one of its entries with weights_entry: {_names(content)}"
        )
    return _without_position_table(_without_wrappers(content, path), path)


def load_encoder_state(preset: EncoderPreset, path: Path | None) -> dict[str, Tensor]:
    """Read a preset's weights from its file, or draw them for a preset that names a seed.

    Args:
        preset: the encoder.
        path: local file from `weights.resolve_weights`; None only for a preset with random_seed.

    Returns:
        official name -> tensor.

    Raises:
        ValueError: the file does not hold the preset's encoder, or the preset names neither file nor seed.
    """
    if path is None:
        return {name: torch.from_numpy(array) for name, array in random_state(preset).items()}
    state = load_state(path, entry_in_use(preset, path))
    check_state(preset, state, origin=str(path))
    return state


def build_encoder(
    preset: EncoderPreset, state: Mapping[str, Tensor | np.ndarray]
) -> VisionTransformer | VisionTransformer21:
    """Make a preset's encoder with exactly the given weights, in float32, evaluation mode and without gradients.

    Raises:
        CheckpointError: the state does not fit the preset.
        ValueError: the preset asks for rotary positions that its kind does not have.
    """
    rope, positions = ROTARY[preset.kind]
    if preset.rope != rope or preset.positions not in positions:
        raise ValueError(
            f"encoder preset '{preset.name}' of kind {preset.kind} has rope '{preset.rope}' and positions '{preset.positions}'; "
            f"known: rope '{rope}', positions {' or '.join(positions)}"
        )
    check_state(preset, state, origin="the given state")
    # Made without storage and given its weights afterwards: no parameter is ever random, and none is held twice.
    with torch.device("meta"):
        encoder = _make(preset)
    encoder.load_state_dict({name: torch.as_tensor(tensor).float() for name, tensor in state.items()}, assign=True)
    return encoder.eval().requires_grad_(False)


def _make(preset: EncoderPreset) -> VisionTransformer | VisionTransformer21:
    sizes = {
        "embed_dim": preset.embed_dim,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_dim": preset.mlp_dim,
        "patch_size": preset.patch_size,
        "tubelet_size": preset.tubelet_size,
    }
    if preset.kind == "vjepa2_1":
        return VisionTransformer21(**sizes, positions=preset.positions)
    return VisionTransformer(**sizes)


def _names(content: Mapping[str, object]) -> str:
    return ", ".join(sorted(map(str, content)))


def _read_pickle(path: Path) -> dict[str, object]:
    try:
        # Only the zip form (torch >= 1.6) can be mapped; all released V-JEPA 2 files are expected to have it.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, or is no checkpoint: {error}\n  Only tensors are read from "
            f"checkpoints, because pickles can run code. If you trust the file, load it once with torch and save the "
            f"encoder's state dict alone under the same entry name"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as a checkpoint, perhaps it was cut short: {error}. "
            f"Download it again"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dict of entries")
    return dict(content)


def _pick_entry(content: Mapping[str, object], entry: str, path: Path) -> Mapping[str, Tensor]:
    if entry not in content:
        hint = "Set weights_entry in the preset"
        if "ema_encoder" in content:  # of the files known, only these have it
            hint += "; distilled V-JEPA 2.1 encoders are under ema_encoder (presets vitb384_v21, vitl384_v21)"
        raise CheckpointError(f"{path} has no entry '{entry}'; it has: {_names(content)}. {hint}")
    state = content[entry]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: entry '{entry}' is no state dict. The file has: {_names(content)}")
    return state


def _without_wrappers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    clean: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in clean:
            raise CheckpointError(f"{path} holds two tensors named {short} once wrappers' prefixes are taken off")
        clean[short] = tensor
    return clean


def _is_sincos(table: Tensor) -> bool:
    # At position (0, 0, 0) every sine is 0 and every cosine 1; no trained or zero table looks so.
    first = table.reshape(-1, table.shape[-1])[0]
    return bool(((first == 0) | (first == 1)).all() and (first == 0).any() and (first == 1).any())


def _without_position_table(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop `pos_embed`, after making sure that it is V-JEPA 2's unused left-over.

    V-JEPA 1 and 2 encoders have the same names and shapes, but V-JEPA 1 adds a fixed sine-cosine table (`pos_embed`)
    and has no RoPE, so its weights would load strictly and give wrong tokens. Old V-JEPA 2 files may hold the table
    too, unused. Told apart by the table: the released V-JEPA 1 shapes are refused, the released V-JEPA 2 shapes are
    dropped; of any other shape a sine-cosine table is refused, because nothing else in the file can tell.
    """
    table = state.get("pos_embed")
    if table is None:
        return state
    shape = list(table.shape)
    size = (table.shape[-2], table.shape[-1]) if table.ndim >= 2 else None
    if size in _VJEPA1_TABLES:
        raise CheckpointError(
            f"{path} is a V-JEPA 1 encoder: it holds the position table pos_embed {shape} of V-JEPA 1's release and has "
            f"no rotary positions. Only V-JEPA 2 encoders can be loaded; name one with encode.weights=PATH"
        )
    if size not in _VJEPA2_TABLES and size is not None and _is_sincos(table):
        raise CheckpointError(
            f"{path} looks like a V-JEPA 1 encoder: it holds a sine-cosine position table pos_embed {shape}, of a shape "
            f"that no released V-JEPA 2 file has. V-JEPA 1 has no rotary positions and would give wrong tokens. If this "
            f"encoder was trained with RoPE, delete pos_embed from the file's entry and save it again"
        )
    log.warning("%s: pos_embed %s dropped; a V-JEPA 2 encoder with rotary positions does not use it", path, shape)
    return {name: tensor for name, tensor in state.items() if name != "pos_embed"}


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # The Hugging Face file also holds the masked (not action-conditioned) predictor, which is not needed.
            state = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("predictor.")}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Download it again") from error
    if any(name.startswith("encoder.") for name in state):
        return _from_hf_names(state)
    return _without_position_table(_without_wrappers(state, path), path)


def _from_hf_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename VJEPA2Model's encoder to the official names; query, key and value become the row blocks of qkv."""
    named = {}
    for name, tensor in state.items():
        for pattern, official in _HF_NAMES:
            name = re.sub(pattern, official, name)
        named[name] = tensor
    for name in list(named):
        if match := _HF_QUERY.match(name):
            parts = [f"{match[1]}{part}{match[2]}" for part in ("query", "key", "value")]
            # An incomplete triple stays as it is and is named by the strict comparison.
            if all(part in named for part in parts):
                named[f"{match[1]}qkv{match[2]}"] = torch.cat([named.pop(part) for part in parts])
    return named
