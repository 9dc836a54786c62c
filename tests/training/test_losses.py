"""The world-model loss.

Claims:
- it equals the definition computed with whole passes over growing contexts, gradients included, for any settings;
- with one rollout step its rollout part is the first-step part of teacher forcing;
- auto_steps beyond the window changes nothing; `legacy` feeds the second teacher-forced step;
- gradients flow through what is fed back; norms and losses are float32 under autocast.
"""

import pytest
import torch
import torch.nn.functional as F

from jepa_cache.predictor.model import ACPredictor
from jepa_cache.training.losses import world_model_loss


def build(**changes: object) -> ACPredictor:
    torch.manual_seed(0)
    sizes = {"embed_dim": 10, "predictor_dim": 24, "depth": 2, "num_heads": 2, "action_dim": 5, "state_dim": 3}
    predictor = ACPredictor(**(sizes | changes), grid=(2, 2))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return predictor


def batch(num_steps: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    shapes = ((num_steps, 4, 10), (num_steps - 1, 5), (num_steps, 3))
    return tuple(torch.randn(2, *shape, dtype=dtype) for shape in shapes)


def by_definition(predictor, tokens, actions, states, p: float, auto_steps: int, norm: bool, legacy: bool):
    """Compute the loss as the equations read, every pass from scratch."""
    rep = (lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5)) if norm else (lambda x: x)
    h = rep(tokens)
    z_tf = rep(predictor(h[:, :-1], actions, states[:, :-1]).tokens)
    z = torch.cat([h[:, :1], z_tf[:, 1:2] if legacy else z_tf[:, :1]], dim=1)
    for n in range(1, auto_steps):
        new = rep(predictor(z, actions[:, : n + 1], states[:, : n + 1]).tokens[:, -1:])
        z = torch.cat([z, new], dim=1)
    jloss = ((z_tf - h[:, 1:]).abs() ** p).mean() / p
    sloss = ((z[:, 1:] - h[:, 1 : 1 + auto_steps]).abs() ** p).mean() / p
    return jloss, sloss


@pytest.mark.parametrize(
    ("p", "auto_steps", "norm", "rollout"),
    [
        (1.0, 1, True, "fixed"),
        (1.0, 2, True, "fixed"),
        (1.0, 4, True, "fixed"),
        (2.0, 3, False, "fixed"),
        (1.5, 2, True, "fixed"),
        (1.0, 1, True, "legacy"),
        (1.0, 3, True, "legacy"),
    ],
)
def test_loss_equals_its_definition_with_gradients(p: float, auto_steps: int, norm: bool, rollout: str):
    predictor, given = build().double(), batch()
    parameters = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    ours = world_model_loss(predictor, *given, loss_exp=p, auto_steps=auto_steps, normalize_reps=norm, rollout=rollout)
    jloss, sloss = by_definition(predictor, *given, p, auto_steps, norm, rollout == "legacy")
    torch.testing.assert_close(
        torch.stack([ours.scalars["jloss"], ours.scalars["sloss"]]), torch.stack([jloss, sloss]), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(ours.total, jloss + sloss, atol=1e-10, rtol=0)
    assert ours.z_tf.shape == (2, 4, 4, 10)
    assert ours.z_ar.shape == (2, auto_steps, 4, 10)
    # The definition's own gradient, so that a detached rollout would show.
    for got, wanted in zip(
        torch.autograd.grad(ours.total, parameters), torch.autograd.grad(jloss + sloss, parameters), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_one_rollout_step_is_the_first_step_of_teacher_forcing():
    predictor, (tokens, actions, states) = build().double(), batch()
    losses = world_model_loss(predictor, tokens, actions, states, auto_steps=1)
    assert torch.equal(losses.z_ar, losses.z_tf[:, :1])
    h = F.layer_norm(tokens, (10,), eps=1e-5)
    torch.testing.assert_close(losses.scalars["sloss"], (losses.z_tf[:, 0] - h[:, 1]).abs().mean(), atol=1e-12, rtol=0)


@torch.no_grad()
def test_rollout_is_capped_at_the_window():
    predictor, given = build().double(), batch(num_steps=3)
    capped, exact = (world_model_loss(predictor, *given, auto_steps=n) for n in (9, 2))
    assert torch.equal(capped.total, exact.total)
    assert capped.z_ar.shape[1] == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_does_not_depend_on_activation_checkpointing(checkpointing: bool):
    plain, other, given = build().double(), build(activation_checkpointing=checkpointing).double(), batch()
    for predictor in (plain, other):
        world_model_loss(predictor, *given, auto_steps=3).total.backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)


def test_norms_and_losses_are_float32_under_autocast():
    predictor = build()
    given = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = world_model_loss(predictor, *given, auto_steps=3)
    full = world_model_loss(predictor, *given, auto_steps=3)
    values = (*low.scalars.values(), low.z_tf, low.z_ar, low.jloss_by_window)
    assert {x.dtype for x in values} == {torch.float32}
    assert low.total.item() != full.total.item()  # autocast did act
    torch.testing.assert_close(low.total, full.total, atol=0.05, rtol=0)  # bfloat16: 8 bits on values of order 1
    low.total.backward()


def test_float16_tokens_from_a_cache_are_taken_as_they_are():
    predictor, (tokens, actions, states) = build(), batch(dtype=torch.float32)
    half = tokens.half()
    losses = world_model_loss(predictor, half, actions, states)
    assert torch.equal(losses.total, world_model_loss(predictor, half.float(), actions, states).total)


@pytest.mark.parametrize(
    ("options", "num_steps", "num_actions", "said"),
    [
        ({"rollout": "legacy"}, 2, 1, r"T >= 3 .*got T = 2"),
        ({}, 1, 0, r"T >= 2 .*got T = 1"),
        ({"rollout_start": 4}, 5, 4, r"T >= 6 .*from step 4"),
        ({}, 5, 5, r"T-1 actions and T states.* got T = 5, 5 actions and 5 states"),
    ],
)
def test_windows_too_short_and_rows_that_do_not_fit_are_named(options, num_steps, num_actions, said):
    tokens, _, states = batch(num_steps)
    with pytest.raises(ValueError, match=said):
        world_model_loss(build(), tokens, torch.zeros(2, num_actions, 5), states, **options)
