"""Image encoders of the transformers library as modules: one frame in, the tokens of its patches out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jepa_cache.config.paths import require

if TYPE_CHECKING:
    from jepa_cache.config.schema import EncoderPreset

UNUSED = ("pooler.",)  # come after last_hidden_state; some models are published without


class ImageEncoder(nn.Module):
    """Owns a frozen transformers model; gives `last_hidden_state` without class, distillation and register tokens."""

    def __init__(self, model: nn.Module, *, num_prefix: int, num_tokens: int, width: int) -> None:
        super().__init__()
        self.model, self.num_prefix, self.num_tokens, self.width = model, num_prefix, num_tokens, width

    def forward(self, clips: Tensor) -> Tensor:
        """Encode single frames [B, 3, 1, R, R] to patch tokens [B, N, D], row by row."""
        hidden = self.model(pixel_values=clips.squeeze(2)).last_hidden_state
        expected = (len(clips), self.num_prefix + self.num_tokens, self.width)
        if hidden.shape != expected:
            raise ValueError(
                f"the model gives tokens {list(hidden.shape)} for {clips.shape[3]} px, but {list(expected)} were expected: "
                f"{self.num_prefix} others and then {self.num_tokens} patches of width {self.width}"
            )
        return hidden[:, self.num_prefix :]


def load_image_model(preset: EncoderPreset, folder: Path, *, num_prefix: int) -> ImageEncoder:
    """Load the model of a preset from its folder in float32, evaluation mode and without gradients; try it on one empty picture.

    Raises:
        ValueError: the folder does not hold the whole model, or it does not take the preset's resolution.
    """
    require("transformers", "hf", f"encoder preset {preset.name!r}")
    from transformers import AutoConfig, AutoModel

    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        model, found = AutoModel.from_pretrained(
            folder,
            config=AutoConfig.from_pretrained(folder, **options),
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded by transformers: {error}") from error
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(UNUSED))
    wrong = sorted(str(name) for name in found["mismatched_keys"])
    if missing or wrong:
        raise ValueError(
            f"{folder} does not hold the whole model: missing {', '.join(missing) or 'nothing'}; of another shape "
            f"{', '.join(wrong) or 'nothing'}. Such weights would be random"
        )
    encoder = ImageEncoder(model, num_prefix=num_prefix, num_tokens=preset.num_tokens, width=preset.embed_dim)
    encoder.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            encoder(torch.zeros(1, 3, 1, preset.resolution, preset.resolution))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the model in {folder} does not take the {preset.resolution} px of encoder preset '{preset.name}': {error}"
        ) from error
    return encoder
