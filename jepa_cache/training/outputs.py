"""What a training hands on: the weights with their card, and the CSV."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.scaler import Scaler
from jepa_cache.files import replaced_files
from jepa_cache.predictor.checkpoints import ENCODER_FIELD, save_state
from jepa_cache.predictor.lora import save_adapter
from jepa_cache.training.checkpoint import WEIGHTS_FILE
from jepa_cache.training.start import Learner, predictor_arguments


def describe_weights(dataset: CachedDataset, scaler: Scaler) -> dict[str, Any]:
    """What a training that starts from the weights of this one must know of them."""
    return {
        "action_space": dataset.space.name,
        "scaler": scaler.to_json(),
        ENCODER_FIELD: dataset.manifest.recipe["encoder"]["weights"],
    }


def write_outputs(
    learner: Learner,
    step: int,
    run: Path,
    output: Path,
    config: Config,
    dataset: CachedDataset,
    scaler: Scaler,
    description: dict[str, Any],
) -> Path:
    """Write predictor.safetensors, with everything that evaluation must know in its card, and a copy of train.csv.

    Args:
        learner: With the weights that are handed on. Under LoRA the adapter is written as well, in `adapter/`; an earlier one goes.
        step: Train steps that they have seen.
        run: Folder of the checkpoints and the CSV.
        output: Where to write.
        config: Resolved settings.
        dataset: The cached features.
        scaler: Fitted on the training episodes.
        description: Of the run, see `identity.describe_run`.
    """
    manifest = dataset.manifest
    card = {
        "run": run.name,
        "step": step,
        "description": description,
        "architecture": predictor_arguments(config, dataset),
        **describe_weights(dataset, scaler),
        "window_steps": config.train.window_steps,
        "normalize_reps": config.train.normalize_reps,
        "tokens_fingerprint": manifest.fingerprint,
        "tokens_recipe": manifest.recipe,  # of the first part; what decides the tokens of given frames is the same in all
        "manifest": manifest.digest,
        "encoder": manifest.encoder,
        "encoder_trained": manifest.encoder_trained,
        "mode": manifest.mode,
    }
    with replaced_files(output, WEIGHTS_FILE, ["adapter"]) as folder:
        save_state(learner.predictor_state(), folder / WEIGHTS_FILE, card)
        if learner.lora:
            save_adapter(learner.module, folder / "adapter", card)
        shutil.copyfile(run / "train.csv", folder / "train.csv")
    return output / WEIGHTS_FILE
