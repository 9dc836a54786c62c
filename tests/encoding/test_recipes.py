"""Claims: every setting of stage one that changes tokens changes the fingerprint, and no other one does.

Each field of a recipe is explained in docs/filling.md; changing any of them leaves the old stores where they are.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import EncodeConfig, EncoderPreset
from jepa_cache.encoder import weights_identity
from jepa_cache.encoding.groups import READING, action_recipe, name_reading, token_recipe
from jepa_cache.files import file_digest
from jepa_cache.sources import build_source
from jepa_cache.store.recipe import fingerprint
from tests.encoded import tiny_config
from tests.workspace import SUITE_SETTINGS

ROOT = Path(__file__).resolve().parents[2]

# Another value for every field that decides tokens; a field that is in neither table fails the tests by its name.
ENCODE_CHANGES = {
    "fps": 4.0,
    "mode": "tubelet",
    "compute_dtype": "bfloat16",
    "compile": True,
    "dtype": "float32",
    "decoder": "pyav",
    "pool": 2,
}
ENCODE_KEEPS = {
    "fill_batches": True,
    "frames_per_clip": 8,  # clip mode only
    "action_space": "vpt36",
    "weights": "elsewhere.pt",  # known by content, not by place
    "single_frame": "image",  # V-JEPA 2.1 only, tested below
    "batch_size": 3,
    "device": "cuda",
    "num_decoders": 7,
    "decode_ahead_mib": 7,
    "max_skipped_share": 0.5,
    "episodes_per_unit": 64,  # other units, of the same episodes
    "max_units": 3,  # fewer units, each of which stays what it is
    "cameras": ("wrist",),  # an option of the source, hence in its recipe
    "phases": (1,),  # each phase has a recipe of its own, tested below
}
ENCODER_CHANGES = {
    "embed_dim": 128,
    "depth": 3,
    "num_heads": 8,
    "mlp_dim": 128,
    "patch_size": 32,
    "tubelet_size": 4,
    "resolution": 128,
    "rope": "paired",
    "crop": "square",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "random_seed": 1,
    "kind": "hf",
    "short_side": 72,
}
ENCODER_KEEPS = {
    "name": "other",
    "compute_dtype": "bfloat16",  # the one in use is encode.compute_dtype
    "batch_size": 3,
    "weights": "elsewhere.pt",
    "weights_entry": "other",  # part of the identity of a file
    "weights_sha256": "0" * 64,
    "positions": "rescaled",  # V-JEPA 2.1 only, tested below
    "single_frame": "image",  # the one in use is encode.single_frame
    "origin": "somebody",  # recorded beside the stores
}


def recipe_of(config):
    source = build_source(config.dataset.source, config.dataset.source_options)
    identity = weights_identity(config.encoder, None, digest=file_digest)
    return token_recipe(config.encode, config.encoder, source.recipe, identity)


def fingerprint_of(config):
    return fingerprint(recipe_of(config))


def action_fingerprint_of(config, phase=0):
    source = build_source(config.dataset.source, config.dataset.source_options)
    space = get_action_space(config.encode.action_space)
    return fingerprint(action_recipe(config.encode, config.encoder, source.recipe, space, phase=phase))


def changed(config, section, field, value):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})


def test_every_field_that_may_decide_tokens_is_looked_at_here():
    assert {field.name for field in dataclasses.fields(EncodeConfig)} == ENCODE_CHANGES.keys() | ENCODE_KEEPS.keys()
    assert {field.name for field in dataclasses.fields(EncoderPreset)} == ENCODER_CHANGES.keys() | ENCODER_KEEPS.keys()


@pytest.mark.parametrize(
    ("section", "changes", "keeps"),
    [("encode", ENCODE_CHANGES, ENCODE_KEEPS), ("encoder", ENCODER_CHANGES, ENCODER_KEEPS)],
)
def test_a_setting_changes_the_fingerprint_where_it_decides_tokens_and_nowhere_else(section, changes, keeps):
    config = tiny_config()
    for field, value in {**changes, **keeps}.items():
        assert getattr(getattr(config, section), field) != value
        other = fingerprint_of(changed(config, section, field, value))
        assert (other != fingerprint_of(config)) == (field in changes), field


def test_actions_depend_on_the_sampling_the_phase_and_the_action_space_and_tokens_on_the_phase():
    config = tiny_config()
    others = {"fps": 4.0, "mode": "tubelet", "action_space": "vpt36"}
    actions = [action_fingerprint_of(changed(config, "encode", field, value)) for field, value in others.items()]
    actions += [action_fingerprint_of(config, phase) for phase in range(3)]
    assert len(set(actions)) == len(actions)
    tokens = {fingerprint(token_recipe(config.encode, config.encoder, {}, "w", phase=phase)) for phase in range(3)}
    assert len(tokens) == 3


def v21_config(**encode):
    """A V-JEPA 2.1 encoder with everything that decides its tokens, V-JEPA 2's settings but for what must differ."""
    config = tiny_config(**encode)
    preset = dataclasses.replace(config.encoder, kind="vjepa2_1", depth=12, rope="paired", positions="rescaled")
    return dataclasses.replace(config, encoder=preset)


