"""What the frozen encoder promises.

Claims: frame mode is the doubled frame, groups are encoded alone, clips jointly; the batch does not matter; nothing
trains; a value that the stored precision cannot hold stops with the step's index. Compiled, all blocks and sizes share a graph.
"""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.frozen import FrozenEncoder, TokenOverflowError, cast_tokens, pool_tokens, to_stored
from jepa_cache.encoder.preprocess import CROP_RULES, normalise

# Values of order 1 to 4; another batch size orders float32 sums differently.
BATCH_TOLERANCE = 1e-5


def make(preset, state, **options):
    encoder = KINDS[preset.kind].build(preset, state)
    return FrozenEncoder(preset, encoder, **{"device": "cpu", "compute_dtype": "float32", **options})


@pytest.fixture
def frozen(preset, wide_state):
    return make(preset, wide_state)


@pytest.fixture
def frames(frozen):
    return frozen.preprocess(np.random.default_rng(1).integers(0, 256, (8, 45, 60, 3), dtype=np.uint8))


def test_tokens_come_in_time_then_row_then_column_order(frozen, frames):
    # With attention switched off every token depends on its own patch only.
    for block in frozen.encoder.blocks:
        block.attn.proj.weight.zero_()
        block.attn.proj.bias.zero_()
    clip = frames[None, :4]
    before = frozen.encode(clip)
    clip = clip.clone()
    clip[0, 2, :, :16, 16:] += 1
    changed = (frozen.encode(clip) != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 1, 1]]


def test_frame_mode_is_the_doubled_frame_and_larger_groups_see_their_frames_jointly_and_in_order(frozen, frames):
    doubled = frames[:, None].repeat(1, 2, 1, 1, 1)
    assert torch.equal(frozen.encode(frames[:, None]), frozen.encode(doubled))
    pair = frames[None, :2]
    assert (frozen.encode(pair) - frozen.encode(pair.flip(1))).abs().max() > 1e-2
    joint, alone = frozen.encode(frames[None])[0], frozen.encode(frames.view(4, 2, 3, 32, 32))[:, 0]
    assert (joint - alone).abs().amax(dim=(1, 2)).min() > 1e-2


