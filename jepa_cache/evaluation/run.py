"""One evaluation from weights to report.html; read this file first.

Then `context` (what is measured, and the way through its windows), `windows` (errors of every prediction), `figures` and `verdict`,
one file for each optional measurement (`energy`, `distances`, `noise`, `probes`), `planning`, `pictures` and `page`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jepa_cache.config.schema import Config
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.evaluation.context import EvaluationContext, open_evaluation
from jepa_cache.evaluation.distances import DISTANCES
from jepa_cache.evaluation.energy import ENERGY
from jepa_cache.evaluation.figures import (
    OPEN_LOOP,
    TEACHER_FORCING,
    Row,
    build_figures,
    describe_windows,
    measure_above,
    slice_table,
    step_table,
    summarize,
    worst_table,
)
from jepa_cache.evaluation.metrics import MEASUREMENTS_FOLDER, episode_means, write_json, write_table
from jepa_cache.evaluation.noise import NOISE
from jepa_cache.evaluation.page import write_page
from jepa_cache.evaluation.pictures import choose_films, draw_horizon, draw_training, write_films
from jepa_cache.evaluation.probes import PROBES
from jepa_cache.evaluation.readout import describe_readout
from jepa_cache.evaluation.verdict import describe_verdict, find_gain
from jepa_cache.evaluation.windows import MODEL, PREDICTIONS, WindowErrors, mean_of_steps, measure_windows
from jepa_cache.files import replaced_files
from jepa_cache.predictor.checkpoints import read_card

DECISIVE = ("rollout_l1", "ratio_copy_last")
"""Held-out figures that stand in summary.json with the answers of the verdict; more are columns of `dvc exp show` that nobody reads."""

RESULTS = ("*.csv", "*.json", "report.html", "pictures", MEASUREMENTS_FOLDER)
"""What an evaluation leaves: an old table of a measurement that is no longer requested would be read as new."""

MEASUREMENTS = {known.name: known for known in (ENERGY, DISTANCES, NOISE, PROBES)}
"""By name; `config.schema.MEASUREMENTS` lists the names, so that a wrong one is refused before anything runs."""


def evaluate_run(config: Config, dataset: CachedDataset, weights: Path, out: Path, typed: str = "") -> dict[str, Any]:
    """Measure trained weights on the held-out episodes and write metrics.json, summary.json, tables, pictures and report.html.

    The weights bring their own scaler. Results of an earlier evaluation in `out` are replaced when all is measured. `typed` are the settings
    that were typed behind the stage, for the page.

    Raises:
        ValueError: When the weights were trained on other features, actions or episodes, or too few are held out.
    """
    evaluation, settings = open_evaluation(config, dataset, weights), config.evaluate
    for name in settings.measure:
        if check := MEASUREMENTS[name].check:
            check(evaluation)
    with replaced_files(out, "metrics.json", RESULTS) as folder:
        for name in ("pictures", MEASUREMENTS_FOLDER):
            (folder / name).mkdir()
        errors = measure_windows(evaluation)
        figures = build_figures(errors, settings)
        described = describe_evaluation(evaluation, weights)
        above, above_rows = measure_above(errors, settings)
        metrics = summarize(figures, errors, dataset) | above | describe_readout(errors.readout)
        metrics["settings"] = {  # those without which the figures say nothing
            **{name: described[name] for name in ("dataset", "encoder")},
            **{
                "predictor": described["predictor"]["name"],
                "train_steps": described["step"],
                "step_hz": dataset.step_rates(evaluation.held_out_segments())[1] / settings.step_length,
            },
            **{name: described["measured"][name] for name in ("window_steps", "normalize_reps")},
            **{name: getattr(settings, name) for name in ("step_length", "num_context_steps", "horizon", "seed")},
        }
        for name in settings.measure:
            metrics |= MEASUREMENTS[name].run(evaluation, folder)
        metrics["verdict"] = describe_verdict(metrics)
        write_json(metrics, folder / "metrics.json")
        summary = {
            "val": {name: metrics["val"][name] for name in DECISIVE if name in metrics["val"]},
            "num_episodes": metrics["num_episodes"],
            "verdict": {question: judged["answer"] for question, judged in metrics["verdict"].items()},
        }
        write_json(summary, folder / "summary.json")
        write_json(described, folder / "settings.json")
        rows, facts = step_table(figures, OPEN_LOOP), describe_windows(evaluation, errors)
        tables = {
            "above": above_rows,
            "episodes": episode_table(errors),
            "horizon": rows,
            "positions": step_table(figures, TEACHER_FORCING, first_column="num_seen"),
            "slices": slice_table(facts, errors, settings),
            "worst": worst_table(facts, errors),
        }
        for name, table in tables.items():
            write_table(table, folder / f"{name}.csv")
        draw_horizon(rows, folder / "pictures/horizon.png", note=evaluation.features)
        write_films(choose_films(errors), errors, facts, evaluation, folder)
        if (history := weights.parent / "train.csv").is_file():
            draw_training(history, folder / "pictures/training.png")
        write_page(folder, MEASUREMENTS.values(), typed)
    return metrics


def describe_evaluation(evaluation: EvaluationContext, weights: Path) -> dict[str, Any]:
    """The content of settings.json: the training run, its settings (from the weights' model card), the tokens, and how they were measured."""
    card, manifest, config = read_card(weights), evaluation.dataset.manifest, evaluation.config
    description = card["description"]
    return {
        "run": card["run"],
        "step": card["step"],
        "dataset": manifest.dataset,
        "encoder": manifest.encoder,
        "encoder_trained": manifest.encoder_trained,
        **({"encoder_origin": manifest.encoder_origin} if manifest.encoder_origin else {}),
        "mode": manifest.mode,
        "dtype": evaluation.dataset.dtype,
        "tokens_fingerprint": manifest.fingerprint,
        "manifest": manifest.digest,
        "action_space": manifest.action_space,
        **({"columns": evaluation.dataset.column_names} if evaluation.dataset.column_names else {}),
        **{section: description[section] for section in ("predictor", "train", "filter", "split", "init")},
        "measured": {
            "filter": asdict(config.filter),
            "split": evaluation.dataset.describe_split(config.split),
            "evaluate": asdict(config.evaluate),
            "window_steps": evaluation.window_steps,
            "normalize_reps": evaluation.model.normalize_reps,
        },
    }


def episode_table(errors: WindowErrors) -> list[Row]:
    """One row for each held-out episode: its windows and mean L1; None where a prediction exists for no window of the episode."""
    columns: dict[str, np.ndarray] = {}
    for name, one_step in errors.one_step.items():
        names = ("teacher_forcing_l1", "rollout_l1") if name == MODEL else (f"{name}_l1", f"rollout_{name}_l1")
        for column, values in zip(names, (one_step, mean_of_steps(errors.open_loop["l1"][name])), strict=True):
            columns[column] = episode_means(values, errors.episodes)
    counts = Counter(errors.episodes)
    return [
        {"episode": episode, "num_windows": counts[episode]}
        | {name: float(values[row]) if np.isfinite(values[row]) else None for name, values in columns.items()}
        for row, episode in enumerate(sorted(counts))
    ]


def describe_metrics(metrics: Mapping[str, Any], horizon: int) -> str:
    """The figures in a few lines: errors, the verdict, and the gain over every baseline and ablation with its interval."""
    val = metrics["val"]
    lines = [
        f"{metrics['num_windows']} windows of {metrics['num_episodes']} held-out episodes; L1 of "
        f"{'layer-normed ' if metrics['settings']['normalize_reps'] else ''}tokens, 95 % intervals over episodes",
        f"  teacher forcing {val['teacher_forcing_l1']:.3f}, open loop {val['rollout_l1']:.3f} (mean of steps 1 to {horizon})",
    ]
    lines.append("  its error below that of every baseline and ablation; negative: above")
    for name in PREDICTIONS[1:]:
        one_step, last = (find_gain(metrics, key) or "not measured" for key in (name, f"{name}_step{horizon}"))
        lines.append(f"    {name}: one step {one_step}, open-loop step {horizon} {last}")
    lines.append(
        f"  mean, regression and no_actions are fitted on all {metrics['num_fitted_steps']} steps of the training episodes"
    )
    return "\n".join([*lines, *(f"  {answer['words']}" for answer in metrics["verdict"].values())])
