"""Frozen image encoders of the transformers library.

Claims:
- the tokens are the model's own last_hidden_state without class, distillation and register tokens, in rows of the picture, for every
  class that is known; other sizes than the model takes, and other numbers of tokens, are errors;
- pixels are what transformers' own image processors make of the frames, exactly;
- code of a repository is never run, pickles are never read, weights that are missing are never drawn;
- the identity is that of config and weights, wherever they lie; a preset that does not describe the model is refused with every
  difference.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.image import CLASS_TOKENS, ImageModelError, read_model, read_preprocessing
from jepa_cache.encoder.preprocess import crop_rule
from jepa_cache.files import file_digest
from tests.encoder.image_models import CENTRE_CROP, MODELS, SQUEEZED, change_config, make_model, preset_of, save_model
from tests.official_files import prepare

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture
def model(dinov2, tmp_path):
    return shutil.copytree(dinov2, tmp_path / "model")


def identity_of(folder, digest=file_digest):
    return KINDS["hf"].identity(None, folder, digest)


def load(folder, **changes):
    return KINDS["hf"].load(preset_of(folder, **changes), folder)


def drop_weights(folder, wanted):
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if not wanted(name)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_known_class_is_tried_here():
    assert set(MODELS) == set(CLASS_TOKENS)


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_are_the_model_s_own_without_what_comes_before_the_patches(tmp_path, model_type):
    encoder = load(save_model(tmp_path, model_type))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = make_model(model_type)(pixel_values=pixels).last_hidden_state
        tokens = encoder(pixels[:, :, None])
    assert tokens.shape == (2, 16, 32)
    assert torch.equal(tokens, own[:, MODELS[model_type][3] :])


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_come_row_by_row(tmp_path, model_type):
    # Without blocks a token sees its own patch only.
    encoder = load(save_model(tmp_path, model_type, num_hidden_layers=0), depth=0)
    pixels = torch.randn(1, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    other = pixels.clone()
    other[..., 16:32, 32:48] += 1.0  # row 1, column 2 of 4 x 4
    changed = (encoder(pixels) != encoder(other)).any(dim=-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 2]


@pytest.mark.parametrize(
    ("size", "preprocessing"), [((90, 160), CENTRE_CROP), ((75, 74), CENTRE_CROP), ((90, 160), SQUEEZED)]
)
def test_pixels_are_those_of_the_library_s_own_processor(tmp_path, size, preprocessing):
    from transformers import BitImageProcessorPil, ViTImageProcessorPil

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    frames = RNG.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    processor = (BitImageProcessorPil if preprocessing is CENTRE_CROP else ViTImageProcessorPil)(**preprocessing)
    expected = processor(list(frames), return_tensors="pt")["pixel_values"]
    preset = preset_of(tmp_path)
    assert torch.equal(prepare(crop_rule(preset), frames, preset.resolution, preset.mean, preset.std), expected)


def test_code_of_a_repository_is_refused_by_name_and_never_run(model, tmp_path):
    (model / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(model, auto_map={"AutoModel": "modeling_evil.Evil"}, model_type="evil")
    with pytest.raises(ImageModelError, match=r"auto_map: modeling_evil\.Evil.*never run"):
        load(model)
    assert not (tmp_path / "ran").exists()


def test_pickles_are_not_read_and_files_that_were_cut_short_are_refused_before_anything_is_loaded(model):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    for kept in (0, 7, 3000, -1):
        path.write_bytes(whole[:kept])
        with pytest.raises(ImageModelError, match=r"no whole safetensors file: .*Copy or download it again"):
            identity_of(model)
    path.rename(model / "pytorch_model.bin")
    with pytest.raises(ImageModelError, match=r"lacks model\.safetensors; it has pytorch_model\.bin, but pickles"):
        load(model)


def test_weights_that_are_missing_are_not_drawn_at_random_but_for_a_pooler(tmp_path, model):
    drop_weights(model, lambda name: name == "encoder.layer.1.norm1.weight")
    with pytest.raises(ValueError, match=r"missing encoder\.layer\.1\.norm1\.weight; .*would be random"):
        load(model)
    folder = save_model(tmp_path / "vit", "vit")
    drop_weights(folder, lambda name: name.startswith("pooler."))
    assert load(folder)(torch.zeros(1, 3, 1, 64, 64)).shape == (1, 16, 32)


def test_a_resolution_that_the_model_does_not_take_is_an_error_and_one_that_it_takes_is_not(tmp_path, dinov2):
    wide = load(dinov2, resolution=96)
    assert wide(torch.zeros(1, 3, 1, 96, 96)).shape == (1, 36, 32), "DINOv2 interpolates its positions"
    folder = save_model(tmp_path, "ijepa")
    with pytest.raises(ValueError, match="does not take the 96 px of encoder preset 'image'"):
        load(folder, resolution=96)


def test_a_preset_that_does_not_describe_the_model_is_refused_with_every_difference(dinov2):
    with pytest.raises(ImageModelError, match=r"embed_dim is 48 .* 32 in the model; depth is 3 .*add-encoder"):
        load(dinov2, embed_dim=48, depth=3)


@pytest.mark.parametrize("model_type", ["resnet", "clip"])
def test_models_without_known_patches_are_refused(model, model_type):
    change_config(model, model_type=model_type)
    with pytest.raises(ImageModelError, match=f"model_type '{model_type}', of which it is not known.*image part alone"):
        read_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_factor": 1.0}, "scaled by 1.0 and not by 1/255"),
        ({"resample": 0}, "resample 0 is none of"),
        ({"crop_size": {"height": 64, "width": 80}}, "gives no square"),
        ({"size": {"height": 70, "width": 70}}, "squeezes to .* and then crops"),
        ({"image_std": [0.0, 0.2, 0.2]}, "no three numbers each, deviations above 0"),
    ],
)
def test_preprocessing_that_is_not_known_is_refused(tmp_path, changes, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CENTRE_CROP | changes))
    with pytest.raises(ImageModelError, match=message):
        read_preprocessing(tmp_path)


@pytest.mark.parametrize("reference", ["nothing", "hf://owner/", "https://example.com/model"])
def test_a_reference_that_is_none_is_refused(tmp_path, reference):
    with pytest.raises(ImageModelError, match=rf"or hf://owner/repo\[@revision\], or .*; got '{reference}'"):
        KINDS["hf"].find(reference, base=tmp_path)


def test_the_identity_is_that_of_config_and_weights_wherever_they_lie(tmp_path, dinov2, model):
    identity = identity_of(dinov2)
    assert identity_of(model) == identity
    assert identity_of(save_model(tmp_path / "other", seed=1)) != identity
    change_config(model, layer_norm_eps=1e-5)
    assert identity_of(model) != identity, "the config decides numbers too"


def test_weights_in_several_files_give_the_same_tokens_and_all_of_them_count(tmp_path, dinov2):
    make_model("dinov2").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CENTRE_CROP))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    pixels = torch.randn(1, 3, 1, 64, 64)
    assert torch.equal(load(dinov2)(pixels), load(tmp_path)(pixels))
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(ImageModelError, match=r"lacks model-00002-"):
        identity_of(tmp_path)


@pytest.mark.parametrize("name", ["../others/model.safetensors", "/etc/passwd", "..", "", 5, None])
def test_weights_outside_the_folder_are_refused_by_name_and_not_opened(tmp_path, model, name):
    shutil.copytree(model, tmp_path / "others")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ImageModelError, match="weight_map names files of this folder"):
        identity_of(model, lambda _: pytest.fail("a file was read"))