@pytest.mark.parametrize("name", ["preset", "preset_21"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_compiled_blocks_share_one_graph_for_batches_of_every_size(request, monkeypatch, frames, name, compute_dtype):
    torch.compiler.reset()
    counter, preset = CompileCounterWithBackend("aot_eager"), request.getfixturevalue(name)
    compile_block = functools.partialmethod(nn.Module.compile, backend=counter, fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", compile_block)
    state = KINDS[preset.kind].make(preset).state_dict()
    plain, compiled = (make(preset, state, compute_dtype=compute_dtype, compiled=it) for it in (False, True))
    for num_groups, num_frames in ((8, 1), (5, 1), (1, 1), (3, 1), (4, 2)):
        groups = frames[: num_groups * num_frames].unflatten(0, (num_groups, num_frames))
        one, other = compiled.encode(groups), plain.encode(groups)
        assert one.shape == other.shape and one.dtype == other.dtype and counter.frame_count == 1
        # Without fusion only the order of sums may differ.
        torch.testing.assert_close(one, other, atol=BATCH_TOLERANCE if compute_dtype == "float32" else 0.1, rtol=0)


def test_a_group_does_not_depend_on_its_batch(frozen, frames):
    together = frozen.encode(frames[:, None])
    assert together.shape == (8, 1, frozen.num_tokens, frozen.width)
    alone = torch.cat([frozen.encode(frame[None, None]) for frame in frames])
    torch.testing.assert_close(together, alone, atol=BATCH_TOLERANCE, rtol=0)


def test_nothing_can_train(frozen, frames):
    assert not frozen.encoder.training
    assert not any(parameter.requires_grad for parameter in frozen.encoder.parameters())
    assert not frozen.encode(frames[:, None].requires_grad_()).requires_grad


def test_bfloat16_is_near_float32_and_its_weights_are_computed_in_float32(preset, wide_state, frozen, frames):
    exact, half = (one.encode(frames[:, None]) for one in (frozen, make(preset, wide_state, compute_dtype="bfloat16")))
    # bfloat16 keeps 8 bits: 0.4 % of values of order 1, through a few layers.
    assert 0 < (half.float() - exact).abs().mean() < 0.03
    stored = {name: value.bfloat16() for name, value in wide_state.items()}
    assert make(preset, stored).encode(frames[:, None]).dtype == torch.float32


@pytest.mark.parametrize("way", ["doubled", "image"])
def test_a_frame_goes_the_way_that_the_settings_say(preset_21, state_21, frames, way):
    encoder, frozen = KINDS["vjepa2_1"].build(preset_21, state_21), make(preset_21, state_21, single_frame=way)
    pixels = normalise(frames, 32, *CROP_RULES["ac"].statistics(preset_21.mean, preset_21.std), in_levels=True)
    clip = pixels[:, :, None] if way == "image" else pixels[:, :, None].expand(-1, -1, 2, -1, -1)
    assert torch.equal(frozen.encode(frames[:, None])[:, 0], encoder(clip))
    pairs = frames.view(4, 2, 3, 32, 32)
    pixels = pixels.view_as(pairs)
    assert torch.equal(frozen.encode(pairs)[:, 0], encoder(pixels.transpose(1, 2))), "a pair is a video on either way"


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", value) for value in (70000.0, -70000.0, float("nan"), float("inf"))]
    + [("bfloat16", value) for value in (float("nan"), float("-inf"), 3.4e38)],  # the last rounds to infinity
)
@pytest.mark.parametrize("shape", [(6, 4, 8), (3, 2, 4, 8)])
def test_what_the_stored_precision_cannot_hold_stops_and_names_the_first_step(dtype, value, shape):
    tokens = torch.zeros(shape)
    tokens.view(6, 4, 8)[3, 1, 2] = tokens.view(6, 4, 8)[5, 0, 0] = value
    reason = r"no numbers \(NaN\).*damaged weights.*preset's mean and std" if np.isnan(value) else "another dtype"
    with pytest.raises(TokenOverflowError, match=rf"step 3 .*{dtype}: .*{reason}") as caught:
        to_stored(tokens, dtype)
    assert caught.value.step == 3 and ("another dtype" in str(caught.value)) != np.isnan(value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_of_a_cast_is_measured_step_by_step(dtype):
    tokens = torch.randn(5, 4, 8)
    cast = tokens.half() if dtype == "float16" else tokens.bfloat16()
    error, truth = cast.double().numpy() - tokens.double().numpy(), tokens.double().numpy()
    expected = [(error**2).sum((1, 2)), (truth**2).sum((1, 2)), np.abs(error).max((1, 2))]
    # Squares are rounded to float32 before they are summed.
    np.testing.assert_allclose(cast_tokens(tokens, dtype)[1], np.stack(expected, axis=1), rtol=1e-6)


@pytest.mark.parametrize(("grid", "pool"), [((4, 6), 2), ((6, 3), 3), ((24, 24), 2)])
def test_a_pooled_token_is_the_mean_of_its_square(grid, pool):
    tokens = torch.randn(2, 3, grid[0] * grid[1], 5)
    planar = tokens.transpose(-1, -2).unflatten(-1, grid).flatten(0, 1)
    expected = torch.nn.functional.avg_pool2d(planar, pool).flatten(-2).transpose(-1, -2).unflatten(0, (2, 3))
    torch.testing.assert_close(pool_tokens(tokens, grid, pool), expected, atol=1e-6, rtol=0)
    assert pool_tokens(tokens, grid, 1) is tokens
    large = torch.full((1, 4, 2), 60000.0).half()  # in float16 the sum of four would be infinite
    assert torch.equal(pool_tokens(large, (2, 2), 2), large[:, :1].float())
