"""The kinds of encoder that V-JEPA 2 and 2.1 released: where their files are, their modules, and seeded random weights.

Imports torch where weights are loaded only. A missing file is always an error; random weights exist only for a preset with a seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import urlopen

import numpy as np

from jepa_cache.config.paths import weights_folder
from jepa_cache.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jepa_cache.config.schema import EncodeConfig, EncoderPreset

INIT_STD = 0.02
OFFICIAL_BASE_URL = "https://dl.fbaipublicfiles.com/vjepa2/"
OFFICIAL_FILES = (
    *("vitl.pt", "vith.pt", "vitg.pt", "vitg-384.pt", "vjepa2-ac-vitg.pt"),
    *("vjepa2_1_vitb_dist_vitG_384.pt", "vjepa2_1_vitl_dist_vitG_384.pt"),
    *("vjepa2_1_vitg_384.pt", "vjepa2_1_vitG_384.pt"),
)
_WAY_OUT = (
    f"Official files are at {OFFICIAL_BASE_URL} ({', '.join(OFFICIAL_FILES)}), those of V-JEPA 2 also as safetensors on the "
    "Hugging Face hub (hf://facebook/vjepa2-vitl-fpc64-256/model.safetensors). Download one on a machine with network "
    "and name it with encode.weights=PATH. Random weights are never used in place of a missing file"
)


class VJepa2:
    """V-JEPA 2's video transformer, from an official file or drawn from a seed."""

    def find(self, reference: str, *, base: Path, download: bool = True) -> Path | None:
        """The file at a path, an https:// URL or hf://owner/repo/file, downloaded at most once.

        Raises:
            ValueError: The file is missing or cannot be downloaded, the form is another one, or it is a V-JEPA 1 file.
        """
        scheme = urlparse(reference).scheme if "://" in reference else ""
        if scheme in ("http", "https"):
            return _find_download(reference, download)
        if scheme == "hf":
            return _find_on_hub(reference, download)
        if scheme:
            raise ValueError(
                f"weights are a path, an https:// URL or hf://owner/repo/file; got '{reference}'. {_WAY_OUT}"
            )
        path = base / Path(reference).expanduser()
        if path.is_dir():
            raise ValueError(f"weights {path} are a folder; name the file in it. {_WAY_OUT}")
        if not path.is_file():
            raise ValueError(f"weights file {path} does not exist. {_WAY_OUT}")
        return path

    def files(self, weights: Path) -> list[Path]:
        """The one file."""
        return [weights]

    def identity(self, preset: EncoderPreset, weights: Path, digest: Callable[[Path], str]) -> str:
        """`file:sha256`, with the entry that is read where the file has any."""
        entry = _entry_of(preset, weights)
        return f"file:{digest(weights)}" + (f"#{entry}" if entry else "")

    def load(self, preset: EncoderPreset, weights: Path | None) -> nn.Module:
        """Read the weights, or draw them where the preset names a seed and no file."""
        import torch

        from jepa_cache.encoder.checkpoints import load_state

        if weights is None:
            return self.build(preset, {name: torch.from_numpy(array) for name, array in random_state(preset).items()})
        return self.build(preset, load_state(weights, _entry_of(preset, weights)), origin=str(weights))

    def build(
        self, preset: EncoderPreset, state: Mapping[str, Tensor], *, origin: str = "the given state"
    ) -> nn.Module:
        """The encoder with exactly the given weights.

        Raises:
            CheckpointError: naming every tensor of the state, which came from `origin`, that does not fit the preset.
        """
        import torch

        from jepa_cache.encoder.checkpoints import load_strictly

        with torch.device("meta"):
            module = self.make(preset)
        return load_strictly(module, preset, state, origin=origin)

    def make(self, preset: EncoderPreset) -> nn.Module:
        """The module, with weights that mean nothing."""
        from jepa_cache.encoder.vit import VisionTransformer

        return VisionTransformer(**_sizes_of(preset))

    def recipe_fields(self, preset: EncoderPreset, encode: EncodeConfig) -> Mapping[str, Any]:
        """Nothing: recipes are as they were when this was the only kind."""
        return {}


