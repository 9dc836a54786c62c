"""Checkpoints of a running training: written whole or not at all, checked when read, the newest one shown by `latest`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_cache.store.recipe import file_digest
from jepa_cache.store.root import publish_folder, remove_folder, remove_stale_temporaries, sync, temporary_folder

WEIGHTS_FILE = "predictor.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
LATEST = "latest"
NUM_KEPT = 2


class Checkpoint(NamedTuple):
    """Everything a training needs to go on as if it had never stopped.

    The order of windows and the rates are pure functions of `step`, so they need no state of their own.
    """

    step: int  # train steps done
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    random_state: Tensor  # torch's generator


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Publish a checkpoint as `folder/step-XXXXXXXX`, point `latest` to it, and remove all but the newest two.

    A crash at any moment leaves every `step-*` folder whole, and `latest` on one of them.
    """
    final = folder / _folder_name(checkpoint.step)
    with temporary_folder(final) as temporary:
        save_file(checkpoint.weights, temporary / WEIGHTS_FILE)
        training = {"optimizer": checkpoint.optimizer, "random_state": checkpoint.random_state}
        torch.save(training, temporary / OPTIMIZER_FILE)
        digests = {name: file_digest(temporary / name) for name in (WEIGHTS_FILE, OPTIMIZER_FILE)}
        (temporary / STATE_FILE).write_text(json.dumps({"step": checkpoint.step, "sha256": digests}) + "\n")
        publish_folder(temporary, final)
    _tidy(folder)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, None when it has none.

    What a crash right after publishing it left undone (`latest` one behind, old checkpoints) is done here.

    Raises:
        ValueError: When it is damaged; names the file and the ways out.
    """
    published = _published(folder)
    if not published:
        return None
    path = published[-1]
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if path.name != _folder_name(state["step"]):
            raise ValueError(f"{STATE_FILE} says train step {state['step']}")
        for name, digest in state["sha256"].items():
            if file_digest(path / name) != digest:
                raise ValueError(f"{name} has changed since it was written, its sha256 differs")
        training = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete this folder to go on from the one before it, if there is one, "
            "or start over with --fresh"
        ) from error
    _tidy(folder)
    return Checkpoint(state["step"], weights, training["optimizer"], training["random_state"])


def forget_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a run, the newest last; a crash leaves those that are not removed yet whole."""
    for path in _published(folder):
        remove_folder(path)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _published(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tidy(folder: Path) -> None:
    *others, newest = _published(folder)
    link = folder / f".{LATEST}"
    link.unlink(missing_ok=True)
    link.symlink_to(newest.name)
    link.replace(folder / LATEST)
    sync(folder)
    for old in others[: 1 - NUM_KEPT]:
        remove_folder(old)
    remove_stale_temporaries(folder)
