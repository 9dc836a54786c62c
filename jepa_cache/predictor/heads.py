"""Small heads on the tokens of a step, by which a planner measures how far a goal is where the distance of tokens does not tell.

`StateReadout` reads the recorded state, `TimeHead` puts steps that follow each other soon close together. Both are fitted once, by
`training.heads`, and lie beside the weights that they were fitted with. Both are called with tokens and give a vector; the distance of two
such vectors is the cost. Neither needs a state when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from jepa_cache.predictor.checkpoints import CheckpointError, load_predictor_weights, read_card
from jepa_cache.predictor.compressed import Compressor

READOUT, TIME = "readout", "time"
TIME_COMPONENTS = 128
SAME_FIELDS = ("run", "tokens_fingerprint", "normalize_reps")
"""Of the cards of a head and of the predictor that it is used with."""


class StateReadout(nn.Module):
    """A linear map from all tokens of a step to numbers of the state, each by its deviation and weighted by how well it is read."""

    def __init__(self, num_tokens: int, embed_dim: int, num_outputs: int) -> None:
        """Make room; `training.heads.fit_readout` or a file fills it."""
        super().__init__()
        self.linear = nn.Linear(num_tokens * embed_dim, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [.., N, E] to [.., K]."""
        return self.linear(tokens.flatten(-2))


class TimeHead(nn.Module):
    """An embedding of principal components whose distance is the time between two steps, in steps of the cache."""

    def __init__(
        self, num_tokens: int, embed_dim: int, num_components: int, width: int = 128, out_dim: int = 32
    ) -> None:
        super().__init__()
        self.compressor = Compressor(num_tokens, embed_dim, num_components)
        self.enter, self.hidden = nn.Linear(num_components, width), nn.Linear(width, width)
        self.leave = nn.Linear(width, out_dim)

    def embed(self, z: Tensor) -> Tensor:
        """Components [.., P] to [.., out_dim]."""
        return self.leave(F.gelu(self.hidden(F.gelu(self.enter(z)))))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [.., N, E] to [.., out_dim]."""
        return self.embed(self.compressor.compress(tokens))


Head: TypeAlias = StateReadout | TimeHead
HEADS: Mapping[str, type[Head]] = {READOUT: StateReadout, TIME: TimeHead}


def head_path(weights: Path, name: str) -> Path:
    """Where the head `name` of a predictor's weights lies: beside them."""
    return weights.with_name(f"{weights.stem}-{name}.safetensors")


def load_head(path: Path, name: str, card: Mapping[str, Any] | None = None) -> Head:
    """Load a head; `card` is that of the predictor it is to be used with.

    Raises:
        CheckpointError: The file is damaged or of something else, or was fitted beside another predictor.
    """
    own: dict[str, Any] = read_card(path)
    if own.get("head") != name:
        raise CheckpointError(f"{path} holds no cost {name!r}; remove it, or train with train.costs=[{name}] again")
    if differing := [field for field in SAME_FIELDS if card is not None and own.get(field) != card.get(field)]:
        raise CheckpointError(
            f"{path} was fitted beside another predictor (its {', '.join(differing)} differ); remove it, or train with "
            f"train.costs=[{name}] again"
        )
    head = HEADS[name](**own["architecture"])
    load_predictor_weights(head, path)
    return head.eval().requires_grad_(False)
