"""What the transformer promises.

Claims: the transformer equals transformers' VJEPA2Model; positions are those of the input's own grid; frames beyond a
tubelet are dropped; impossible inputs are named.
"""

import pytest
import torch

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.vit import VisionTransformer, rotate, rotation_tables

CPU = torch.device("cpu")


@pytest.fixture
def encoder(preset, wide_state):
    return KINDS["vjepa2"].build(preset, wide_state)


def test_safetensors_with_transformers_names_give_transformers_tokens(preset, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the second reference is transformers' VJEPA2Model")
    from dataclasses import replace

    from safetensors.torch import save_file

    config = transformers.VJEPA2Config(
        crop_size=32, frames_per_clip=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2.0,
        pred_hidden_size=24, pred_num_hidden_layers=1, pred_num_attention_heads=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.VJEPA2Model(config).eval()
    with torch.no_grad():
        # Biases and norms start at 0 and 1, where a wrong name map could hide.
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in reference.state_dict().items()}, path)
    preset = replace(preset, random_seed=None, weights=str(path), weights_entry="target_encoder")

    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = reference(clip.transpose(1, 2), skip_predictor=True).last_hidden_state
        got = KINDS["vjepa2"].load(preset, path)(clip)
    # Values of order 1; only the order of float32 sums differs (patch projection as matrix product).
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_attention_scores_depend_on_grid_offsets_of_time_row_and_column_only():
    # Tiled frequencies break this law in wider heads; a head of width 6 has one frequency per axis.
    cosine, sine = rotation_tables((3, 3, 4), 6, CPU)
    q, k = torch.randn(2, 1, 1, 1, 6).expand(2, 1, 1, 36, 6)
    scores = (rotate(q, cosine, sine) @ rotate(k, cosine, sine).transpose(-1, -2))[0, 0].view(3, 3, 4, 3, 3, 4)
    torch.testing.assert_close(scores[1, 1, 1, 2, 2, 3], scores[0, 0, 0, 1, 1, 2], atol=1e-5, rtol=0)


def test_rotation_tiles_the_frequencies_over_a_block():
    cosine, _ = rotation_tables((1, 1, 3), 24, CPU)
    column_block = cosine[2, 16:24]
    frequencies = 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(column_block, torch.cos(2 * frequencies).repeat(2))


def test_channels_beyond_three_blocks_are_not_rotated():
    x = torch.randn(1, 1, 8, 16)
    assert torch.equal(rotate(x, *rotation_tables((2, 2, 2), 16, CPU))[..., 12:], x[..., 12:])


def test_tables_first_made_in_inference_mode_serve_a_backward_pass(encoder):
    clip = torch.randn(1, 3, 2, 16, 80)
    with torch.inference_mode():
        encoder(clip)
    clip.requires_grad_()
    encoder(clip).sum().backward()
    assert clip.grad is not None


def test_swapping_rows_and_columns_of_a_non_square_input_is_seen(encoder):
    clip = torch.randn(1, 3, 2, 16, 48)
    wide = encoder(clip)
    tall = encoder(clip.reshape(1, 3, 2, 16, 3, 16).transpose(3, 4).reshape(1, 3, 2, 48, 16))
    # The same patches in the same order, once side by side and once on top of each other.
    assert (wide - tall).abs().max() > 1e-2


def test_a_constructor_without_resolution_serves_every_grid(encoder):
    assert encoder(torch.randn(1, 3, 4, 48, 80)).shape == (1, 2 * 3 * 5, 48)


def test_frames_beyond_a_tubelet_are_dropped(encoder):
    clip = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(encoder(clip), encoder(clip[:, :, :4]))


@pytest.mark.parametrize("size", [(2, 3, 2, 40, 32), (2, 3, 2, 32, 17), (1, 3, 2, 0, 32)])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(encoder, size):
    with pytest.raises(ValueError, match=f"{size[3]} x {size[4]}"):
        encoder(torch.zeros(size))


def test_less_than_a_tubelet_is_refused(encoder):
    with pytest.raises(ValueError, match="repeat it"):
        encoder(torch.zeros(1, 3, 1, 32, 32))


def test_frames_before_channels_are_refused(encoder):
    with pytest.raises(ValueError, match=r"\[B, 3, F, h, w\]"):
        encoder(torch.zeros(1, 2, 3, 32, 32, 1))


def test_a_width_that_does_not_split_into_heads_is_refused():
    with pytest.raises(ValueError, match="embed_dim 50 and num_heads 4"):
        VisionTransformer(embed_dim=50, depth=1, num_heads=4, mlp_dim=8)
