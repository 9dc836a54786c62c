"""Attention and rotary positions.

Claims:
- prefix attention equals one masked softmax, forward and backward, with and without past steps;
- the mask lets a token see its own and earlier steps, and nothing else;
- the rotary table equals the rule written out token by token, on grids that are not square, for odd head widths too;
- a table first built in inference mode can be trained with.
"""

import math

import pytest
import torch

from jepa_cache.predictor.attention import block_causal_attention, block_causal_mask, rotary_table, rotate


def masked_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def table_of(head_width: int, grid: tuple[int, int], **changes: object):
    options = {"first_step": 0, "num_steps": 2, "num_conditioning": 2, "dtype": torch.float32}
    return rotary_table(head_width, grid=grid, device=torch.device("cpu"), **(options | changes))


@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1), (0, 4), (2, 1), (3, 2)])
def test_prefix_attention_equals_masked_softmax_with_gradients(num_past: int, num_new: int):
    torch.manual_seed(0)
    length = 5
    q = torch.randn(2, 3, num_new * length, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, 3, (num_past + num_new) * length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    weight = torch.randn_like(q)
    mask = block_causal_mask(num_past + num_new, length)[num_past * length :]
    ours = block_causal_attention(q, k, v, tokens_per_step=length, num_past_steps=num_past)
    expected = masked_reference(q, k, v, mask)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_mask_admits_exactly_own_and_earlier_steps():
    mask = block_causal_mask(4, 3)
    for query in range(12):
        for key in range(12):
            assert mask[query, key].item() == (key // 3 <= query // 3)


def test_attention_refuses_keys_that_do_not_fit_the_past():
    x = torch.zeros(1, 1, 10, 8)
    with pytest.raises(ValueError, match="1 \\+ T steps"):
        block_causal_attention(x, x, x, tokens_per_step=5, num_past_steps=1)


@pytest.mark.parametrize(("head_width", "grid"), [(24, (3, 3)), (16, (2, 5)), (64, (4, 3)), (15, (2, 3))])
def test_rotation_equals_the_rule_written_out(head_width: int, grid: tuple[int, int]):
    torch.manual_seed(0)
    rows, columns = grid
    x = torch.randn(2 * (2 + rows * columns), head_width)
    ours = rotate(x, table_of(head_width, grid, first_step=3))
    block = 2 * math.floor(math.floor(head_width / 3) / 2)
    for index, token in enumerate(x):
        step, place = divmod(index, 2 + rows * columns)
        frame = place - 2
        positions = (step + 3, 0.0, 0.0)
        if frame >= 0:
            positions = (step + 3, frame // columns, (frame % columns) * rows / columns)
        expected = token.clone()
        for axis, position in enumerate(positions):
            for channel in range(0, block, 2):
                first, second = axis * block + channel, axis * block + channel + 1
                a0, a1 = (position * 10000 ** (-2 * ((channel + i) % (block // 2)) / block) for i in (0, 1))
                expected[first] = token[first] * math.cos(a0) - token[second] * math.sin(a0)
                expected[second] = token[second] * math.cos(a1) + token[first] * math.sin(a1)
        torch.testing.assert_close(ours[index], expected, atol=1e-5, rtol=0)


def test_table_is_built_once_per_shape():
    assert table_of(24, (7, 3)) is table_of(24, (7, 3))
    assert table_of(24, (7, 3)) is not table_of(24, (7, 3), first_step=1)


def test_table_from_inference_mode_serves_training():
    with torch.inference_mode():
        table = table_of(24, (11, 2))
    x = torch.randn(len(table.cos), 24, requires_grad=True)
    rotate(x, table).sum().backward()
    assert x.grad.abs().sum() > 0
