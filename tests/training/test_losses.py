"""The world-model loss.

Claims:
- it equals the definition computed with whole passes over growing contexts, gradients included, for any settings;
- auto_steps beyond the window changes nothing; tokens of a cache are taken in their dtype;
- norms and losses are float32 under autocast; windows that are too short are named;
- weights that are cast once for all passes give autocast's loss and gradients, bit for bit.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from jepa_cache.predictor.lora import add_lora
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import LatentModel
from jepa_cache.training.losses import Objective, world_model_loss
from tests.predictor.makers import build_lively


def build() -> ACPredictor:
    sizes = {"embed_dim": 10, "predictor_dim": 24, "depth": 2, "action_dim": 5, "state_dim": 3}
    return build_lively(**sizes)


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
def test_the_loss_equals_its_definition_with_gradients(p: float, auto_steps: int, norm: bool, rollout: str):
    predictor, given = build(), batch()
    parameters = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    ours = world_model_loss(predictor, *given, loss_exp=p, auto_steps=auto_steps, normalize_reps=norm, rollout=rollout)
    jloss, sloss = by_definition(predictor, *given, p, auto_steps, norm, rollout == "legacy")
    got = torch.stack([ours.scalars["jloss"], ours.scalars["sloss"], ours.total])
    torch.testing.assert_close(got, torch.stack([jloss, sloss, jloss + sloss]), atol=1e-10, rtol=0)
    assert ours.z_tf.shape == (2, 4, 4, 10) and ours.z_ar.shape == (2, auto_steps, 4, 10)
    # The definition's own gradient, so that a detached rollout would show.
    wanted = torch.autograd.grad(jloss + sloss, parameters)
    for one, other in zip(torch.autograd.grad(ours.total, parameters), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_the_rollout_is_capped_at_the_window_and_tokens_of_a_cache_are_taken_as_they_are():
    predictor, given = build(), batch(num_steps=3)
    capped, exact = (world_model_loss(predictor, *given, auto_steps=n) for n in (9, 2))
    assert torch.equal(capped.total, exact.total) and capped.z_ar.shape[1] == 2
    predictor, (tokens, *others) = build().float(), batch(dtype=torch.float32)
    losses = [world_model_loss(predictor, given, *others).total for given in (tokens.half(), tokens.half().float())]
    assert torch.equal(*losses)


def test_norms_and_losses_are_float32_under_autocast():
    predictor, given = build().float(), batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = world_model_loss(predictor, *given, auto_steps=3)
    full = world_model_loss(predictor, *given, auto_steps=3)
    values = (*low.scalars.values(), low.z_tf, low.z_ar, low.jloss_by_window)
    assert {x.dtype for x in values} == {torch.float32}
    assert low.total.item() != full.total.item()  # autocast did act
    torch.testing.assert_close(low.total, full.total, atol=0.05, rtol=0)  # bfloat16: 8 bits on values of order 1
    low.total.backward()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_weights_cast_once_for_all_passes_give_the_bits_of_autocast(recomputes: bool, lora: bool):
    settings = {"loss_exp": 1.0, "auto_steps": 3, "normalize_reps": True, "rollout": "fixed", "precision": "bfloat16"}
    predictor = build().float()
    predictor.activation_checkpointing = recomputes
    model = add_lora(predictor, rank=2, alpha=2.0, dropout=0.0, rslora=False) if lora else predictor
    given, found = batch(dtype=torch.float32), []
    for once in (True, False):
        model.zero_grad()
        if once:
            total = Objective(model, SimpleNamespace(**settings), torch.device("cpu"))(*given).total
        else:
            with torch.autocast("cpu", enabled=False):
                total = world_model_loss(LatentModel(model, precision="bfloat16").predict, *given, auto_steps=3).total
        total.backward()
        gradients = {name: it.grad for name, it in model.named_parameters() if it.requires_grad and it.grad is not None}
        found.append({"total": total, **gradients})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 16
    for name, gradient in found[0].items():
        # Autocast casts LoRA's B for each pass, so both passes' gradients are added in float32.
        limit = 0.02 * gradient.abs().max() if "lora_B" in name else 0
        assert (gradient - found[1][name]).abs().max() <= limit, name


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
