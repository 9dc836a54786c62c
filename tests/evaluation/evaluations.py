"""Predictors, and evaluations of them, that the tests of this room share."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.predictor.model import ACPredictor, PredictorOutput
from jepa_cache.predictor.rollout import LatentModel
from tests.caches import GRID, WIDTH, Cache
from tests.predictor.makers import build_lively


class Trained(NamedTuple):
    """A cache of 18 episodes, and a predictor that learned what actions do."""

    cache: Cache
    weights: Path


class Oracle(torch.nn.Module):
    """Knows how the tokens of tests/caches.py follow from the yaw: 2 sin(yaw (1 + c % 2) + 0.8 token + 1.7 channel)."""

    def __init__(self, scaler, sign: float = 1.0, *, blind: bool = False) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.scaler, self.sign, self.blind = scaler, sign, blind

    def forward(self, tokens, actions, states, past=None, num_kept_steps=None) -> PredictorOutput:
        yaw = states[..., 0].double() * self.scaler.states.scale[0] + self.scaler.states.mean[0]
        if not self.blind:
            yaw = yaw + actions[..., 2].double() * self.scaler.actions.scale[2] + self.scaler.actions.mean[2]
        token, channel = torch.meshgrid(torch.arange(GRID[0] * GRID[1]), torch.arange(WIDTH), indexing="ij")
        angle = torch.deg2rad(yaw)[..., None, None] * (1 + channel % 2) + 0.8 * token + 1.7 * channel
        return PredictorOutput(self.sign * 2 * torch.sin(angle).float(), [(torch.zeros(len(tokens), 1, 1, 1),) * 2])


def a_predictor(action_weight: float = 1.0) -> ACPredictor:
    predictor = build_lively(action_dim=13, state_dim=2).float().eval()
    predictor.action_encoder.weight.data.mul_(action_weight)
    return predictor


def evaluation_of(cache: Cache, predictor: torch.nn.Module, **evaluate) -> EvaluationContext:
    config = replace(cache.config, evaluate=replace(cache.config.evaluate, **evaluate))
    return EvaluationContext(LatentModel(predictor), config, cache.dataset, cache.scaler, 5)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
