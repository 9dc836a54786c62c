"""Tiny randomly drawn image encoders of the transformers library, saved as users have them on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from jepa_cache.config.schema import EncoderPreset
from jepa_cache.encoder.image import read_preprocessing

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
    fields = read_preprocessing(folder)
    return replace(
        EncoderPreset(
            name="image",
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_dim=64,
            patch_size=16,
            tubelet_size=1,
            rope="own",
            compute_dtype="float32",
            batch_size=4,
            weights=str(folder),
            weights_entry=None,
            weights_sha256=None,
            random_seed=None,
            kind="hf",
            **fields,
        ),
        **changes,
    )
