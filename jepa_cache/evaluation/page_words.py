"""What report.html says beside figures and pictures: what they show and what to look for."""

from __future__ import annotations

from jepa_cache.evaluation.page_parts import Picture

CURVES = Picture(
    "horizon.png",
    "Curves of error against open-loop step, with bands, for the predictor, baselines and controls",
    "The predictor's curve (thick, blue) should lie below every other one, with bands that do not touch. Where it meets "
    '"copy the last step", it sees no further ahead; where it meets "shuffled actions", it does not use its actions. '
    "Numbers: horizon.csv.",
)
ROLLOUT = Picture(
    "rollout1.gif",
    "Animation of one held-out window: recorded frame, true tokens, predicted tokens and error at each step",
    "The window of strip1.png, step by step. Predicted tokens should change as the true ones do; a picture that stands still while the "
    "recording moves is a copy. It stops after ten rounds; reload to see it again.",
)
STRIPS = "strip*.png"
FIRST_STRIP = (
    "Strip of one held-out window: rows of recorded frames, true tokens, predicted tokens and error",
    "Colours are the first three principal components of true tokens, one basis for all strips and the animation, so equal colours "
    "are alike everywhere. Look for errors where things move, and for predictions that blur or stand still.",
)
OTHER_STRIP = (
    "Strip of another held-out window: rows of recorded frames, true tokens, predicted tokens and error",
    "Another held-out window, in the same colours.",
)
ACTIONS = Picture(
    "actions.png",
    "Histograms of the recorded actions of held-out and training episodes",
    "Held-out actions (blue) should be spread as those of training (grey). A column that never moves cannot be learned, and none can be "
    "used that the training episodes lack. Heights are on a logarithmic scale; values beyond the range count at its ends.",
)
SLICES = "Where it is better and worse: each row is a part of the held-out windows. Gaps above 0 say that actions are used there."
WORST = "The windows with the largest error, by name, so that one can look at the recording."
OPTIONAL = {
    "energy": (
        "Energy: the true action among others",
        "Rank 0: no sampled action leads nearer to the true next step than the recorded one; 0.5 is chance.",
        ("energy_ranks.csv", "energy_maps.csv"),
        (
            Picture(
                "energy_ranks.png",
                "Histogram of the true action's rank among sampled actions",
                "Bars should be high on the left. A flat histogram at the dashed line says that actions make no difference.",
            ),
            Picture(
                "energy_maps.png",
                "Maps of energy over two action columns around the true action",
                "A valley at the cross says that a planner could find the action; a flat or tilted map that it could not.",
                wide=True,
            ),
        ),
    ),
    "distances": (
        "Distances between predicted and true tokens, taken together",
        "Near the distance between two halves of the true tokens is as good as can be; compare with copying the last step.",
        ("distance.csv",),
        (),
    ),
    "noise": (
        "Noise floor",
        "Errors hardly fall below what differs between neighbouring steps in which nothing happens.",
        ("noise.csv",),
        (),
    ),
    "probes": (
        "Probes: do the tokens hold the action at all?",
        "Simple heads fitted on training episodes and scored on held-out ones; a score at its baseline says that the tokens do not tell.",
        ("probes.csv",),
        (),
    ),
}
"""Name in `evaluate.measure` to heading, explanation, tables and pictures."""
SECTIONS = {"energy": "energy", "distances": "distance", "noise": "noise", "probes": "probe"}
"""Name in `evaluate.measure` to its section of metrics.json."""
