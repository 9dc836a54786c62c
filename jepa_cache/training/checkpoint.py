"""Checkpoints of a running training: written whole or not at all, the newest one found through `latest`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_cache.store.root import publish_folder, remove_stale_temporaries, temporary_folder

WEIGHTS_FILE = "predictor.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
LATEST = "latest"


class Checkpoint(NamedTuple):
    """Everything a training needs to go on as if it had never stopped.

    The order of windows and the rates are pure functions of `step`, so they need no state of their own.
    """

    step: int  # train steps done
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    random_state: Tensor  # torch's generator


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Publish a checkpoint as `folder/step-XXXXXXXX`, point `latest` to it, and remove all but the newest `keep`.

    A crash at any moment leaves `latest` on a whole checkpoint.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    remove_stale_temporaries(folder)
    if not final.is_dir():
        with temporary_folder(final) as temporary:
            save_file(checkpoint.weights, temporary / WEIGHTS_FILE)
            torch.save(
                {"optimizer": checkpoint.optimizer, "random_state": checkpoint.random_state}, temporary / OPTIMIZER_FILE
            )
            (temporary / STATE_FILE).write_text(json.dumps({"step": checkpoint.step}) + "\n")
            publish_folder(temporary, final)
    link = folder / f".{LATEST}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(folder / LATEST)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None when it has none.

    Raises:
        ValueError: When `latest` points to something that cannot be read.
    """
    path = folder / LATEST
    if not path.exists():
        return None
    try:
        state: Mapping[str, Any] = json.loads((path / STATE_FILE).read_text())
        training = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path.resolve()} cannot be read ({error}); start over with --fresh") from error
    return Checkpoint(state["step"], weights, training["optimizer"], training["random_state"])
