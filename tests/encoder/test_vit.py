"""What the transformers promise beside the reference's numbers, which tests/test_golden.py compares.

Claims: V-JEPA 2's equals transformers' VJEPA2Model; rows are told from columns; frames beyond a tubelet are dropped.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from jepa_cache.encoder import KINDS


@pytest.fixture(params=["vjepa2", "vjepa2_1"])
def encoder(request, preset, wide_state, preset_21, state_21):
    given = (preset, wide_state) if request.param == "vjepa2" else (preset_21, state_21)
    return KINDS[request.param].build(*given)


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


def test_swapping_rows_and_columns_of_a_non_square_input_is_seen(encoder):
    clip = torch.randn(1, 3, 2, 16, 48)
    wide = encoder(clip)
    tall = encoder(clip.reshape(1, 3, 2, 16, 3, 16).transpose(3, 4).reshape(1, 3, 2, 48, 16))
    # The same patches in the same order, once side by side and once on top of each other.
    assert (wide - tall).abs().max() > 1e-2


def test_frames_beyond_a_tubelet_are_dropped(encoder):
    clip = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(encoder(clip), encoder(clip[:, :, :4]))
