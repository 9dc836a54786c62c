"""What an evaluation leaves behind: metrics.json with a verdict in words, tables, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.evaluation.context import EvaluationContext, open_evaluation
from jepa_cache.evaluation.distances import write_distances
from jepa_cache.evaluation.energy import write_energy
from jepa_cache.evaluation.noise import write_noise
from jepa_cache.evaluation.page import write_page
from jepa_cache.evaluation.pictures import draw_pictures
from jepa_cache.evaluation.record import write_record
from jepa_cache.evaluation.run import horizon_table, position_table, summarize
from jepa_cache.evaluation.slices import describe_windows, slice_table, worst_table
from jepa_cache.evaluation.tables import MEASUREMENTS_FOLDER, write_json, write_table
from jepa_cache.evaluation.verdict import describe_verdict, find_gain
from jepa_cache.evaluation.windows import PREDICTIONS, measure_windows
from jepa_cache.files import replaced_files
from jepa_cache.predictor.checkpoints import read_card

DECISIVE = {
    "val": (
        *("teacher_forcing_l1", "rollout_l1", "ratio_copy_last"),
        *("gain_copy_last_percent", "gain_regression_percent", "gain_shuffled_actions_percent"),
    ),
    "energy": ("mean_rank", "top10_rate"),
}
"""Figures of metrics.json that stand in summary.json too, by section; the answers of the verdict join them."""

RESULTS = ("*.csv", "*.json", "report.html", "pictures", MEASUREMENTS_FOLDER)
"""What an evaluation leaves: an old table of a measurement that is no longer requested would be read as new."""

Measurement = Callable[[EvaluationContext, Path], dict[str, Any]]
"""Writes tables of its own into the folder and gives its sections of metrics.json, such as `energy` and `energy_ci`."""


def _run_probes(evaluation: EvaluationContext, out: Path) -> dict[str, Any]:
    # Here, because scikit-learn takes two seconds of everybody else.
    from jepa_cache.evaluation.probes import run_probes

    return run_probes(evaluation, out)


MEASUREMENTS: dict[str, Measurement] = {
    "energy": write_energy,
    "distances": write_distances,
    "noise": write_noise,
    "probes": _run_probes,
}
"""What `evaluate.measure` may ask for; the names stand in `config.schema.MEASUREMENTS` too."""


def evaluate_run(config: Config, dataset: CachedDataset, weights: Path, out: Path) -> dict[str, Any]:
    """Measure trained weights on the held-out episodes and write metrics.json, summary.json, tables, pictures and report.html.

    Args:
        config: Its `evaluate` and `split` sections count, and where to compute: `train.device`.
        dataset: The cached features.
        weights: predictor.safetensors of a training run; brings its own scaler.
        out: Folder for the results of this evaluation alone: those of an earlier one are replaced when all is measured.

    Raises:
        ValueError: When the weights were trained on other features, actions or episodes, or too few are held out.
    """
    evaluation = open_evaluation(config, dataset, weights)
    with replaced_files(out, "metrics.json", RESULTS) as folder:
        return _measure(evaluation, weights, folder)


def _measure(evaluation: EvaluationContext, weights: Path, out: Path) -> dict[str, Any]:
    config, dataset = evaluation.config, evaluation.dataset
    for name in ("pictures", MEASUREMENTS_FOLDER):
        (out / name).mkdir()
    errors = measure_windows(evaluation)
    metrics = summarize(errors, config, dataset) | {"settings": describe_settings(evaluation, weights)}
    metrics["verdict"] = describe_verdict(metrics)
    for name in config.evaluate.measure:
        metrics |= MEASUREMENTS[name](evaluation, out)
    write_json(metrics, out / "metrics.json")
    write_json(pick_decisive(metrics), out / "summary.json")
    write_record(errors, evaluation, weights, out)
    rows, facts = horizon_table(errors, config), describe_windows(evaluation, errors)
    write_table(rows, out / "horizon.csv")
    for measure in ("l2", "cosine"):
        write_table(horizon_table(errors, config, measure), out / f"horizon_{measure}.csv")
    write_table(position_table(errors, config), out / "positions.csv")
    write_table(slice_table(facts, errors, config.evaluate), out / "slices.csv")
    write_table(worst_table(facts, errors), out / "worst.csv")
    draw_pictures(errors, evaluation, rows, out / "pictures")
    write_page(out)
    return metrics


def pick_decisive(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures by which runs are chosen, under their names in metrics.json: what `dvc metrics show` and `dvc exp show` list.

    What was not measured is left out, so that no experiment shows a figure that it does not have.
    """
    chosen: dict[str, Any] = {
        section: {name: metrics[section][name] for name in names if name in metrics[section]}
        for section, names in DECISIVE.items()
        if section in metrics
    }
    return chosen | {
        "num_episodes": metrics["num_episodes"],
        "verdict": {question: judged["answer"] for question, judged in metrics["verdict"].items()},
    }


def describe_settings(evaluation: EvaluationContext, weights: Path) -> dict[str, Any]:
    """The few settings without which the figures say nothing; settings.json holds all."""
    card, manifest, settings = read_card(weights), evaluation.dataset.manifest, evaluation.config.evaluate
    return {
        "dataset": manifest.dataset,
        "encoder": manifest.encoder,
        "predictor": card["description"]["predictor"]["name"],
        "train_steps": card["step"],
        "window_steps": evaluation.window_steps,
        "num_context_steps": settings.num_context_steps,
        "horizon": settings.horizon,
        "step_hz": evaluation.config.step_hz,
        "normalize_reps": evaluation.model.normalize_reps,
        "seed": settings.seed,
    }


def describe_metrics(metrics: Mapping[str, Any], horizon: int) -> str:
    """The figures in a few lines: errors, the verdict, and the gain over every baseline and control with its interval."""
    val = metrics["val"]
    lines = [
        f"{metrics['num_windows']} windows of {metrics['num_episodes']} held-out episodes; L1 of "
        f"{'layer-normed ' if metrics['settings']['normalize_reps'] else ''}tokens, 95 % intervals over episodes",
        f"  teacher forcing {val['teacher_forcing_l1']:.3f}, open loop {val['rollout_l1']:.3f} (mean of steps 1 to {horizon})",
    ]
    for name in PREDICTIONS[1:]:
        gains = [find_gain(metrics, name, where) for where in ("", f"_step{horizon}")]
        one_step, last = ("not measured" if gain is None else str(gain) for gain in gains)
        lines.append(f"  error below that of {name}: one step {one_step}, open-loop step {horizon} {last}")
    lines.append(
        f"  mean and regression are fitted on all {metrics['num_fitted_steps']} steps of the training episodes"
    )
    return "\n".join([*lines, *(f"  {answer['words']}" for answer in metrics["verdict"].values())])
