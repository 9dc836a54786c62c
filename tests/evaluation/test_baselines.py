"""Baselines and action ablations.

Claims:
- donors, of whole windows and of single steps, are of another episode, the same by seed, drawn from all of them as `choice` among the
  others would; one episode alone is refused;
- zero actions keep the slot; shifted ones are the recording's own neighbours, and where there is none they are NaN;
- mean and regression are those of all training steps, each counted once (test_run.py recomputes what they predict).
"""

from dataclasses import replace

import numpy as np
import pytest
import zarr

from jepa_cache.data.ablations import ABLATIONS, action_ablations, choose_donors, draw_others, draw_rows, positions_of
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.energy import ActionPool, iter_one_steps
from jepa_cache.evaluation.windows import RIDGE, fit_baselines, measure_windows
from jepa_cache.predictor.rollout import LatentModel
from tests.caches import make_cache
from tests.evaluation.evaluations import Oracle


def test_donors_are_of_another_episode_and_drawn_as_choice_among_the_others_would():
    episodes = [f"e{number}" for number in np.random.default_rng(0).integers(0, 9, 60)]
    names, plain = np.array(episodes), np.random.default_rng(7)
    expected = [plain.choice(np.flatnonzero(names != name)) for name in names]
    assert choose_donors(episodes, seed=7).tolist() == expected != choose_donors(episodes, seed=8).tolist()
    for name, own in positions_of(episodes).items():
        expected = np.random.default_rng(7).choice(np.flatnonzero(names != name), size=5)
        assert np.array_equal(draw_others(own, 60, np.random.default_rng(7), 5), expected)
    rows = draw_rows(episodes, 5, seed=0)
    assert rows.shape == (60, 5) and np.array_equal(rows, draw_rows(episodes, 5, seed=0))
    assert all(episodes[row // 5] != episodes[window] for window in range(60) for row in rows[window])
    assert len(np.unique(rows)) > 150, "drawn from all rows"


def test_one_episode_alone_has_no_donors():
    with pytest.raises(ValueError, match=r"at least two held-out episodes.*split\.val_share.*held out: only"):
        choose_donors(["only"] * 5, seed=0)


# Shorter than a piece, one piece, and with a rest.
@pytest.mark.parametrize(
    ("num_steps", "normalize", "apart"), [(2, True, 1), (17, True, 1), (18, False, 1), (40, True, 1), (61, True, 3)]
)
def test_the_baselines_are_fitted_on_every_training_step_and_pair_once(tmp_path, num_steps, normalize, apart):
    cache = make_cache(tmp_path, num_steps=num_steps)
    segments = cache.dataset.segments_of("train", cache.config.split)
    segments += [segments[0]._replace(stop=segments[0].start + 1)]  # what a filter may leave: a step without a pair
    found = fit_baselines(cache.dataset, segments, cache.scaler, LatentModel(None, normalize), step_length=apart)
    steps, inputs, changes = [], [], []
    for segment in segments:
        entry, manifest = cache.dataset.manifest.entries[segment.store], cache.dataset.manifest
        tokens = zarr.open(cache.root.tokens(manifest.fingerprint, entry.unit_digest))["tokens"]
        own = np.array(tokens[segment.start : segment.stop], np.float64)
        if normalize:
            own = (own - own.mean(-1, keepdims=True)) / np.sqrt(own.var(-1, keepdims=True) + 1e-5)
        pairs = max(len(own) - apart, 0)
        given = cache.dataset.controls(segment.store, apart)
        actions, states = (values[segment.start : segment.start + pairs] for values in given)
        scaled = np.ones((pairs, 1)), cache.scaler.actions.apply(actions), cache.scaler.states.apply(states)
        steps, inputs = [*steps, *own], [*inputs, *np.hstack(scaled).astype(np.float64)]
        changes += [*(own[apart:] - own[:pairs]).reshape(pairs, own[0].size)]
    assert found.num_steps == len(steps)
    assert np.allclose(found.mean.numpy(), np.mean(steps, axis=0), atol=1e-5)
    x, y = np.array(inputs), np.array(changes)
    penalty = RIDGE * len(x) * np.eye(x.shape[1])
    penalty[0, 0] = 0
    change = np.linalg.solve(x.T @ x + penalty, x.T @ y)
    assert np.allclose(found.change.flatten(1).numpy(), change, atol=1e-4)


def test_ablations_take_the_place_of_the_true_actions_of_windows_alike(cache):
    num_steps, apart = 4, 3
    index = WindowIndex(cache.dataset.segments_of("val", cache.config.split), num_steps, (1, apart))
    numbers = list(range(len(index)))
    found = action_ablations(cache.dataset, cache.scaler, index, numbers, seed=0)
    assert set(found) == set(ABLATIONS)
    true, scale = (
        WindowLoader(cache.dataset, index, cache.scaler).read(numbers).actions.numpy(),
        cache.scaler.actions.apply,
    )
    zero = found["zero_actions"]
    assert (zero[..., :4] == scale(np.zeros(13))[:4]).all() and np.array_equal(zero[..., 4:], true[..., 4:]), (
        "slots stay"
    )
    lengths = np.array([index[number].step_length for number in numbers])
    episodes = np.array([index.segments[index[number].segment].episode for number in numbers])
    for place, (length, episode) in enumerate(zip(lengths, episodes, strict=True)):
        others = true[(lengths == length) & (episodes != episode)]
        assert (found["shuffled_actions"][place] == others).all(axis=(1, 2)).any()
        assert (found["permuted_actions"][place][:, None] == others.reshape(-1, 13)).all(axis=2).any(axis=1).all()
        window, after, before = index[place], found["next_actions"][place], found["previous_actions"][place]
        segment, first = index.segments[window.segment], window.start - length
        if first >= segment.start and window.start + num_steps * length < segment.stop:
            rows = scale(cache.dataset.controls(window.store, int(length))[0][first::length])
            assert np.array_equal(before, rows[: num_steps - 1]) and np.array_equal(after, rows[2 : num_steps + 1])
        else:
            assert np.isnan(after).all() and np.isnan(before).all()


@pytest.mark.parametrize("apart", [1, 3])
def test_one_who_knows_what_actions_do_errs_by_rounding_alone_however_far_the_steps_lie_apart(cache, apart):
    """The tokens follow from the yaw, so tokens, states and composed actions must be those of the same steps."""
    settings = replace(cache.config.evaluate, step_length=apart, num_context_steps=2, horizon=3)
    config = replace(cache.config, evaluate=settings)
    evaluation = EvaluationContext(LatentModel(Oracle(cache.scaler)), config, cache.dataset, cache.scaler, 4)
    errors = measure_windows(evaluation)
    assert errors.one_step["model"].max() < 2e-3, "float16"
    assert errors.one_step["shuffled_actions"].mean() > 0.1 and errors.one_step["zero_actions"].mean() > 0.1
    assert np.nanmean(errors.one_step["next_actions"]) > 0.1 and errors.one_step["copy_last"].mean() > 0.1
    pool = ActionPool(cache.dataset, evaluation.held_out_segments(), apart)
    for step, _, segment in iter_one_steps(evaluation, errors.chosen):
        assert step.energies(step.true[None])[0] < 2e-3
        assert step.energies(pool.draw(20, step.true, segment, np.random.default_rng(0))).mean() > 0.1
