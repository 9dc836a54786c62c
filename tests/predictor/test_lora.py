"""LoRA.

Claims:
- the adapted predictor is the plain one, bit for bit, before the first training step;
- trainable are the adapters of qkv, proj, fc1 and fc2 of the blocks, and what is to be trained in full; the counts are the known ones;
- merged weights give what the adapted predictor gives, are float32 and exact to float32 for a bfloat16 one, and change nothing in it;
- a bfloat16 predictor under a float32 adapter computes what the merged one does;
- an adapter is saved in PEFT's own format, without the frozen weights, equal trainings in equal bytes, and is refused on other weights.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from jepa_cache.predictor import lora
from jepa_cache.predictor.checkpoints import CheckpointError
from jepa_cache.predictor.lora import (
    adapter_state,
    count_trainable,
    load_adapter,
    load_adapter_state,
    merged_state,
    save_adapter,
)
from jepa_cache.predictor.model import ACPredictor
from tests.predictor import makers
from tests.predictor.makers import SIZES

CARD = {"architecture": SIZES | {"depth": 2}}


def build(seed: int = 0, **changes: object) -> ACPredictor:
    return makers.build(seed, **({"depth": 2} | changes))


def add_lora(predictor: ACPredictor, **changes: object):
    return lora.add_lora(predictor, **({"rank": 4, "alpha": 8.0, "dropout": 0.0, "rslora": True} | changes))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7), torch.randn(2, 3, 7)


def train_a_little(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs()).tokens.square().mean().backward()
        optimizer.step()


def trained(*full: str):
    model = add_lora(build(), full=full)
    train_a_little(model)
    return model


@pytest.mark.parametrize("full", [(), ("action_encoder", "state_encoder")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_changes_before_the_first_training_step(full: tuple[str, ...], dropout: float):
    before = build()(*inputs()).tokens
    assert torch.equal(add_lora(build(), dropout=dropout, rslora=False, full=full)(*inputs()).tokens, before)


@pytest.mark.parametrize(("rank", "expected"), [(16, 6_291_456), (64, 25_165_824)])
def test_the_released_size_has_the_known_number_of_trainable_weights(rank: int, expected: int):
    sizes = {"embed_dim": 1408, "predictor_dim": 1024, "depth": 24, "num_heads": 16, "grid": (16, 16)}
    with torch.device("meta"):
        assert count_trainable(add_lora(build(**sizes), rank=rank, alpha=32.0)) == expected


def test_adapters_and_full_layers_train_and_nothing_else_moves():
    before, after = build().state_dict(), merged_state(trained("action_encoder"))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"predictor_blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert moved == expected | {"action_encoder.weight", "action_encoder.bias"}


@pytest.mark.parametrize("use_extrinsics", [False, True])
def test_an_extrinsics_encoder_trains_only_where_it_is_used(use_extrinsics: bool):
    predictor = build(use_extrinsics=use_extrinsics, state_dim=7 + 6 * use_extrinsics)
    model = add_lora(
        predictor, full=() if use_extrinsics else ("extrinsics_encoder",)
    )  # used, also without being named
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("extrinsics_encoder" in name for name in trainable) == use_extrinsics
    assert any("extrinsics_encoder" in name for name in adapter_state(model))  # else a fresh one would be lost


@pytest.mark.parametrize(("rslora", "scale"), [(True, 8.0 / 4**0.5), (False, 8.0 / 4)])
def test_merged_weights_give_what_the_adapted_predictor_gives(rslora: bool, scale: float):
    model = add_lora(build(), rslora=rslora, full=("state_encoder",))
    train_a_little(model)
    adapted, before = model(*inputs()).tokens, {name: t.clone() for name, t in model.state_dict().items()}
    state, plain = merged_state(model), build(1)
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(plain(*inputs()).tokens, adapted, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layer = model.get_base_model().predictor_blocks[1].mlp.fc2
    expected = layer.base_layer.weight + scale * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    torch.testing.assert_close(state["predictor_blocks.1.mlp.fc2.weight"], expected, atol=1e-7, rtol=1e-6)
    merged = model.merge_and_unload().state_dict()  # PEFT's own merge, in float32
    assert merged.keys() == state.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_bfloat16_predictor_computes_under_an_adapter_and_is_merged_in_float32():
    model = add_lora(build().bfloat16())
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
    plain = build(1)
    plain.load_state_dict(state, strict=True)
    adapted = model(*(it.bfloat16() for it in inputs())).tokens
    torch.testing.assert_close(adapted.float(), plain(*inputs()).tokens, atol=0.05, rtol=0.05)


def test_an_adapter_comes_back_bit_for_bit_also_through_peft_and_without_the_frozen_weights(tmp_path: Path):
    from peft import PeftModel

    model = trained("action_encoder")
    for folder in ("adapter", "again"):
        save_adapter(trained("action_encoder"), tmp_path / folder, CARD)
    for file in ("adapter_model.safetensors", "adapter_config.json", "card.json"):
        assert (tmp_path / "adapter" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    targets = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # a set in PEFT, whose order changes from process to process
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 2 + 2
    assert sum(tensor.numel() for tensor in tensors.values()) == count_trainable(model)
    base = build()
    with torch.no_grad():
        base.action_encoder.weight.zero_()  # a new layer: what the base holds of it does not count
    loaded = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(loaded(*inputs()).tokens, model(*inputs()).tokens)
    assert count_trainable(loaded) == count_trainable(model)
    theirs = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert torch.equal(theirs(*inputs()).tokens, model(*inputs()).tokens)


def test_an_adapter_is_refused_on_other_weights_and_where_its_file_is_damaged(tmp_path: Path):
    save_adapter(add_lora(build()), tmp_path, CARD)
    with pytest.raises(CheckpointError, match=r"was trained on the weights sha256:.* these are sha256:"):
        load_adapter(build(1), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 99)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_adapter(build(), folder)


def test_an_adapter_of_another_rank_is_refused_with_every_difference():
    model, other = add_lora(build()), add_lora(build(), rank=2)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \[2, 12\] in the file, \[4, 12\] here") as e:
        load_adapter_state(model, adapter_state(other))
    assert "16 differences" in str(e.value) and str(e.value).count("shape: ") == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(model).items())
