"""`jepa-cache view`: an episode of the cache in Rerun, a viewer with a time line."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from jepa_cache.config.loading import find_repository, load_config, outputs_folder, split_arguments
from jepa_cache.config.paths import require
from jepa_cache.data.dataset import CachedDataset, open_dataset
from jepa_cache.data.episodes import Dataset, Run
from jepa_cache.data.windows import first_cached_rows
from jepa_cache.evaluation.context import EvaluationContext, open_evaluation
from jepa_cache.evaluation.metrics import unguard_cell
from jepa_cache.evaluation.pictures import TokenColours
from jepa_cache.predictor.checkpoints import read_card

ZOOM = 16
"""Pixels of a token's colour."""
PLACE_COLUMNS = ("episode", "camera", "phase", "first_step", "horizon")
PLAN_KINDS = ("plan", "recorded", "random", "zero", "other_goal", "moved")
"""Columns of plans.csv: where a plan begins, and ends of those that are compared with each other."""


def view(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="key of the episode (else the first held-out one); key=value or FILE.yaml"),
    ] = None,
    *,
    save: Annotated[
        Path | None, typer.Option(help="write a .rrd file for another machine's viewer; needs no screen")
    ] = None,
) -> None:
    """Show an episode in Rerun: frames, tokens as colours, actions and states; and what a trained predictor foresees of each next step.

    Frames are shown where the recording is still on this machine, predictions where train of the outputs has a predictor of this cache. With
    predictions go two curves: their error, and that of copying the last step. Plans that stages/plan.py made with this predictor stand where
    they begin: their energy and the recorded actions', where they end, and the goal frame.
    """
    overrides, keys = split_arguments(arguments)
    if len(keys) > 1:
        raise ValueError(f"view shows one episode; got {', '.join(keys)}")
    if (
        save is None
        and sys.platform == "linux"
        and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    ):
        raise ValueError("there is no screen here; --save FILE.rrd writes a file that `rerun FILE.rrd` shows elsewhere")
    require("rerun", "view", "jepa-cache view")
    root = find_repository(Path.cwd())
    config = load_config(root, overrides)
    dataset = open_dataset(config, root)
    episodes = Dataset(dataset, config)
    key = keys[0] if keys else (episodes.keys("val") or episodes.keys())[0]
    weights = outputs_folder(config, root) / "train/run/predictor.safetensors"
    evaluation = open_evaluation(config, dataset, weights) if weights.is_file() else None

    import rerun

    rerun.init("jepa-cache", recording_id=f"{dataset.manifest.dataset}/{key}", spawn=save is None)
    if save is not None:
        rerun.save(save)
    plans = read_plans(outputs_folder(config, root) / "plan", weights, key)
    step, first_rows = 0, first_cached_rows(dataset.segments)
    runs, frames = episodes.episode(key), episodes.frames(key)
    for segment, run, pictures in zip(episodes.segments(key), runs, frames, strict=True):
        tokens = run.tokens if evaluation is None else evaluation.model.as_reps(run.tokens.to(evaluation.device)).cpu()
        run, colours = run._replace(tokens=tokens), TokenColours(tokens.numpy())
        _log_run(dataset, step, run, colours, pictures)
        if evaluation is not None:
            _log_predictions(evaluation, step, run, colours)
        part = dataset.manifest.stores[segment.store][0]
        own = [row for row in plans if (row["camera"], row["phase"]) == (part.camera or "", str(part.phase))]
        _log_plans(own, step, segment.start - first_rows[segment.store, key], pictures, len(run.tokens))
        step += len(run.tokens)
    rerun.disconnect()
    told = "" if evaluation is not None else f"; no predictor in {config.outputs}/train, so nothing is foreseen"
    shown = (
        ""
        if any(pictures is not None for pictures in frames)
        else "; the recording is not on this machine, so there are no frames"
    )
    print(f"{key}: {step} steps in {len(runs)} runs{told}{shown}")
    if save is not None:
        print(f"wrote {save}; next: rerun {save}")


