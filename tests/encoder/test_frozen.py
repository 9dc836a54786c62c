"""What the frozen encoder promises.

Claims: frame mode is the doubled frame, groups are encoded alone, clips jointly; the batch does not matter; nothing
trains; a value that the stored precision cannot hold stops with the step's index.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.encoder.checkpoints import build_encoder
from jepa_cache.encoder.frozen import FrozenEncoder, TokenOverflowError, measure_cast, to_stored

# Values of order 1 to 4; another batch size orders float32 sums differently.
BATCH_TOLERANCE = 1e-5


@pytest.fixture
def frozen(preset, wide_state):
    return FrozenEncoder(preset, build_encoder(preset, wide_state), device="cpu", compute_dtype="float32")


@pytest.fixture
def frames(frozen):
    return frozen.preprocess(np.random.default_rng(1).integers(0, 256, (8, 45, 60, 3), dtype=np.uint8))


def test_pixels_become_tokens_of_the_announced_shape(frozen, frames):
    assert frames.shape == (8, 3, 32, 32)
    assert frozen.encode(frames[:, None]).shape == (8, 1, frozen.num_tokens, frozen.width)
    assert frozen.encode(frames.view(2, 4, 3, 32, 32)).shape == (2, 2, frozen.num_tokens, frozen.width)


def test_frame_mode_equals_encoding_the_doubled_frame(frozen, frames):
    doubled = frames[:, None].repeat(1, 2, 1, 1, 1)
    assert torch.equal(frozen.encode(frames[:, None]), frozen.encode(doubled))


def test_tubelet_mode_sees_the_order_of_its_two_frames(frozen, frames):
    pair = frames[None, :2]
    assert (frozen.encode(pair) - frozen.encode(pair.flip(1))).abs().max() > 1e-2


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


def test_a_joint_clip_differs_from_its_tubelets_encoded_alone(frozen, frames):
    joint = frozen.encode(frames[None])[0]
    alone = frozen.encode(frames.view(4, 2, 3, 32, 32))[:, 0]
    assert (joint - alone).abs().amax(dim=(1, 2)).min() > 1e-2


def test_a_group_does_not_depend_on_its_batch(frozen, frames):
    together = frozen.encode(frames[:, None])
    alone = torch.cat([frozen.encode(frame[None, None]) for frame in frames])
    torch.testing.assert_close(together, alone, atol=BATCH_TOLERANCE, rtol=0)


def test_the_same_batch_gives_the_same_bits(frozen, frames):
    assert torch.equal(frozen.encode(frames[:, None]), frozen.encode(frames[:, None]))


def test_nothing_can_train(frozen, frames):
    assert not frozen.encoder.training
    assert not any(parameter.requires_grad for parameter in frozen.encoder.parameters())
    assert not frozen.encode(frames[:, None].requires_grad_()).requires_grad


def test_bfloat16_is_near_float32_and_not_equal(preset, wide_state, frozen, frames):
    half = (
        FrozenEncoder(preset, build_encoder(preset, wide_state), device="cpu", compute_dtype="bfloat16")
        .encode(frames[:, None])
        .float()
    )
    difference = (half - frozen.encode(frames[:, None])).abs()
    # bfloat16 keeps 8 bits: 0.4 % of values of order 1, through a few layers.
    assert 0 < difference.mean() < 0.03


def test_weights_stored_in_bfloat16_are_computed_in_float32(preset, wide_state, frames):
    state = {name: value.bfloat16() for name, value in wide_state.items()}
    frozen = FrozenEncoder(preset, build_encoder(preset, state), device="cpu", compute_dtype="float32")
    assert frozen.encode(frames[:, None]).dtype == torch.float32


@pytest.mark.parametrize("num_frames", [0, 3])
def test_groups_that_do_not_fill_tubelets_are_refused(frozen, num_frames):
    with pytest.raises(ValueError, match=f"got {num_frames} frames"):
        frozen.encode(torch.zeros(1, num_frames, 3, 32, 32))


def test_groups_of_another_resolution_are_refused(frozen):
    with pytest.raises(ValueError, match=r"\[B, G, 3, 32, 32\]"):
        frozen.encode(torch.zeros(1, 1, 3, 48, 48))


@pytest.mark.parametrize(
    ("change", "compute_dtype", "message"),
    [
        ({}, "bf16", "compute_dtype 'bf16'.*bfloat16"),
        ({"crop": "center"}, "float32", "crop 'center'.*eval_array"),
        ({"resolution": 40}, "float32", "resolution 40"),
    ],
)
def test_unknown_settings_are_refused_at_the_start(preset, wide_state, change, compute_dtype, message):
    with pytest.raises(ValueError, match=message):
        FrozenEncoder(
            replace(preset, **change), build_encoder(preset, wide_state), device="cpu", compute_dtype=compute_dtype
        )


def test_storing_is_the_plain_cast():
    tokens = torch.randn(3, 2, 4, 8)
    stored = to_stored(tokens, "float16")
    assert stored.dtype == np.float16
    assert np.array_equal(stored, tokens.numpy().astype(np.float16))


@pytest.mark.parametrize("value", [70000.0, -70000.0, float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(6, 4, 8), (3, 2, 4, 8)])
def test_what_the_stored_precision_cannot_hold_stops_and_names_the_first_step(value, shape):
    tokens = torch.zeros(shape)
    tokens.view(6, 4, 8)[3, 1, 2] = value
    tokens.view(6, 4, 8)[5, 0, 0] = value
    with pytest.raises(TokenOverflowError, match=r"step 3 .*float16") as caught:
        to_stored(tokens, "float16")
    assert caught.value.step == 3


def test_what_is_no_number_points_to_weights_and_preset_and_not_to_another_dtype():
    tokens = torch.zeros(2, 4, 8)
    tokens[1, 0, 0] = float("nan")
    with pytest.raises(
        TokenOverflowError, match=r"step 1 .*no numbers \(NaN\).*damaged weights.*preset's mean and std"
    ) as caught:
        to_stored(tokens, "float16")
    assert caught.value.step == 1 and "another dtype" not in str(caught.value)


def test_bfloat16_is_stored_as_its_bits_and_holds_what_float16_cannot():
    tokens = torch.randn(3, 4, 8) * 1e9
    bits = to_stored(tokens, "bfloat16")
    assert bits.dtype == np.uint16 and np.array_equal(bits, tokens.bfloat16().view(torch.uint16).numpy())


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3.4e38])  # the last rounds to infinity
def test_bfloat16_refuses_what_is_not_finite(value):
    tokens = torch.zeros(3, 4, 8)
    tokens[2, 1, 1] = value
    with pytest.raises(TokenOverflowError, match=r"step 2 .*bfloat16"):
        to_stored(tokens, "bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_of_a_cast_is_measured_step_by_step(dtype):
    tokens = torch.randn(5, 4, 8)
    cast = tokens.half() if dtype == "float16" else tokens.bfloat16()
    error, truth = cast.double().numpy() - tokens.double().numpy(), tokens.double().numpy()
    expected = [(error**2).sum((1, 2)), (truth**2).sum((1, 2)), np.abs(error).max((1, 2))]
    # Squares are rounded to float32 before they are summed.
    np.testing.assert_allclose(measure_cast(tokens, dtype), np.stack(expected, axis=1), rtol=1e-6)


def test_float32_storage_holds_what_float16_cannot():
    assert to_stored(torch.full((1, 4, 8), 70000.0), "float32").max() == 70000.0
