"""Weight files of the predictor: ours (safetensors with a card) and the official ones (`.pt`), always loaded strictly.

A predictor reads the tokens of one encoder only: those of another one, even of the same size, are noise to it. Third
parties report that the encoder inside vjepa2-ac-vitg.pt differs from vitg.pt: names of files and presets prove nothing,
identities do. An identity is what the recipe of a cache says of its weights: `file:<sha256>#<entry>`, `file:<sha256>` or
`random:<sha256>`; `check_encoder` compares them.
"""

import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jepa_cache.files import atomic_file
from jepa_cache.predictor.compressed import CompressedPredictor, LinearPredictor
from jepa_cache.predictor.model import ACPredictor

log = logging.getLogger(__name__)

Predictor: TypeAlias = ACPredictor | CompressedPredictor
KINDS: Mapping[str, type[Predictor]] = {
    "transformer": ACPredictor,
    "compressed": CompressedPredictor,
    "linear": LinearPredictor,
}
"""By `kind` in the preset and in the `architecture` of a card; cards without one are of transformers."""
OFFICIAL_ENTRY = "predictor"
CARD_ENTRY = "jepa_cache"
"""Where an official file of ours keeps its card, as JSON; upstream's loaders read their own entries only."""
DIGEST_FIELD = "weights_sha256"
"""Of the card in a file: digest of the weights beside it, checked when they are read. Cards in memory are without it."""
CONDITIONING = ("action_encoder", "state_encoder", "extrinsics_encoder")
"""The layers whose input width follows from the action space."""
OFFICIAL_SUFFIXES = (".pt", ".pth", ".tar")
WRAPPER_NAMES = frozenset({"module", "backbone", "_orig_mod"})
"""Put there by DDP, by the wrapper of upstream's pretraining, and by torch.compile (which may wrap single blocks)."""
ENCODER_ENTRIES = ("encoder", "target_encoder")
"""Both are the frozen encoder that the predictor of the same file was trained on: a copy, and the one of the targets."""
ENCODER_FIELD = "encoder_weights"
"""Of a card: the identity of the encoder in the recipe of the cache that the predictor was trained on."""

STEP_HZ_FIELD = "step_hz"
"""Of a card: the least, middle and greatest true rate of steps of the training segments, Hz; absent in weights of older versions."""

CAMERAS_FIELD = "joined_cameras"
"""Of a card: the cameras whose tokens are one step's, in their order; absent where a step is of one camera."""


class CheckpointError(ValueError):
    """A weight file that cannot be used for this predictor; the message lists every difference."""


def clean_name(name: str) -> str:
    """Return a parameter's official name, without what DDP, torch.compile or a wrapper put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def save_state(state: Mapping[str, Tensor], path: Path, card: Mapping[str, object]) -> None:
    """Write weights, by their official names, with a card as a safetensors file, in one atomic step.

    The card is JSON: what is needed to build the predictor again (`architecture`), and whatever describes the run.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    card = {**card, DIGEST_FIELD: digest_state(tensors)}
    # One metadata key only: the library writes several in random order, and equal runs would differ in their bytes.
    with atomic_file(path) as partial:
        save_file(tensors, partial, metadata={"card": json.dumps(card, sort_keys=True)})


