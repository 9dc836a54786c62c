"""What the CUDA path of `ac300m` is asked to do, counted without a GPU: launches, bytes and memory, of tensors alone.

Claims:
- a training step at 8 windows of 8 steps in bfloat16 stays below a number of launches and bytes, and recomputes activations by itself on a
  card that cannot hold them;
- plans by the published settings take 6 GiB at most, and 32 windows are evaluated in 7 GiB.
"""

from types import SimpleNamespace
from unittest import mock

import pytest

from tests.emulated_cuda import counted_cuda, on_emulated_cuda

pytestmark = pytest.mark.long  # a minute of counting
GIB, DEPTH = 2**30, 24


def build(**changes: object):
    import torch

    from jepa_cache.predictor.model import ACPredictor

    sizes = {"embed_dim": 1408, "predictor_dim": 1024, "depth": DEPTH, "num_heads": 16, "action_dim": 7, "state_dim": 7}
    with torch.device("cuda"):
        return ACPredictor(**sizes | changes, grid=(16, 16))


def card_of(gib: float):
    import torch

    return mock.patch.object(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * GIB))


def count_training_step(counts, predictor) -> None:
    """Run two training steps of eight windows and count the second."""
    import torch

    from jepa_cache.training.losses import Objective
    from jepa_cache.training.optim import build_optimizer

    settings = {"loss_exp": 1.0, "auto_steps": 2, "normalize_reps": True, "rollout": "fixed", "precision": "bfloat16"}
    objective = Objective(predictor, SimpleNamespace(**settings), torch.device("cuda"))
    optimizer = build_optimizer(predictor, lr=1e-4, weight_decay=0.04)
    for _ in range(2):
        counts.reset()
        shapes = ((8, 8, 256, 1408), (8, 7, 7), (8, 8, 7))
        objective(*(torch.empty(shape, device="cuda") for shape in shapes)).total.backward()
        optimizer.step()
        optimizer.zero_grad()


@on_emulated_cuda
def test_a_training_step_keeps_within_its_launches_and_bytes_and_recomputes_where_memory_is_short():
    with counted_cuda() as counts, card_of(80):
        count_training_step(counts, build(activation_checkpointing="auto"))
        assert sum(counts.launches.values()) <= 3260
        assert counts.launches["_foreach_copy_"] == 2 * DEPTH, "weights of a block are cast once, and their gradients"
        assert counts.launches["_foreach_add"] == DEPTH, "gradients of both passes are added together"
        assert counts.elementwise_bytes <= 133e9
        assert 15 * GIB < counts.peak_bytes <= 20 * GIB
        with card_of(16):
            count_training_step(counts, build(activation_checkpointing="auto"))
        assert counts.peak_bytes <= 8 * GIB  # a rollout step of its own keeps its 2 GiB


@on_emulated_cuda
def test_plans_by_the_published_settings_fit_on_a_small_card():
    import numpy as np
    import torch

    from jepa_cache.control.costs import TOKENS
    from jepa_cache.control.planner import SETTINGS, Context, Rollout
    from jepa_cache.predictor.rollout import LatentModel

    def upload(_, *tables):
        return [torch.empty(table.shape, device="cuda") for table in tables]

    with (
        counted_cuda() as counts,
        mock.patch.object(torch.Tensor, "numpy", lambda it: np.zeros(tuple(it.shape))),
        mock.patch.object(Rollout, "_scaled", upload),
    ):
        tokens = torch.empty(3, 256, 1408, device="cuda")
        context = Context(tokens, np.zeros((2, 7)), np.zeros((3, 7)))
        for name, precision in (("paper", "float32"), ("world_model", "bfloat16")):
            rollout = Rollout(LatentModel(build(), True, precision), context, lambda states, actions: states)
            counts.reset()
            actions = np.zeros((SETTINGS[name].num_samples, SETTINGS[name].horizon, 7))
            assert rollout.energies(actions, tokens[0], TOKENS).shape == (len(actions),)
            assert counts.peak_bytes <= 6 * GIB, (name, counts.peak_bytes / GIB)


@on_emulated_cuda
def test_32_windows_are_evaluated_in_seven_gib():
    import torch

    from jepa_cache.predictor.rollout import LatentModel

    with counted_cuda() as counts, torch.no_grad():
        shapes = ((32, 8, 256, 1408), (32, 7, 7), (32, 8, 7))
        h, actions, states = (torch.empty(shape, device="cuda") for shape in shapes)
        model = LatentModel(build())
        counts.reset()
        model.both_ways(h, actions, states, num_forced=7, num_context=3, horizon=4)
        assert counts.peak_bytes <= 7 * GIB, counts.peak_bytes / GIB
