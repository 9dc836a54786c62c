"""What the origin and identity of weights promise.

Claims: only a seed gives random weights, the same everywhere; the identity follows the content and needs no torch;
missing, foreign or changed weights are refused with the way to get them.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jepa_cache.config.parsing import parse_dataclass
from jepa_cache.config.schema import EncoderPreset
from jepa_cache.encoder import weights
from jepa_cache.encoder.structure import parameter_shapes, random_state
from jepa_cache.encoder.weights import (
    WeightsNotFoundError,
    resolve_weights,
    weights_identity,
)
from jepa_cache.store.recipe import file_digest

CONFIGS = Path(__file__).parents[2] / "configs" / "encoder"
TINY_IDENTITY = "random:8e747ed62b082e586d5e661b2b39b437943403b8dd970f2f47120b002f303326"


def read_preset(name):
    from ruamel.yaml import YAML

    path = CONFIGS / f"{name}.yaml"
    return parse_dataclass(EncoderPreset, {"name": name, **YAML(typ="safe").load(path)}, str(path))


def test_tiny_weights_never_change():
    # Every cache made with tiny carries this digest; another generator or order would change it unnoticed.
    assert weights_identity(read_preset("tiny"), None, digest=file_digest) == TINY_IDENTITY


def test_identity_and_random_weights_import_no_torch():
    code = (
        "import sys; from types import SimpleNamespace as S; from jepa_cache.encoder.weights import weights_identity;"
        "p = S(name='t', embed_dim=12, depth=1, num_heads=2, mlp_dim=8, patch_size=4, tubelet_size=2, random_seed=0, kind='vjepa2');"
        "weights_identity(p, None, digest=str); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_random_weights_follow_the_official_initialisation(preset):
    state = random_state(replace(preset, embed_dim=96, depth=3))
    assert not any(array.any() for name, array in state.items() if name.endswith("bias"))
    assert all((array == 1).all() for name, array in state.items() if "norm" in name and name.endswith("weight"))
    assert state["blocks.2.attn.qkv.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert state["patch_embed.proj.weight"].std() == pytest.approx(0.02, rel=0.03)
    for name in ("attn.proj", "mlp.fc2"):
        assert state[f"blocks.2.{name}.weight"].std() == pytest.approx(0.02 / np.sqrt(6), rel=0.03)


def test_random_weights_follow_the_seed(preset):
    assert weights_identity(preset, None, digest=file_digest) == weights_identity(preset, None, digest=file_digest)
    assert weights_identity(preset, None, digest=file_digest) != weights_identity(
        replace(preset, random_seed=4), None, digest=file_digest
    )


def test_without_a_seed_there_are_no_random_weights(file_preset):
    with pytest.raises(ValueError, match=r"no random_seed.*encode\.weights=PATH"):
        random_state(file_preset)


def test_identity_of_a_file_follows_bytes_and_entry_but_not_the_name(file_preset, tmp_path):
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    one.write_bytes(b"weights")
    two.write_bytes(b"weights")
    assert weights_identity(file_preset, one, digest=file_digest) == weights_identity(
        file_preset, two, digest=file_digest
    )
    assert weights_identity(file_preset, one, digest=file_digest).endswith("#target_encoder")
    assert weights_identity(replace(file_preset, weights_entry="encoder"), one, digest=file_digest) != weights_identity(
        file_preset, one, digest=file_digest
    )
    two.write_bytes(b"Weights")
    assert weights_identity(file_preset, one, digest=file_digest) != weights_identity(
        file_preset, two, digest=file_digest
    )


def test_entry_is_no_part_of_the_identity_of_safetensors(file_preset, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert weights_identity(file_preset, path, digest=file_digest) == f"file:{file_digest(path)}"


def test_a_remembered_digest_is_used(file_preset, tmp_path):
    assert weights_identity(file_preset, tmp_path / "absent.pt", digest=lambda path: "abc") == "file:abc#target_encoder"


def test_another_file_than_the_preset_names_is_refused(file_preset, tmp_path):
    path = tmp_path / "encoder.pt"
    path.write_bytes(b"weights")
    assert weights_identity(replace(file_preset, weights_sha256=file_digest(path)), path, digest=file_digest)
    with pytest.raises(ValueError, match="gives 0000"):
        weights_identity(replace(file_preset, weights_sha256="0000"), path, digest=file_digest)


def test_relative_paths_start_at_the_base(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "vitl.pt").touch()
    assert resolve_weights("w/vitl.pt", base=tmp_path) == tmp_path / "w" / "vitl.pt"


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(WeightsNotFoundError) as caught:
        resolve_weights("w/vitl.pt", base=tmp_path)
    for part in (str(tmp_path / "w" / "vitl.pt"), "https://dl.fbaipublicfiles.com/vjepa2/", "encode.weights=PATH"):
        assert part in str(caught.value)


def test_an_unreachable_url_says_how_to_get_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(WeightsNotFoundError, match=r"127\.0\.0\.1:9/vitl\.pt.*encode\.weights=PATH"):
        resolve_weights("http://127.0.0.1:9/vitl.pt", base=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_url_is_downloaded_once_and_kept_by_host_and_path(tmp_path, monkeypatch, http_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (http_folder.path / "vitl.pt").write_bytes(b"weights")
    first = resolve_weights(f"{http_folder.url}/vitl.pt", base=tmp_path)
    assert first.read_bytes() == b"weights"
    assert first.is_relative_to(tmp_path / "cache" / "jepa-cache" / "weights")
    (http_folder.path / "vitl.pt").unlink()
    assert resolve_weights(f"{http_folder.url}/vitl.pt", base=tmp_path) == first
    assert [path.name for path in first.parent.iterdir()] == ["vitl.pt"]


def test_files_of_one_name_from_two_places_do_not_stand_for_each_other(tmp_path, monkeypatch, http_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("a", "b"):
        (http_folder.path / folder).mkdir()
        (http_folder.path / folder / "vitl.pt").write_text(folder)
    got = [resolve_weights(f"{http_folder.url}/{folder}/vitl.pt", base=tmp_path).read_text() for folder in ("a", "b")]
    other_host = http_folder.url.replace("127.0.0.1", "localhost")
    (http_folder.path / "a" / "vitl.pt").write_text("other host")
    assert [*got, resolve_weights(f"{other_host}/a/vitl.pt", base=tmp_path).read_text()] == ["a", "b", "other host"]


def test_a_download_that_breaks_off_is_never_taken_for_the_file(tmp_path, monkeypatch, http_folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (http_folder.path / "vitl.pt").write_bytes(b"weights")
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda url, part, progress: Path(part).write_bytes(b"wei"))
    with pytest.raises(WeightsNotFoundError, match="3 of 7 bytes"):
        resolve_weights(f"{http_folder.url}/vitl.pt", base=tmp_path)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_vjepa1_urls_are_refused_before_the_download(tmp_path):
    with pytest.raises(ValueError, match="V-JEPA 1"):
        resolve_weights("https://dl.fbaipublicfiles.com/jepa/vitl16/vitl16.pth.tar", base=tmp_path)


@pytest.mark.parametrize("reference", ["hf://facebook/model.safetensors", "s3://bucket/vitl.pt"])
def test_other_references_are_refused(reference, tmp_path):
    with pytest.raises(ValueError, match="hf://owner/repo/file"):
        resolve_weights(reference, base=tmp_path)


def test_a_hub_reference_is_split_into_repository_and_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: seen.append((repo, file)) or "x")
    resolve_weights("hf://facebook/vjepa2-vitl-fpc64-256/sub/model.safetensors", base=tmp_path)
    assert seen == [("facebook/vjepa2-vitl-fpc64-256", "sub/model.safetensors")]


def test_a_hub_that_does_not_answer_says_how_to_get_the_file(tmp_path, monkeypatch):
    def fail(repo, file):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(WeightsNotFoundError, match=r"no network.*encode\.weights=PATH"):
        resolve_weights("hf://facebook/vjepa2-vitl-fpc64-256/model.safetensors", base=tmp_path)


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


@pytest.mark.parametrize("name", NUM_WEIGHTS)
def test_presets_have_the_released_size(name):
    assert sum(int(np.prod(shape)) for shape in parameter_shapes(read_preset(name)).values()) == NUM_WEIGHTS[name]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_names_exactly_one_origin_of_weights(path):
    preset = read_preset(path.stem)
    assert (preset.weights is None) != (preset.random_seed is None)
    if preset.kind == "hf":
        assert preset.weights.startswith("hf://") and preset.weights.count("/") == 3
    elif preset.weights:
        assert preset.weights.removeprefix(weights.OFFICIAL_BASE_URL) in weights.OFFICIAL_FILES
