"""Claims of encoding/costs.py: the operations are those that torch counts in the true encoder and a true train step."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_cache.config.loading import load_config
from jepa_cache.encoder.vit import VisionTransformer
from jepa_cache.encoder.vit21 import VisionTransformer21
from jepa_cache.encoding.costs import compare_runs, count_encoder, count_predictor
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.training.losses import world_model_loss
from tests.workspace import SUITE_SETTINGS

CONFIG = load_config(SUITE_SETTINGS)


def _count(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("mode", "num_frames", "sampled", "steps"), [("frame", 2, 1, 1), ("tubelet", 2, 2, 1), ("clip", 8, 8, 4)]
)
def test_an_encoder_input_costs_what_torch_counts(mode, num_frames, sampled, steps):
    preset, encode = CONFIG.encoder, replace(CONFIG.encode, mode=mode, frames_per_clip=8)
    model = VisionTransformer(
        embed_dim=preset.embed_dim, depth=preset.depth, num_heads=preset.num_heads, mlp_dim=preset.mlp_dim
    )
    counted = _count(lambda: model(torch.zeros(1, 3, num_frames, preset.resolution, preset.resolution)))
    assert count_encoder(preset, encode) == (counted, sampled, steps)


@pytest.mark.parametrize(("single_frame", "num_frames"), [("doubled", 2), ("image", 1)])
def test_a_v21_frame_costs_what_torch_counts_on_either_way(single_frame, num_frames):
    preset = replace(CONFIG.encoder, kind="vjepa2_1", depth=12)
    model = VisionTransformer21(
        embed_dim=preset.embed_dim, depth=12, num_heads=preset.num_heads, mlp_dim=preset.mlp_dim
    )
    counted = _count(lambda: model(torch.zeros(1, 3, num_frames, preset.resolution, preset.resolution)))
    assert count_encoder(preset, replace(CONFIG.encode, single_frame=single_frame)) == (counted, 1, 1)


def test_pooling_makes_the_predictor_cheaper_and_leaves_the_encoder():
    shape = {"num_frames": 1000, "num_actions": 7, "num_states": 7}
    whole, pooled = (
        compare_runs(CONFIG.encoder, CONFIG.predictor, CONFIG.train, replace(CONFIG.encode, pool=pool), **shape)
        for pool in (1, 2)
    )
    assert whole.build == pooled.build and whole.online == pooled.online
    assert 2 < whole.predictor / pooled.predictor < 10


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("window_steps", "auto_steps"), [(8, 2), (5, 1), (6, 4)])
def test_a_window_in_training_costs_what_torch_counts(window_steps, auto_steps, checkpointing):
    preset = replace(CONFIG.predictor, predictor_dim=48, depth=2, num_heads=4, activation_checkpointing=checkpointing)
    model = ACPredictor(
        embed_dim=64,
        predictor_dim=48,
        depth=2,
        num_heads=4,
        action_dim=13,
        state_dim=2,
        grid=(4, 4),
        activation_checkpointing=checkpointing,
    )
    tokens, actions = torch.randn(1, window_steps, 16, 64), torch.randn(1, window_steps - 1, 13)
    states = torch.randn(1, window_steps, 2)
    counted = _count(lambda: world_model_loss(model, tokens, actions, states, auto_steps=auto_steps).total.backward())
    train = replace(CONFIG.train, window_steps=window_steps, auto_steps=auto_steps)
    planned = count_predictor(preset, train, num_tokens=16, width=64, num_actions=13, num_states=2)
    # The rollout's states need no gradient either, which is not told apart.
    assert planned == pytest.approx(counted, rel=1e-3)


def test_break_even_does_not_depend_on_the_predictor_and_the_gain_does():
    shape = {"encode": CONFIG.encode, "num_frames": 1000, "num_actions": 7, "num_states": 7}
    vitl = load_config(SUITE_SETTINGS, ["encoder=vitl", "predictor=small"])
    small = compare_runs(vitl.encoder, vitl.predictor, vitl.train, **shape)
    large = compare_runs(vitl.encoder, load_config(SUITE_SETTINGS, ["predictor=ac300m"]).predictor, vitl.train, **shape)
    assert small.runs == large.runs == 1000 / (600 * 32 * 8)
    assert small.gain_per_run > large.gain_per_run > 1
