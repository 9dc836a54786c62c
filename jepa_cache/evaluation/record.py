"""What lets two evaluations be compared later: the error of each held-out episode, and the settings that the run was made with."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.metrics import episode_means
from jepa_cache.evaluation.tables import write_json, write_table
from jepa_cache.evaluation.windows import MODEL, WindowErrors, mean_of_steps
from jepa_cache.predictor.checkpoints import read_card

EPISODES_FILE = "episodes.csv"
SETTINGS_FILE = "settings.json"


def episode_table(errors: WindowErrors) -> list[dict[str, str | int | float | None]]:
    """One row for each held-out episode: its windows, and the mean L1 over them of the model, every baseline and control.

    `teacher_forcing_l1` and `rollout_l1` are the model's, `<name>_l1` and `rollout_<name>_l1` those of the others; None where
    a prediction exists for no window of the episode.
    """
    columns: dict[str, np.ndarray] = {}
    for name in errors.one_step:
        one_step, rollout = (
            ("teacher_forcing_l1", "rollout_l1") if name == MODEL else (f"{name}_l1", f"rollout_{name}_l1")
        )
        columns[one_step] = episode_means(errors.one_step[name], errors.episodes)
        columns[rollout] = episode_means(mean_of_steps(errors.horizon[name]), errors.episodes)
    counts = Counter(errors.episodes)
    return [
        {"episode": episode, "num_windows": counts[episode]}
        | {name: float(values[row]) if np.isfinite(values[row]) else None for name, values in columns.items()}
        for row, episode in enumerate(sorted(counts))
    ]


def describe_evaluation(evaluation: EvaluationContext, weights: Path) -> dict[str, Any]:
    """Everything that says what was measured: the training run, its settings, the tokens, and how they were measured.

    Args:
        evaluation: What is measured.
        weights: Its predictor.safetensors, whose card says how it was trained.
    """
    card, manifest, config = read_card(weights), evaluation.dataset.manifest, evaluation.config
    description = card["description"]
    return {
        "run": card["run"],
        "step": card["step"],
        "dataset": manifest.dataset,
        "encoder": manifest.encoder,
        "encoder_trained": manifest.encoder_trained,
        "mode": manifest.mode,
        "dtype": evaluation.dataset.dtype,
        "tokens_fingerprint": manifest.fingerprint,
        "manifest": manifest.digest,
        "action_space": manifest.action_space,
        **{section: description[section] for section in ("predictor", "train", "filter", "split", "init")},
        "measured": {
            "filter": asdict(config.filter),
            "split": asdict(config.split),
            "evaluate": asdict(config.evaluate),
            "window_steps": evaluation.window_steps,
            "normalize_reps": evaluation.model.normalize_reps,
        },
    }


def write_record(errors: WindowErrors, evaluation: EvaluationContext, weights: Path, out: Path) -> None:
    """Write episodes.csv and settings.json, which `jepa-cache compare` reads."""
    write_table(episode_table(errors), out / EPISODES_FILE)
    write_json(describe_evaluation(evaluation, weights), out / SETTINGS_FILE)
