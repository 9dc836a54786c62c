"""Fine-tuning with LoRA: small trainable matrices beside the frozen ones of the blocks, by the PEFT library.

Adapted are qkv, proj, fc1 and fc2 of every block. Conditioning encoders that are new, because the actions or states have another
width than in the starting weights, cannot be adapted: they are trained in full and travel with the adapter.

An adapter means nothing without the weights under it. It therefore carries their digest, and is refused on any others.
PEFT takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa_cache.files import atomic_file
from jepa_cache.predictor.checkpoints import CONDITIONING, CheckpointError, clean_name, list_differences

if TYPE_CHECKING:
    from peft import PeftModel

    from jepa_cache.predictor.model import ACPredictor

TARGETS = ("qkv", "proj", "fc1", "fc2")
"""Last part of the adapted layers' names; `predictor_proj` does not end in `.proj` and stays as it is."""
ADAPTER = "default"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "card.json"
_BASE = "sha256:"


@dataclass(frozen=True)
class LoraSettings:
    """Size and scale of the adapters; an adapter adds `scale * B @ A` to its layer's weights."""

    rank: int  # rows of A and columns of B
    alpha: float  # scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA
    dropout: float  # share of the adapter's inputs set to 0 in training, in [0, 1)
    rslora: bool  # rank-stabilised scale: the same alpha serves every rank

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.rank < 1:
            raise ValueError(f"LoRA: rank must be at least 1, got {self.rank}; leave LoRA out to train in full")
        if self.alpha <= 0:
            raise ValueError(f"LoRA: alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA: dropout must lie in [0, 1), got {self.dropout}")


def add_lora(predictor: ACPredictor, settings: LoraSettings, full: Sequence[str] = ()) -> PeftModel:
    """Freeze a predictor and put trainable adapters beside the linear layers of its blocks.

    Outputs are the same as before, bit for bit, until the first train step: B starts at zero.

    Args:
        predictor: with its starting weights; changed in place.
        settings: of the adapters.
        full: conditioning encoders to train in full, as `checkpoints.load_start_weights` returns them. An extrinsics encoder that the
            predictor does not use stays frozen, but is kept with the adapter as well.

    Returns:
        A module that is called like the predictor and whose trainable parameters are the adapters and the layers in `full`.

    Raises:
        ValueError: `full` names another layer.

    Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732.
    """
    unknown = [name for name in full if name not in CONDITIONING]
    if unknown:
        raise ValueError(f"LoRA: only {', '.join(CONDITIONING)} may be trained in full, got {', '.join(unknown)}")
    return _wrap(predictor, settings, full, _base_digest(predictor, full))


def _wrap(predictor: ACPredictor, settings: LoraSettings, full: Sequence[str], base: str) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=list(TARGETS),
        modules_to_save=list(full) or None,
        bias="none",
    )
    model = get_peft_model(predictor, config)
    config.base_model_name_or_path = base
    if all(parameter.dtype == torch.float32 for parameter in predictor.parameters()):
        for module in predictor.modules():
            if isinstance(module, LoraLayer):
                # Else a float32 copy of every input is kept for the backward pass, which autocast makes bfloat16 again at once.
                module.cast_input_dtype_enabled = False
    if not predictor.use_extrinsics:
        predictor.extrinsics_encoder.requires_grad_(False)  # DDP would wait for its gradient
    return model


