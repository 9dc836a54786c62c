"""The kind of encoder that transformers' image models are: which files count, what identifies them, what they say of themselves.

Imports neither torch nor transformers but to load one. No code that lies beside the weights is ever run, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from jepa_cache.encoder.shipped import CONFIG, PREFIX, PREPROCESSING, SHIPPED, WEIGHTS, find_shipped

if TYPE_CHECKING:
    from torch import nn

    from jepa_cache.config.schema import EncodeConfig, EncoderPreset

INDEX = "model.safetensors.index.json"
CLASS_TOKENS = {
    "beit": 1,
    "clip_vision_model": 1,
    "deit": 2,  # class and distillation
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "ijepa": 0,
    "siglip_vision_model": 0,
    "vit": 1,
    "vit_msn": 1,
}
"""Tokens before the patch tokens of `last_hidden_state`, by model_type; registers (config.num_register_tokens) come on top."""
# Numbers of PIL.Image.Resampling, as preprocessing files have them.
PILLOW_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


class ImageModelError(ValueError):
    """A folder or hub repository that cannot serve as a frozen image encoder; the message says why and what would."""


class ImageKind:
    """A frozen image encoder of the transformers library, such as DINOv2; takes frames one by one."""

    def find(self, reference: str, *, base: Path, download: bool = True) -> Path | None:
        """The folder of a model: one on disk (relative to `base`), or the local copy of hf://owner/repo[@revision] or shipped:NAME.

        None where `download` is off and the copy is not on this machine.
        """
        if reference.startswith(PREFIX):
            return find_shipped(reference.removeprefix(PREFIX), download=download)
        repo, _, revision = reference.removeprefix("hf://").partition("@")
        is_remote, folder = reference.startswith("hf://"), base / Path(reference).expanduser()
        usable = repo.count("/") == 1 and all(repo.split("/")) if is_remote else folder.is_dir()
        if not usable:
            raise ImageModelError(
                f"an image encoder is a folder with {CONFIG} and {WEIGHTS}, as save_pretrained writes it, or "
                f"hf://owner/repo[@revision], or shipped by a package ({', '.join(SHIPPED)}); got '{reference}'"
                + ("" if is_remote else f", and {folder} is no folder")
            )
        if not is_remote:
            return folder
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        # By name: neither code nor pickles are ever fetched.
        options = {
            "allow_patterns": [CONFIG, PREPROCESSING, "model*.safetensors", INDEX],
            "local_files_only": not download,
        }
        try:
            return Path(snapshot_download(repo, revision=revision or None, **options))
        except (HfHubHTTPError, OSError, ValueError) as error:
            if not download and isinstance(error, LocalEntryNotFoundError):
                return None
            raise ImageModelError(
                f"{reference} could not be had from the hub: {error} Download it on a machine with network (`hf download {repo}`) and "
                "name the folder with encode.weights=PATH"
            ) from error

    def files(self, weights: Path) -> list[Path]:
        """The files that decide a model's numbers, config first, then weights by name; whole, and no pickles."""
        files = [weights / WEIGHTS]
        if (weights / INDEX).is_file():
            weight_map = _read_json(weights / INDEX).get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) else {weight_map}
            for name in names:
                if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
                    raise ImageModelError(
                        f"{weights / INDEX}: weight_map names files of this folder; {name!r} is none. Save the model again with "
                        "save_pretrained(FOLDER)"
                    )
            files = [weights / INDEX, *(weights / name for name in sorted(names))]
        missing = [file.name for file in (weights / CONFIG, *files) if not file.is_file()]
        if missing:
            pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in weights.glob(pattern))
            raise ImageModelError(
                f"{weights} lacks {', '.join(missing)}"
                + (f"; it has {', '.join(pickles)}, but pickles can run code and are not read here" if pickles else "")
                + ". Save the model again with save_pretrained(FOLDER), which writes safetensors"
            )
        for file in files:
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, framework="np"):  # compares the file's length with its header
                        pass
                except (OSError, SafetensorError) as error:
                    raise ImageModelError(
                        f"{file} ({file.stat().st_size} bytes) is no whole safetensors file: {error}. Copy or download it again"
                    ) from error
        return [weights / CONFIG, *files]

    def identity(self, preset: EncoderPreset, weights: Path, digest: Callable[[Path], str]) -> str:
        """`hf:sha256` over config and weights, whatever folder or revision they came from."""
        total = hashlib.sha256()
        for file in self.files(weights):
            total.update(f"{file.name} {digest(file)}\n".encode())
        return f"hf:{total.hexdigest()}"

    def load(self, preset: EncoderPreset, weights: Path | None) -> nn.Module:
        """The model on its own weights."""
        from jepa_cache.encoder.image_model import load_image_model

        assert weights is not None
        self.files(weights)  # refuses pickles and files that are not whole
        model = read_model(weights)
        differing = [
            f"{name} is {getattr(preset, name)} in the preset and {size} in the model"
            for name, size in model.sizes.items()
            if getattr(preset, name) != size
        ]
        if differing:
            raise ImageModelError(
                f"encoder preset '{preset.name}' does not describe the model in {weights}: {'; '.join(differing)}. "
                f"`jepa-cache add-encoder {weights} NAME` writes the preset that does"
            )
        return load_image_model(preset, weights, num_prefix=model.num_prefix)

    def recipe_fields(self, preset: EncoderPreset, encode: EncodeConfig) -> Mapping[str, Any]:
        """The kind alone: the config of the model is part of the identity."""
        return {"kind": "hf"}


