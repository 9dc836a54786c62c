"""Weight files of the predictor.

Claims:
- what is saved is loaded bit for bit, with its card;
- official files load through their entry, with wrapper prefixes stripped, and export under official names;
- every missing, unexpected or misshapen tensor is listed, and nothing is loaded then;
- a missing, damaged (one value changed, too) or foreign file is refused, and a code-carrying pickle is never run.
"""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from jepa_cache.predictor.checkpoints import CheckpointError, load_predictor_weights, read_card, save_predictor
from jepa_cache.predictor.model import ACPredictor


def build(seed: int, **changes: int) -> ACPredictor:
    torch.manual_seed(seed)
    sizes = {"embed_dim": 8, "predictor_dim": 12, "depth": 1, "num_heads": 2, "action_dim": 7, "state_dim": 7}
    return ACPredictor(**(sizes | changes), grid=(2, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_saved_weights_are_loaded_bit_for_bit_with_their_card(tmp_path: Path):
    saved, loaded, path = build(0), build(1), tmp_path / "w.safetensors"
    save_predictor(saved, path, {"config": {"depth": 1}})
    load_predictor_weights(loaded, path)
    assert same(saved, loaded)
    assert read_card(path) == {"config": {"depth": 1}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


class Wrapped(nn.Module):
    """Names its child as DDP does."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.module = child


def test_a_wrapped_predictor_is_saved_under_official_names(tmp_path: Path):
    saved, loaded, path = build(0), build(1), tmp_path / "w.safetensors"
    save_predictor(Wrapped(saved), path, {})
    load_predictor_weights(loaded, path)
    assert same(saved, loaded)


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
    predictor, untouched = build(1), build(1)
    with pytest.raises(CheckpointError) as caught:
        load_predictor_weights(predictor, tmp_path / "other.pt")
    assert same(predictor, untouched)
    message = str(caught.value)
    for line in (
        "missing: predictor_norm.bias [12]",
        "unexpected: predictor_pos_embed [12]",
        "shape: action_encoder.weight is [12, 13] in the file, [12, 7] here",
        "shape: extrinsics_encoder.weight is [12, 12] in the file, [12, 6] here",
        "4 differences",
    ):
        assert line in message


def test_unusable_files_are_refused(tmp_path: Path):
    torch.save({"encoder": {}}, tmp_path / "encoder.pt")
    (tmp_path / "broken.pt").write_bytes(b"x" * 100)
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, reason in (
        ("encoder.pt", 'need an entry "predictor"; the file holds: encoder'),
        ("broken.pt", "cannot be read"),
        ("empty.pt", "cannot be read"),
        ("broken.safetensors", "cannot be read"),
        ("absent.pt", "do not exist"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            load_predictor_weights(build(0), tmp_path / name)


class Payload:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_code_in_a_weight_file_is_never_run(tmp_path: Path):
    torch.save({"predictor": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"holds \S+, and pickles can run code") as caught:
        load_predictor_weights(build(0), tmp_path / "evil.pt")
    assert "weights_only" not in str(caught.value), "torch's advice to run the code is not ours"
    assert not (tmp_path / "ran").exists()
    assert pickle.dumps(Payload(tmp_path / "ran"))  # the payload itself is sound


def test_equal_weights_and_cards_give_equal_bytes(tmp_path):
    # DVC compares files by their bytes: a file that differs from run to run would evaluate again for nothing.
    contents = set()
    for attempt in range(8):
        torch.manual_seed(0)
        predictor = ACPredictor(
            embed_dim=8, predictor_dim=24, depth=1, num_heads=2, action_dim=3, state_dim=2, grid=(2, 2)
        )
        save_predictor(predictor, tmp_path / f"{attempt}.safetensors", {"b": 1, "a": [2]})
        contents.add((tmp_path / f"{attempt}.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("change", [b"\x00", b"\xff"], ids=["zeroed", "set"])
def test_damaged_weights_are_refused(tmp_path, change):
    path = tmp_path / "predictor.safetensors"
    save_predictor(build(0), path, {})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = change * 64
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="are damaged: they are not those that were written"):
        load_predictor_weights(build(1), path)
