"""The planner's rollouts against a plain loop over samples, each with its context computed anew, on the same samples in turn.

    python benchmarks/planner.py
    python benchmarks/planner.py --samples 400 --horizon 2 --context 7 --dim 1024 --blocks 4 --repeats 5

Random weights and tokens, 16x16 of them a step. Energies of both ways are compared before anything is timed; "gain" is the median
over turns of plain / ours in the same turn.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from jepa_cache.actions import get_action_space  # noqa: E402
from jepa_cache.control.motion import build_motion  # noqa: E402
from jepa_cache.control.planner import Context, Rollout, follow_actions  # noqa: E402
from jepa_cache.predictor.model import ACPredictor  # noqa: E402
from jepa_cache.predictor.rollout import LatentModel  # noqa: E402

TOLERANCE = 1e-3  # of energies near 1: float32 sums in another order


def main(argv: list[str] | None = None) -> None:
    """Time both ways and print the gain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"samples": 25, "horizon": 2, "context": 3, "grid": 16, "width": 64, "dim": 256, "blocks": 2, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    rng, motion = np.random.default_rng(0), build_motion(get_action_space("pose7"))
    predictor = ACPredictor(
        embed_dim=given.width,
        predictor_dim=given.dim,
        depth=given.blocks,
        num_heads=given.dim // 64,
        action_dim=7,
        state_dim=7,
        grid=(given.grid, given.grid),
    )
    model = LatentModel(predictor.eval())
    tokens = model.as_reps(torch.randn(given.context + 1, given.grid**2, given.width))
    actions = rng.uniform(-0.05, 0.05, (given.context - 1, 7))
    context, goal = Context(tokens[:-1], actions, rng.uniform(-0.3, 0.3, (given.context, 7))), tokens[-1]
    noise = rng.standard_normal((given.samples, given.horizon, len(motion.names)))
    samples = motion.actions(np.clip(noise * motion.first_std, motion.low, motion.high), np.zeros(7))

    def ours() -> np.ndarray:
        return Rollout(model, context, motion.integrate).energies(samples, goal)

    @torch.no_grad()
    def plain() -> np.ndarray:
        energies = []
        for sample in samples:
            states = np.concatenate([context.states, follow_actions(context.states[-1], sample, motion)[1:-1]])
            moves = np.concatenate([context.actions, sample])
            rows = (torch.from_numpy(values).float()[None] for values in (moves, states))
            rolled = model.open_loop(context.tokens[None], *rows, given.horizon)
            energies.append(float((rolled[0, -1] - goal).abs().mean()))
        return np.array(energies)

    difference = float(np.abs(ours() - plain()).max())
    if difference > TOLERANCE:
        raise SystemExit(f"energies of both ways differ by {difference:.2g}, more than {TOLERANCE}: nothing was timed")
    turns = []
    for _ in range(given.repeats):
        began = time.perf_counter()
        plain()
        between = time.perf_counter()
        ours()
        turns.append((between - began, time.perf_counter() - between))
    gain = statistics.median(slow / quick for slow, quick in turns)
    plain_s, ours_s = (statistics.median(times) for times in zip(*turns, strict=True))
    print(f"plain {plain_s:.3f} s, ours {ours_s:.3f} s, gain {gain:.2f}; energies differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
