"""What an evaluation leaves behind: metrics.json, horizon.csv, pictures, and a verdict in words that follows from the figures."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jepa_cache.config.schema import Config
from jepa_cache.data.cache import CachedDataset
from jepa_cache.data.scaler import scaler_from_json
from jepa_cache.evaluation.plots import draw_horizon, draw_strip
from jepa_cache.evaluation.run import horizon_table, measure_windows, summarize
from jepa_cache.evaluation.strips import build_strip
from jepa_cache.predictor.checkpoints import load_predictor, read_card
from jepa_cache.store.recipe import canonical_json
from jepa_cache.store.root import atomic_file

NUM_STRIPS = 2
OF_THE_MACHINE = (
    "device",
    "keep_ranges",  # known by its content, which the segments show
    "log_every",
    "num_threads",
    "validate_every",
)  # move no weight, so weights may differ in them
NUM_DIGITS = 3  # of figures in words


def evaluate_run(config: Config, dataset: CachedDataset, weights: Path, out: Path) -> dict[str, Any]:
    """Measure trained weights on the held-out episodes and write metrics.json, horizon.csv and pictures.

    Args:
        config: Its `evaluate` and `split` sections count, and where to compute: `train.device`.
        dataset: The cached features.
        weights: predictor.safetensors of a training run; brings its own scaler.
        out: Folder for the results.

    Raises:
        ValueError: When the weights were trained on other features, actions or episodes, or too few are held out.
    """
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; run `python stages/train_predictor.py` first")
    predictor, card = load_predictor(weights)
    manifest = dataset.manifest
    for name, then, now, way_out in (
        ("tokens recipe", card["tokens_fingerprint"], manifest.fingerprint, "encode as then"),
        ("action space", card["action_space"], dataset.space.name, "encode as then"),
        (
            "split",
            card["description"]["split"],
            asdict(config.split),
            "set split.* as then: it decides what was held out",
        ),
    ):
        if then != now:
            raise ValueError(
                f"{weights} was trained with {name} {then}, but now it is {now}; train again, or {way_out}"
            )
    device = "cuda" if config.train.device == "auto" and torch.cuda.is_available() else "cpu"
    predictor = predictor.to(device).eval()
    scaler, normalize_reps = scaler_from_json(card["scaler"]), card["normalize_reps"]
    errors = measure_windows(
        predictor, config, dataset, scaler, window_steps=card["window_steps"], normalize_reps=normalize_reps
    )
    metrics = summarize(errors, config, dataset)
    write_metrics(metrics, out / "metrics.json")
    rows = horizon_table(errors, config)
    write_horizon(rows, out / "horizon.csv")
    pictures = out / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    note = f"dataset {manifest.dataset}, encoder {manifest.encoder}" + (
        "" if manifest.encoder_trained else " (untrained)"
    )
    draw_horizon(rows, pictures / "horizon.png", note=note)
    for strip, position in enumerate(_spread(len(errors.numbers), NUM_STRIPS)):
        drawn = build_strip(position, errors, predictor, config, dataset, scaler, normalize_reps=normalize_reps)
        draw_strip(drawn, pictures / f"strip{strip + 1}.png")
    return metrics


def check_settings(config: Config, weights: Path) -> None:
    """Refuse weights of another training: those of an earlier run still lie there when the one asked for was interrupted.

    Raises:
        ValueError: Naming every setting that differs, or when the weights are missing.
    """
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; run `python stages/train_predictor.py` first")
    description = read_card(weights)["description"]
    now = {section: asdict(getattr(config, section)) for section in ("predictor", "train", "split", "filter")}
    differing = [
        f"{section}.{key} was {then!r}, now it is {now[section].get(key)!r}"
        for section in now
        for key, then in description[section].items()
        if key not in OF_THE_MACHINE and now[section].get(key) != then
    ]
    if differing:
        raise ValueError(
            f"{weights} is of another training ({'; '.join(differing)}); run `python stages/train_predictor.py` with these "
            "settings, or evaluate with those"
        )


def _spread(count: int, num: int) -> list[int]:
    """Positions spread over a list, away from its ends."""
    return sorted({(2 * i + 1) * count // (2 * num) for i in range(num)})


def write_metrics(metrics: Mapping[str, Any], path: Path) -> None:
    """Write metrics.json atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(canonical_json(metrics))


def write_horizon(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write the table of errors per open-loop step as CSV."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def describe_metrics(metrics: Mapping[str, Any], horizon: int) -> str:
    """The figures in a few lines: gaps with intervals, and whether each is above chance."""
    val, interval = metrics["val"], metrics["val_ci"]
    lines = [
        f"{metrics['num_windows']} windows of {metrics['num_episodes']} held-out episodes; L1 of layer-normed tokens, "
        "95 % intervals over episodes",
        f"  teacher forcing {val['teacher_forcing_l1']:.3f}, open loop {val['rollout_l1']:.3f} (mean of steps 1 to {horizon})",
    ]
    for name, words in (
        ("copy_last", "copying the last step"),
        ("shuffled_actions", "shuffled actions"),
        ("zero_actions", "zero actions"),
    ):
        for key, where in ((f"gap_{name}", "one step"), (f"gap_{name}_step{horizon}", f"open-loop step {horizon}")):
            low, high = (round(end, NUM_DIGITS) for end in interval[key])  # a gap below the last digit shown is none
            verdict = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
            lines.append(
                f"  {where}: {verdict} {words}, gap {val[key]:.{NUM_DIGITS}f} [{low:.{NUM_DIGITS}f}, {high:.{NUM_DIGITS}f}]"
            )
    if not metrics["encoder_trained"]:
        lines.append(
            "  the encoder has random weights: these figures show that the path works, nothing about the world"
        )
    if not metrics["comparable"]:
        lines.append("  clip mode: early steps have seen later frames; not comparable with frame or tubelet mode")
    return "\n".join(lines)
