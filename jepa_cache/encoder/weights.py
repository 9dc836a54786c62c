"""What identifies an encoder's weights, for the recipe. Imports no torch: `encode` asks for it before anything is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cache.encoder import KINDS
from jepa_cache.encoder.vjepa2 import random_state

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset


def weights_identity(preset: EncoderPreset, path: Path | None, *, digest: Callable[[Path], str]) -> str:
    """Name the weights by their content, for the recipe: equal strings mean equal weights.

    Covers weights only; what else decides the tokens (num_heads, rope, crop, dtype) belongs into the recipe beside it. `path` is
    from the kind's `find`, None for a preset without a file; `digest` gives a file's hex sha256, possibly remembered from an earlier run.

    Returns:
        `random:<sha256 over names, shapes and bytes>`, or `file:<sha256 of the file>` followed by `#<entry>` for
        checkpoints that have entries, or `hf:<sha256 over config and weights>` for an image encoder, or `pixels:1` where there are none.

    Raises:
        ValueError: the digest is not the one that the preset gives, or the preset names no seed and no file.
    """
    if path is None and preset.random_seed is not None:
        total = hashlib.sha256()
        for name, array in random_state(preset).items():
            total.update(f"{name} {list(array.shape)} {array.dtype.str}\n".encode())
            total.update(array.tobytes())
        return f"random:{total.hexdigest()}"
    identity = KINDS[preset.kind].identity(preset, path, digest)
    found = identity.partition(":")[2].partition("#")[0]
    if preset.weights_sha256 and found != preset.weights_sha256:
        raise ValueError(
            f"weights {path} have sha256 {found}, but encoder preset '{preset.name}' gives {preset.weights_sha256}: "
            f"they are other ones or were damaged. Download it again, or correct weights_sha256 in the preset"
        )
    return identity
