"""`jepa-cache view`: an episode of the cache in Rerun, a viewer with a time line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from jepa_cache.config.loading import find_repository, is_override, load_config
from jepa_cache.config.paths import require
from jepa_cache.data.dataset import CachedDataset, Segment, open_dataset
from jepa_cache.data.episodes import Dataset
from jepa_cache.evaluation.context import EvaluationContext, open_evaluation
from jepa_cache.evaluation.pictures import TokenColours

ZOOM = 16
"""Pixels of a token's colour."""


def view(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="key of the episode (else the first held-out one); key=value")
    ] = None,
    *,
    save: Annotated[
        Path | None, typer.Option(help="write a .rrd file for another machine's viewer; needs no screen")
    ] = None,
) -> None:
    """Show an episode in Rerun: frames, tokens as colours, actions and states; and what a trained predictor foresees of each next step.

    Frames are shown where the recording is still on this machine, predictions where outputs/train has a predictor of this cache. With
    predictions go two curves: their error, and that of copying the last step.
    """
    given = arguments or []
    keys = [text for text in given if not is_override(text)]
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
    config = load_config(root, [text for text in given if is_override(text)])
    dataset = open_dataset(config, root)
    episodes = Dataset(dataset, config)
    key = keys[0] if keys else (episodes.keys("val") or episodes.keys())[0]
    weights = root / "outputs/train/run/predictor.safetensors"
    evaluation = open_evaluation(config, dataset, weights) if weights.is_file() else None
    segments = episodes.segments(key)
    frames = episodes.frames(key)

    import rerun

    rerun.init("jepa-cache", recording_id=f"{dataset.manifest.dataset}/{key}", spawn=save is None)
    if save is not None:
        rerun.save(save)
    step = 0
    for segment, run, pictures in zip(segments, episodes.episode(key), frames, strict=True):
        tokens = run.tokens if evaluation is None else evaluation.model.as_reps(run.tokens.to(evaluation.device)).cpu()
        _log_run(dataset, step, tokens.numpy(), run.actions.numpy(), run.states.numpy(), pictures)
        if evaluation is not None:
            _log_predictions(evaluation, segment, step, tokens)
        step += len(run.tokens)
    rerun.disconnect()
    told = "" if evaluation is not None else "; no predictor in outputs/train, so nothing is foreseen"
    shown = (
        ""
        if any(pictures is not None for pictures in frames)
        else "; the recording is not on this machine, so there are no frames"
    )
    print(f"{key}: {step} steps in {len(segments)} runs{told}{shown}")
    if save is not None:
        print(f"wrote {save}; next: rerun {save}")


def _log_run(
    dataset: CachedDataset,
    first: int,
    tokens: np.ndarray,
    actions: np.ndarray,
    states: np.ndarray,
    frames: np.ndarray | None,
) -> None:
    """Log steps in a row: tokens [T, N, D], actions [T-1, A], states [T, S], frames [T, h, w, 3] or None."""
    import rerun

    painted = _paint(TokenColours(tokens), tokens, dataset.manifest.grid)
    for place in range(len(tokens)):
        rerun.set_time("step", sequence=first + place)
        rerun.log("tokens/true", rerun.Image(painted[place]))
        if frames is not None:
            rerun.log("camera", rerun.Image(frames[place]).compress(jpeg_quality=90))
        for name, columns, rows in (
            ("states", dataset.space.states, states),
            ("actions", dataset.space.actions, actions),
        ):
            for column, value in zip(columns, rows[place] if place < len(rows) else (), strict=False):
                rerun.log(f"{name}/{column.name}", rerun.Scalars(float(value)))


@torch.no_grad()
def _log_predictions(evaluation: EvaluationContext, segment: Segment, first: int, tokens: torch.Tensor) -> None:
    """Log what is foreseen of each step from the true ones before it, in the colours of the true tokens, and how far it is off."""
    import rerun

    context, colours = evaluation.config.evaluate.num_context_steps, TokenColours(tokens.numpy())
    actions, states = evaluation.dataset.controls_of(segment)
    scaled = (
        torch.from_numpy(rows)
        for rows in (evaluation.scaler.actions.apply(actions), evaluation.scaler.states.apply(states))
    )
    actions, states = (rows.to(evaluation.device) for rows in scaled)
    for place in range(context, len(tokens)):
        seen = slice(place - context, place)
        given = (rows[seen][None] for rows in (tokens.to(evaluation.device), actions, states))
        foreseen = evaluation.model.open_loop(*given, 1)[0].cpu()
        rerun.set_time("step", sequence=first + place)
        rerun.log(
            "tokens/foreseen", rerun.Image(_paint(colours, foreseen.numpy(), evaluation.dataset.manifest.grid)[0])
        )
        for name, guess in (("predictor", foreseen[0]), ("copy_last", tokens[place - 1])):
            rerun.log(f"error/{name}", rerun.Scalars(float((guess - tokens[place]).abs().mean())))


def _paint(colours: TokenColours, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Pictures uint8 [T, ZOOM * H, ZOOM * W, 3] of tokens [T, N, D]."""
    painted = (255 * colours.paint(tokens, grid)).astype(np.uint8)
    return painted.repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
