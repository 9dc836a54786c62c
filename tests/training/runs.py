"""Short trainings on a tiny cache, in this process and in others, and what they leave."""

import csv
from pathlib import Path

from safetensors.torch import load_file

from jepa_cache.predictor.checkpoints import read_card
from jepa_cache.training.trainer import TrainResult, train
from tests.caches import Cache, make_config
from tests.processes import Started

TIMING = ("samples_per_s", "loader_wait_share")
SCRIPT = Path(__file__).with_name("process.py")


def run(cache: Cache, output: Path, *overrides: str, fresh: bool = False) -> TrainResult:
    return train(make_config(*overrides), cache.dataset, cache.scaler, output / "run", base=output, fresh=fresh)


def start(cache: Cache, home: Path, *words: str, **env: object) -> Started:
    """A training in a process of its own; the environment is what torchrun, accelerate launch and srun set."""
    home.mkdir(exist_ok=True)
    words = (f"cache.root={cache.root.path}", *words)
    # Elsewhere than in the checkout: DVCLive would look the repository up in every process.
    return Started(home, SCRIPT, cache.folder, home, *words, JEPA_RUNS_HOME=home / "runs", **env)


def read_csv(folder: Path) -> list[dict[str, str]]:
    """Rows of a CSV without the columns that depend on the clock."""
    with (folder / "train.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def rows(result: TrainResult) -> list[dict[str, str]]:
    return read_csv(result.run)


def bits(weights: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}


def content(weights: Path) -> tuple[dict, dict[str, bytes]]:
    """The card and the bits of every tensor."""
    return read_card(weights), bits(weights)
