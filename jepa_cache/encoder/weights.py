"""Where an encoder's weights come from, and what identifies them. Imports no torch: `encode` asks for the identity first.

A missing file is always an error here; random weights exist only for a preset that names a seed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from jepa_cache.encoder.image_files import model_digest, model_files, resolve_model
from jepa_cache.encoder.structure import random_state
from jepa_cache.files import atomic_file

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset

OFFICIAL_BASE_URL = "https://dl.fbaipublicfiles.com/vjepa2/"
OFFICIAL_FILES = (
    "vitl.pt",
    "vith.pt",
    "vitg.pt",
    "vitg-384.pt",
    "vjepa2-ac-vitg.pt",
    "vjepa2_1_vitb_dist_vitG_384.pt",
    "vjepa2_1_vitl_dist_vitG_384.pt",
    "vjepa2_1_vitg_384.pt",
    "vjepa2_1_vitG_384.pt",
)
_WAY_OUT = (
    f"Official files are at {OFFICIAL_BASE_URL} ({', '.join(OFFICIAL_FILES)}), those of V-JEPA 2 also as safetensors on the "
    "Hugging Face hub (hf://facebook/vjepa2-vitl-fpc64-256/model.safetensors). Download one on a machine with network "
    "and name it with encode.weights=PATH. Random weights are never used in place of a missing file"
)


class WeightsNotFoundError(ValueError):
    """The named weights cannot be had; the message says how to get them."""


def entry_in_use(preset: EncoderPreset, path: Path) -> str | None:
    """Name the top-level entry that is read from a weights file; None for safetensors, which have no entries."""
    return None if path.suffix == ".safetensors" else preset.weights_entry


def weights_identity(preset: EncoderPreset, path: Path | None, *, digest: Callable[[Path], str]) -> str:
    """Name the weights by their content, for the recipe: equal strings mean equal weights.

    Covers weights only; what else decides the tokens (num_heads, rope, crop, dtype) belongs into the recipe beside it.

    Args:
        preset: the encoder.
        path: its weights from `resolve_weights`; None for a preset with random_seed.
        digest: gives a file's hex sha256, possibly remembered from an earlier run.

    Returns:
        `random:<sha256 over names, shapes and bytes>`, or `file:<sha256 of the file>` followed by `#<entry>` for
        checkpoints that have entries, or `hf:<sha256 over config and weights>` for an image encoder.

    Raises:
        ValueError: the file's digest is not the one that the preset gives, or the preset names no seed and no file.
    """
    if path is None:
        total = hashlib.sha256()
        for name, array in random_state(preset).items():
            total.update(f"{name} {list(array.shape)} {array.dtype.str}\n".encode())
            total.update(array.tobytes())
        return f"random:{total.hexdigest()}"
    found = model_digest(path, digest=digest) if preset.kind == "hf" else digest(path)
    if preset.weights_sha256 and found != preset.weights_sha256:
        raise ValueError(
            f"weights {path} have sha256 {found}, but encoder preset '{preset.name}' gives {preset.weights_sha256}: "
            f"they are other ones or were damaged. Download it again, or correct weights_sha256 in the preset"
        )
    if preset.kind == "hf":
        return f"hf:{found}"
    entry = entry_in_use(preset, path)
    return f"file:{found}" + (f"#{entry}" if entry else "")


def weights_files(preset: EncoderPreset, path: Path) -> list[Path]:
    """The files that an encoder is loaded from and that its identity covers."""
    return model_files(path) if preset.kind == "hf" else [path]


def weights_folder() -> Path:
    """Where downloads by URL are kept: $XDG_CACHE_HOME/jepa-cache/weights, or the same under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jepa-cache" / "weights"


def resolve_weights(reference: str, *, base: Path, kind: str = "vjepa2") -> Path:
    """Turn a reference to weights into a local file, downloading it at most once.

    Args:
        reference: a path (relative to `base`, ~ allowed), an https:// URL, or hf://owner/repo/file; for kind hf a folder or
            hf://owner/repo[@revision].
        base: folder that relative paths start from.
        kind: of the encoder.

    Returns:
        Path of an existing file; for kind hf of a folder.

    Raises:
        WeightsNotFoundError: the file is missing or cannot be downloaded.
        ValueError: the reference has an unknown form, or names a V-JEPA 1 file.
    """
    if kind == "hf":
        return resolve_model(reference, base=base)
    scheme = urlparse(reference).scheme if "://" in reference else ""
    if scheme in ("http", "https"):
        return _download(reference)
    if scheme == "hf":
        return _from_hub(reference)
    if scheme:
        raise ValueError(f"weights are a path, an https:// URL or hf://owner/repo/file; got '{reference}'. {_WAY_OUT}")
    path = base / Path(reference).expanduser()
    if not path.is_file():
        raise WeightsNotFoundError(f"weights file {path} does not exist. {_WAY_OUT}")
    return path


def find_weights(reference: str, *, base: Path, kind: str = "vjepa2") -> Path | None:
    """The local file that `resolve_weights` would give, where it need not be downloaded; else None.

    Args:
        reference: as for `resolve_weights`.
        base: folder that relative paths start from.
        kind: of the encoder.

    Raises:
        WeightsNotFoundError: a path that does not exist.
        ValueError: the reference has an unknown form.
    """
    if kind == "hf":
        return resolve_model(reference, base=base, local_only=True)
    scheme = urlparse(reference).scheme if "://" in reference else ""
    if scheme in ("http", "https"):
        target = _downloaded(reference)
        return target if target.is_file() else None
    if scheme == "hf":
        from huggingface_hub import try_to_load_from_cache

        owner, repo, file = _split_hub(reference)
        found = try_to_load_from_cache(f"{owner}/{repo}", file)
        return Path(found) if isinstance(found, str) else None
    return resolve_weights(reference, base=base)


def _downloaded(url: str) -> Path:
    """Where a download is kept. Host and path stay in the name: files of one name from two places must not be mixed up."""
    parts = urlparse(url)
    return weights_folder() / str(parts.hostname) / parts.path.lstrip("/")


def _download(url: str) -> Path:
    parts = urlparse(url)
    if parts.path.startswith("/jepa/") and parts.hostname == "dl.fbaipublicfiles.com":
        raise ValueError(f"{url} is a V-JEPA 1 file; only V-JEPA 2 encoders can be loaded. {_WAY_OUT}")
    target = _downloaded(url)
    if target.is_file():
        return target
    try:
        # The size comes first, because a connection that breaks off leaves a short file without any error.
        with urlopen(Request(url, method="HEAD"), timeout=60) as answer:
            size_bytes = int(answer.headers.get("Content-Length") or 0)
        from torch.hub import download_url_to_file

        with atomic_file(target) as part:
            download_url_to_file(url, str(part), progress=True)
            got_bytes = part.stat().st_size
            if size_bytes and got_bytes != size_bytes:
                raise OSError(f"the download ended after {got_bytes} of {size_bytes} bytes")
    except (OSError, ValueError) as error:
        raise WeightsNotFoundError(f"weights {url} could not be downloaded to {target}: {error}. {_WAY_OUT}") from error
    return target


def _from_hub(reference: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    owner, repo, file = _split_hub(reference)
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise WeightsNotFoundError(f"weights {reference} could not be had from the hub: {error}. {_WAY_OUT}") from error


def _split_hub(reference: str) -> tuple[str, str, str]:
    owner, _, rest = reference.removeprefix("hf://").partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise ValueError(f"a hub reference is hf://owner/repo/file; got '{reference}'. {_WAY_OUT}")
    return owner, repo, file
