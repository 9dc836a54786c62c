"""The predictor network.

Claims:
- parameters have the official names and counts, whatever the widths of actions and states, and start as officially;
- nothing later in a window changes an earlier output, by exactly 0, and everything earlier does;
- keys and values of earlier steps give what one full pass gives, gradients included, with activation checkpointing too;
- an unused extrinsics encoder is frozen, a used one matters;
- a residual predictor adds the newest known step to its prediction, in every kind of pass;
- adaptive layer norms begin without effect, leave the official names alone, are causal, and work in every kind of pass;
- compiled by blocks, all blocks and all rollout starts share two graphs (three where a rollout has a step between) without a break, with the values of the uncompiled one;
- a wrong shape is named.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from jepa_cache.predictor import layers
from jepa_cache.predictor.layers import rotary_table
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.training.losses import Objective
from tests.predictor.makers import build_lively

GRID = (2, 3)
SIZES = {
    **{"embed_dim": 10, "predictor_dim": 24, "depth": 2, "num_heads": 2, "action_dim": 5, "state_dim": 3},
    "grid": GRID,
}


def build(**changes: object) -> ACPredictor:
    return build_lively(**(SIZES | changes))


def inputs(num_steps: int = 4, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    shapes = ((GRID[0] * GRID[1], 10), (5,), (3,))
    return [torch.randn(batch, num_steps, *shape, dtype=torch.float64) for shape in shapes]


def test_parameters_have_exactly_the_official_names_whatever_the_widths_of_actions_and_states():
    layers = ["predictor_embed", "action_encoder", "state_encoder", "extrinsics_encoder"]
    layers += ["predictor_norm", "predictor_proj"]
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        layers += [f"predictor_blocks.{i}.{layer}" for i in range(2)]
    predictor = build(action_dim=13, state_dim=2)
    assert set(predictor.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    encoders = predictor.action_encoder, predictor.state_encoder, predictor.extrinsics_encoder
    assert [encoder.in_features for encoder in encoders] == [13, 2, 12]


@pytest.mark.parametrize(
    ("embed_dim", "predictor_dim", "depth", "num_heads", "num_weights"),
    [
        (1408, 1024, 24, 16, 305_220_992),
        (1024, 1024, 24, 16, 304_434_176),
        (1280, 1024, 24, 16, 304_958_720),
        (1024, 384, 6, 6, 11_444_224),
        (1024, 768, 12, 12, 86_648_320),
    ],
)
def test_released_sizes_have_the_released_number_of_weights(embed_dim, predictor_dim, depth, num_heads, num_weights):
    sizes = {"embed_dim": embed_dim, "predictor_dim": predictor_dim, "depth": depth, "num_heads": num_heads}
    with torch.device("meta"):
        tensors = ACPredictor(**sizes, action_dim=7, state_dim=7, grid=(16, 16)).state_dict().values()
    assert sum(tensor.numel() for tensor in tensors) == num_weights and len(tensors) == 12 * (depth + 1)


def test_fresh_weights_follow_the_official_initialisation():
    torch.manual_seed(0)
    predictor = ACPredictor(**(SIZES | {"predictor_dim": 192, "depth": 3}))
    for number, block in enumerate(predictor.predictor_blocks, start=1):
        for layer, std in ((block.attn.qkv, 0.02), (block.attn.proj, 0.02 / (2 * number) ** 0.5)):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.05)  # 36,864 draws or more: 0.4 % at one sigma
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05)
        assert block.norm1.eps == 1e-6
    assert all(not p.any() for name, p in predictor.named_parameters() if name.endswith("bias"))
    assert all((p == 1).all() for name, p in predictor.named_parameters() if p.ndim == 1 and name.endswith("weight"))


@pytest.mark.parametrize("conditioning", ["tokens", "adaln"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["tokens", "actions", "states"])
@torch.no_grad()
def test_later_inputs_never_change_earlier_outputs(which: int, conditioning: str):
    predictor, given = build(conditioning=conditioning), inputs()
    before = predictor(*given).tokens
    given[which][:, 2] += 1.0
    after = predictor(*given).tokens
    assert torch.equal(before[:, :2], after[:, :2])
    assert ((before - after)[:, 2:].abs().amax(dim=(2, 3)) > 1e-6).all()


@pytest.mark.parametrize("conditioning", ["tokens", "adaln"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("num_first", [1, 3])
def test_continuing_from_the_past_equals_one_full_pass_with_gradients(num_first, checkpointing, conditioning):
    full, parts = (build(conditioning=conditioning, activation_checkpointing=it) for it in (False, checkpointing))
    given = inputs()
    weight = torch.randn(2, 4, 6, 10, dtype=torch.float64)
    expected = full(*given).tokens
    (expected * weight).sum().backward()
    first = parts(*(x[:, :num_first] for x in given))
    second = parts(*(x[:, num_first:] for x in given), past=first.past)
    ours = torch.cat([first.tokens, second.tokens], dim=1)
    (ours * weight).sum().backward()
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    for (name, p), q in zip(full.named_parameters(), parts.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-9, rtol=1e-9, msg=name)


@torch.no_grad()
def test_continuing_from_kept_steps_forgets_the_others():
    predictor, given = build(), inputs()
    kept = predictor(*given, num_kept_steps=2).past
    assert kept[0][0].shape[2] == 2 * predictor.tokens_per_step
    again = predictor(*(x[:, 2:] for x in given), past=kept).tokens
    torch.testing.assert_close(again, predictor(*given).tokens[:, 2:], atol=1e-12, rtol=0)


def test_unused_extrinsics_encoder_is_frozen_and_a_used_one_matters():
    assert not any(p.requires_grad for p in build().extrinsics_encoder.parameters())
    predictor, (tokens, actions, states) = build(use_extrinsics=True, state_dim=7), inputs()
    assert predictor.state_encoder.in_features == 3, "as without: released weights load"
    given = tokens, actions, torch.cat([states, torch.randn(2, 4, 4, dtype=torch.float64)], dim=-1)
    assert all(p.requires_grad for p in predictor.extrinsics_encoder.parameters())
    moved = (*given[:2], given[2] + torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    assert (predictor(*moved).tokens - predictor(*given).tokens).abs().max() > 1e-3
    blind = build(use_extrinsics=True, state_dim=7, use_states=False)
    assert (blind(*moved).tokens - blind(*given).tokens).abs().max() > 1e-3, "the camera is no state of the arm"
    with pytest.raises(
        ValueError, match=r"last 4 columns of the states are the camera's pose, and there are 3; set encode"
    ):
        build(use_extrinsics=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda given: given.__setitem__(0, given[0][:, :, :5]), "tokens must be"),
        (lambda given: given.__setitem__(1, given[1][:, :3]), "actions must be"),
        (lambda given: given.__setitem__(2, given[2][..., :1]), "states must be"),
        (lambda given: given.append([]), "past holds 0 blocks"),
        (lambda given: given.append([(torch.zeros(2, 2, 7, 12),) * 2] * 2), "past must hold"),
    ],
)
def test_wrong_inputs_are_named(change, named: str):
    given = inputs()
    change(given)
    with pytest.raises(ValueError, match=named):
        build()(*given)


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"action_dim": 0}, {"depth": 0}, {"grid": (0, 2)}])
def test_impossible_sizes_are_refused(change: dict):
    with pytest.raises(ValueError, match="predictor: "):
        ACPredictor(**(SIZES | change))


@torch.no_grad()
def test_residual_adds_each_steps_own_tokens_in_every_kind_of_pass():
    plain, residual, given = build(), build(residual=True), inputs()
    assert torch.equal(residual(*given).tokens, given[0] + plain(*given).tokens)
    assert plain.state_dict().keys() == residual.state_dict().keys()
    first = residual(*(x[:, :3] for x in given))
    last = residual(*(x[:, 3:] for x in given), past=first.past)
    torch.testing.assert_close(last.tokens, residual(*given).tokens[:, 3:], atol=1e-10, rtol=0)


# --- adaptive layer norms ---------------------------------------------------------------------------------------------------


def test_adaptive_layer_norms_begin_without_effect_and_add_only_their_own_weights():
    plain, adaptive = build(), build(conditioning="adaln")
    extra = set(adaptive.state_dict()) - set(plain.state_dict())
    assert extra and all(name.startswith("modulations.") for name in extra)
    assert list(plain.state_dict()) == [name for name in adaptive.state_dict() if name not in extra]
    with torch.no_grad():
        for modulation in adaptive.modulations:  # as it starts: `build` makes everything lively
            modulation.weight.zero_()
            modulation.bias.zero_()
    tokens, actions, states = inputs(3)
    x = adaptive.predictor_embed(tokens).flatten(1, 2)
    table = rotary_table(
        adaptive.head_width, first_step=0, num_steps=3, grid=GRID, num_conditioning=0, dtype=x.dtype, device=x.device
    )
    for block in adaptive.predictor_blocks:
        x, _, _ = block(x, table, 6, None)
    expected = adaptive.predictor_proj(adaptive.predictor_norm(x)).view_as(tokens)
    assert torch.equal(adaptive(tokens, actions, states).tokens, expected)
    fresh = ACPredictor(**SIZES, conditioning="adaln")
    assert not any(tensor.any() for tensor in fresh.modulations.state_dict().values())


def test_nothing_imports_the_compiler_of_torch_before_it_compiles():
    """It takes 1.6 s, in every stage and in programs that deploy."""
    names = "jepa_cache.api, jepa_cache.training.trainer, jepa_cache.evaluation.run"
    code = f"import sys, {names}; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("precision", "checkpointing", "flex", "auto_steps"),
    [
        pytest.param("float32", False, False, 2, marks=pytest.mark.long),  # each compiles for 6 s
        ("float32", True, False, 3),
        pytest.param("bfloat16", False, False, 2, marks=pytest.mark.long),
        ("bfloat16", True, False, 2),
        ("float32", True, True, 2),
    ],
)
def test_compiled_blocks_share_their_graphs_wherever_a_rollout_starts(
    precision: str, checkpointing: bool, flex: bool, auto_steps: int, monkeypatch: pytest.MonkeyPatch
):
    # It refuses gradients on a CPU, where it has no kernels.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    # The path of a GPU: products unroll a CPU's steps.
    monkeypatch.setattr(layers, "has_bfloat16_products", lambda: False)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = build(), build(activation_checkpointing=checkpointing)
    given, atol = inputs(6), 1e-9
    if precision == "bfloat16":
        plain, compiled, given, atol = plain.float(), compiled.float(), [it.float() for it in given], 0
    compiled.compile(flex=flex, backend=counter, fullgraph=True)
    settings = {
        "loss_exp": 1.0,
        "auto_steps": auto_steps,
        "normalize_reps": True,
        "rollout": "fixed",
        "precision": precision,
    }
    settings = SimpleNamespace(**settings)
    for turn, start in enumerate((0, 3, 1, 2, 0, 3)):
        totals = []
        for predictor in (plain, compiled):
            predictor.zero_grad()
            tokens, actions, states = given
            totals.append(
                Objective(predictor, settings, torch.device("cpu"))(tokens, actions[:, :5], states, start).total
            )
            totals[-1].backward()
        torch.testing.assert_close(totals[1], totals[0], atol=atol, rtol=atol)
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(q.grad, p.grad, atol=atol, rtol=atol, msg=name)
        # The whole window, and one step after a past of any number of steps.
        assert counter.frame_count == (2 if auto_steps == 2 else 3), turn
