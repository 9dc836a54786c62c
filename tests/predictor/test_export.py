"""Export.

Claims:
- a predictor written to the official layout and read back is the same bit for bit, and so is one written as safetensors;
- the official file has upstream's entries and prefixes, with the encoder where its file is given and is the right one;
- a LoRA adapter is merged into its base;
- a predictor with a residual path, adaptive layer norms, no states, or of another kind is refused there; other widths of actions and states are
  pointed out;
- contradicting arguments are named before anything is written.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from jepa_cache.cli.main import main
from jepa_cache.files import file_digest
from jepa_cache.predictor.checkpoints import (
    build_predictor,
    check_encoder,
    load_predictor,
    load_predictor_weights,
    read_card,
)
from jepa_cache.predictor.lora import add_lora, merged_state, save_adapter
from tests.official_files import write_official_file
from tests.predictor.makers import SIZES, build, same, save
from tests.predictor.test_compressed import KINDS


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command as a user does; returns what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["jepa-cache", "export", "predictor", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        if caught.value.code not in (0, None):
            raise ValueError(caught.value.code)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("where", ["outputs/train", "outputs/train/predictor.safetensors"])
def test_a_round_trip_through_either_layout_is_bit_exact(tmp_path: Path, export, where: str):
    predictor = build()
    save(tmp_path / "outputs/train/predictor.safetensors", predictor, run="abc")
    export(tmp_path / where, tmp_path / "new/ac.pt")
    content = torch.load(tmp_path / "new/ac.pt", weights_only=True)
    assert content.keys() == {"predictor", "jepa_cache"}
    assert content["predictor"].keys() == {f"module.{name}" for name in predictor.state_dict()}
    # What upstream's hub code does with it: take the substrings off, load strictly.
    cleaned = {name.replace("module.", "").replace("backbone.", ""): t for name, t in content["predictor"].items()}
    theirs = build(1)
    theirs.load_state_dict(cleaned, strict=True)
    ours, card = load_predictor(tmp_path / "new/ac.pt")
    assert same(theirs, predictor) and same(ours, predictor) and card == {"architecture": SIZES, "run": "abc"}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["ac.pt"]
    assert "back.json" in export(tmp_path / "new/ac.pt", tmp_path / "back.safetensors", "--format", "safetensors")
    assert same(load_predictor(tmp_path / "back.safetensors")[0], predictor)
    assert json.loads((tmp_path / "back.json").read_text()) == read_card(tmp_path / "back.safetensors") == card


def test_the_encoder_is_added_where_it_is_the_right_one(tmp_path: Path, export):
    encoder = {"patch_embed.proj.bias": torch.randn(8), "norm.weight": torch.randn(8)}
    file = tmp_path / "vitg.pt"
    write_official_file(file, {}, encoder)
    identity = f"file:{hashlib.sha256(file.read_bytes()).hexdigest()}#target_encoder"
    run = save(tmp_path / "p.safetensors", build(), encoder_weights=identity)
    export(run, tmp_path / "ac.pt", "--encoder", file)
    content = torch.load(tmp_path / "ac.pt", weights_only=True)
    for entry in ("encoder", "target_encoder"):
        assert content[entry].keys() == {f"module.{name}" for name in encoder}
        assert all(torch.equal(content[entry][f"module.{name}"], tensor) for name, tensor in encoder.items())
    # The new file is known as one of the cache that the predictor was trained on, although its own digest differs.
    assert check_encoder(tmp_path / "ac.pt", identity, digest=file_digest).matches


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"encoder_weights": f"file:{'0' * 64}#encoder"}, "is not the encoder that this predictor was trained with"),
        ({"encoder_weights": f"random:{'0' * 64}"}, "weights that no file holds"),
        ({}, "card does not say which encoder"),
    ],
)
def test_another_encoder_is_not_added(tmp_path: Path, export, card: dict[str, str], message: str):
    write_official_file(tmp_path / "vitg.pt", {}, {"norm.weight": torch.zeros(8)})
    run = save(tmp_path / "p.safetensors", build(), **card)
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "ac.pt", "--encoder", tmp_path / "vitg.pt")
    assert not (tmp_path / "ac.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning": "adaln"}, 'conditioning: "adaln"'),
        ({"use_states": False}, "use_states: false"),
        ({"residual": True}, "residual: true"),
        (KINDS["linear"], 'kind: "linear"'),
    ],
)
def test_other_predictors_have_no_official_layout_but_are_exported_as_safetensors(
    tmp_path: Path, export, change, message
):
    architecture = change if "kind" in change else SIZES | change
    predictor = build_predictor(architecture)
    run = save(tmp_path / "p.safetensors", predictor, architecture=architecture)
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "ac.pt")
    assert not (tmp_path / "ac.pt").exists()
    export(run, tmp_path / "ac.safetensors", "--format", "safetensors")
    assert same(load_predictor(tmp_path / "ac.safetensors")[0], predictor)


def test_other_widths_are_pointed_out(tmp_path: Path, export):
    sizes = {"action_dim": 13, "state_dim": 2}
    run = save(tmp_path / "p.safetensors", build(**sizes), architecture=SIZES | sizes)
    assert "ties the state width to the action width" in export(run, tmp_path / "ac.pt")
    assert "note" not in export(save(tmp_path / "p.safetensors", build()), tmp_path / "ac.pt")
    sizes = {"use_extrinsics": True, "state_dim": 13}
    run = save(tmp_path / "p.safetensors", build(**sizes), architecture=SIZES | sizes)
    assert (said := export(run, tmp_path / "ac.pt")).count(
        "note"
    ) == 1 and "behind the first 7 columns as extrinsics" in said


def test_an_adapter_is_merged_into_its_base(tmp_path: Path, export):
    base, adapter = save(tmp_path / "base.safetensors", build()), tmp_path / "adapter"
    model = add_lora(build(), rank=4, alpha=8.0, dropout=0.0, rslora=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
    save_adapter(model, adapter, {"architecture": SIZES})
    export(adapter, tmp_path / "merged.pt", "--merge", "--base", base)
    assert read_card(tmp_path / "merged.pt") == {"architecture": SIZES}
    exported = build(5)
    load_predictor_weights(exported, tmp_path / "merged.pt")
    expected = merged_state(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.state_dict().items())


def test_arguments_that_contradict_each_other_are_named(tmp_path: Path, export):
    run, out = save(tmp_path / "p.safetensors", build()), tmp_path / "ac.pt"
    torch.save({"predictor": {}}, tmp_path / "foreign.pt")
    save_adapter(
        add_lora(build(), rank=4, alpha=8.0, dropout=0.0, rslora=True), tmp_path / "lora", {"architecture": SIZES}
    )
    for arguments, message in (
        ([run, tmp_path / "ac.safetensors"], "--format official writes .pt"),
        ([run, out, "--format", "safetensors"], "--format safetensors writes .safetensors"),
        ([run, tmp_path / "x.safetensors", "--format", "safetensors", "--encoder", run], "--encoder adds"),
        ([tmp_path / "absent", out], "names no weights"),
        ([tmp_path / "foreign.pt", out], "has no card that says"),
        ([tmp_path / "lora", out], "no predictor by itself"),
        ([tmp_path / "lora", out, "--merge"], "--merge needs --base"),
        ([run, out, "--base", run], "--base belongs to --merge"),
        ([tmp_path, out, "--merge", "--base", run], "no LoRA adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            export(*arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["foreign.pt", "lora", "p.safetensors"]
