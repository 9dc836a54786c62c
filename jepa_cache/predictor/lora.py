"""Fine-tuning with LoRA: small trainable matrices beside the frozen ones of the blocks, by the PEFT library.

Adapted are qkv, proj, fc1 and fc2 of every block. Conditioning encoders that are new, because the actions or states have
another width than in the starting weights, cannot be adapted: they are trained in full and travel with the adapter.

An adapter means nothing without the weights under it: it carries their digest, and is refused on any others.
PEFT takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa_cache.files import atomic_file
from jepa_cache.predictor.checkpoints import CheckpointError, clean_name, digest_state, refuse_differences

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import LoraVariant

    from jepa_cache.predictor.model import ACPredictor

TARGETS = ("qkv", "proj", "fc1", "fc2")
"""Last part of the adapted layers' names; `predictor_proj` does not end in `.proj` and stays as it is."""
ADAPTER = "default"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
CARD_FILE = "card.json"


def add_lora(
    predictor: ACPredictor, *, rank: int, alpha: float, dropout: float, rslora: bool, full: Sequence[str] = ()
) -> PeftModel:
    """Freeze a predictor and put trainable adapters beside the linear layers of its blocks.

    An adapter adds `scale * B @ A` to its layer's weights. Outputs are the same as before, bit for bit, until the first
    training step: B starts at zero.

    The predictor is changed in place; what is returned is called like it. The scale is alpha / rank, or alpha / sqrt(rank)
    with rsLoRA. Conditioning encoders in `full` (from `checkpoints.load_start_weights`) are trained in full, and so is an extrinsics encoder
    that is used: released weights hold one that was never trained. One that is not used stays frozen, but is kept with the adapter as well.

    Source: LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732.
    """
    from peft import LoraConfig

    full = sorted({*full, *["extrinsics_encoder"] * predictor.use_extrinsics})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=list(TARGETS),
        modules_to_save=list(full) or None,
        bias="none",
    )
    return _wrap(predictor, config)


def _wrap(predictor: ACPredictor, config: LoraConfig) -> PeftModel:
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    base = _base_digest(predictor, config)
    model = get_peft_model(predictor, config)
    config.base_model_name_or_path = base  # PEFT has put the class's name there
    if all(parameter.dtype == torch.float32 for parameter in predictor.parameters()):  # PEFT adds float32 to others
        for module in predictor.modules():
            if isinstance(module, LoraLayer):
                module.lora_variant[ADAPTER] = _added_by_product()
                # Else a float32 copy of every input is kept for the backward pass, which autocast casts back at once.
                module.cast_input_dtype_enabled = False
    if not predictor.use_extrinsics:
        predictor.extrinsics_encoder.requires_grad_(False)  # DDP would wait for its gradient
    return model


@cache
def _added_by_product() -> LoraVariant:
    from peft.tuners.lora.layer import LoraVariant

    class AddedByProduct(LoraVariant):
        """What PEFT computes, but scaled and added to the layer's output by the product with B: two passes over outputs less, and two backwards."""

        @staticmethod
        def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
            inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
            b, scale = module.lora_B[active_adapter].weight, module.scaling[active_adapter]
            return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), b.T, alpha=scale).view_as(result)

        @staticmethod
        def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight + module.get_delta_weight(active_adapter)

        @staticmethod
        def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
            orig_weight.data += module.get_delta_weight(active_adapter)

        @staticmethod
        def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight - module.get_delta_weight(active_adapter)

    return AddedByProduct()


def count_trainable(model: nn.Module) -> int:
    """Count the weights that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapters and the layers trained in full, under the names of PEFT's files, without the frozen weights."""
    from peft import get_peft_model_state_dict

    # PEFT would ask the hub about embedding layers otherwise; there are none.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Fill the adapters of a model of `add_lora` with what `adapter_state` returned, if all names and shapes fit."""
    from peft import set_peft_model_state_dict

    refuse_differences(adapter_state(model), state, "the LoRA adapter")
    set_peft_model_state_dict(model, dict(state), adapter_name=ADAPTER)


def save_adapter(model: PeftModel, folder: Path, card: Mapping[str, object]) -> None:
    """Write an adapter as PEFT does, with a card; `peft.PeftModel.from_pretrained` reads it too.

    The card is as of `checkpoints.save_state`, with the `architecture` of the predictor under the adapter.
    """
    with atomic_file(folder / WEIGHTS_FILE) as partial:
        save_file(adapter_state(model), partial, metadata={"format": "pt"})
    for name, content in ((CONFIG_FILE, model.peft_config[ADAPTER].to_dict()), (CARD_FILE, card)):
        with atomic_file(folder / name) as partial:
            # Sets are sorted: equal trainings would differ in their bytes otherwise.
            partial.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n")


def read_adapter_card(folder: Path) -> dict[str, object]:
    """Read the card that `save_adapter` wrote; a CheckpointError where it is missing or damaged."""
    try:
        card = json.loads((folder / CARD_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no LoRA adapter of this project: {error}") from error
    if not isinstance(card, dict) or "architecture" not in card:
        raise CheckpointError(f"{folder / CARD_FILE} says nothing of the architecture under the adapter")
    return card


def load_adapter(predictor: ACPredictor, folder: Path) -> PeftModel:
    """Put the adapter of a folder on the weights that it was trained on, ready to train on or to merge.

    Raises:
        CheckpointError: A file is missing or damaged, the adapter was trained on other weights, or it does not fit.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"LoRA adapter {folder} cannot be read: {error}") from error
    base = _base_digest(predictor, config)
    if config.base_model_name_or_path != base:
        raise CheckpointError(
            f"LoRA adapter {folder} was trained on the weights {config.base_model_name_or_path}, these are {base}; "
            "an adapter means nothing on others. Load the weights that its training started from (train.init)"
        )
    config.inference_mode = False  # which would freeze it
    model = _wrap(predictor, config)
    load_adapter_state(model, state)
    return model


@torch.no_grad()
def merged_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the weights of one plain predictor that gives what the adapted one gives, by official names.

    Always in float32, also where the weights or the adapters were trained in bfloat16: a product rounded to bfloat16
    before it is added loses most of a small update. The model is not changed, unlike by PEFT's own merge.
    """
    from peft.tuners.lora import LoraLayer

    state = {}
    for name, tensor in model.get_base_model().state_dict().items():
        if ".lora_" not in name and ".original_module." not in name:  # adapters, and layers that were replaced
            name = name.replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
            state[clean_name(name)] = tensor.detach().float().clone()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A[ADAPTER].weight.float(), module.lora_B[ADAPTER].weight.float()
            state[f"{clean_name(name)}.weight"] += module.scaling[ADAPTER] * (b @ a)
    return state


def _base_digest(predictor: nn.Module, config: LoraConfig) -> str:
    """Return the identity of the weights that stay frozen. Cost: reads them all, about 2 s for 300 M weights."""
    full = config.modules_to_save or ()
    state = {name: tensor for name, tensor in predictor.state_dict().items() if name.partition(".")[0] not in full}
    return f"sha256:{digest_state(state)}"