def count_trainable(model: nn.Module) -> int:
    """Count the weights that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapters and the layers trained in full, under the names of PEFT's files; the frozen weights are left out."""
    from peft import get_peft_model_state_dict

    # PEFT would ask the hub about embedding layers otherwise; there are none.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Fill the adapters of a model of `add_lora` with what `adapter_state` returned.

    Raises:
        CheckpointError: a name or shape differs; all are listed and nothing is loaded.
    """
    from peft import set_peft_model_state_dict

    differences = list_differences(adapter_state(model), state)
    if differences:
        raise CheckpointError(
            f"the adapter does not fit this model ({len(differences)} differences; compare LoRA's rank, the predictor's size and the "
            "layers trained in full):\n  " + "\n  ".join(differences)
        )
    set_peft_model_state_dict(model, dict(state), adapter_name=ADAPTER)


def save_adapter(model: PeftModel, folder: Path, card: Mapping[str, object]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does; `peft.PeftModel.from_pretrained` reads them too.

    Args:
        model: from `add_lora`.
        folder: made where absent; each file is replaced in one step.
        card: as of `checkpoints.save_predictor`, with the `architecture` of the predictor under the adapter; kept in `card.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / WEIGHTS_FILE) as partial:
        save_file(adapter_state(model), partial, metadata={"format": "pt"})
    with tempfile.TemporaryDirectory() as scratch:
        model.peft_config[ADAPTER].save_pretrained(scratch)
        config = json.loads((Path(scratch) / CONFIG_FILE).read_text())
    config["target_modules"].sort()  # a set in PEFT: equal trainings would differ in their bytes
    with atomic_file(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with atomic_file(folder / CARD_FILE) as partial:
        partial.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def read_adapter_card(folder: Path) -> dict[str, object]:
    """Read the card that `save_adapter` wrote.

    Raises:
        CheckpointError: there is none, or it is damaged or holds no architecture.
    """
    try:
        card = json.loads((folder / CARD_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no LoRA adapter of this project: {error}") from error
    if not isinstance(card, dict) or "architecture" not in card:
        raise CheckpointError(f"{folder / CARD_FILE} says nothing of the architecture under the adapter")
    return card


def load_adapter(predictor: ACPredictor, folder: Path) -> PeftModel:
    """Put the adapter of a folder on the weights that it was trained on, ready to train on or to merge.

    Args:
        predictor: with the starting weights of that training; changed in place.
        folder: from `save_adapter`.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter was trained on other weights, or it does not fit.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"LoRA adapter {folder} cannot be read: {error}") from error
    full = config.modules_to_save or ()
    base = _base_digest(predictor, full)
    if config.base_model_name_or_path != base:
        raise CheckpointError(
            f"LoRA adapter {folder} was trained on the weights {config.base_model_name_or_path}, these are {base}; "
            "an adapter means nothing on others. Load the weights that its training started from (train.init)"
        )
    settings = LoraSettings(config.r, config.lora_alpha, config.lora_dropout, config.use_rslora)
    model = _wrap(predictor, settings, full, base)
    load_adapter_state(model, state)
    return model


@torch.no_grad()
def merged_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the weights of one plain predictor that gives what the adapted one gives, under official names; `model` is not changed.

    Always in float32, also where the weights or the adapters were trained in bfloat16: a product rounded to bfloat16 before it is added
    loses most of a small update.

    Returns:
        official name -> float32 tensor, for `ACPredictor.load_state_dict`.
    """
    from peft.tuners.lora import LoraLayer

    state = {}
    for name, tensor in model.get_base_model().state_dict().items():
        kept = _without_adapter_parts(name)
        if kept is not None:
            state[kept] = tensor.detach().float().clone()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A[ADAPTER].weight.float(), module.lora_B[ADAPTER].weight.float()
            state[f"{clean_name(name)}.weight"] += module.scaling[ADAPTER] * (b @ a)
    return state


def _without_adapter_parts(name: str) -> str | None:
    """Official name of a tensor inside an adapted predictor; None for what has none: adapters, and originals that were replaced."""
    if ".lora_" in name or ".original_module." in name:
        return None
    return clean_name(name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", "."))


def _base_digest(predictor: nn.Module, full: Sequence[str]) -> str:
    """Identity of the weights that stay frozen: names, shapes, dtypes and bytes. Cost: reads them all, about 2 s for 300 M weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(predictor.state_dict().items()):
        if name.partition(".")[0] in full:
            continue
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return _BASE + total.hexdigest()
