"""A world model as another library's cost model.

Claims:
- costs are the world's energies of what the environment would carry out: unscaled by the policy's process, clipped row by row, a block of
  rows composed to one action; the solver's axis of samples on frames and states changes nothing;
- frames that are no uint8 RGB, candidates of another block, missing states and gradients are refused in words.
"""

import numpy as np
import pytest
import torch

from jepa_cache.actions import get_action_space
from jepa_cache.control.cost_model import CostModel
from jepa_cache.control.costs import TOKENS


class Room:
    """A world whose frames show a place as its first two numbers; actions move it."""

    space, frames_per_step, uses_states = get_action_space("vector_sum2x2"), 1, False

    def choose_cost(self, cost):
        return {"tokens": TOKENS}[cost]

    def energies(self, frames, goal, actions, *, states, cost, batch_size):
        assert frames.shape == (3, 1, 4, 5, 3) and goal.shape == (3, 4, 5, 3)
        assert (states is not None) == self.uses_states
        place, aim = (np.asarray(seen, np.float64).reshape(3, -1)[:, :2] for seen in (frames, goal))
        return np.linalg.norm(place[:, None] + actions.sum(axis=2) - aim[:, None], axis=-1).astype(np.float32)


class Seeing(Room):
    uses_states = True


class Process:
    """What a policy scales actions with."""

    def inverse_transform(self, rows):
        assert rows.ndim == 2 and rows.shape[1] == 2
        return rows * 3 + 1


def make_info(rng, samples=None):
    info = {name: rng.integers(0, 200, (3, 1, 4, 5, 3), dtype=np.uint8) for name in ("pixels", "goal")}
    info["proprio"] = rng.normal(size=(3, 1, 2))
    if samples:  # as CEMSolver hands them on: tensors that were expanded, or repeated arrays
        info = {"pixels": torch.from_numpy(info["pixels"])[:, None].expand(3, samples, 1, 4, 5, 3)} | {
            name: np.repeat(info[name][:, None], samples, axis=1) for name in ("goal", "proprio")
        }
    return info


@pytest.mark.parametrize(("world", "state"), [(Room(), None), (Seeing(), "proprio")])
def test_costs_are_energies_of_what_the_environment_would_carry_out(world, state):
    rng = np.random.default_rng(0)
    candidates = torch.from_numpy(rng.normal(size=(3, 7, 2, 10)))
    given = make_info(np.random.default_rng(1))
    rows = np.clip(candidates.numpy().reshape(3, 7, 2, 5, 2) * 3 + 1, -1.0, 1.0)
    states = None if state is None else given["proprio"]
    expected = world.energies(
        given["pixels"], given["goal"][:, 0], rows.sum(axis=3), states=states, cost=TOKENS, batch_size=None
    )
    model = CostModel(world, 5, -1.0, np.ones(2), process=Process(), state=state)
    for info in (given, make_info(np.random.default_rng(1), samples=7)):
        costs = model.get_cost(info, candidates)
        assert costs.dtype == torch.float32 and costs.shape == (3, 7)
        np.testing.assert_allclose(costs, expected, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    model, info, candidates = CostModel(Room(), 5, -1, 1), make_info(np.random.default_rng(0)), torch.zeros(3, 7, 2, 10)
    for said, changes, wrong in (
        (r"info has no 'goal'; it has pixels, proprio", {"goal": None}, candidates),
        (r"info\['pixels'\] must be .*uint8; got float32", {"pixels": info["pixels"].astype(np.float32)}, candidates),
        (r"must be .*got uint8 \[3, 1, 3, 4, 5\]", {"goal": np.moveaxis(info["goal"], -1, 2)}, candidates),
        (r"horizon, 5 x 2\] .*got \[3, 7, 2, 4\]", {}, candidates[..., :4]),
        ("no gradient; use a solver that samples", {}, candidates.clone().requires_grad_()),
    ):
        changed = {name: value for name, value in (info | changes).items() if value is not None}
        with pytest.raises(ValueError, match=said):
            model.get_cost(changed, wrong)
    with pytest.raises(ValueError, match=r"reads states \(state_0, state_1\): .*scaler.states=ignore"):
        CostModel(Seeing(), 5, -1, 1)
    with pytest.raises(ValueError, match="low < high; got block 5, 1, 1"):
        CostModel(Room(), 5, 1, 1)
