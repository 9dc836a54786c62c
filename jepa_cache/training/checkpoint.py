"""Checkpoints of a running training: written whole or not at all, checked when read, rotated.

`latest` points to the newest, `best` to the one with the lowest validation metric.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa_cache.files import (
    publish_folder,
    remove_folder,
    remove_stale_temporaries,
    replace_link,
    sync,
    temporary_folder,
)
from jepa_cache.store.recipe import canonical_json, file_digest, fingerprint

WEIGHTS_FILE = "predictor.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
CSV_FILE = "train.csv"  # the rows up to the train step
LATEST = "latest"
BEST = "best"


class Best(NamedTuple):
    """The best validation so far."""

    step: int  # train step; 0 before the first validation
    value: float  # of the metric; lower is better


NO_BEST = Best(0, math.inf)


class Checkpoint(NamedTuple):
    """Everything a training needs to go on as if it had never stopped.

    The order of windows, the rates and everything random are pure functions of `step`: they need no state of their own.
    """

    step: int  # train steps done
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    gradient_scaler: dict[str, Any]  # empty unless the precision is float16
    num_threads: int  # torch threads; other numbers of threads round otherwise
    best: Best = NO_BEST
    card: Mapping[str, Any] = MappingProxyType({})  # what a training that starts from these weights must know of them
    run: str | None = None  # whose it is; None in those of the first release
    rows: str | None = None  # the CSV so far; None in those of the first release


class Rotation(NamedTuple):
    """Which checkpoints stay: the newest, those at whole multiples of a spacing, and the best one."""

    keep_last: int = 2
    keep_every: int = 0  # train steps; 0: none for their spacing


def save_checkpoint(folder: Path, checkpoint: Checkpoint, rotation: Rotation) -> Path:
    """Publish a checkpoint as `folder/step-XXXXXXXX`, point `latest` and `best`, and remove what the rotation lets go.

    A crash at any moment leaves every `step-*` folder whole, and the links on whole ones.
    """
    final = folder / _folder_name(checkpoint.step)
    with temporary_folder(final) as temporary:
        card = {"card": json.dumps(dict(checkpoint.card), sort_keys=True)} if checkpoint.card else None
        save_file(checkpoint.weights, temporary / WEIGHTS_FILE, metadata=card)
        training = {"optimizer": checkpoint.optimizer, "gradient_scaler": checkpoint.gradient_scaler}
        with (temporary / OPTIMIZER_FILE).open("wb") as file:  # torch's own writer does not say that the disk is full
            torch.save(training, file)
        if checkpoint.rows is not None:
            (temporary / CSV_FILE).write_bytes(checkpoint.rows.encode())
        digests = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        state = {
            "step": checkpoint.step,
            "run": checkpoint.run,
            "num_threads": checkpoint.num_threads,
            "best": checkpoint.best._asdict() if checkpoint.best.step else None,
            "sha256": digests,
        }
        (temporary / STATE_FILE).write_bytes(canonical_json({**state, "digest": fingerprint(state)}))
        publish_folder(temporary, final)
    _tidy(folder, rotation)
    return final


def load_latest(folder: Path, rotation: Rotation | None = None, *, run: str | None = None) -> Checkpoint | None:
    """The newest checkpoint of a run, None when it has none.

    With a rotation, what a crash right after publishing it left undone (links one behind, old checkpoints) is done here.

    Raises:
        ValueError: As `load_checkpoint`.
    """
    published = published_checkpoints(folder)
    if not published:
        return None
    checkpoint = load_checkpoint(published[-1], run=run)
    if rotation is not None:
        _tidy(folder, rotation)
    return checkpoint


def load_checkpoint(path: Path, *, run: str | None = None) -> Checkpoint:
    """Read one published checkpoint.

    Args:
        path: Its folder.
        run: That it must be of; any where None, and where it does not say.

    Raises:
        ValueError: When it is damaged or of another run; names the file and the ways out.
    """
    checkpoint = _read_checkpoint(path)
    if None not in (run, checkpoint.run) and run != checkpoint.run:
        raise ValueError(
            f"checkpoint {path} is of run {checkpoint.run}, not of {run}: it was copied here. Move it away, or start over with --fresh; "
            f"to start from its weights set train.init={path / WEIGHTS_FILE}"
        )
    return checkpoint


def describe_last(folder: Path) -> str:
    """Where the newest checkpoint of a run is, or that there is none, as part of a message."""
    published = published_checkpoints(folder)
    return f"the last checkpoint is {published[-1]}" if published else "there was no checkpoint yet"


def _read_checkpoint(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if state.pop("digest") != fingerprint(state):
            raise ValueError(f"{STATE_FILE} has changed since it was written, its digest differs")
        if path.name != _folder_name(state["step"]):
            raise ValueError(f"{STATE_FILE} says train step {state['step']}")
        for name, digest in state["sha256"].items():
            if file_digest(path / name) != digest:
                raise ValueError(f"{name} has changed since it was written, its sha256 differs")
        training = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        return Checkpoint(
            step=state["step"],
            weights=load_file(path / WEIGHTS_FILE),
            optimizer=training["optimizer"],
            gradient_scaler=training["gradient_scaler"],
            num_threads=state["num_threads"],
            best=Best(**state["best"]) if state["best"] else NO_BEST,
            run=state.get("run"),
            rows=(path / CSV_FILE).read_bytes().decode() if CSV_FILE in state["sha256"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete this folder to go on from the one before it, if there is one, "
            "or start over with --fresh"
        ) from error


def forget_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a run, the newest last; a crash leaves those that are not removed yet whole."""
    for path in published_checkpoints(folder):
        remove_folder(path)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def published_checkpoints(folder: Path) -> list[Path]:
    """Folders of the checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"))


def _tidy(folder: Path, rotation: Rotation) -> None:
    published = published_checkpoints(folder)
    newest = published[-1]
    best = json.loads((newest / STATE_FILE).read_text())["best"]
    replace_link(folder / LATEST, newest.name)
    if best and (folder / _folder_name(best["step"])).is_dir():
        replace_link(folder / BEST, _folder_name(best["step"]))
    sync(folder)
    for old in published[: -max(1, rotation.keep_last)]:
        step = int(old.name.removeprefix("step-"))
        wanted = (rotation.keep_every and step % rotation.keep_every == 0) or (best and step == best["step"])
        if not wanted:
            remove_folder(old)
    remove_stale_temporaries(folder)
