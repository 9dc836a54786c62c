"""Finished predictors for other programs: the official layout, and safetensors with a readable card beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jepa_cache.files import atomic_file
from jepa_cache.predictor.checkpoints import CARD_ENTRY, ENCODER_ENTRIES, OFFICIAL_ENTRY, CheckpointError, save_state

# As upstream's trainer, which wraps everything in DDP, writes and expects it; upstream's hub code takes it off.
OFFICIAL_PREFIX = "module."
OFFICIAL = {"kind": "transformer", "residual": False, "conditioning": "tokens", "use_states": True}
"""What an `architecture` says of a predictor that upstream's class can be built with; absent entries mean the same."""


def export_official(
    state: Mapping[str, Tensor], card: Mapping[str, object], path: Path, encoder: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint that upstream's loaders take, in one atomic step.

    Entries: `predictor`, `encoder` and `target_encoder` (the same tensors, stored once) where an encoder is given, and
    `jepa_cache` with the card as JSON text. Only what upstream reads to load weights: no optimiser, no counters.

    Tensors are by official name, and written bit for bit in their dtype. A predictor that upstream's class cannot be (another kind,
    a residual path, adaptive layer norms, no states) is refused with a CheckpointError.

    Source: upstream checkpoint layout (vjepa2-ac-vitg.pt; the trainer's files have target_encoder too).
    """
    architecture = card.get("architecture", {})
    if other := [
        f"{name}: {json.dumps(architecture[name])}"
        for name, official in OFFICIAL.items()
        if architecture.get(name, official) != official
    ]:
        raise CheckpointError(
            f"this predictor was trained with {', '.join(other)}; the official one is another function, so the same weights would predict something "
            "else there or not load. Export it as safetensors, or train an official one (predictor=tiny, small, base or ac300m)"
        )
    content: dict[str, object] = {OFFICIAL_ENTRY: _prefixed(state), CARD_ENTRY: json.dumps(card, sort_keys=True)}
    if encoder is not None:
        content |= dict.fromkeys(ENCODER_ENTRIES, _prefixed(encoder))
    # Through Python's own file: where it cannot be opened torch's writer says only that.
    with atomic_file(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


def export_safetensors(state: Mapping[str, Tensor], card: Mapping[str, object], path: Path) -> Path:
    """Write weights with the card inside, and beside it as a JSON file for people, whose path is returned."""
    save_state(state, path, card)
    beside = path.with_suffix(".json")
    with atomic_file(beside) as partial:
        partial.write_text(json.dumps(card, sort_keys=True, indent=2) + "\n")
    return beside


def differs_from_official_class(architecture: Mapping[str, Any]) -> list[str]:
    """Say what upstream's predictor class cannot be built with as it is: one line per difference."""
    actions, states = architecture["action_dim"], architecture["state_dim"]
    differing = []
    if architecture.get("use_extrinsics"):
        states -= max(actions - 1, 1)
        differing.append(
            f"upstream's class takes the camera's pose apart: build it with use_extrinsics=True, and give it the states behind the first {states} "
            "columns as extrinsics"
        )
    if actions != states:
        differing.append(
            f"upstream's class ties the state width to the action width; here they are {states} and {actions}: replace its state_encoder by "
            f"a linear layer that takes {states} numbers before loading"
        )
    return differing


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{OFFICIAL_PREFIX}{name}": tensor.detach().contiguous() for name, tensor in state.items()}