@pytest.mark.parametrize(
    ("config", "section", "field", "value", "counts"),
    [
        (tiny_config(mode="clip"), "encode", "frames_per_clip", 8, True),
        (v21_config(mode="frame"), "encode", "single_frame", "image", True),
        (v21_config(mode="tubelet"), "encode", "single_frame", "image", False),
        (v21_config(mode="clip"), "encode", "single_frame", "image", False),
        (v21_config(), "encoder", "positions", "grid", True),
        (v21_config(), "encoder", "kind", "vjepa2", True),
    ],
)
def test_what_only_some_modes_and_kinds_use_counts_there_alone(config, section, field, value, counts):
    assert (fingerprint_of(changed(config, section, field, value)) != fingerprint_of(config)) == counts


def leaves(recipe, prefix=""):
    """Every field of a recipe by its path, such as `encoder.rope`."""
    found = {}
    for key, value in recipe.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_the_docs_explain_every_field_of_a_recipe_and_no_other():
    text, recipe = (ROOT / "docs/filling.md").read_text(), leaves(recipe_of(tiny_config()))
    table = re.findall(r"^\| (`.*?) \| .+ \|$", text, re.MULTILINE)
    v21 = v21_config()
    explained = {name for row in table for name in re.findall(r"`(.+?)`", row)}
    options = {path for path in recipe if path.startswith("source.")} - {"source.source", "source.recipe_version"}
    recipe = recipe_of(tiny_config(pool=2, compile=True)) | {
        "encoder": token_recipe(v21.encode, v21.encoder, {}, "w")["encoder"]
    }
    recipe["source"] = name_reading(recipe["source"], READING)
    assert explained == leaves(recipe).keys() - options | {"source.*"}


# Caches of these recipes exist: preset and mode, of the vpt data set, with weights "pinned".
PINNED = {
    ("tiny", "frame"): "6d23c60ec4f15a66c5b76232848dc44f",
    ("tiny", "tubelet"): "836e958788be2e05e25fce824a5a2e20",
    ("tiny", "clip"): "d89b5835d4f0de00c7600898ccc54dba",
    ("vitl", "frame"): "3b4a6c8cba7dd5d04f246dea5c996d3f",
    ("vitl", "tubelet"): "40ad3ee44a6f8a6863badc1cdf7322ac",
    ("vitl", "clip"): "8de0005a14152ecce170389f814f4c55",
    ("vith", "frame"): "140226144b9300f302325104ab46d231",
    ("vitg", "frame"): "cb863a39f45d3475bba554660c2ef785",
    ("vitg384", "frame"): "e52ffd6bb2c08e6b11c56472d8ad29d7",
    ("ac_vitg", "frame"): "cb863a39f45d3475bba554660c2ef785",
}


@pytest.mark.parametrize(("preset", "mode"), PINNED)
def test_the_recipes_of_caches_that_exist_keep_their_fingerprints(preset, mode):
    config = load_config(SUITE_SETTINGS, ["dataset=vpt", f"encoder={preset}", f"encode.mode={mode}"])
    source = build_source(config.dataset.source, config.dataset.source_options)
    assert fingerprint(token_recipe(config.encode, config.encoder, source.recipe, "pinned")) == PINNED[preset, mode]
