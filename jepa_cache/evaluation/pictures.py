"""The pictures that every evaluation leaves in pictures/: curves, actions, and rollouts as strips and as an animation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_cache.evaluation.action_plots import draw_actions, read_segment_actions
from jepa_cache.evaluation.animation import write_animation
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.plots import draw_horizon, draw_strip
from jepa_cache.evaluation.strips import build_strips, fit_window_colours, spread_positions
from jepa_cache.evaluation.windows import WindowErrors

NUM_STRIPS = 2


def draw_pictures(
    errors: WindowErrors, evaluation: EvaluationContext, rows: Sequence[Mapping[str, float]], folder: Path
) -> None:
    """Draw horizon.png, actions.png, strip1.png and so on, and rollout1.gif.

    Args:
        errors: Of all measured windows; some of them are shown.
        evaluation: What was measured.
        rows: Of horizon.csv.
        folder: Where they go; it must be there.

    Cost: decodes the recordings of the windows that are shown, where they are on this machine.
    """
    dataset = evaluation.dataset
    draw_horizon(rows, folder / "horizon.png", note=evaluation.features)
    recorded = (
        read_segment_actions(dataset, part) for part in (evaluation.training_segments(), evaluation.held_out_segments())
    )
    draw_actions(dataset.space.actions, *recorded, folder / "actions.png")
    positions = spread_positions(len(errors.chosen.numbers), NUM_STRIPS)
    strips = build_strips(positions, errors, evaluation, fit_window_colours(errors, evaluation))
    for number, strip in enumerate(strips, start=1):
        draw_strip(strip, folder / f"strip{number}.png")
    write_animation(strips[0], folder / "rollout1.gif")
