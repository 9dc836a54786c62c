"""Weight files of the predictor: our own (safetensors with a card) and the official ones (`.pt`), always loaded strictly."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jepa_cache.predictor.model import ACPredictor

OFFICIAL_ENTRY = "predictor"
OFFICIAL_SUFFIXES = (".pt", ".pth", ".tar")
# Put there by DDP, by the multi-sequence wrapper of upstream's pretraining, and by torch.compile (which may wrap single blocks).
WRAPPER_NAMES = frozenset({"module", "backbone", "_orig_mod"})


class CheckpointError(ValueError):
    """A weight file that cannot be used for this predictor; the message lists every difference."""


def clean_name(name: str) -> str:
    """Return a parameter's official name, without what DDP, torch.compile or a wrapper put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def save_predictor(predictor: nn.Module, path: Path, card: Mapping[str, object]) -> None:
    """Write all weights under their official names, with a card, in one atomic step.

    Args:
        predictor: an `ACPredictor`, also inside DDP or torch.compile.
        path: safetensors file; an existing one is replaced.
        card: what is needed to build the predictor again (its configuration) and whatever describes the run; JSON.
    """
    state = {clean_name(name): tensor.detach().contiguous() for name, tensor in predictor.state_dict().items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # One key only: the library writes several in random order, and equal runs would differ in their bytes.
        save_file(state, partial, metadata={"card": json.dumps(card, sort_keys=True)})
        partial.chmod(0o644)  # the library makes it readable by its owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_card(path: Path) -> dict[str, object]:
    """Read the card of a file that `save_predictor` wrote, without its weights.

    Raises:
        CheckpointError: the file is missing or damaged, or holds no card.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"predictor weights {path} cannot be read: {error}") from error
    if "card" not in metadata:
        raise CheckpointError(f"predictor weights {path} hold no card; they were not written by this project")
    return json.loads(metadata["card"])


def load_predictor(path: Path) -> tuple[ACPredictor, dict[str, object]]:
    """Build the predictor that a file of `save_predictor` holds, from the `architecture` in its card.

    Returns:
        The predictor with its weights, and the card.

    Raises:
        CheckpointError: the file is missing or damaged, or its card holds no architecture.
    """
    card = read_card(path)
    if "architecture" not in card:
        raise CheckpointError(
            f"predictor weights {path}: the card says nothing of the architecture; found {', '.join(sorted(card))}"
        )
    predictor = ACPredictor(**card["architecture"])
    load_predictor_weights(predictor, path)
    return predictor, card


def load_predictor_weights(predictor: nn.Module, path: Path) -> None:
    """Fill a predictor from a weight file, ours (`.safetensors`) or official (`.pt`, entry "predictor").

    Nothing is loaded unless every name and shape fits, in both directions.

    Args:
        predictor: a bare `ACPredictor` of the file's sizes.
        path: the file.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind, or names or shapes differ (all are listed).

    Source: upstream checkpoint layout (vjepa2-ac-vitg.pt: entries encoder and predictor).
    """
    state = read_state(path)
    own = predictor.state_dict()
    differences = [f"missing: {name} {list(own[name].shape)}" for name in own if name not in state]
    differences += [f"unexpected: {name} {list(state[name].shape)}" for name in state if name not in own]
    differences += [
        f"shape: {name} is {list(state[name].shape)} in the file, {list(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if differences:
        raise CheckpointError(
            f"predictor weights {path} do not fit this predictor ({len(differences)} differences; compare the preset's "
            "sizes and the action and state widths):\n  " + "\n  ".join(differences)
        )
    predictor.load_state_dict(state, strict=True)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read predictor weights by their official names, on the CPU.

    Args:
        path: safetensors file of ours, or an official `.pt` file with an entry "predictor".

    Raises:
        CheckpointError: the file is missing, damaged, or has no such entry.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"predictor weights {path} do not exist")
    if path.suffix in OFFICIAL_SUFFIXES:
        named = _read_official(path)
    else:
        try:
            with safe_open(path, "pt") as file:
                named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iteration)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"predictor weights {path} cannot be read: {error}") from error
    state = {clean_name(name): tensor for name, tensor in named.items()}
    if len(state) != len(named):
        raise CheckpointError(f"predictor weights {path}: several names differ only in wrapper prefixes")
    return state


def _read_official(path: Path) -> dict[str, Tensor]:
    try:
        # mmap: the file also holds an encoder of four gigabytes that is not wanted here.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"predictor weights {path} cannot be read as tensors only: {error}") from error
    if not isinstance(content, Mapping) or OFFICIAL_ENTRY not in content:
        found = ", ".join(sorted(map(str, content))[:12]) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f'predictor weights {path} need an entry "{OFFICIAL_ENTRY}"; the file holds: {found}')
    return dict(content[OFFICIAL_ENTRY])
