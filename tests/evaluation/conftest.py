"""One small cache and one trained predictor for all tests of this room."""

import hashlib

import pytest

from jepa_cache.training.trainer import train
from tests.caches import Cache, make_cache, make_config
from tests.evaluation.evaluations import Trained

PLANS = ("plan.starts_per_episode=1", "plan.num_context_steps=2", "plan.num_samples=40", "plan.num_rounds=5")


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Cache:
    """Eight episodes, three of them held out."""
    few = ("evaluate.energy_samples=20", "evaluate.energy_windows=3", "evaluate.noise_windows=3")
    return make_cache(tmp_path_factory.mktemp("cache"), *few)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    units = {
        hashlib.sha256(name.encode()).hexdigest(): [f"episode-{name}{number}" for number in range(6)] for name in "abc"
    }
    split = "split.val_share=0.4"
    cache = make_cache(tmp_path_factory.mktemp("trained"), split, *PLANS, encoder_trained=True, units=units)
    steps = [f"train.{it}" for it in ("num_steps=170", "batch_size=16", "lr=0.03", "log_every=50", "validate_every=0")]
    config = make_config(split, *steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", str(cache.folder / "runs"))
        result = train(config, cache.dataset, cache.scaler, cache.folder / "train/run", base=cache.folder)
    return Trained(cache, result.weights)
