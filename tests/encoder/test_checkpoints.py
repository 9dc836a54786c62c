"""What reading checkpoints promises.

Claims: official files load strictly whatever wrapped them, other entries unread; every mismatch is listed; V-JEPA 1
and V-JEPA 2.1 files, wrong entries, damaged files and files with code are refused in words.
"""

import logging
import traceback
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from jepa_cache.encoder.checkpoints import CheckpointError, build_encoder, load_encoder_state, load_state


def sincos_table(num_steps, grid, width):
    """Fixed three-dimensional table as V-JEPA 1 has: sines, then cosines of each position."""
    index = torch.arange(num_steps * grid * grid, dtype=torch.float32)
    angles = index[:, None] / 10000 ** (torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)[None]


@pytest.fixture
def write(tmp_path, wide_state):
    """Write an official-looking file: prefixes, several entries, optimiser and counters."""

    def write_checkpoint(extra=None, *, without=(), prefix="module.backbone."):
        state = {name: value for name, value in wide_state.items() if name not in without} | (extra or {})
        path = tmp_path / "encoder.pt"
        other = {name: torch.zeros_like(value) for name, value in wide_state.items()}
        content = {
            "encoder": {f"module.{name}": value for name, value in other.items()},
            "predictor": {"module.mask_tokens.0": torch.zeros(1, 1, 24)},
            "target_encoder": {prefix + name: value for name, value in state.items()},
            "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]},
            "scaler": None,
            "epoch": 3,
            "loss": 0.5,
            "batch_size": 8,
            "world_size": 2,
            "lr": 1e-4,
        }
        torch.save(content, path)
        return path

    return write_checkpoint


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module.backbone.", "backbone."])
def test_official_file_loads_under_any_wrapper(write, file_preset, wide_state, prefix):
    state = load_encoder_state(file_preset, write(prefix=prefix))
    assert state.keys() == wide_state.keys()
    assert all(torch.equal(state[name], wide_state[name]) for name in wide_state)


def test_the_preset_decides_the_entry(write, file_preset):
    state = load_encoder_state(replace(file_preset, weights_entry="encoder"), write())
    assert not any(value.any() for value in state.values())


def test_the_encoder_holds_exactly_the_loaded_weights(write, file_preset, wide_state):
    encoder = build_encoder(file_preset, load_encoder_state(file_preset, write()))
    assert all(torch.equal(value, wide_state[name]) for name, value in encoder.state_dict().items())


def test_plain_state_dict_needs_no_entry(tmp_path, file_preset, wide_state):
    torch.save(wide_state, tmp_path / "plain.pt")
    assert (
        load_encoder_state(replace(file_preset, weights_entry=None), tmp_path / "plain.pt").keys() == wide_state.keys()
    )


def test_safetensors_with_official_names_load(tmp_path, file_preset, wide_state):
    save_file(wide_state, tmp_path / "encoder.safetensors")
    state = load_encoder_state(file_preset, tmp_path / "encoder.safetensors")
    assert all(torch.equal(state[name], wide_state[name]) for name in wide_state)


def test_unknown_entry_lists_the_entries_of_the_file(write):
    with pytest.raises(
        CheckpointError, match=r"no entry 'ema_encoder'; it has: .*encoder, .*predictor.*target_encoder"
    ):
        load_state(write(), "ema_encoder")


def test_an_entry_that_is_no_state_dict_is_refused(write):
    with pytest.raises(CheckpointError, match="'epoch' is no state dict"):
        load_state(write(), "epoch")


def test_no_entry_for_a_file_with_entries_lists_them(write):
    with pytest.raises(CheckpointError, match="weights_entry: batch_size, encoder"):
        load_state(write(), None)


def test_every_mismatch_is_listed_by_name_and_shape(write, file_preset):
    path = write(
        {"blocks.2.norm1.weight": torch.zeros(48), "blocks.1.mlp.fc1.bias": torch.zeros(7)}, without=("norm.weight",)
    )
    with pytest.raises(CheckpointError) as caught:
        load_encoder_state(file_preset, path)
    message = str(caught.value)
    assert "3 tensors differ" in message
    assert "missing     norm.weight [48]" in message
    assert "unexpected  blocks.2.norm1.weight [48]" in message
    assert "wrong shape blocks.1.mlp.fc1.bias [7], expected [96]" in message
    assert "encode.weights=PATH" in message


