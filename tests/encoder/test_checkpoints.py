"""What the weights of official encoders promise.

Claims: only a seed gives random weights, the same everywhere; the identity follows the content and needs no torch; official files load
strictly whatever wrapped them, other entries unread; every mismatch is listed; V-JEPA 1 files, files of the other architecture, wrong
entries, damaged files and files with code are refused in words; missing files are downloaded once, whole, or named with the way to them.
"""

import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jepa_cache.config.loading import load_config
from jepa_cache.encoder import KINDS, vjepa2, weights_identity
from jepa_cache.encoder.checkpoints import CheckpointError, load_state
from jepa_cache.encoder.vjepa2 import random_state
from jepa_cache.files import file_digest
from tests.media.fake_bucket import serve
from tests.official_files import encoder_shapes, without_storage, write_v21_file
from tests.workspace import SUITE_SETTINGS

TINY_IDENTITY = "random:8e747ed62b082e586d5e661b2b39b437943403b8dd970f2f47120b002f303326"
# Released sizes, counted over all weights of the encoder.
NUM_WEIGHTS = {
    "vitl": 303_885_312,
    "vith": 631_648_000,
    "vitg": 1_012_173_952,
    "vitg384": 1_012_173_952,
    "ac_vitg": 1_012_173_952,
    # 86.8, 304.7, 1,013.3 and 1,845.2 million are known; the digits follow from the list of tensors.
    "vitb384_v21": 86_833_152,
    "vitl384_v21": 304_680_960,
    "vitg384_v21": 1_013_267_968,
    "vitgigantic384_v21": 1_845_216_768,
}


def read_preset(name):
    return load_config(SUITE_SETTINGS, [f"encoder={name}"]).encoder


def load(preset, path):
    return KINDS[preset.kind].load(preset, path).state_dict()


find = KINDS["vjepa2"].find


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def write(tmp_path, wide_state):
    """Write an official-looking file: prefixes, several entries, optimiser and counters."""

    def write_checkpoint(extra=None, *, without=(), prefix="module.backbone."):
        state = {name: value for name, value in wide_state.items() if name not in without} | (extra or {})
        content = {
            "encoder": {f"module.{name}": torch.zeros_like(value) for name, value in wide_state.items()},
            "predictor": {"module.mask_tokens.0": torch.zeros(1, 1, 24)},
            "target_encoder": {prefix + name: value for name, value in state.items()},
            "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99)}]},
            "scaler": None,
            "epoch": 3,
        }
        torch.save(content, tmp_path / "encoder.pt")
        return tmp_path / "encoder.pt"

    return write_checkpoint


# --- random weights and identity ------------------------------------------------------------------------------------------