def _log_run(dataset: CachedDataset, first: int, run: Run, colours: TokenColours, frames: np.ndarray | None) -> None:
    """Log steps in a row, with their frames [T, h, w, 3] or None."""
    import rerun

    painted = _paint(colours, run.tokens, dataset.manifest.grid)
    for place in range(len(painted)):
        rerun.set_time("step", sequence=first + place)
        rerun.log("tokens/true", rerun.Image(painted[place]))
        if frames is not None:
            rerun.log("camera", rerun.Image(frames[place]).compress(jpeg_quality=90))
        for name, columns, rows in (
            ("states", dataset.space.states, run.states),
            ("actions", dataset.space.actions, run.actions),
        ):
            for column, value in zip(columns, rows[place] if place < len(rows) else (), strict=False):
                rerun.log(f"{name}/{column.name}", rerun.Scalars(float(value)))


@torch.no_grad()
def _log_predictions(evaluation: EvaluationContext, first: int, run: Run, colours: TokenColours) -> None:
    """Log what is foreseen of each step from the true ones before it, in the colours of the true tokens, and how far it is off."""
    import rerun

    context, scaler, tokens = evaluation.config.evaluate.num_context_steps, evaluation.scaler, run.tokens
    scaled = scaler.actions.apply(run.actions.numpy()), scaler.states.apply(run.states.numpy())
    inputs = [rows.to(evaluation.device) for rows in (tokens, *map(torch.from_numpy, scaled))]
    for place in range(context, len(tokens)):
        given = (rows[place - context : place][None] for rows in inputs)
        foreseen = evaluation.model.open_loop(*given, 1)[0].cpu()
        rerun.set_time("step", sequence=first + place)
        rerun.log("tokens/foreseen", rerun.Image(_paint(colours, foreseen, evaluation.dataset.manifest.grid)[0]))
        for name, guess in (("predictor", foreseen[0]), ("copy_last", tokens[place - 1])):
            rerun.log(f"error/{name}", rerun.Scalars(float((guess - tokens[place]).abs().mean())))


def read_plans(folder: Path, weights: Path, key: str) -> list[dict[str, str]]:
    """Rows of plans.csv that begin in an episode; none, and a word why, where the plans there are not of these weights' training."""
    if not (folder / "plans.csv").is_file() or not weights.is_file():
        return []
    planned = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("run")
    if planned != read_card(weights)["run"]:
        print(
            f"plans in {folder} are not of this predictor, so they are not shown; python stages/plan.py makes them anew"
        )
        return []
    with (folder / "plans.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if unguard_cell(row["episode"]) == key]


def _log_plans(
    plans: Sequence[Mapping[str, str]], first: int, first_step: int, frames: np.ndarray | None, num_steps: int
) -> None:
    """Log plans that begin in a run: its step `first_step` of the episode stands at `first` of the time line."""
    import rerun

    for plan in plans:
        place, ahead = int(plan["first_step"]) - first_step, int(plan["horizon"])
        if not 0 <= place < num_steps - ahead:
            continue
        rerun.set_time("step", sequence=first + place)
        above = f"plans/{ahead}_steps"
        if frames is not None:
            rerun.log(f"{above}/goal", rerun.Image(frames[place + ahead]).compress(jpeg_quality=90))
        for column in (name for name in plan if name not in PLACE_COLUMNS):
            kind, _, name = column.partition("_")
            if kind not in ("planned", "recorded"):
                kind = next(kind for kind in PLAN_KINDS if column.endswith(f"_{kind}"))
                name = column.removesuffix(f"_{kind}")
            rerun.log(f"{above}/{name}/{kind}", rerun.SeriesPoints(), static=True)
            rerun.log(f"{above}/{name}/{kind}", rerun.Scalars(float(plan[column])))


def _paint(colours: TokenColours, tokens: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Pictures uint8 [T, ZOOM * H, ZOOM * W, 3] of tokens [T, N, D]."""
    painted = (255 * colours.paint(tokens.numpy(), grid)).astype(np.uint8)
    return painted.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
