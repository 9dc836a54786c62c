"""LoRA.

Claims:
- the adapted predictor is the plain one, bit for bit, before the first train step;
- trainable are the adapters of qkv, proj, fc1 and fc2 of the blocks, and what is to be trained in full; the counts are the known ones;
- merged weights give what the adapted predictor gives, are float32 and exact to float32 for a bfloat16 one, and change nothing in it;
- an adapter is saved in PEFT's own format, without the frozen weights, equal trainings in equal bytes, and is refused on other weights;
- `jepa-cache export predictor --merge` writes the merged predictor.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jepa_cache.cli.main import main
from jepa_cache.predictor.checkpoints import CheckpointError, load_predictor_weights, read_card, save_predictor
from jepa_cache.predictor.lora import (
    LoraSettings,
    adapter_state,
    add_lora,
    count_trainable,
    load_adapter,
    load_adapter_state,
    merged_state,
    save_adapter,
)
from jepa_cache.predictor.model import ACPredictor

SIZES = {
    "embed_dim": 8,
    "predictor_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "action_dim": 7,
    "state_dim": 7,
    "grid": [2, 2],
}
SETTINGS = LoraSettings(rank=4, alpha=8.0, dropout=0.0, rslora=True)
CARD = {"architecture": SIZES}


def build(seed: int = 0, **changes: object) -> ACPredictor:
    torch.manual_seed(seed)
    return ACPredictor(**(SIZES | changes))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7), torch.randn(2, 3, 7)


def train_a_little(model: nn.Module, num_steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(*inputs()).tokens.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("full", [(), ("action_encoder", "state_encoder")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_changes_before_the_first_train_step(full: tuple[str, ...], dropout: float):
    predictor = build()
    before = predictor(*inputs()).tokens
    model = add_lora(predictor, LoraSettings(4, 8.0, dropout, False), full)
    assert torch.equal(model(*inputs()).tokens, before)


@pytest.mark.parametrize(("rank", "expected"), [(16, 6_291_456), (64, 25_165_824)])
def test_the_released_size_has_the_known_number_of_trainable_weights(rank: int, expected: int):
    with torch.device("meta"):
        predictor = ACPredictor(
            embed_dim=1408, predictor_dim=1024, depth=24, num_heads=16, action_dim=7, state_dim=7, grid=(16, 16)
        )
        assert count_trainable(add_lora(predictor, LoraSettings(rank, 32.0, 0.0, True))) == expected


def test_adapters_and_full_layers_train_and_nothing_else_moves():
    predictor = build()
    before = {name: tensor.clone() for name, tensor in predictor.state_dict().items()}
    model = add_lora(predictor, SETTINGS, ("action_encoder",))
    train_a_little(model)
    moved = {name for name, tensor in merged_state(model).items() if not torch.equal(tensor, before[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert moved == {f"predictor_blocks.{i}.{layer}.weight" for i in range(2) for layer in layers} | {
        "action_encoder.weight",
        "action_encoder.bias",
    }


@pytest.mark.parametrize("use_extrinsics", [False, True])
def test_an_extrinsics_encoder_trains_only_where_it_is_used(use_extrinsics: bool):
    model = add_lora(build(use_extrinsics=use_extrinsics), SETTINGS, ("extrinsics_encoder",))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("extrinsics_encoder" in name for name in trainable) == use_extrinsics
    assert any("extrinsics_encoder" in name for name in adapter_state(model))  # else a fresh one would be lost


def test_only_conditioning_encoders_may_be_trained_in_full():
    with pytest.raises(ValueError, match=r"only action_encoder.* got predictor_norm"):
        add_lora(build(), SETTINGS, ("predictor_norm",))


@pytest.mark.parametrize(
    ("changes", "message"), [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")]
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**({"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": True} | changes))


@pytest.mark.parametrize(("rslora", "scale"), [(True, 8.0 / 4**0.5), (False, 8.0 / 4)])
def test_merged_weights_give_what_the_adapted_predictor_gives(rslora: bool, scale: float):
    model = add_lora(build(), LoraSettings(4, 8.0, 0.0, rslora), ("state_encoder",))
    train_a_little(model)
    adapted, before = model(*inputs()).tokens, {name: t.clone() for name, t in model.state_dict().items()}
    state = merged_state(model)
    plain = build(1)
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(*inputs()).tokens, adapted, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layer = model.get_base_model().predictor_blocks[1].mlp.fc2
    delta = scale * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    expected = layer.base_layer.weight + delta
    torch.testing.assert_close(state["predictor_blocks.1.mlp.fc2.weight"], expected, atol=1e-7, rtol=1e-6)
    merged = model.merge_and_unload().state_dict()  # PEFT's own merge, in float32
    assert merged.keys() == state.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_bfloat16_predictor_is_merged_in_float32():
    model = add_lora(build().bfloat16(), SETTINGS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.01)
    state = merged_state(model)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    layer = model.get_base_model().predictor_blocks[0].attn.qkv
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 4.0 * (b @ a)
    error = (state["predictor_blocks.0.attn.qkv.weight"].double() - exact).abs().max()
    assert error < 1e-7, f"{error:.1e}; rounded to bfloat16 it would be about 1e-4"


def test_an_adapter_comes_back_bit_for_bit_and_without_the_frozen_weights(tmp_path: Path):
    model = add_lora(build(), SETTINGS, ("action_encoder",))
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter", CARD)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 2 + 2
    assert sum(tensor.numel() for tensor in tensors.values()) == count_trainable(model)
    base = build()
    with torch.no_grad():
        base.action_encoder.weight.zero_()  # a new layer: what the base holds of it does not count
    loaded = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(loaded(*inputs()).tokens, model(*inputs()).tokens)
    assert count_trainable(loaded) == count_trainable(model)


def test_peft_itself_reads_the_adapter(tmp_path: Path):
    from peft import PeftModel

    model = add_lora(build(), SETTINGS, ("state_encoder",))
    train_a_little(model)
    save_adapter(model, tmp_path, CARD)
    assert torch.equal(PeftModel.from_pretrained(build(), tmp_path)(*inputs()).tokens, model(*inputs()).tokens)


def test_equal_adapters_are_equal_bytes(tmp_path: Path):
    for folder in ("a", "b"):
        model = add_lora(build(), SETTINGS, ("state_encoder",))
        train_a_little(model)
        save_adapter(model, tmp_path / folder, CARD)
    for file in ("adapter_model.safetensors", "adapter_config.json", "card.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # a set in PEFT, whose order changes from process to process


def test_an_adapter_is_refused_on_other_weights(tmp_path: Path):
    save_adapter(add_lora(build(), SETTINGS), tmp_path, CARD)
    with pytest.raises(CheckpointError, match=r"was trained on the weights sha256:.* these are sha256:"):
        load_adapter(build(1), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(build(), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(build(), tmp_path / "absent")


def test_an_adapter_of_another_rank_is_refused_with_every_difference():
    model, other = add_lora(build(), SETTINGS), add_lora(build(), LoraSettings(2, 8.0, 0.0, True))
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \[2, 12\] in the file, \[4, 12\] here") as e:
        load_adapter_state(model, adapter_state(other))
    assert "16 differences" in str(e.value) and str(e.value).count("shape: ") == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())


def run_export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["jepa-cache", "export", "predictor", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    if caught.value.code not in (0, None):
        raise ValueError(caught.value.code)


def test_the_command_merges_an_adapter_into_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.pt"
    save_predictor(build(), base, CARD)
    model = add_lora(build(), SETTINGS)
    train_a_little(model)
    save_adapter(model, adapter, CARD)
    run_export(monkeypatch, str(adapter), str(out), "--merge", "--base", str(base))
    assert read_card(out) == CARD
    exported = build(5)
    load_predictor_weights(exported, out)
    expected = merged_state(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.state_dict().items())
    for arguments, message in (
        ([str(adapter), str(out)], "no predictor by itself"),
        ([str(adapter), str(out), "--merge"], "--merge needs --base"),
        ([str(base), str(out), "--base", str(base)], "--base belongs to --merge"),
        ([str(tmp_path), str(out), "--merge", "--base", str(base)], "no LoRA adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            run_export(monkeypatch, *arguments)
