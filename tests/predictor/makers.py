"""A small predictor, and how the tests compare and save it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from jepa_cache.predictor.checkpoints import save_state
from jepa_cache.predictor.model import ACPredictor

SIZES = {
    **{"embed_dim": 8, "predictor_dim": 12, "depth": 1, "num_heads": 2, "action_dim": 7, "state_dim": 7},
    "grid": [2, 2],
}


def build(seed: int = 0, **changes: object) -> ACPredictor:
    """A predictor with the weights of a seed."""
    torch.manual_seed(seed)
    return ACPredictor(**(SIZES | changes))


def build_lively(**changes: object) -> ACPredictor:
    """One in float64 whose weights are wide enough for every input to matter."""
    predictor = build(0, **changes).double()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return predictor


def draw(*shape: int) -> Tensor:
    """Normal numbers in float64, the same for the same shape."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two predictors hold the same bits under the same names."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def save(path: Path, predictor: ACPredictor, **card: object) -> Path:
    """Write a predictor with a card that says its architecture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_state(predictor.state_dict(), path, {"architecture": SIZES} | card)
    return path


def block_causal_mask(num_steps, tokens_per_step):
    """The definition that `block_causal_attention` keeps to without building it: [T*L, T*L] bool, rows are queries."""
    step = torch.arange(num_steps * tokens_per_step) // tokens_per_step
    return step[:, None] >= step[None, :]
