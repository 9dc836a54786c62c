"""Claims: encoder presets of V-JEPA 2.1 load, train with every predictor, and cannot be set up to give wrong tokens unnoticed."""

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from tests.workspace import SUITE_SETTINGS

PRESETS = {
    "vitb384_v21": "ema_encoder",
    "vitl384_v21": "ema_encoder",
    "vitg384_v21": "target_encoder",
    "vitgigantic384_v21": "target_encoder",
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_v21_encoder_is_an_ordinary_choice(name):
    config = load_config(SUITE_SETTINGS, ["dataset=vpt", f"encoder={name}", "predictor=ac300m", "train.preset=vpt-16f"])
    assert config.encode.grid_of(config.encoder) == (24, 24)
    assert config.encode.num_tokens_of(config.encoder) == 576
    assert config.encode.single_frame == "doubled"
    assert config.encoder.weights_entry == PRESETS[name]


@pytest.mark.parametrize(("encoder", "num_tokens"), [("vitl384_v21", 144), ("vitl", 64), ("vitg384", 144)])
def test_pooling_quarters_the_tokens_of_every_encoder(encoder, num_tokens):
    config = load_config(SUITE_SETTINGS, [f"encoder={encoder}", "encode.pool=2"])
    assert config.encode.num_tokens_of(config.encoder) == num_tokens


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("rope: paired", "rope: tiled", r"rope of encoder vitl384_v21, kind vjepa2_1, is 'tiled'; .*paired"),
        ("positions: rescaled", "positions: index", r"positions of encoder vitl384_v21.* is 'index'; .*rescaled, grid"),
        ("depth: 24", "depth: 32", r"depth of encoder vitl384_v21, kind vjepa2_1, is 32; .*12, 24, 40, 48"),
        ("patch_size: 16", "patch_size: 32", r"patch_size 16 only; got 32"),
        ("kind: vjepa2_1", "kind: vjepa21", r"vitl384_v21\.yaml: kind is 'vjepa21'; did you mean 'vjepa2_1'"),
        ("kind: vjepa2_1", "kind: vjepa2", r"rope of encoder vitl384_v21, kind vjepa2, is 'paired'; .*tiled"),
        ("random_seed: null", "random_seed: 0", r"exactly one of weights and random_seed"),
        ("single_frame: doubled", "single_frame: once", r"vitl384_v21\.yaml: single_frame is 'once'.*doubled, image"),
    ],
)
def test_a_preset_that_fits_no_released_weights_is_refused(root, line, other, words):
    path = root / "configs/encoder/vitl384_v21.yaml"
    text = path.read_text()
    assert f"\n{line}" in text
    path.write_text(text.replace(f"\n{line}", f"\n{other}"))
    with pytest.raises(ConfigError, match=words):
        load_config(root, ["encoder=vitl384_v21"])


def test_seeded_random_weights_of_v21_are_refused(root):
    path = root / "configs/encoder/vitl384_v21.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("weights:", "random_seed:"))]
    path.write_text("\n".join([*lines, "weights: null", "random_seed: 1"]))
    with pytest.raises(ConfigError, match=r"random_seed of encoder vitl384_v21, kind vjepa2_1, is 1; .*null only"):
        load_config(root, ["encoder=vitl384_v21"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["encoder=vitl", "encode.single_frame=image"], r"'vitl' is of kind vjepa2, which has no image path"),
        (["encoder=vitl384_v21", "encode.single_frame=image", "encode.mode=tubelet"], r"in tubelet mode no frame is"),
        (["encoder=vitl384_v21", "encode.pool=5"], r"encode.pool 5 must divide the grid .* 24 x 24"),
        (["encoder=tiny", "encode.pool=0"], r"encode.pool must be above 0; got 0"),
    ],
)
def test_tokens_that_cannot_be_had_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(SUITE_SETTINGS, overrides)