def test_tiny_weights_never_change_and_need_no_torch(preset):
    # Every cache made with tiny carries this digest; another generator or order would change it unnoticed.
    assert weights_identity(read_preset("tiny"), None, digest=file_digest) == TINY_IDENTITY
    assert weights_identity(replace(read_preset("tiny"), random_seed=4), None, digest=file_digest) != TINY_IDENTITY
    assert {name: array.shape for name, array in random_state(preset).items()} == encoder_shapes(preset)
    code = (
        "import sys; from types import SimpleNamespace as S; from jepa_cache.encoder import weights_identity;"
        "p = S(name='t', embed_dim=12, depth=1, num_heads=2, mlp_dim=8, patch_size=4, tubelet_size=2, random_seed=0, kind='vjepa2');"
        "weights_identity(p, None, digest=str); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_identity_of_a_file_follows_bytes_and_entry_but_not_the_name(file_preset, tmp_path):
    def identity(name, content, entry="target_encoder", **changes):
        (tmp_path / name).write_bytes(content)
        return weights_identity(
            replace(file_preset, weights_entry=entry, **changes), tmp_path / name, digest=file_digest
        )

    one = identity("one.pt", b"weights")
    assert one == identity("two.pt", b"weights") and one.endswith("#target_encoder")
    assert one != identity("one.pt", b"weights", "encoder") and one != identity("one.pt", b"Weights")
    digest = file_digest(tmp_path / "two.pt")
    assert identity("model.safetensors", b"weights") == f"file:{digest}", "safetensors have no entries"
    assert identity("two.pt", b"weights", weights_sha256=digest) == one
    with pytest.raises(ValueError, match="gives 0000"):
        identity("two.pt", b"weights", weights_sha256="0000")
    assert weights_identity(file_preset, tmp_path / "absent.pt", digest=lambda path: "abc") == "file:abc#target_encoder"


# --- loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.backbone.", "backbone."])
def test_official_files_load_under_any_wrapper(tmp_path, write, file_preset, wide_state, preset_21, state_21, prefix):
    assert equal(load(file_preset, write(prefix=prefix)), wide_state)
    for entry in ("ema_encoder", "target_encoder"):
        write_v21_file(tmp_path / "v21.pt", state_21, entry=entry, prefix=prefix)
        assert equal(load(replace(preset_21, weights_entry=entry), tmp_path / "v21.pt"), state_21)


def test_the_preset_decides_the_entry_and_a_plain_state_dict_needs_none(tmp_path, write, file_preset, wide_state):
    assert not any(value.any() for value in load(replace(file_preset, weights_entry="encoder"), write()).values())
    torch.save(wide_state, tmp_path / "plain.pt")
    assert equal(load(replace(file_preset, weights_entry=None), tmp_path / "plain.pt"), wide_state)
    save_file(wide_state | {"predictor.norm.bias": torch.zeros(3)}, tmp_path / "encoder.safetensors")
    assert equal(load(file_preset, tmp_path / "encoder.safetensors"), wide_state), "a hub file has a predictor too"


@pytest.mark.parametrize("name", NUM_WEIGHTS)
def test_files_of_the_released_sizes_load_into_their_presets_and_no_other(tmp_path, name):
    preset, shapes = read_preset(name), encoder_shapes(read_preset(name))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == NUM_WEIGHTS[name]
    write_v21_file(tmp_path / "file.pt", without_storage(shapes), entry="wanted")
    state = load(replace(preset, weights_entry="wanted"), tmp_path / "file.pt")
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    other = replace(read_preset("vitl" if name != "vitl" else "vith"), weights_entry="wanted")
    with pytest.raises(CheckpointError, match=f"not those of encoder preset '{other.name}'"):
        load(other, tmp_path / "file.pt")


def test_every_preset_with_weights_names_a_released_file():
    for path in (SUITE_SETTINGS / "configs/encoder").glob("*.yaml"):
        preset = read_preset(path.stem)
        if preset.kind == "hf":
            assert preset.weights.startswith("hf://") and preset.weights.count("/") == 3
        elif preset.weights:
            assert preset.weights.removeprefix(vjepa2.OFFICIAL_BASE_URL) in vjepa2.OFFICIAL_FILES


def test_every_mismatch_is_listed_by_name_and_shape(preset, wide_state):
    state = wide_state | {"blocks.20.norm1.weight": torch.zeros(48), "blocks.1.mlp.fc1.bias": torch.zeros(7)}
    del state["blocks.0.norm1.bias"]
    with pytest.raises(CheckpointError) as caught:
        KINDS["vjepa2"].build(preset, state)
    for line in (
        "3 tensors differ",
        "missing     blocks.0.norm1.bias [48]",
        "unexpected  blocks.20.norm1.weight [48]",
        "wrong shape blocks.1.mlp.fc1.bias [7], expected [96]",
        "encode.weights=PATH",
    ):
        assert line in str(caught.value)


def test_a_file_of_the_other_architecture_is_named(preset, wide_state, preset_21, state_21):
    with pytest.raises(CheckpointError, match=r"This is a V-JEPA 2\.1 encoder.*kind: vjepa2_1"):
        KINDS["vjepa2"].build(replace(preset, depth=12), state_21)
    with pytest.raises(CheckpointError, match=r"This is a V-JEPA 2 encoder.*kind: vjepa2"):
        KINDS["vjepa2_1"].build(preset_21, wide_state)


@pytest.mark.parametrize(
    ("extra", "prefix", "entry", "words"),
    [
        ({}, "", "ema_encoder", r"no entry 'ema_encoder'; it has: .*encoder, .*predictor.*target_encoder"),
        ({}, "", "epoch", "'epoch' is no state dict"),
        ({}, "", None, "weights_entry: encoder, epoch"),
        ({"backbone.norm.bias": torch.zeros(48)}, "module.", "target_encoder", r"two tensors named norm\.bias"),
    ],
)
def test_entries_that_hold_no_encoder_are_refused(write, extra, prefix, entry, words):
    with pytest.raises(CheckpointError, match=words):
        load_state(write(extra, prefix=prefix), entry)


def test_a_position_table_means_vjepa1_unless_a_released_vjepa2_file_left_it(write, caplog):
    for sizes in ((1568, 1024), (4608, 1280), (32, 48)):
        with pytest.raises(CheckpointError, match=r"V-JEPA 1 encoders hold such tables.*delete pos_embed"):
            load_state(write({"pos_embed": torch.zeros(1, *sizes)}), "target_encoder")
    for sizes in ((8 * 256, 1024), (32 * 576, 1408)):
        caplog.clear()
        assert "pos_embed" not in load_state(write({"pos_embed": torch.zeros(1).expand(1, *sizes)}), "target_encoder")
        assert "dropped" in caplog.text


def test_damaged_files_and_files_that_could_run_code_are_refused(tmp_path, write):
    cut = write()
    cut.write_bytes(cut.read_bytes()[:-2000])
    torch.save({"target_encoder": {}, "extra": pytest.approx(1)}, tmp_path / "objects.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise" * 100)
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    for name, said in (
        ("encoder.pt", "cannot be read as a checkpoint|is no checkpoint"),
        ("page.pt", "is no checkpoint, or damaged"),
        ("objects.pt", r"holds \S*pytest\S*ApproxScalar.*pickles can run code"),
        ("noise.pt", "is no checkpoint, or damaged.*pickles can run code"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_state(tmp_path / name, "target_encoder")
        printed = "".join(traceback.format_exception(caught.value))
        if "pickles" in said:
            assert "weights_only" not in printed and "trust" not in printed, "torch's advice to run the code"


# --- where files come from ------------------------------------------------------------------------------------------------


def test_paths_start_at_the_base_and_a_missing_file_says_how_to_get_it(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/vitl.pt").touch()
    assert find("w/vitl.pt", base=tmp_path) == tmp_path / "w/vitl.pt"
    with pytest.raises(
        ValueError, match=r"w/vith\.pt does not.*https://dl\.fbaipublicfiles\.com/vjepa2/.*weights=PATH"
    ):
        find("w/vith.pt", base=tmp_path)
    with pytest.raises(ValueError, match=r"/w are a folder; name the file in it"):
        find("w", base=tmp_path)


def test_a_url_is_downloaded_once_whole_and_kept_by_host_and_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serve() as server:
        server.files |= {f"{folder}/vitl.pt": folder.encode() for folder in "ab"}
        url = f"{server.url}/a/vitl.pt"
        server.faults["a/vitl.pt"] = [("drop", 0)]
        for address, words in (
            (url, "1 bytes early, after 0"),
            ("http://127.0.0.1:9/vitl.pt", r":9/vitl\.pt.*weights=PATH"),
        ):
            with pytest.raises(ValueError, match=words):
                find(address, base=tmp_path)
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
        assert find(url, base=tmp_path, download=False) is None
        first = find(url, base=tmp_path)
        assert first.is_relative_to(tmp_path / "cache/jepa-cache/weights")
        assert find(f"{server.url}/b/vitl.pt", base=tmp_path).read_text() == "b"
        server.files["a/vitl.pt"] = b"other host"
        assert find(url.replace("127.0.0.1", "localhost"), base=tmp_path).read_text() == "other host"
        assert find(url, base=tmp_path) == first and first.read_text() == "a"
    assert [path.name for path in first.parent.iterdir()] == ["vitl.pt"]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("https://dl.fbaipublicfiles.com/jepa/vitl16/vitl16.pth.tar", "V-JEPA 1"),
        ("hf://facebook/model.safetensors", "hf://owner/repo/file"),
        ("s3://bucket/vitl.pt", "hf://owner/repo/file"),
    ],
)
def test_other_references_are_refused(reference, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        find(reference, base=tmp_path)


def test_a_hub_reference_names_repository_and_file_and_a_silent_hub_the_way_out(tmp_path, monkeypatch):
    def hub(repo, file, *, local_files_only):
        if local_files_only:
            raise ConnectionError("no network")
        return f"{repo}:{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    reference = "hf://facebook/vjepa2-vitl-fpc64-256/sub/model.safetensors"
    assert find(reference, base=tmp_path) == Path("facebook/vjepa2-vitl-fpc64-256:sub/model.safetensors")
    with pytest.raises(ValueError, match=r"no network.*encode\.weights=PATH"):
        find(reference, base=tmp_path, download=False)