class ImageModel(NamedTuple):
    """What a model's config says.

    `num_prefix` counts the tokens before those of the patches: class, distillation and register tokens. `sizes` are embed_dim, depth,
    num_heads, mlp_dim (of two equal matrices, for gated ones too) and patch_size, as far as the config names them.
    """

    model_type: str
    num_prefix: int
    sizes: Mapping[str, int]


def read_model(folder: Path) -> ImageModel:
    """Read a model's config; refused if it needs code of its own, or its tokens are not known to be patches in rows."""
    config = _read_json(folder / CONFIG)
    model_type = str(config.get("model_type"))
    if "auto_map" in config:
        raise ImageModelError(
            f"{folder / CONFIG} names code of its own (auto_map: {', '.join(map(str, config['auto_map'].values()))}). Code of a "
            "repository is never run here; take a copy of the model in a class that transformers itself has"
        )
    if model_type not in CLASS_TOKENS:
        raise ImageModelError(
            f"{folder / CONFIG} is of model_type '{model_type}', of which it is not known that its tokens are patches in rows, and how "
            f"many others come before them. Known: {', '.join(sorted(CLASS_TOKENS))}. Of a model of text and images save the image "
            "part alone"
        )
    names = {
        "embed_dim": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "patch_size": "patch_size",
    }
    sizes = {ours: config[theirs] for ours, theirs in names.items() if isinstance(config.get(theirs), int)}
    if model_type.startswith("dinov2"):  # gated ones have three matrices of 2/3 of this
        sizes["mlp_dim"] = int(config["hidden_size"] * config.get("mlp_ratio", 4))
    elif "mlp_dim" in sizes and config.get("use_gated_mlp"):
        sizes["mlp_dim"] = sizes["mlp_dim"] * 3 // 2
    return ImageModel(model_type, CLASS_TOKENS[model_type] + int(config.get("num_register_tokens") or 0), sizes)


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """The preset fields that a model's preprocessing file stands for: resolution, short_side, crop, mean, std.

    Known is a resize by Pillow, a centre crop, and mean and std; everything else is refused.
    """
    path = folder / PREPROCESSING
    config = _read_json(path)
    size, crop, resample = config.get("size"), config.get("crop_size"), config.get("resample", 2)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    cropped = bool(config.get("do_center_crop", False))
    square = crop if cropped else size
    short_side = size if isinstance(size, int) else (size or {}).get("shortest_edge")
    mean, std, scale = config.get("image_mean"), config.get("image_std"), config.get("rescale_factor", 1 / 255)
    if not config.get("do_resize", True) or not config.get("do_normalize", True):
        unknown = "it does not resize, or does not normalise"
    elif abs(scale * 255 - 1) > 1e-6 or not config.get("do_rescale", True):
        unknown = f"pixels are scaled by {scale} and not by 1/255"
    elif resample not in PILLOW_FILTERS:
        unknown = f"resample {resample} is none of {PILLOW_FILTERS}"
    elif not all(isinstance(v, list) and len(v) == 3 for v in (mean, std)) or min(std) <= 0:
        unknown = f"image_mean {mean} and image_std {std} are no three numbers each, deviations above 0"
    elif not isinstance(square, Mapping) or square.get("height") != square.get("width") or not square.get("height"):
        unknown = f"it gives no square: size {size}, crop_size {crop}, do_center_crop {cropped}"
    elif cropped and short_side is None and size != crop:
        unknown = f"it squeezes to {size} and then crops to {crop}"
    else:
        return {
            "resolution": square["height"],
            "crop": f"pillow_{PILLOW_FILTERS[resample]}",
            "short_side": short_side if cropped else None,
            "mean": mean,
            "std": std,
        }
    raise ImageModelError(f"{path}: {unknown}; write the preset by hand (docs/image_encoders.md)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ImageModelError(
            f"{path} cannot be read as JSON: {error}. A model is a folder as save_pretrained writes it"
        ) from error
    if not isinstance(content, dict):
        raise ImageModelError(f"{path} holds no JSON object")
    return content
