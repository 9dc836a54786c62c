"""Claims of encoder/pixels.py: tokens are the resized frame's pixels, no weight is asked for, and a preset that contradicts itself is refused."""

import numpy as np
import pytest
from PIL import Image

from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from jepa_cache.encoder import weights_identity
from jepa_cache.encoder.frozen import FrozenEncoder, load_module
from jepa_cache.encoding.groups import token_recipe
from tests.official_files import IMAGENET_MEAN, IMAGENET_STD
from tests.workspace import SUITE_SETTINGS, copy_settings

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 90, 160, 3), dtype=np.uint8)


@pytest.mark.parametrize(("changes", "pool"), [({}, 1), ({"patch_size: 16": "patch_size: 4", "768  ": "48  "}, 2)])
def test_tokens_are_the_pixels_of_the_whole_frame_patch_by_patch(tmp_path, changes, pool):
    root = copy_settings(tmp_path)
    preset_file = root / "configs/encoder/pixels.yaml"
    for old, new in changes.items():
        preset_file.write_text(preset_file.read_text().replace(old, new, 1))
    config = load_config(root, ["encoder=pixels", f"encode.pool={pool}"])
    preset = config.encoder
    assert not preset.trained
    encoder = FrozenEncoder(preset, load_module(preset, None), device="cpu", compute_dtype="float32", pool=pool)
    tokens = encoder.encode(encoder.preprocess(FRAMES)[:, None])[:, 0].numpy()
    small = np.stack([np.array(Image.fromarray(frame).resize((16, 16), Image.BILINEAR)) for frame in FRAMES])
    pixels = (small / 255 - IMAGENET_MEAN) / IMAGENET_STD
    patch, side = preset.patch_size, 16 // preset.patch_size
    expected = np.empty((2, side, side, preset.embed_dim))
    for row in range(side):
        for column in range(side):
            square = pixels[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            expected[:, row, column] = square.transpose(0, 3, 1, 2).reshape(2, -1)
    expected = expected.reshape(2, side // pool, pool, side // pool, pool, -1).mean((2, 4)).reshape(tokens.shape)
    assert np.abs(tokens - expected).max() < 1e-5


def test_the_recipe_says_that_they_are_pixels_and_asks_for_no_file():
    config = load_config(SUITE_SETTINGS, ["encoder=pixels"])
    identity = weights_identity(config.encoder, None, digest=lambda _: pytest.fail("a file was asked for"))
    recipe = token_recipe(config.encode, config.encoder, {}, identity)
    assert (recipe["encoder"]["weights"], recipe["encoder"]["kind"]) == ("pixels:1", "pixels")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("random_seed: null", "random_seed: 0", "kind pixels, has no weights; set weights and random_seed to null"),
        ("weights: null", "weights: a.pt", "kind pixels, has no weights"),
        ("patch_size: 16", "patch_size: 4", r"is 3 \* patch_size \* patch_size, 48; got 768"),
        ("rope: none", "rope: own", "rope of encoder 'pixels', kind pixels, is 'own'; known: none"),
    ],
)
def test_a_preset_that_contradicts_itself_is_refused(tmp_path, old, new, words):
    path = copy_settings(tmp_path) / "configs/encoder/pixels.yaml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path, ["encoder=pixels"])
    with pytest.raises(ConfigError, match=r"encode\.mode must be frame"):
        load_config(SUITE_SETTINGS, ["encoder=pixels", "encode.mode=tubelet"])