def digest_state(state: Mapping[str, Tensor]) -> str:
    """Return the hex sha256 over names, shapes, dtypes and bytes of weights; those without storage have no bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_card(path: Path) -> dict[str, object]:
    """Read the card of a file of this project, without its weights; a CheckpointError where it holds none."""
    card = find_card(path)
    if card is None:
        raise CheckpointError(f"predictor weights {path} hold no card; they were not written by this project")
    return card


def find_card(path: Path) -> dict[str, object] | None:
    """Read the card of a file, without its weights; None where the file was not written by this project."""
    if path.suffix in OFFICIAL_SUFFIXES:
        card = read_official(path).get(CARD_ENTRY)
    else:
        _, card = _read_safetensors(path, weights=False)
    if not isinstance(card, str):
        return None
    content = json.loads(card)
    content.pop(DIGEST_FIELD, None)
    return content


def build_predictor(architecture: Mapping[str, Any]) -> Predictor:
    """Build a predictor of any kind with fresh weights from the `architecture` of a card."""
    sizes = dict(architecture)
    kind = sizes.pop("kind", "transformer")
    if kind not in KINDS:
        raise CheckpointError(
            f"predictors of kind {kind!r} are not known here, only {', '.join(KINDS)}: a newer release wrote them"
        )
    return KINDS[kind](**sizes)


def load_predictor(path: Path) -> tuple[Predictor, dict[str, object]]:
    """Build the predictor that a file of `save_state` holds, from the `architecture` in its card; returns both."""
    card = read_card(path)
    if "architecture" not in card:
        raise CheckpointError(
            f"predictor weights {path}: the card says nothing of the architecture; found {', '.join(sorted(card))}"
        )
    if "head" in card:
        raise CheckpointError(
            f"{path} holds the cost {card['head']!r} of a predictor; name the predictor's own weights, predictor.safetensors"
        )
    predictor = build_predictor(card["architecture"])
    load_predictor_weights(predictor, path)
    return predictor, card


def load_predictor_weights(predictor: nn.Module, path: Path) -> None:
    """Fill a bare `ACPredictor` from a weight file, ours (`.safetensors`) or official (`.pt`, entry "predictor").

    Raises:
        CheckpointError: The file is missing, damaged or of another kind, or names or shapes differ in either direction.
            All differences are listed, and nothing is loaded then.

    Source: upstream checkpoint layout (vjepa2-ac-vitg.pt: entries encoder and predictor).
    """
    state = read_state(path)
    refuse_differences(predictor.state_dict(), state, f"predictor weights {path}")
    predictor.load_state_dict(state, strict=True)


def load_start_weights(predictor: nn.Module, path: Path) -> tuple[str, ...]:
    """Fill a predictor from the weights that a fine-tuning starts from; its actions and states may have other widths.

    Conditioning encoders whose input width differs are new layers: they keep the weights they were built with, bias
    included, and the log says so. Everything else has to fit, as in `load_predictor_weights`.

    Returns the names of the new layers, such as ("action_encoder", "extrinsics_encoder").
    """
    state, own = read_state(path), predictor.state_dict()
    new = []
    for layer in CONDITIONING:
        here, there = (weights.get(f"{layer}.weight") for weights in (own, state))
        # Another number of rows is another predictor, not another action space.
        if here is None or there is None or there.ndim != 2 or there.shape[1] == here.shape[1]:
            continue
        if there.shape[0] == here.shape[0]:
            widths = here.shape[1], path.name, there.shape[1]
            log.warning("%s takes %d numbers, in %s it takes %d: it is a new layer with fresh weights", layer, *widths)
            new.append(layer)
            state |= {f"{layer}.{kind}": own[f"{layer}.{kind}"] for kind in ("weight", "bias")}
    refuse_differences(own, state, f"predictor weights {path}")
    predictor.load_state_dict(state, strict=True)
    return tuple(new)


def refuse_differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise a CheckpointError that lists every name and shape in which weights to load differ from those that are here."""
    lines = [f"missing: {name} {list(own[name].shape)}" for name in own if name not in state]
    lines += [f"unexpected: {name} {list(state[name].shape)}" for name in state if name not in own]
    lines += [
        f"shape: {name} is {list(state[name].shape)} in the file, {list(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if lines:
        raise CheckpointError(
            f"{what} do not fit ({len(lines)} differences; compare the predictor's sizes, the action and state widths, and "
            "LoRA's rank):\n  " + "\n  ".join(lines)
        )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read predictor weights by their official names, on the CPU; a CheckpointError where the file does not hold them."""
    _refuse_folder(path)
    if not path.is_file():
        raise CheckpointError(f"predictor weights {path} do not exist")
    if path.suffix in OFFICIAL_SUFFIXES:
        content = read_official(path)
        if OFFICIAL_ENTRY not in content:
            found = ", ".join(sorted(map(str, content))[:12])
            raise CheckpointError(f'predictor weights {path} need an entry "{OFFICIAL_ENTRY}"; the file holds: {found}')
        named = content[OFFICIAL_ENTRY]
        if not isinstance(named, Mapping) or not all(isinstance(tensor, Tensor) for tensor in named.values()):
            raise CheckpointError(f'predictor weights {path}: entry "{OFFICIAL_ENTRY}" is no state dict')
    else:
        named, card = _read_safetensors(path)
        expected = json.loads(card or "{}").get(DIGEST_FIELD)
        if expected is not None and digest_state(named) != expected:
            raise CheckpointError(
                f"predictor weights {path} are damaged: they are not those that were written (their sha256 differs). Copy the file again, "
                "or write it anew with `python stages/train_predictor.py`, which resumes from its checkpoints"
            )
    state = {clean_name(name): tensor for name, tensor in named.items()}
    if len(state) != len(named):
        raise CheckpointError(f"predictor weights {path}: several names differ only in wrapper prefixes")
    return state


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(
            f"predictor weights {path} are a folder; name the file in it, as {path}/predictor.safetensors"
        )


def _read_safetensors(path: Path, *, weights: bool = True) -> tuple[dict[str, Tensor], str | None]:
    """Return weights by name (none unless `weights`) and the card's JSON."""
    _refuse_folder(path)
    try:
        with safe_open(path, "pt") as file:
            named = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
            return named, (file.metadata() or {}).get("card")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"predictor weights {path} cannot be read: {error}") from error


