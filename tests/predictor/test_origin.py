"""Weights that a fine-tuning starts from, and the encoder that they belong to.

Claims:
- a file of the released size and structure loads strictly, whatever else it holds, at full size too;
- with other widths of actions or states exactly the conditioning encoders concerned are new, and the log says so; everything else must fit;
- weights are combined only with a cache of the encoder that their file holds or names, as the cache's own recipe names it;
- an override is allowed and recorded.
"""

import logging
import warnings
from pathlib import Path

import pytest
import torch

from jepa_cache.config.loading import load_config
from jepa_cache.encoder.checkpoints import load_state
from jepa_cache.encoder.weights import weights_identity
from jepa_cache.predictor.checkpoints import (
    ENCODER_FIELD,
    CheckpointError,
    check_encoder,
    encoder_identities,
    load_predictor_weights,
    load_start_weights,
    read_state,
    save_predictor,
)
from jepa_cache.predictor.model import ACPredictor
from jepa_cache.store.recipe import file_digest
from tests.official_files import encoder_shapes, without_storage, write_official_file
from tests.workspace import SUITE_SETTINGS

SIZES = {
    "embed_dim": 8,
    "predictor_dim": 12,
    "depth": 1,
    "num_heads": 2,
    "action_dim": 7,
    "state_dim": 7,
    "grid": (2, 2),
}
RELEASED = {"embed_dim": 1408, "predictor_dim": 1024, "depth": 24, "num_heads": 16, "grid": (16, 16)}
ENCODER = {"patch_embed.proj.bias": torch.zeros(8)}


def build(seed: int = 0, **changes: int) -> ACPredictor:
    torch.manual_seed(seed)
    return ACPredictor(**(SIZES | changes))


def build_released(**widths: int) -> ACPredictor:
    with torch.device("meta"):
        return ACPredictor(**RELEASED, **({"action_dim": 7, "state_dim": 7} | widths))


@pytest.fixture
def official(tmp_path: Path) -> Path:
    write_official_file(tmp_path / "ac.pt", build(1).state_dict(), ENCODER)
    return tmp_path / "ac.pt"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released file's 300 + 484 tensors at full size, without their gigabytes."""
    path = tmp_path_factory.mktemp("released") / "vjepa2-ac-vitg.pt"
    shapes = {name: tuple(tensor.shape) for name, tensor in build_released().state_dict().items()}
    encoder = load_config(SUITE_SETTINGS, ["encoder=ac_vitg"]).encoder
    write_official_file(path, without_storage(shapes), without_storage(encoder_shapes(encoder)))
    return path


def test_the_released_structure_loads_strictly_at_full_size(released: Path):
    state = read_state(released)
    assert len(state) == 300
    assert sum(tensor.numel() for tensor in state.values()) == 305_220_992
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        load_predictor_weights(build_released(), released)
        assert load_start_weights(build_released(), released) == ()
    preset = load_config(SUITE_SETTINGS, ["encoder=ac_vitg"]).encoder
    assert sum(tensor.numel() for tensor in load_state(released, preset.weights_entry).values()) == 1_012_173_952


def test_the_released_file_lends_its_blocks_to_other_action_spaces(released: Path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        new = load_start_weights(build_released(action_dim=13, state_dim=2), released)
    assert new == ("action_encoder", "state_encoder", "extrinsics_encoder")


@pytest.mark.parametrize(
    ("widths", "new"),
    [
        ({}, ()),
        ({"state_dim": 2}, ("state_encoder",)),
        ({"action_dim": 13}, ("action_encoder", "extrinsics_encoder")),
    ],
)
def test_exactly_the_layers_of_other_widths_are_new(
    official: Path, widths: dict[str, int], new: tuple[str, ...], caplog: pytest.LogCaptureFixture
):
    predictor, fresh = build(2, **widths), build(2, **widths).state_dict()
    with torch.no_grad():
        for layer in ("action_encoder", "state_encoder", "extrinsics_encoder"):
            getattr(predictor, layer).bias.fill_(0.5)
            fresh[f"{layer}.bias"].fill_(0.5)
    there = read_state(official)
    with caplog.at_level(logging.WARNING):
        assert load_start_weights(predictor, official) == new
    for name, tensor in predictor.state_dict().items():
        expected = fresh if name.partition(".")[0] in new else there
        assert torch.equal(tensor, expected[name]), name
    assert [record.getMessage().split()[0] for record in caplog.records] == list(new)


def test_other_sizes_are_refused_and_every_difference_is_listed(official: Path):
    predictor, before = build(2, state_dim=3, embed_dim=10), build(2, state_dim=3, embed_dim=10).state_dict()
    with pytest.raises(CheckpointError, match="3 differences") as caught:
        load_start_weights(predictor, official)
    for line in (
        "shape: predictor_embed.weight is [12, 8] in the file, [12, 10] here",
        "shape: predictor_proj.weight is [8, 12] in the file, [10, 12] here",
        "shape: predictor_proj.bias is [8] in the file, [10] here",
    ):
        assert line in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in predictor.state_dict().items())


def test_conditioning_encoders_of_another_predictor_are_not_taken_for_new(official: Path):
    with pytest.raises(CheckpointError, match=r"shape: state_encoder.weight is \[12, 7\] in the file, \[24, 2\] here"):
        load_start_weights(build(2, predictor_dim=24, state_dim=2), official)


@pytest.mark.parametrize("entry", ["encoder", "target_encoder"])
def test_the_encoder_in_an_official_file_is_known_as_a_cache_names_it(official: Path, entry: str):
    from dataclasses import replace

    preset = replace(load_config(SUITE_SETTINGS, ["encoder=ac_vitg"]).encoder, weights_entry=entry)
    identity = weights_identity(preset, official, digest=file_digest)
    assert identity in encoder_identities(official, file_digest)
    match = check_encoder(official, identity, digest=file_digest)
    assert match.matches and match.cache == identity


def test_another_encoder_is_refused_unless_allowed(official: Path):
    other = f"file:{'0' * 64}#encoder"
    with pytest.raises(CheckpointError) as caught:
        check_encoder(official, other, digest=file_digest)
    assert other in str(caught.value) and file_digest(official) in str(caught.value)
    assert "train.allow_other_encoder" in str(caught.value)
    match = check_encoder(official, other, digest=file_digest, allow_other=True)
    assert not match.matches and match.file == encoder_identities(official, file_digest)


def test_a_predictor_alone_says_nothing_and_is_refused_unless_allowed(tmp_path: Path):
    torch.save({"predictor": build().state_dict(), "encoder": {}}, tmp_path / "alone.pt")
    with pytest.raises(CheckpointError, match="holds a predictor alone"):
        check_encoder(tmp_path / "alone.pt", "random:1", digest=file_digest)
    assert check_encoder(tmp_path / "alone.pt", "random:1", digest=file_digest, allow_other=True).file == ()


def test_weights_of_this_project_name_their_encoder_in_the_card(tmp_path: Path):
    path = tmp_path / "own.safetensors"
    save_predictor(build(), path, {ENCODER_FIELD: "random:abc"})
    assert check_encoder(path, "random:abc", digest=file_digest).matches
    with pytest.raises(CheckpointError, match="tokens of random:abc"):
        check_encoder(path, "random:abd", digest=file_digest)


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "absent.pt"])
def test_a_damaged_file_is_not_taken_for_one_that_says_nothing(tmp_path: Path, name: str):
    for broken in ("broken.pt", "broken.safetensors"):
        (tmp_path / broken).write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_encoder(tmp_path / name, "random:1", digest=file_digest, allow_other=True)
