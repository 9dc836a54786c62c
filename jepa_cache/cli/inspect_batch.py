"""`jepa-cache inspect --batch`: shapes and ranges of the first training batch, read as the trainer reads it, window by window."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_cache.actions import Column
from jepa_cache.config.loading import find_repository, load_config

if TYPE_CHECKING:
    from jepa_cache.data.cache import CachedDataset
    from jepa_cache.data.loader import Batch
    from jepa_cache.data.windows import WindowIndex

Report = dict[str, Any]

MAX_STRIPS = 8
"""Windows whose frames are shown; those of a window of 8 steps in 1280x720 take 22 MB until they are made small."""
STRIP_WIDTH = 160  # pixels


def describe_batch(overrides: Sequence[str], *, pictures: bool) -> Report:
    """Describe the first training batch of the encoded data set.

    Args:
        overrides: `key=value` settings, as training takes them.
        pictures: Add the frames of the first windows, as data URLs; None where the recording is not on this machine.

    Returns:
        `settings` it was made with; `tensors`, action and state columns with their spreads; `windows` by their position in the
        recordings, where `raw_actions` [T-1, A] lead from one frame to the next.

    Raises:
        ValueError: Nothing is encoded, no scaler is fitted, or either was made with other settings.
    """
    from jepa_cache.data.cache import TRAIN, Segment, open_dataset
    from jepa_cache.data.frames import read_frames
    from jepa_cache.data.loader import WindowLoader
    from jepa_cache.data.scaler import check_scaler, read_scaler
    from jepa_cache.data.windows import WindowIndex, WindowSampler
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
    located = _locate(dataset, index, batch.numbers)
    for window, values in zip(located, raw_actions, strict=True):
        window["raw_actions"] = values.tolist()
    if pictures:
        shown = [
            Segment(window.store, index.segments[window.segment].episode, run.start, run.stop)
            for window, run in zip(windows[:MAX_STRIPS], runs, strict=False)
        ]
        for window, frames in zip(located, read_frames(config, dataset, shown), strict=False):
            window["pictures"] = None if frames is None else [encode_picture(frame, STRIP_WIDTH) for frame in frames]
    manifest = dataset.manifest
    dataset.close()
    return {
        "settings": {
            "dataset": manifest.dataset,
            "encoder": manifest.encoder + ("" if manifest.encoder_trained else " (random weights)"),
            "mode": manifest.mode,
            "step_hz": config.step_hz,
            "action_space": dataset.space.name,
            "num_windows": len(index),
            "num_segments": len(segments),
            "seed": settings.seed,
        },
        "tensors": _describe_tensors(batch, settings.normalize_reps),
        "actions": describe_columns(dataset.space.actions, batch.actions.numpy(), raw_actions),
        "states": describe_columns(dataset.space.states, batch.states.numpy(), raw_states),
        "windows": located,
    }


def _describe_tensors(batch: Batch, normalize_reps: bool) -> list[Report]:
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
        {
            "name": name,
            "axes": axes,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "meaning": words,
            "spread": measure_spread(list(tensor.numpy())),
        }
        for name, axes, words, tensor in tensors
    ]


def _locate(dataset: CachedDataset, index: WindowIndex, numbers: np.ndarray) -> list[Report]:
    """Where the windows come from."""
    from jepa_cache.data.windows import first_cached_rows

    located, first_rows = [], first_cached_rows(dataset.segments)
    for number in numbers:
        window = index[int(number)]
        part, _ = dataset.manifest.stores[window.store]
        episode = index.segments[window.segment].episode
        steps = dataset.steps(window.store).slice(window.start, index.num_steps)
        located.append(
            {
                "dataset": part.dataset,
                "camera": part.camera,
                "phase": part.phase,
                "episode": episode,
                "first_step": window.start - first_rows[window.store, episode],  # counted from the start of its episode
                "frames": steps.column("frame").to_pylist(),  # of the video
                "ticks": steps.column("tick").to_pylist(),  # rows of the controls
            }
        )
    for window in located:
        window["name"] = _name_window(window)
    return located


def _name_window(window: Report) -> str:
    """A window in words: data set, camera, phase, episode and steps."""
    camera = f", {window['camera']}" if window["camera"] else ""
    phase = f", phase {window['phase']}" if window["phase"] else ""
    steps = f"steps {window['first_step']} to {window['first_step'] + len(window['frames']) - 1}"
    return f"{window['episode']}, {steps} ({window['dataset']}{camera}{phase})"


def measure_spread(parts: Sequence[np.ndarray]) -> Report:
    """Minimum, mean, maximum and deviation over all finite values of some arrays, in float64; None where there is none."""
    finite = [part[np.isfinite(part)].astype(np.float64) for part in parts]
    count, num_values = sum(map(len, finite)), sum(part.size for part in parts)
    if count == 0:
        return {**dict.fromkeys(("minimum", "mean", "maximum", "std")), "num_bad": num_values}
    finite = [values for values in finite if len(values)]
    mean = sum(float(values.sum()) for values in finite) / count
    variance = sum(float(((values - mean) ** 2).sum()) for values in finite) / count
    low, high = min(values.min() for values in finite), max(values.max() for values in finite)
    spread = {"minimum": float(low), "mean": mean, "maximum": float(high), "std": variance**0.5}
    return {**spread, "num_bad": num_values - count}


def describe_columns(columns: Sequence[Column], scaled: np.ndarray, raw: np.ndarray) -> list[Report]:
    """Spreads of the columns of [B, T, C] values, as the predictor gets them and as they were recorded."""
    return [
        {**column._asdict(), "scaled": measure_spread([scaled[..., i]]), "raw": measure_spread([raw[..., i]])}
        for i, column in enumerate(columns)
    ]


def encode_picture(frame: np.ndarray, width: int) -> str:
    """A frame [h, w, 3] uint8 as the data URL of a JPEG, thinned to between `width` and twice that where it is larger."""
    from matplotlib.image import imsave

    stride = max(1, frame.shape[1] // width)
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(frame[::stride, ::stride]), format="jpeg", pil_kwargs={"quality": 75})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def print_batch(report: Report) -> None:
    """Print the tables: tensors, action and state columns, windows."""
    settings = report["settings"]
    print(
        f"the first training batch: {len(report['windows'])} of {settings['num_windows']} windows in {settings['num_segments']} "
        f"segments; data set {settings['dataset']}, encoder {settings['encoder']}, {settings['mode']} mode, "
        f"{settings['step_hz']:g} steps/s"
    )
    print(f"\n{'tensor':<8} {'shape':<22} {'dtype':<8} {'min':>9} {'mean':>9} {'max':>9} {'std':>9}")
    for tensor in report["tensors"]:
        shape = " ".join(f"{letter}={n}" for letter, n in zip(tensor["axes"].split(), tensor["shape"], strict=True))
        print(f"{tensor['name']:<8} {shape:<22} {tensor['dtype']:<8} {_numbers(tensor['spread'])}  {tensor['meaning']}")
    for title, columns in (("action", report["actions"]), ("state", report["states"])):
        print(f"\n{title + ' column':<14} {'unit':<18} {'scaled min':>10} {'mean':>9} {'max':>9} {'std':>9}", end="")
        print(f" | {'raw min':>9} {'mean':>9} {'max':>9} {'std':>9}")
        for column in columns:
            spreads = f"{_numbers(column['scaled'])} | {_numbers(column['raw'])}"
            print(f"{column['name']:<14} {column['unit'][:18]:<18}  {spreads}")
    print()
    for number, window in enumerate(report["windows"]):
        frames, ticks = (f"{values[0]} to {values[-1]}" for values in (window["frames"], window["ticks"]))
        print(f"window {number}: {window['name']}; frames {frames}, ticks {ticks}")
    if bad := [tensor["name"] for tensor in report["tensors"] if tensor["spread"]["num_bad"]]:
        print(f"suspicious: {', '.join(bad)} hold values that are not finite")


def _numbers(spread: Report) -> str:
    values = (spread[name] for name in ("minimum", "mean", "maximum", "std"))
    return " ".join(f"{'-' if value is None else format(value, '.4g'):>9}" for value in values)