def read_official(path: Path) -> Mapping[str, object]:
    """Open an official `.pt` file: its entries by name.

    Tensors are memory-mapped, so an unwanted encoder is never read; a file from before torch 1.6 is read whole.

    Raises:
        CheckpointError: The file is missing, damaged, or holds more than tensors, numbers and text.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # Of torch's words only the name: they advise to load the file with weights_only=False, which runs its code.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"predictor weights {path} cannot be read as tensors only: the file "
            f"{f'holds {found[1]}, and pickles can run code' if found else 'is no checkpoint, or damaged'}. Take it from its publisher "
            "again, or have whoever made it save tensors alone"
        ) from None
    except (OSError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"predictor weights {path} cannot be read as tensors only: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'predictor weights {path} need an entry "{OFFICIAL_ENTRY}"; the file holds a {type(content).__name__}'
        )
    return content


class EncoderMatch(NamedTuple):
    """What a run records of its starting weights."""

    cache: str  # identity of the encoder that made the cache's tokens
    file: tuple[str, ...]  # identities of the encoder that the weights belong to; empty where the file does not say
    matches: bool  # False only where the caller allowed it


def check_encoder(
    path: Path, cache_weights: str, *, digest: Callable[[Path], str], allow_other: bool = False
) -> EncoderMatch:
    """Refuse to combine a predictor's weights with a cache of another encoder's tokens.

    An official file says which encoder it belongs to by holding it; a file of this project by its card.

    `cache_weights` is the identity in the cache's recipe; `digest` gives a file's hex sha256 and is called only where the
    file holds an encoder. With `allow_other` they are combined all the same, and what is returned says so.

    Raises:
        CheckpointError: They do not belong together, or the file does not say, and `allow_other` is not set.
    """
    named, found = (find_card(path) or {}).get(ENCODER_FIELD), ()
    if path.suffix in OFFICIAL_SUFFIXES:
        content = read_official(path)
        found = tuple(f"file:{digest(path)}#{entry}" for entry in ENCODER_ENTRIES if content.get(entry))
    if isinstance(named, str):
        found += (named,)
    if cache_weights not in found and not allow_other:
        said = (
            f"those weights were trained on the tokens of {' or '.join(found)}"
            if found
            else "the file holds a predictor alone and does not say which encoder it was trained with"
        )
        raise CheckpointError(
            f"the predictor weights {path} may not be trained on this cache: its tokens are those of encoder {cache_weights}, but {said}. "
            "Tokens of another encoder are noise to a predictor. Encode with the encoder that belongs to it (for the released file: "
            "encoder=ac_vitg with encode.weights naming that same file), or set train.allow_other_encoder: true, which is recorded"
        )
    return EncoderMatch(cache_weights, found, cache_weights in found)