def test_an_incomplete_state_is_refused_when_building(preset, wide_state):
    wide_state.pop("norm.bias")
    with pytest.raises(CheckpointError, match=r"missing     norm.bias \[48\]"):
        build_encoder(preset, wide_state)


def test_two_tensors_of_one_name_are_refused(write):
    with pytest.raises(CheckpointError, match=r"two tensors named norm\.bias"):
        load_state(write({"backbone.norm.bias": torch.zeros(48)}, prefix="module."), "target_encoder")


@pytest.mark.parametrize(("rows", "width"), [(1568, 1024), (1568, 1280), (4608, 1280)])
def test_released_vjepa1_tables_are_refused_whatever_they_hold(write, rows, width):
    path = write({"pos_embed": torch.zeros(1, rows, width)})
    with pytest.raises(CheckpointError, match="is a V-JEPA 1 encoder"):
        load_state(path, "target_encoder")


def test_a_sincos_table_of_unknown_shape_is_refused_with_the_way_out(write):
    path = write({"pos_embed": sincos_table(8, 2, 48)})
    with pytest.raises(CheckpointError, match=r"looks like a V-JEPA 1 encoder.*delete pos_embed"):
        load_state(path, "target_encoder")


@pytest.mark.parametrize(
    "table",
    [sincos_table(8, 16, 1024), sincos_table(32, 24, 1408), torch.zeros(1, 32, 48)],
    ids=["16 frames at 256 px", "64 frames at 384 px", "zeros"],
)
def test_left_over_table_of_an_old_vjepa2_file_is_dropped_aloud(write, file_preset, caplog, table):
    with caplog.at_level(logging.WARNING):
        state = load_encoder_state(file_preset, write({"pos_embed": table}))
    assert "pos_embed" not in state
    assert "pos_embed" in caplog.text
    assert "dropped" in caplog.text


def test_vjepa21_is_named(write, file_preset):
    path = write({"norms_block.3.weight": torch.zeros(48)})
    with pytest.raises(CheckpointError, match=r"V-JEPA 2\.1"):
        load_encoder_state(file_preset, path)


def test_a_file_cut_short_is_refused(write):
    path = write()
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint|is no checkpoint"):
        load_state(path, "target_encoder")


def test_a_page_of_html_is_refused(tmp_path):
    path = tmp_path / "vitl.pt"
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match=r"vitl\.pt"):
        load_state(path, "target_encoder")


def test_a_file_with_objects_that_could_run_code_is_refused(tmp_path):
    torch.save({"target_encoder": {}, "extra": pytest.approx(1)}, tmp_path / "objects.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    for name, said in (("objects.pt", r"holds \S*pytest\S*ApproxScalar"), ("noise.pt", "is no checkpoint, or damaged")):
        with pytest.raises(CheckpointError, match=f"{said}.*pickles can run code") as caught:
            load_state(tmp_path / name, "target_encoder")
        printed = "".join(traceback.format_exception(caught.value))
        assert "weights_only" not in printed and "trust" not in printed, "torch's advice to run the code is not ours"


def test_the_masked_predictor_of_a_hub_file_is_ignored_and_nothing_else(tmp_path, file_preset, wide_state):
    content = wide_state | {"predictor.layernorm.weight": torch.zeros(3), "pooler.weight": torch.zeros(3)}
    save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_encoder_state(file_preset, tmp_path / "model.safetensors")
    assert "unexpected  pooler.weight [3]" in str(caught.value)
    assert "1 tensors differ" in str(caught.value)


def test_unknown_rope_flavour_is_refused(preset, wide_state):
    with pytest.raises(ValueError, match=r"rope 'interleaved' and .*; known: rope 'tiled'"):
        build_encoder(replace(preset, rope="interleaved"), wide_state)
