"""What the V-JEPA 2.1 transformer promises; tests/test_golden.py compares its numbers with the reference implementation.

Claims: rows and columns span 0 to 15 on every grid, one patch wide ones too, and time stays; both channels of a pair share a
frequency; images and videos each have their own embedding and vector; levels come in the order of depth; files of the released
structure load strictly, and the other architecture, other depths and missing image paths are named.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import LEVEL_LAYERS
from jepa_cache.encoder.checkpoints import CheckpointError, build_encoder, load_encoder_state
from jepa_cache.encoder.frozen import FrozenEncoder
from jepa_cache.encoder.structure import level_layers, parameter_shapes
from jepa_cache.encoder.vit import rotate, rotation_tables
from jepa_cache.encoder.vit21 import VisionTransformer21
from tests.official_files import without_storage, write_v21_file
from tests.workspace import SUITE_SETTINGS

CPU = torch.device("cpu")


@pytest.fixture
def encoder(preset_21, state_21):
    return build_encoder(preset_21, state_21)


def frozen(preset, state, **options):
    return FrozenEncoder(
        preset, build_encoder(preset, state), **{"device": "cpu", "compute_dtype": "float32", **options}
    )


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


def test_module_and_shape_list_name_the_same_parameters(preset_21, encoder):
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert list(shapes.items()) == list(parameter_shapes(preset_21).items())


def test_positions_follow_the_preset(preset_21, state_21, encoder):
    clip = torch.randn(1, 3, 2, 48, 48)
    plain = build_encoder(replace(preset_21, positions="grid"), state_21)
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


@pytest.mark.parametrize("depth", LEVEL_LAYERS)
def test_every_depth_has_four_levels_up_to_its_last_block(depth):
    layers = level_layers(depth)
    assert len(layers) == 4 and layers[-1] == depth - 1 and list(layers) == sorted(set(layers))


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
    other = build_encoder(preset_21, state_21 | {name: state_21[name] + torch.randn(state_21[name].shape)})
    frame = torch.randn(1, 3, 1, 32, 32)
    pair = frame.expand(-1, -1, 2, -1, -1)
    assert torch.equal(other(frame), encoder(frame)) != image
    assert torch.equal(other(pair), encoder(pair)) != video


def test_frames_beyond_a_tubelet_are_dropped_and_less_than_one_is_refused(encoder):
    clip = torch.randn(1, 3, 5, 32, 32)
    assert torch.equal(encoder(clip), encoder(clip[:, :, :4]))
    with pytest.raises(ValueError, match="at least one tubelet of 2 frames; got 0"):
        encoder(clip[:, :, :0])


def test_a_frame_goes_the_way_that_is_asked_for(preset_21, state_21, encoder):
    doubled, image = (frozen(preset_21, state_21, single_frame=way) for way in ("doubled", "image"))
    frames = doubled.preprocess(np.random.default_rng(1).integers(0, 256, (3, 45, 60, 3), dtype=np.uint8))[:, None]
    clip = frames.transpose(1, 2)
    assert torch.equal(image.encode(frames)[:, 0], encoder(clip))
    assert torch.equal(doubled.encode(frames)[:, 0], encoder(clip.expand(-1, -1, 2, -1, -1)))
    assert (image.encode(frames) - doubled.encode(frames)).abs().max() > 1e-2
    pairs = frames[:2].view(1, 2, 3, 32, 32)
    assert torch.equal(image.encode(pairs), doubled.encode(pairs))


def test_bfloat16_is_near_float32_and_ends_in_float32(preset_21, state_21):
    exact, half = (frozen(preset_21, state_21, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    frames = torch.randn(2, 1, 3, 32, 32)
    got = half.encode(frames)
    assert got.dtype == torch.float32
    # 12 blocks of 8 bits, on values of order 1.
    assert 0 < (got - exact.encode(frames)).abs().mean() < 0.1


@pytest.mark.parametrize("entry", ["ema_encoder", "target_encoder"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_file_of_the_released_structure_loads_whatever_wrapped_it(tmp_path, preset_21, state_21, prefix, entry):
    write_v21_file(tmp_path / "v21.pt", state_21, entry=entry, prefix=prefix)
    preset = replace(preset_21, weights_entry=entry)
    built = build_encoder(preset, load_encoder_state(preset, tmp_path / "v21.pt"))
    assert all(torch.equal(value, state_21[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize("name", ["vitb384_v21", "vitl384_v21", "vitg384_v21", "vitgigantic384_v21"])
def test_files_of_the_released_sizes_load_into_their_presets_and_no_other(tmp_path, name):
    preset = load_config(SUITE_SETTINGS, [f"encoder={name}"]).encoder
    shapes = parameter_shapes(preset)
    write_v21_file(tmp_path / "v21.pt", without_storage(shapes), entry=preset.weights_entry)
    state = load_encoder_state(preset, tmp_path / "v21.pt")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    other = load_config(
        SUITE_SETTINGS, ["encoder=vitl384_v21" if "vitl" not in name else "encoder=vitb384_v21"]
    ).encoder
    with pytest.raises(CheckpointError, match=f"not those of encoder preset '{other.name}'"):
        load_encoder_state(replace(other, weights_entry=preset.weights_entry), tmp_path / "v21.pt")


def test_every_tensor_that_differs_is_listed(tmp_path, preset_21, state_21):
    state_21["norms_block.4.weight"] = torch.zeros(48)
    state_21["patch_embed_img.proj.weight"] = torch.zeros(48, 3, 2, 16, 16)
    del state_21["video_mod_embed"]
    write_v21_file(tmp_path / "v21.pt", state_21)
    with pytest.raises(CheckpointError) as caught:
        load_encoder_state(preset_21, tmp_path / "v21.pt")
    for line in (
        "3 tensors differ",
        "missing     video_mod_embed [1, 1, 48]",
        "unexpected  norms_block.4.weight [48]",
        "wrong shape patch_embed_img.proj.weight [48, 3, 2, 16, 16], expected [48, 3, 1, 16, 16]",
    ):
        assert line in str(caught.value)


def test_a_file_of_the_other_architecture_is_named(preset, wide_state, preset_21, state_21):
    with pytest.raises(CheckpointError, match=r"This is a V-JEPA 2\.1 encoder.*kind: vjepa2_1"):
        build_encoder(replace(preset, depth=12), state_21)
    with pytest.raises(CheckpointError, match=r"This is a V-JEPA 2 encoder.*kind: vjepa2"):
        build_encoder(preset_21, wide_state)


@pytest.mark.parametrize("change", [{"rope": "tiled"}, {"positions": "stretched"}])
def test_rotary_positions_of_no_kind_are_refused(preset_21, state_21, change):
    with pytest.raises(ValueError, match="known: rope 'paired', positions rescaled or grid"):
        build_encoder(replace(preset_21, **change), state_21)


def test_a_depth_without_known_levels_is_refused(preset_21, state_21):
    with pytest.raises(ValueError, match=r"a depth of 12, 24, 40, 48.* got depth 11"):
        build_encoder(replace(preset_21, depth=11), state_21)
    with pytest.raises(ValueError, match="got depth 2"):
        VisionTransformer21(embed_dim=48, depth=2, num_heads=2, mlp_dim=8)


def test_rescaled_positions_of_other_patches_are_refused():
    with pytest.raises(ValueError, match=r"patches of 16 px only; got 14.*positions: grid"):
        VisionTransformer21(embed_dim=48, depth=12, num_heads=2, mlp_dim=8, patch_size=14)


def test_an_encoder_without_an_image_path_is_not_asked_for_one(preset, wide_state):
    with pytest.raises(ValueError, match="kind vjepa2 has no image path"):
        frozen(preset, wide_state, single_frame="image")
    with pytest.raises(ValueError, match="unknown single_frame 'once'"):
        frozen(preset, wide_state, single_frame="once")
