"""`jepa-cache inspect --batch`: one training batch, read as the trainer reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jepa_cache.config.loading import find_repository, load_config
from jepa_cache.inspection.batch import (
    BatchReport,
    ColumnReport,
    Spread,
    TensorReport,
    WindowReport,
    describe_batch,
    describe_tensor,
    name_window,
)

if TYPE_CHECKING:
    from jepa_cache.data.cache import CachedDataset
    from jepa_cache.data.loader import Batch
    from jepa_cache.data.windows import WindowIndex

MAX_STRIPS = 8
"""Windows whose frames are shown; those of a window of 8 steps in 1280x720 take 22 MB until they are made small."""


def inspect_batch(overrides: Sequence[str], *, as_json: bool, html: Path | None) -> None:
    """Show the first training batch of the encoded data set.

    Args:
        overrides: `key=value` settings, as training takes them.
        as_json: Print JSON instead of tables.
        html: Write a page with the windows' frames to this file as well.

    Raises:
        ValueError: Nothing is encoded, no scaler is fitted, or either was made with other settings.
    """
    from jepa_cache.data.cache import Segment, open_dataset
    from jepa_cache.data.frames import read_frames
    from jepa_cache.data.loader import WindowLoader
    from jepa_cache.data.scaler import check_scaler, read_scaler
    from jepa_cache.data.splits import TRAIN
    from jepa_cache.data.windows import WindowIndex, WindowSampler
    from jepa_cache.inspection.batch_page import build_batch_page
    from jepa_cache.training.batches import mixture_groups

    root = find_repository(Path.cwd())
    config = load_config(root, overrides)
    dataset = open_dataset(config, root)
    scaler = read_scaler(root / "outputs/scaler/scaler.json")
    segments = dataset.segments_of(TRAIN, config.split, config.filter)
    check_scaler(scaler, segments)
    settings = config.train
    index = WindowIndex(segments, settings.window_steps)
    sampler = WindowSampler(len(index), settings.batch_size, seed=settings.seed, groups=mixture_groups(dataset, index))
    batch = WindowLoader(dataset, index, scaler).read(sampler.numbers(0).tolist())
    windows = [index[int(number)] for number in batch.numbers]
    controls = [dataset.controls(window.store) for window in windows]
    runs = [slice(window.start, window.start + index.num_steps) for window in windows]
    raw_actions = np.stack([actions[run][:-1] for (actions, _), run in zip(controls, runs, strict=True)])
    raw_states = np.stack([states[run] for (_, states), run in zip(controls, runs, strict=True)])
    report = describe_batch(
        {
            "dataset": dataset.manifest.dataset,
            "encoder": dataset.manifest.encoder + ("" if dataset.manifest.encoder_trained else " (random weights)"),
            "mode": dataset.manifest.mode,
            "step_hz": config.step_hz,
            "action_space": dataset.space.name,
            "num_windows": len(index),
            "num_segments": len(segments),
            "seed": settings.seed,
        },
        dataset.space,
        _describe_tensors(batch, settings.normalize_reps),
        actions=(batch.actions.numpy(), raw_actions),
        states=(batch.states.numpy(), raw_states),
        windows=_locate(dataset, index, batch.numbers),
    )
    if html is not None:
        shown = [
            Segment(window.store, index.segments[window.segment].episode, run.start, run.stop)
            for window, run in zip(windows[:MAX_STRIPS], runs, strict=False)
        ]
        frames = read_frames(config, dataset, shown)
        html.write_text(build_batch_page(report, frames, raw_actions), encoding="utf-8")
    dataset.close()
    if as_json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
        return
    print_batch(report)
    if html is not None:
        print(f"wrote {html}")


def _describe_tensors(batch: Batch, normalize_reps: bool) -> list[TensorReport]:
    from jepa_cache.predictor.rollout import as_reps

    given = "layer-normed" if normalize_reps else "as float32"
    meaning = f"tokens {given}: what the predictor is given and has to predict"
    tensors = (
        ("tokens", "B T N D", "encoder output, as stored", batch.tokens),
        ("h", "B T N D", meaning, as_reps(batch.tokens, normalize_reps)),
        ("actions", "B T-1 A", "scaled; row t leads from step t to t+1", batch.actions),
        ("states", "B T S", "scaled", batch.states),
    )
    return [
        describe_tensor(name, axes, words, str(tensor.dtype).removeprefix("torch."), list(tensor.numpy()))
        for name, axes, words, tensor in tensors
    ]


def _locate(dataset: CachedDataset, index: WindowIndex, numbers: np.ndarray) -> list[WindowReport]:
    """Where the windows come from."""
    from jepa_cache.data.windows import first_cached_rows

    located, first_rows = [], first_cached_rows(dataset.segments)
    for number in numbers:
        window = index[int(number)]
        part, _ = dataset.manifest.stores[window.store]
        episode = index.segments[window.segment].episode
        steps = dataset.steps(window.store).slice(window.start, index.num_steps)
        located.append(
            WindowReport(
                dataset=part.dataset,
                camera=part.camera,
                phase=part.phase,
                episode=episode,
                first_step=window.start - first_rows[window.store, episode],
                frames=steps.column("frame").to_pylist(),
                ticks=steps.column("tick").to_pylist(),
            )
        )
    return located


def print_batch(report: BatchReport) -> None:
    """Print the tables: tensors, action and state columns, windows."""
    settings = report.settings
    print(
        f"the first training batch: {len(report.windows)} of {settings['num_windows']} windows in {settings['num_segments']} segments; "
        f"data set {settings['dataset']}, encoder {settings['encoder']}, {settings['mode']} mode, {settings['step_hz']:g} steps/s"
    )
    print(f"\n{'tensor':<8} {'shape':<22} {'dtype':<8} {'min':>9} {'mean':>9} {'max':>9} {'std':>9}")
    for tensor in report.tensors:
        shape = " ".join(f"{letter}={n}" for letter, n in zip(tensor.axes.split(), tensor.shape, strict=True))
        print(f"{tensor.name:<8} {shape:<22} {tensor.dtype:<8} {_numbers(tensor.spread)}  {tensor.meaning}")
    for title, columns in (("action", report.actions), ("state", report.states)):
        print(f"\n{title + ' column':<14} {'unit':<18} {'scaled min':>10} {'mean':>9} {'max':>9} {'std':>9}", end="")
        print(f" | {'raw min':>9} {'mean':>9} {'max':>9} {'std':>9}")
        for column in columns:
            print(_column_line(column))
    print()
    for number, window in enumerate(report.windows):
        frames, ticks = (f"{values[0]} to {values[-1]}" for values in (window.frames, window.ticks))
        print(f"window {number}: {name_window(window)}; frames {frames}, ticks {ticks}")
    bad = [tensor.name for tensor in report.tensors if tensor.spread.num_bad]
    if bad:
        print(f"suspicious: {', '.join(bad)} hold values that are not finite")


def _column_line(column: ColumnReport) -> str:
    return f"{column.name:<14} {column.unit[:18]:<18}  {_numbers(column.scaled)} | {_numbers(column.raw)}"


def _numbers(spread: Spread) -> str:
    values = (spread.minimum, spread.mean, spread.maximum, spread.std)
    return " ".join(f"{'-' if value is None else format(value, '.4g'):>9}" for value in values)
