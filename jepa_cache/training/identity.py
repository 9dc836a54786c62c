"""Which run a training command means: a hash of everything that decides it, so the same command finds its checkpoints."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jepa_cache
from jepa_cache.config.schema import Config
from jepa_cache.data.scaler import Scaler
from jepa_cache.predictor.checkpoints import OFFICIAL_SUFFIXES
from jepa_cache.store.digests import state_folder
from jepa_cache.store.manifest import Manifest
from jepa_cache.store.recipe import file_digest, fingerprint
from jepa_cache.training.checkpoint import LATEST, WEIGHTS_FILE

# What another machine may set otherwise without moving a number: a run goes on under other values.
COSMETIC = ("checkpoint_every", "init", "num_loader_threads")  # init: its content counts, not its name
# Whose code decides what a training computes; an edit there is another run, never a silent reuse of old weights.
CODE = ("actions.py", "data", "idle.py", "poses.py", "predictor", "store", "training", "vpt_actions.py")


def describe_run(config: Config, manifest: Manifest, scaler: Scaler, init: Path | None) -> dict[str, Any]:
    """Everything that decides a run, as plain JSON.

    Args:
        config: Resolved settings; predictor, train and split count.
        manifest: The training set.
        scaler: Fitted on it.
        init: File whose weights are the start.
    """
    return {
        "code": code_digest(),
        "init": file_digest(init) if init is not None else None,
        "manifest": manifest.digest,
        "predictor": asdict(config.predictor),
        "scaler": scaler.to_json(),
        "filter": asdict(config.filter),
        "split": asdict(config.split),
        "train": {name: value for name, value in asdict(config.train).items() if name not in COSMETIC},
    }


def run_folder(description: dict[str, Any]) -> Path:
    """Folder of the run's checkpoints and log: $JEPA_RUNS_HOME, else beside the digest table, outside any workspace."""
    home = os.environ.get("JEPA_RUNS_HOME")
    return (Path(home).expanduser() if home else state_folder() / "runs") / fingerprint(description)


def resolve_init(reference: str | None, base: Path) -> Path | None:
    """The weights file that `train.init` names: a file, a folder that holds predictor.safetensors, or a run's id.

    Raises:
        ValueError: When there is no such file; says what was tried.
    """
    if reference is None:
        return None
    path = (base / Path(reference).expanduser()).resolve()
    run = run_folder({}).parent / reference
    candidates = [path, path / WEIGHTS_FILE, path / "run" / WEIGHTS_FILE]
    candidates += [folder / "checkpoints" / LATEST / WEIGHTS_FILE for folder in (path, run)]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".safetensors", *OFFICIAL_SUFFIXES):
            return candidate
    tried = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise ValueError(f"train.init={reference!r} names no weights; tried {tried}")


def code_digest() -> str:
    """Hash of the source files that decide a training."""
    package = Path(jepa_cache.__file__).parent
    digest = hashlib.sha256()
    for name in CODE:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
