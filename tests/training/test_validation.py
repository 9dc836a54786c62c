"""Validation while a training runs.

Claims:
- its losses and its gaps to copying and to another episode's actions are those of the weights that it leaves, computed anew;
- with one held-out episode there is no other to compare with, and the losses stay.
"""

import pytest
import torch

from jepa_cache.data.ablations import choose_donors
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.windows import WindowIndex, spread_windows
from jepa_cache.predictor.checkpoints import load_predictor
from jepa_cache.predictor.rollout import normalize_tokens, teacher_forcing
from jepa_cache.training.batches import VALIDATION_WINDOWS_PER_EPISODE
from jepa_cache.training.trainer import TrainResult, train
from tests.caches import Cache, make_cache
from tests.training.runs import rows

pytestmark = pytest.mark.usefixtures("runs")


def last_row(cache: Cache) -> tuple[TrainResult, dict[str, str]]:
    result = train(cache.config, cache.dataset, cache.scaler, cache.folder / "run", base=cache.folder)
    return result, rows(result)[-1]


def test_validation_compares_with_copying_and_with_the_actions_of_another_episode(tmp_path):
    cache = make_cache(tmp_path)
    result, row = last_row(cache)
    predictor, card = load_predictor(result.weights)
    index = WindowIndex(cache.dataset.segments_of("val", cache.config.split), card["window_steps"])
    numbers = spread_windows(index, VALIDATION_WINDOWS_PER_EPISODE)
    episodes = [index.segments[index[number].segment].episode for number in numbers]
    donors = choose_donors(episodes, seed=cache.config.train.seed)
    batch = WindowLoader(cache.dataset, index, cache.scaler).read(numbers)
    h = normalize_tokens(batch.tokens)
    errors = []
    with torch.no_grad():
        for actions in (batch.actions, batch.actions[donors]):
            predicted = teacher_forcing(predictor.eval(), h, actions, batch.states)
            errors.append(float((predicted - h[:, 1:]).abs().mean()))
    copied = float((h[:, :-1] - h[:, 1:]).abs().mean())
    assert float(row["val_jloss"]) == pytest.approx(errors[0], abs=1e-5)
    assert float(row["val_gap_copy_last"]) == pytest.approx(copied - errors[0], abs=1e-5)
    assert float(row["val_gap_shuffled_actions"]) == pytest.approx(errors[1] - errors[0], abs=1e-5)
    assert errors[1] != errors[0]


def test_one_held_out_episode_is_validated_without_another_to_compare_with(tmp_path):
    alone = make_cache(tmp_path, "split.seed=1")
    _, row = last_row(alone)
    assert row["val_jloss"] and not row["val_gap_copy_last"] and not row["val_gap_shuffled_actions"]
