"""Open-loop prediction.

Claims:
- it equals the plain loop that feeds a growing context from scratch, with and without layer norm, with extrinsics too;
- it and teacher forcing at once give what each gives alone;
- windows that together need more memory than a pass is given go through in parts, with the same predictions;
- another precision changes predictions by its roundings, and nothing else;
- tokens are normalised in float32 whatever their dtype; the codes of a store are no tokens.
"""

import pytest
import torch
import torch.nn.functional as F

from jepa_cache.predictor import rollout
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.predictor.rollout import LatentModel, as_reps, normalize_tokens
from tests.predictor.makers import build_lively, draw


def build(use_extrinsics: bool = False) -> ACPredictor:
    sizes = {"embed_dim": 10, "predictor_dim": 24, "depth": 2, "action_dim": 5, "state_dim": 3 + 4 * use_extrinsics}
    return build_lively(**sizes, use_extrinsics=use_extrinsics)


@pytest.mark.parametrize("normalize_reps", [True, False])
@pytest.mark.parametrize("use_extrinsics", [True, False])
@torch.no_grad()
def test_open_loop_equals_a_growing_context_from_scratch(use_extrinsics: bool, normalize_reps: bool):
    predictor = build(use_extrinsics)
    context, horizon = 3, 4
    tokens, actions, states = draw(2, context, 4, 10), draw(2, 6, 5), draw(2, 6, 3 + 4 * use_extrinsics)
    seen = tokens
    for _ in range(horizon):
        n = seen.shape[1]
        out = predictor(seen, actions[:, :n], states[:, :n]).tokens[:, -1:]
        seen = torch.cat([seen, F.layer_norm(out, (10,), eps=1e-5) if normalize_reps else out], dim=1)
    ours = LatentModel(predictor, normalize_reps).open_loop(tokens, actions, states, horizon)
    torch.testing.assert_close(ours, seen[:, context:], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("num_forced", "num_context", "horizon"), [(5, 2, 3), (2, 4, 2), (3, 3, 1), (1, 1, 5)])
@torch.no_grad()
def test_both_ways_at_once_equal_each_alone(num_forced: int, num_context: int, horizon: int):
    predictor, tokens, actions, states = build(), draw(2, 6, 4, 10), draw(2, 5, 5), draw(2, 6, 3)
    both = LatentModel(predictor).both_ways(
        tokens, actions, states, num_forced=num_forced, num_context=num_context, horizon=horizon
    )
    forced = LatentModel(predictor).teacher_forcing(tokens[:, : num_forced + 1], actions[:, :num_forced], states)
    rows = num_context + horizon - 1
    rolled = LatentModel(predictor).open_loop(tokens[:, :num_context], actions[:, :rows], states[:, :rows], horizon)
    torch.testing.assert_close(both.teacher_forced, forced, atol=1e-12, rtol=0)
    torch.testing.assert_close(both.open_loop, rolled, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_are_normalised_in_float32(dtype: torch.dtype):
    tokens = (torch.randn(3, 50) * 7 + 100).to(dtype)
    ours = normalize_tokens(tokens)
    exact = tokens.double()
    exact = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=1e-4, rtol=0)


def test_rollout_refuses_rows_that_do_not_fit_the_horizon():
    with pytest.raises(ValueError, match="actions must have 4 rows"):
        LatentModel(build()).open_loop(draw(1, 2, 4, 10), draw(1, 3, 5), draw(1, 4, 3), 3)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        LatentModel(build()).open_loop(draw(1, 2, 4, 10), draw(1, 1, 5), draw(1, 1, 3), 0)


@pytest.mark.parametrize("normalize_reps", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_of_a_store_are_refused(dtype, normalize_reps):
    with pytest.raises(ValueError, match=r"must be values, not the codes of a store"):
        as_reps(torch.zeros(1, 2, 4, 8, dtype=dtype), normalize_reps)


@torch.no_grad()
def test_windows_go_through_in_parts_where_memory_is_short(monkeypatch: pytest.MonkeyPatch):
    predictor, given = build(), [draw(5, 6, 4, 10), draw(5, 5, 5), draw(5, 6, 3)]
    model, counts = LatentModel(predictor), {"num_forced": 5, "num_context": 3, "horizon": 3}
    whole = model.both_ways(*given, **counts)
    monkeypatch.setattr(rollout, "PASS_BYTES", 2 * predictor.bytes_per_row(5, 7, 4) + 1)
    assert model.rows_at_once(5, 7) == 2 and LatentModel(lambda: None).rows_at_once(5, 7) > 10**9
    seen = []
    predictor.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    parts = model.both_ways(*given, **counts)
    assert seen == [2] * 6 + [1] * 3
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_another_precision_only_rounds():
    predictor = build().float()
    given = [it.float() for it in (draw(2, 6, 4, 10), draw(2, 5, 5), draw(2, 6, 3))]
    exact, rounded = (
        LatentModel(predictor, True, it).open_loop(given[0][:, :2], given[1], given[2][:, :5], 4)
        for it in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32 and next(predictor.parameters()).dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05, f"relative error of bfloat16 {error:.4f}"