class VJepa21(VJepa2):
    """V-JEPA 2.1's transformer, which takes single frames as images too."""

    def make(self, preset: EncoderPreset) -> nn.Module:
        """The module, with weights that mean nothing."""
        from jepa_cache.encoder.vit import VisionTransformer21

        return VisionTransformer21(**_sizes_of(preset), positions=preset.positions)

    def recipe_fields(self, preset: EncoderPreset, encode: EncodeConfig) -> Mapping[str, Any]:
        """Where rows and columns lie, and in frame mode the way of a frame; in the other modes every input is a video."""
        fields = {"kind": "vjepa2_1", "positions": preset.positions}
        return fields | ({"single_frame": encode.single_frame} if encode.mode == "frame" else {})


def _sizes_of(preset: EncoderPreset) -> dict[str, int]:
    names = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size", "tubelet_size")
    return {name: getattr(preset, name) for name in names}


def _entry_of(preset: EncoderPreset, path: Path) -> str | None:
    """The top-level entry that is read from a weights file; safetensors have none."""
    return None if path.suffix == ".safetensors" else preset.weights_entry


def random_state(preset: EncoderPreset) -> dict[str, np.ndarray]:
    """Draw seeded, untrained weights by the official initialisation; only for presets that name a seed (`tiny`).

    Matrices and the patch projection are normal with deviation 0.02 (upstream's truncation at +-2 never acts), biases
    0, norms 1; attn.proj and mlp.fc2 of block l (from 1) are divided by sqrt(2 l). Gives official name -> float32 array, the
    same on every machine for one seed.

    Source: V-JEPA 2, arXiv 2506.09985, upstream initialisation.
    """
    assert preset.random_seed is not None, "a generator without a seed would draw others each time"
    generator = np.random.Generator(np.random.PCG64(preset.random_seed))
    state = {}
    for layer, shape in _layers(preset):
        std = INIT_STD
        if layer.endswith(("attn.proj", "mlp.fc2")):
            std /= np.sqrt(2.0 * (int(layer.split(".")[1]) + 1))
        if "norm" in layer:
            state[f"{layer}.weight"] = np.ones(shape, np.float32)
        else:
            state[f"{layer}.weight"] = (generator.standard_normal(shape) * std).astype(np.float32)
        state[f"{layer}.bias"] = np.zeros(shape[:1], np.float32)
    return state


def _layers(preset: EncoderPreset) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Layers in the module's order with the shapes of their weights: written down because the identity is asked without torch."""
    dim, hidden, patch = preset.embed_dim, preset.mlp_dim, preset.patch_size
    yield "patch_embed.proj", (dim, 3, preset.tubelet_size, patch, patch)
    for block in (f"blocks.{index}" for index in range(preset.depth)):
        yield f"{block}.norm1", (dim,)
        yield f"{block}.attn.qkv", (3 * dim, dim)
        yield f"{block}.attn.proj", (dim, dim)
        yield f"{block}.norm2", (dim,)
        yield f"{block}.mlp.fc1", (hidden, dim)
        yield f"{block}.mlp.fc2", (dim, hidden)
    yield "norm", (dim,)


def _find_download(url: str, download: bool) -> Path | None:
    """The kept copy of a URL. Host and path stay in its name: files of one name from two places must not be mixed up."""
    from tqdm import tqdm

    parts = urlparse(url)
    if parts.path.startswith("/jepa/") and parts.hostname == "dl.fbaipublicfiles.com":
        raise ValueError(f"{url} is a V-JEPA 1 file; only V-JEPA 2 encoders can be loaded. {_WAY_OUT}")
    target = weights_folder() / str(parts.hostname) / parts.path.lstrip("/")
    if target.is_file() or not download:
        return target if target.is_file() else None
    try:
        with atomic_file(target) as part, urlopen(url, timeout=60) as answer:
            progress = tqdm.wrapattr(answer, "read", total=answer.length, desc=target.name)
            with part.open("wb") as file, progress as content:
                shutil.copyfileobj(content, file, 1 << 20)
            if answer.length:  # a connection that breaks off leaves a short file without any error
                raise OSError(f"the download ended {answer.length} bytes early, after {part.stat().st_size}")
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {url} could not be downloaded to {target}: {error}. {_WAY_OUT}") from error
    return target


def _find_on_hub(reference: str, download: bool) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, _, rest = reference.removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise ValueError(f"a hub reference is hf://owner/repo/file; got '{reference}'. {_WAY_OUT}")
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file, local_files_only=not download))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if not download and isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(f"weights {reference} could not be had from the hub: {error}. {_WAY_OUT}") from error
