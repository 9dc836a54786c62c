"""What the V-JEPA 2.1 transformer promises; tests/test_golden.py compares its numbers with the reference implementation.

Claims: rows and columns span 0 to 15 on every grid, one patch wide ones too, and time stays; both channels of a pair share a
frequency; images and videos each have their own embedding and vector; levels come in the order of depth; under autocast tokens are float32.
"""

from dataclasses import replace

import pytest
import torch

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.vit import rotate, rotation_tables
from jepa_cache.encoder.vit21 import VisionTransformer21

CPU = torch.device("cpu")


@pytest.fixture
def encoder(preset_21, state_21):
    return KINDS["vjepa2_1"].build(preset_21, state_21)


def angles(grid, positions):
    """Positions of every token, read back from the slowest frequency of each axis: [T, H, W, 3]."""
    cosine, sine = rotation_tables(grid, 48, CPU, pairing="paired", positions=positions)
    slowest = 10000.0 ** (-14 / 16)
    return (torch.atan2(sine, cosine)[:, [15, 31, 47]] / slowest).view(*grid, 3)


@pytest.mark.parametrize("grid", [(3, 24, 24), (2, 4, 9), (1, 16, 16), (2, 1, 5), (1, 1, 1)])
def test_rescaled_rows_and_columns_span_0_to_15_and_time_does_not(grid):
    got = angles(grid, "rescaled")
    rows, columns = (torch.linspace(0, 15 if side > 1 else 0, side) for side in grid[1:])
    times = torch.arange(grid[0], dtype=torch.float32)
    expected = torch.stack(torch.meshgrid(times, rows, columns, indexing="ij"), dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_on_16_rows_and_columns_rescaling_changes_nothing():
    torch.testing.assert_close(angles((2, 16, 16), "rescaled"), angles((2, 16, 16), "grid"), atol=1e-4, rtol=0)


def test_attention_scores_depend_on_offsets_only_in_wide_heads_too():
    # Tiled frequencies break this law from two frequencies per axis on.
    cosine, sine = rotation_tables((3, 3, 4), 24, CPU, pairing="paired")
    q, k = torch.randn(2, 1, 1, 1, 24).expand(2, 1, 1, 36, 24)
    scores = (rotate(q, cosine, sine) @ rotate(k, cosine, sine).transpose(-1, -2))[0, 0].view(3, 3, 4, 3, 3, 4)
    torch.testing.assert_close(scores[1, 1, 1, 2, 2, 3], scores[0, 0, 0, 1, 1, 2], atol=1e-5, rtol=0)


def test_positions_follow_the_preset(preset_21, state_21, encoder):
    clip = torch.randn(1, 3, 2, 48, 48)
    plain = KINDS["vjepa2_1"].build(replace(preset_21, positions="grid"), state_21)
    assert (encoder(clip) - plain(clip)).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(2, 16, 48), (1, 16, 16), (3, 48, 16)])
def test_a_grid_one_patch_wide_has_finite_tokens(encoder, size):
    assert encoder(torch.randn(1, 3, *size)).isfinite().all()


def test_levels_come_in_the_order_of_depth_and_the_last_is_the_plain_output(encoder):
    clip = torch.randn(2, 3, 4, 32, 32)
    levels = encoder.encode_levels(clip).unflatten(-1, (4, 48))
    assert levels.shape == (2, 2 * 4, 4, 48)
    assert torch.equal(levels[..., 3, :], encoder(clip))
    for level, last_block in enumerate((2, 5, 8, 11)):
        cut = build_cut(encoder, last_block, level)
        assert torch.equal(levels[..., level, :], cut(clip))


def build_cut(encoder, last_block, level):
    """The encoder with its later blocks left out: its last level is the one asked for."""
    cut = VisionTransformer21(embed_dim=48, depth=12, num_heads=2, mlp_dim=96).requires_grad_(False)
    cut.load_state_dict(encoder.state_dict())
    cut.blocks, cut.norms_block = cut.blocks[: last_block + 1], cut.norms_block[: level + 1]
    return cut


@pytest.mark.parametrize(
    ("name", "image", "video"),
    [
        ("img_mod_embed", True, False),
        ("patch_embed_img.proj.bias", True, False),
        ("video_mod_embed", False, True),
        ("patch_embed.proj.bias", False, True),
        ("norms_block.0.weight", False, False),
        ("norms_block.3.weight", True, True),
    ],
)
def test_images_and_videos_have_weights_of_their_own(preset_21, state_21, encoder, name, image, video):
    other = KINDS["vjepa2_1"].build(preset_21, state_21 | {name: state_21[name] + torch.randn(state_21[name].shape)})
    frame = torch.randn(1, 3, 1, 32, 32)
    pair = frame.expand(-1, -1, 2, -1, -1)
    assert torch.equal(other(frame), encoder(frame)) != image
    assert torch.equal(other(pair), encoder(pair)) != video


def test_frames_beyond_a_tubelet_are_dropped_and_less_than_one_is_refused(encoder):
    clip = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(encoder(clip), encoder(clip[:, :, :4]))
    with pytest.raises(ValueError, match="at least one tubelet of 2 frames; got 0"):
        encoder(clip[:, :, :0])


def test_bfloat16_is_near_float32_and_ends_in_float32(encoder):
    frames = torch.randn(2, 3, 1, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder(frames)
    assert got.dtype == torch.float32
    # 12 blocks of 8 bits, on values of order 1.
    assert 0 < (got - encoder(frames)).abs().mean() < 0.1
