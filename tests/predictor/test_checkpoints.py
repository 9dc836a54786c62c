"""Weight files of the predictor, what a fine-tuning starts from, and the encoder that weights belong to.

Claims:
- what is saved is loaded bit for bit, with its card; equal weights and cards are equal bytes;
- official files load through their entry, whatever wrappers put into their names, at full size too;
- every missing, unexpected or misshapen tensor is listed, and nothing is loaded then;
- a missing, damaged (one value changed, too) or foreign file is refused, and a code-carrying pickle is never run;
- with other widths of actions or states exactly the conditioning encoders concerned are new, and the log says so;
- weights are combined only with a cache of the encoder that their file holds or names; an override is recorded.
"""

import dataclasses
import logging
import warnings
from pathlib import Path

import pytest
import torch

from jepa_cache.config.loading import load_config
from jepa_cache.encoder import weights_identity
from jepa_cache.encoder.checkpoints import load_state
from jepa_cache.files import file_digest
from jepa_cache.predictor.checkpoints import (
    ENCODER_FIELD,
    CheckpointError,
    check_encoder,
    load_predictor_weights,
    load_start_weights,
    read_card,
    read_state,
    save_state,
)
from jepa_cache.predictor.model import ACPredictor
from tests.official_files import encoder_shapes, without_storage, write_official_file
from tests.predictor.makers import build, same, save
from tests.workspace import SUITE_SETTINGS

RELEASED = {"embed_dim": 1408, "predictor_dim": 1024, "depth": 24, "num_heads": 16, "grid": (16, 16)}
ENCODER = {"patch_embed.proj.bias": torch.zeros(8)}


