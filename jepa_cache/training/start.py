"""What a training starts from: a fresh predictor, given weights, or LoRA adapters on given weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from jepa_cache.config.checks import check_schedule
from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.scaler import Scaler
from jepa_cache.predictor.checkpoints import EncoderMatch, check_encoder, find_card, load_start_weights
from jepa_cache.predictor.lora import LoraSettings, adapter_state, add_lora, load_adapter_state, merged_state
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.store.digests import DigestTable
from jepa_cache.store.recipe import canonical_json, recipe_changes


class Learner:
    """The predictor as it is trained: in full, or frozen under LoRA adapters.

    Attributes:
        module: Called like an `ACPredictor`; what the loss sees.
        new_layers: Conditioning encoders that the starting weights did not have in this width.
    """

    def __init__(self, config: Config, dataset: CachedDataset, init: Path | None) -> None:
        """Build it with its starting weights.

        Args:
            config: Its `train` and `predictor` sections count.
            dataset: Gives the widths.
            init: File whose weights are the start.

        Raises:
            ValueError: The file does not fit, or adapters have nothing to start from.
        """
        settings = config.train
        predictor = ACPredictor(**predictor_arguments(config, dataset))
        self.new_layers: tuple[str, ...] = load_start_weights(predictor, init) if init is not None else ()
        self.lora: LoraSettings | None = None
        self.module: nn.Module = predictor
        if settings.lora_rank:
            if init is None:
                raise ConfigError(
                    f"train.lora_rank is {settings.lora_rank}, but train.init names no weights: adapters change given weights a "
                    "little and teach fresh ones nothing. Set train.init, or train.lora_rank=0 to train in full"
                )
            self.lora = LoraSettings(
                settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_rslora
            )
            self.module = add_lora(predictor, self.lora, self.new_layers)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: all weights, or the adapters and new layers alone; on the CPU."""
        state = adapter_state(self.module) if self.lora else self.module.state_dict()
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        if self.lora:
            load_adapter_state(self.module, state)
        else:
            self.module.load_state_dict(state)

    def predictor_state(self) -> dict[str, Tensor]:
        """The weights of a plain predictor that gives what the trained one gives; adapters are merged in float32."""
        return merged_state(self.module) if self.lora else self.module.state_dict()


def check_start(config: Config, dataset: CachedDataset, init: Path | None) -> EncoderMatch | None:
    """Refuse starting weights that belong to another encoder's tokens; None where a training starts afresh.

    Raises:
        ValueError: They do, and `train.allow_other_encoder` is not set.
    """
    if init is None:
        return None
    weights = dataset.manifest.recipe["encoder"]["weights"]
    return check_encoder(init, weights, digest=DigestTable().digest, allow_other=config.train.allow_other_encoder)


def compare_start(init: Path, dataset: CachedDataset, scaler: Scaler) -> list[str]:
    """How the actions and states that the starting weights know differ from those of this training; empty where unknown or equal.

    Fine-tuning on another action space is what starting weights are for, so this is said, not refused.
    """
    card = find_card(init) or {}
    here = json.loads(canonical_json({"action_space": dataset.space.name, "scaler": scaler.to_json()}))
    there = {name: card[name] for name in here if name in card}
    return recipe_changes(there, {name: here[name] for name in there})


def predictor_arguments(config: Config, dataset: CachedDataset) -> dict[str, Any]:
    """Constructor arguments of a predictor of the preset's size that fits the data set's tokens, actions and states."""
    manifest, preset = dataset.manifest, config.predictor
    return {
        "embed_dim": manifest.width,
        "predictor_dim": preset.predictor_dim,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_ratio": preset.mlp_ratio,
        "action_dim": len(dataset.space.actions),
        "state_dim": len(dataset.space.states),
        "grid": list(manifest.grid),
        "activation_checkpointing": preset.activation_checkpointing,
        "residual": preset.residual,
    }


def resolve_epochs(config: Config, num_windows: int, num_processes: int) -> Config:
    """The settings with `num_epochs` turned into train steps, rounded up; unchanged where it is 0.

    Raises:
        ConfigError: Warm-up and decay do not fit into them.
    """
    train = config.train
    if not train.num_epochs:
        return config
    per_step = train.batch_size * train.grad_accumulation * num_processes
    num_steps = math.ceil(train.num_epochs * num_windows / per_step)
    print(f"{train.num_epochs:g} epochs of {num_windows} windows are {num_steps} train steps of {per_step}")
    train = replace(train, num_steps=num_steps)
    check_schedule(train)
    return replace(config, train=train)
