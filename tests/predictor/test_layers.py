"""Attention and rotary positions.

Claims:
- prefix attention equals one masked softmax, forward and backward, with and without past steps, by either kernel, however many heads go together;
- one call of FlexAttention with the mask of steps gives the same, forward and backward (by its definition: its kernels are a GPU's);
- the kernel of matrix products is as good in bfloat16 as the dtype allows;
- it is taken for bfloat16 on a CPU that has such products, and nowhere else;
- the rotary table equals the rule written out token by token, on grids that are not square, for odd head widths too;
- the gradient of a rotation is that of the rule, and what is rotated does not keep the projection alive;
- a table first built in inference mode can be trained with.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import flex_attention

from jepa_cache.predictor import layers
from jepa_cache.predictor.layers import block_causal_attention, rotary_table, rotate, step_mask
from tests.predictor.makers import block_causal_mask


def masked_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def table_of(head_width: int, grid: tuple[int, int], **changes: object):
    options = {"first_step": 0, "num_steps": 2, "num_conditioning": 2, "dtype": torch.float32}
    return rotary_table(head_width, grid=grid, device=torch.device("cpu"), **(options | changes))


def by_steps(*tensors: torch.Tensor, **steps: int) -> torch.Tensor:
    return block_causal_attention(*tensors, **steps)[0]


def by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, tokens_per_step: int, num_past_steps: int = 0):
    """Take the kernel that bfloat16 takes on the CPU, in any dtype."""
    return layers._PrefixAttention.apply(q, k, v, tokens_per_step)


def draw(num_past: int, num_new: int, length: int = 5) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of the output."""
    torch.manual_seed(0)
    lengths = (num_new, num_past + num_new, num_past + num_new, num_new)
    return [torch.randn(2, 3, steps * length, 8, dtype=torch.float64, requires_grad=True) for steps in lengths]


@pytest.mark.filterwarnings("error")  # torch only warns when a buffer of the wrong size is handed to it
@pytest.mark.parametrize(
    ("attend", "heads_together"), [(by_steps, 6), (by_products, 6), (by_products, 4), (by_products, 0)]
)
@pytest.mark.parametrize(("num_past", "num_new"), [(0, 1), (0, 4), (2, 1), (3, 2)])
def test_prefix_attention_equals_masked_softmax_with_gradients(
    num_past: int, num_new: int, attend: Callable, heads_together: int, monkeypatch: pytest.MonkeyPatch
):
    length = 5
    monkeypatch.setattr(layers, "_SCORE_BYTES", heads_together * length * (num_past + num_new) * length * 8)
    q, k, v, weight = draw(num_past, num_new)
    mask = block_causal_mask(num_past + num_new, length)[num_past * length :]
    ours = attend(q, k, v, tokens_per_step=length, num_past_steps=num_past)
    expected = masked_reference(q, k, v, mask)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    for got, wanted in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_steps", [2, 5])
def test_one_call_of_flex_attention_equals_prefixes_with_gradients(num_steps: int, monkeypatch: pytest.MonkeyPatch):
    # It refuses gradients on a CPU, where it has no kernels.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    q, k, v, weight = draw(0, num_steps)
    mask = step_mask(num_steps, 5, torch.device("cpu"))
    found = [block_causal_attention(q, k, v, tokens_per_step=5, mask=given)[0] for given in (mask, None)]
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    for pair in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in found), strict=True):
        torch.testing.assert_close(*pair, atol=1e-12, rtol=0)


def test_matrix_products_in_bfloat16_are_as_good_as_its_eight_bits_allow():
    exact = draw(1, 3)
    mask = block_causal_mask(4, 5)[5:]
    wanted = masked_reference(*exact[:3], mask)
    gradients = torch.autograd.grad((wanted * exact[3]).sum(), exact[:3])
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    ours = by_products(*rounded[:3], tokens_per_step=5)
    got = torch.autograd.grad(ours, rounded[:3], rounded[3])
    for name, x, y in zip(("output", "dq", "dk", "dv"), (ours, *got), (wanted, *gradients), strict=True):
        error = ((x.double() - y).norm() / y.norm()).item()
        assert error < 0.02, f"relative error of {name} is {error:.3f}; 0.008 was seen"


@pytest.mark.parametrize(
    ("dtype", "capable", "expected"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, True, False)],
)
def test_the_kernel_follows_from_dtype_and_processor(
    dtype: torch.dtype, capable: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layers, "has_bfloat16_products", lambda: capable)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in draw(0, 2)[:3])
    out = block_causal_attention(q, k, v, tokens_per_step=5)[0]
    assert (type(out.grad_fn).__name__ == "_PrefixAttentionBackward") == expected
    monkeypatch.setattr(layers, "has_bfloat16_products", lambda: not capable)
    other = block_causal_attention(q, k, v, tokens_per_step=5)[0]
    assert type(other.grad_fn) is not type(out.grad_fn) or dtype != torch.bfloat16
    torch.testing.assert_close(other, out, atol=2**-6, rtol=2**-6)


def test_attention_refuses_keys_that_do_not_fit_the_past():
    x = torch.zeros(1, 1, 10, 8)
    with pytest.raises(ValueError, match="1 \\+ T steps"):
        block_causal_attention(x, x, x, tokens_per_step=5, num_past_steps=1)


@pytest.mark.parametrize(("head_width", "grid"), [(24, (3, 3)), (16, (2, 5)), (64, (4, 3)), (15, (2, 3))])
def test_rotation_equals_the_rule_written_out(head_width: int, grid: tuple[int, int]):
    torch.manual_seed(0)
    rows, columns = grid
    x = torch.randn(2 * (2 + rows * columns), head_width)
    ours = rotate(x, *table_of(head_width, grid, first_step=3)[:2])
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


@pytest.mark.parametrize("head_width", [24, 15])
def test_the_gradient_of_a_rotation_is_that_of_the_rule(head_width: int):
    torch.manual_seed(0)
    table = table_of(head_width, (2, 3), dtype=torch.float64)
    qkv = torch.randn(1, len(table.cos), 3, 1, head_width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: layers._SplitRotated.apply(qkv, *table), (qkv,))


def test_queries_and_keys_are_rotated_and_none_keeps_the_projection_alive():
    torch.manual_seed(0)
    table = table_of(24, (2, 3))
    qkv = torch.randn(2, len(table.cos), 3, 4, 24)
    q, k, v = layers._SplitRotated.apply(qkv, *table)
    for got, part in ((q, 0), (k, 1)):
        assert torch.equal(got, rotate(qkv[:, :, part].transpose(1, 2), table.cos, table.sin))
    assert torch.equal(v, qkv[:, :, 2].transpose(1, 2))
    assert all(it.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr() for it in (q, k, v))


def test_table_from_inference_mode_serves_training():
    with torch.inference_mode():
        table = table_of(24, (11, 2))
    x = torch.randn(1, len(table.cos), 3, 1, 24, requires_grad=True)
    layers._SplitRotated.apply(x, *table)[0].sum().backward()
    assert x.grad.abs().sum() > 0