def test_saved_weights_are_loaded_bit_for_bit_and_equal_ones_are_equal_bytes(tmp_path: Path):
    loaded, contents = build(1), set()
    # DVC compares files by their bytes: a file that differs from run to run would evaluate again for nothing.
    for attempt in range(8):
        path = tmp_path / f"{attempt}/w.safetensors"
        save_state(build().state_dict(), path, {"config": {"depth": 1}, "a": [2]})
        contents.add(path.read_bytes())
    load_predictor_weights(loaded, path)
    assert same(build(), loaded) and len(contents) == 1
    assert read_card(path) == {"config": {"depth": 1}, "a": [2]}
    assert [entry.name for entry in path.parent.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module."])
def test_official_files_load_without_their_prefixes(tmp_path: Path, prefix: str):
    saved, loaded, path = build(0), build(1), tmp_path / "official.pt"
    torch.save({"predictor": {prefix + k: v for k, v in saved.state_dict().items()}, "encoder": {}, "epoch": 3}, path)
    load_predictor_weights(loaded, path)
    assert same(saved, loaded)


def test_every_difference_is_listed_and_nothing_is_loaded(tmp_path: Path):
    state = build(0, action_dim=13).state_dict()
    state["predictor_pos_embed"] = state.pop("predictor_norm.bias")
    torch.save({"predictor": state}, tmp_path / "other.pt")
    predictor = build(1)
    with pytest.raises(CheckpointError) as caught:
        load_predictor_weights(predictor, tmp_path / "other.pt")
    assert same(predictor, build(1))
    for line in (
        "missing: predictor_norm.bias [12]",
        "unexpected: predictor_pos_embed [12]",
        "shape: action_encoder.weight is [12, 13] in the file, [12, 7] here",
        "shape: extrinsics_encoder.weight is [12, 12] in the file, [12, 6] here",
        "4 differences",
    ):
        assert line in str(caught.value)


class Payload:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_unusable_files_are_refused_and_code_in_one_is_never_run(tmp_path: Path):
    torch.save({"encoder": {}}, tmp_path / "encoder.pt")
    torch.save({"predictor": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "run").mkdir()
    for read in (read_state, read_card):
        with pytest.raises(
            CheckpointError, match=r"run are a folder; name the file in it, as .*/predictor\.safetensors"
        ):
            read(tmp_path / "run")
    for change in (b"\x00", b"\xff"):
        path = tmp_path / f"damaged{change[0]}.safetensors"
        content = bytearray(save(path, build()).read_bytes())
        middle = len(content) // 2
        content[middle : middle + 64] = change * 64
        path.write_bytes(content)
    for name, reason in (
        ("encoder.pt", 'need an entry "predictor"; the file holds: encoder'),
        ("evil.pt", r"holds \S+, and pickles can run code"),
        ("broken.pt", "cannot be read"),
        ("empty.pt", "cannot be read"),
        ("broken.safetensors", "cannot be read"),
        ("damaged0.safetensors", "are damaged: they are not those that were written"),
        ("damaged255.safetensors", "are damaged: they are not those that were written"),
        ("absent.pt", "do not exist"),
    ):
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_predictor_weights(build(0), tmp_path / name)
        assert "weights_only" not in str(caught.value), "torch's advice to run the code is not ours"
    assert not (tmp_path / "ran").exists()


# --- the released file, and other widths -----------------------------------------------------------------------------------


def build_released(**widths: int) -> ACPredictor:
    with torch.device("meta"):
        return ACPredictor(**RELEASED, **({"action_dim": 7, "state_dim": 7} | widths))


def test_the_released_structure_loads_strictly_at_full_size_and_lends_its_blocks_to_other_actions(tmp_path: Path):
    """The released file's 300 + 484 tensors at full size, without their gigabytes."""
    path, preset = tmp_path / "vjepa2-ac-vitg.pt", load_config(SUITE_SETTINGS, ["encoder=ac_vitg"]).encoder
    shapes = {name: tuple(tensor.shape) for name, tensor in build_released().state_dict().items()}
    write_official_file(path, without_storage(shapes), without_storage(encoder_shapes(preset)))
    state = read_state(path)
    assert len(state) == 300 and sum(tensor.numel() for tensor in state.values()) == 305_220_992
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        load_predictor_weights(build_released(), path)
        assert load_start_weights(build_released(), path) == ()
        new = load_start_weights(build_released(action_dim=13, state_dim=2), path)
    assert new == ("action_encoder", "state_encoder", "extrinsics_encoder")
    assert sum(tensor.numel() for tensor in load_state(path, preset.weights_entry).values()) == 1_012_173_952


@pytest.fixture
def official(tmp_path: Path) -> Path:
    write_official_file(tmp_path / "ac.pt", build(1).state_dict(), ENCODER)
    return tmp_path / "ac.pt"


@pytest.mark.parametrize(
    ("widths", "new"),
    [
        ({}, ()),
        ({"state_dim": 2}, ("state_encoder",)),
        ({"action_dim": 13}, ("action_encoder", "extrinsics_encoder")),
    ],
)
def test_exactly_the_layers_of_other_widths_are_new(official: Path, widths: dict, new: tuple[str, ...], caplog):
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


def test_other_sizes_are_no_new_layers_and_nothing_is_loaded(official: Path):
    predictor = build(2, state_dim=3, embed_dim=10)
    with pytest.raises(CheckpointError, match=r"3 differences(.|\n)*predictor_embed.weight is \[12, 8\] in the file"):
        load_start_weights(predictor, official)
    assert same(predictor, build(2, state_dim=3, embed_dim=10))
    with pytest.raises(CheckpointError, match=r"shape: state_encoder.weight is \[12, 7\] in the file, \[24, 2\] here"):
        load_start_weights(build(2, predictor_dim=24, state_dim=2), official)


# --- the encoder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["encoder", "target_encoder"])
def test_the_encoder_in_an_official_file_is_known_as_a_cache_names_it(official: Path, entry: str):
    preset = dataclasses.replace(load_config(SUITE_SETTINGS, ["encoder=ac_vitg"]).encoder, weights_entry=entry)
    identity = weights_identity(preset, official, digest=file_digest)
    match = check_encoder(official, identity, digest=file_digest)
    assert match.matches and match.cache == identity and identity in match.file


def test_another_encoder_is_refused_unless_allowed(official: Path):
    other = f"file:{'0' * 64}#encoder"
    with pytest.raises(CheckpointError, match=r"train\.allow_other_encoder") as caught:
        check_encoder(official, other, digest=file_digest)
    assert other in str(caught.value) and file_digest(official) in str(caught.value)
    match = check_encoder(official, other, digest=file_digest, allow_other=True)
    assert not match.matches and len(match.file) == 2


def test_a_predictor_alone_says_nothing_and_one_of_this_project_says_it_in_its_card(tmp_path: Path):
    alone, own = tmp_path / "alone.pt", save(tmp_path / "own.safetensors", build(), **{ENCODER_FIELD: "random:abc"})
    torch.save({"predictor": build().state_dict(), "encoder": {}}, alone)
    with pytest.raises(CheckpointError, match="holds a predictor alone"):
        check_encoder(alone, "random:1", digest=file_digest)
    assert check_encoder(alone, "random:1", digest=file_digest, allow_other=True).file == ()
    assert check_encoder(own, "random:abc", digest=file_digest).matches
    with pytest.raises(CheckpointError, match="tokens of random:abc"):
        check_encoder(own, "random:abd", digest=file_digest)


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors", "absent.pt"])
def test_a_damaged_file_is_not_taken_for_one_that_says_nothing(tmp_path: Path, name: str):
    for broken in ("broken.pt", "broken.safetensors"):
        (tmp_path / broken).write_bytes(b"x" * 50)
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_encoder(tmp_path / name, "random:1", digest=file_digest, allow_other=True)
