"""Short trainings on a tiny cache, and what they leave."""

import csv
from pathlib import Path

from safetensors.torch import load_file

from jepa_cache.training.trainer import TrainResult, train
from tests.caches import Cache, make_config

TIMING = ("samples_per_s", "loader_wait_share")


def run(cache: Cache, output: Path, *overrides: str, fresh: bool = False) -> TrainResult:
    return train(make_config(*overrides), cache.dataset, cache.scaler, output / "run", base=output, fresh=fresh)


def rows(result: TrainResult) -> list[dict[str, str]]:
    """Rows of the CSV without the columns that depend on the clock."""
    with (result.run / "train.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def bits(weights: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}
