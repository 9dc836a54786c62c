"""Encoder weights from files: official `.pt` checkpoints and Hugging Face safetensors, always loaded strictly."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset

log = logging.getLogger(__name__)

# Added by DistributedDataParallel, the multi-sequence wrapper of pretraining, and torch.compile.
_WRAPPERS = {"module", "backbone", "_orig_mod"}
# Position tables [rows, width] that a released V-JEPA 2 encoder can hold as an unused left-over: 16 or 64 frames at 256 px, ViT-g
# also at 384 px.
_UNUSED_TABLES = {(steps * 256, width) for steps in (8, 32) for width in (1024, 1280, 1408)} | {
    (4608, 1408),
    (18432, 1408),
}
_HF_NAMES = (
    (r"^encoder\.embeddings\.patch_embeddings\.proj\.", "patch_embed.proj."),
    (r"^encoder\.layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.attention\.", r"blocks.\1.attn."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
)
_HF_QUERY = re.compile(r"^(blocks\.\d+\.attn\.)query(\.weight|\.bias)$")


class CheckpointError(ValueError):
    """A weights file does not hold the encoder that the preset describes; the message lists how."""


def load_strictly(module: nn.Module, preset: EncoderPreset, state: Mapping[str, Tensor], *, origin: str) -> nn.Module:
    """Give a module, made on torch's meta device, exactly the weights of `state`, in float32, evaluation mode and without gradients.

    Raises:
        CheckpointError: names every missing, unexpected and wrongly shaped tensor, and `origin` as the place of the state.
    """
    expected, found = ({name: list(t.shape) for name, t in held.items()} for held in (module.state_dict(), state))
    lines = [f"missing     {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"unexpected  {name} {shape}" for name, shape in sorted(found.items()) if name not in expected]
    lines += [
        f"wrong shape {name} {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"the weights in {origin} are not those of encoder preset '{preset.name}' (embed_dim {preset.embed_dim}, depth "
            f"{preset.depth}, mlp_dim {preset.mlp_dim}); {len(lines)} tensors differ:\n  {listed}\n  "
            f"{_name_other_kind(preset.kind, found)}Choose the encoder preset that fits the file, or another file with "
            "encode.weights=PATH"
        )
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return module.eval().requires_grad_(False)


def _name_other_kind(kind: str, found: Mapping[str, list[int]]) -> str:
    if not any(name.startswith("blocks.") for name in found):
        return ""
    is_21 = any(name.startswith(("norms_block.", "patch_embed_img.")) for name in found)
    release, held = ("2.1", "vjepa2_1") if is_21 else ("2", "vjepa2")
    return "" if held == kind else f"This is a V-JEPA {release} encoder, another architecture (kind: {held}). "


def load_state(path: Path, entry: str | None) -> dict[str, Tensor]:
    """Read an encoder's state dict under the official names, on the CPU, in the stored dtypes.

    `path` is an official `.pt` file, or `.safetensors` with Hugging Face's VJEPA2Model names or the official ones. Of a `.pt` file
    `entry` names the top-level entry, None where the file itself is a state dict; other entries stay unread: the file is memory-mapped.

    Raises:
        CheckpointError: the file cannot be read, lacks the entry, or holds a V-JEPA 1 encoder.
    """
    if path.suffix == ".safetensors":
        if entry is not None:
            raise CheckpointError(
                f"{path}: safetensors have no entries, but the preset names entry '{entry}'. Set weights_entry: null"
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


def _names(content: Mapping[str, object]) -> str:
    return ", ".join(sorted(map(str, content)))


def _read_pickle(path: Path) -> dict[str, object]:
    try:
        # Only the zip form (torch >= 1.6) can be mapped; all released V-JEPA 2 files are expected to have it.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # Of torch's words only the name: they advise to load the file with weights_only=False, which runs its code.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} {f'holds {found[1]}' if found else 'is no checkpoint, or damaged'}. Only tensors and plain values are read from "
            "checkpoints, because pickles can run code. Take the file from its publisher again, as safetensors where there is one, "
            "or have whoever made it save the encoder's state dict alone under the same entry name"
        ) from None
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
        raise CheckpointError(
            f"{path} has no entry '{entry}'; it has: {_names(content)}. Set weights_entry in the preset, or take "
            "that of the file (distilled V-JEPA 2.1 files have ema_encoder: vitb384_v21, vitl384_v21)"
        )
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


def _without_position_table(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Drop `pos_embed` where it is V-JEPA 2's unused left-over.

    V-JEPA 1 and 2 encoders have the same names and shapes, but V-JEPA 1 adds a fixed position table and has no RoPE, so its weights
    would load strictly and give wrong tokens. Nothing but the table's shape tells them apart.
    """
    table = state.get("pos_embed")
    if table is None:
        return state
    shape = list(table.shape)
    if tuple(shape[-2:]) not in _UNUSED_TABLES:
        raise CheckpointError(
            f"{path} holds a position table pos_embed {shape}, of a shape that no released V-JEPA 2 file has. V-JEPA 1 encoders "
            "hold such tables, have no rotary positions and would give wrong tokens: name another file with encode.weights=PATH; if this encoder "
            "was trained with RoPE, delete pos_embed from the file's entry and save it again"
        )
    log.warning("%s: pos_embed %s dropped; a V-JEPA 2 encoder with rotary positions does not use it", path, shape)
    return {name: tensor for name, tensor in state.items() if name != "pos_embed"}


def _from_safetensors(path: Path) -> dict[str, Tensor]:
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
