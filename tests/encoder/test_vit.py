"""What the transformers promise beside the reference's numbers, which tests/test_golden.py compares.

Claims: V-JEPA 2's equals transformers' VJEPA2Model; positions are those of the input's own grid, V-JEPA 2.1's rescaled in space;
images and videos each have their own embedding and vector; frames beyond a tubelet are dropped.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.vit import rotation_tables


@pytest.fixture(params=["vjepa2", "vjepa2_1"])
def encoder(request, preset, wide_state, preset_21, state_21):
    given = (preset, wide_state) if request.param == "vjepa2" else (preset_21, state_21)
    return KINDS[request.param].build(*given)


@pytest.fixture
def encoder_21(preset_21, state_21):
    return KINDS["vjepa2_1"].build(preset_21, state_21)


def test_safetensors_with_transformers_names_give_transformers_tokens(preset, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the second reference is transformers' VJEPA2Model")
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


@pytest.mark.parametrize("grid", [(3, 24, 24), (2, 4, 9), (2, 1, 5), (1, 1, 1)])
def test_rescaled_rows_and_columns_span_0_to_15_and_time_does_not(grid):
    cosine, sine = rotation_tables(grid, 48, torch.device("cpu"), pairing="paired", positions="rescaled")
    # Positions of every token, read back from the slowest frequency of each axis: [T, H, W, 3].
    got = (torch.atan2(sine, cosine)[:, [15, 31, 47]] / 10000.0 ** (-14 / 16)).view(*grid, 3)
    rows, columns = (torch.linspace(0, 15 if side > 1 else 0, side) for side in grid[1:])
    times = torch.arange(grid[0], dtype=torch.float32)
    expected = torch.stack(torch.meshgrid(times, rows, columns, indexing="ij"), dim=-1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_swapping_rows_and_columns_of_a_non_square_input_is_seen(encoder):
    clip = torch.randn(1, 3, 2, 16, 48)
    wide = encoder(clip)
    tall = encoder(clip.reshape(1, 3, 2, 16, 3, 16).transpose(3, 4).reshape(1, 3, 2, 48, 16))
    # The same patches in the same order, once side by side and once on top of each other.
    assert (wide - tall).abs().max() > 1e-2


def test_tables_first_made_in_inference_mode_serve_a_backward_pass(encoder):
    clip = torch.randn(1, 3, 2, 16, 80)
    with torch.inference_mode():
        encoder(clip)
    clip.requires_grad_()
    encoder(clip).sum().backward()
    assert clip.grad is not None


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
def test_images_and_videos_have_weights_of_their_own(preset_21, state_21, encoder_21, name, image, video):
    other = KINDS["vjepa2_1"].build(preset_21, state_21 | {name: state_21[name] + torch.randn(state_21[name].shape)})
    frame = torch.randn(1, 3, 1, 32, 32)
    pair = frame.expand(-1, -1, 2, -1, -1)
    assert torch.equal(other(frame), encoder_21(frame)) != image
    assert torch.equal(other(pair), encoder_21(pair)) != video
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder_21(frame).dtype == torch.float32, "the vectors keep the residual stream in float32"


def test_frames_beyond_a_tubelet_are_dropped(encoder):
    clip = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(encoder(clip), encoder(clip[:, :, :4]))
