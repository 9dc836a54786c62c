"""Errors read out as positions, and the linear model without actions.

Claims:
- positions that tokens hold are read with an R2 of 1 on held-out episodes, from pooled tokens too; the errors read are those of the
  positions' own direction, and how far they lie above the true actions' is their ratio over episodes;
- positions that tokens do not hold, and spaces without any, give no figure but the reason;
- the linear model without actions finds how components and states lead on to the next step.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache import ridge
from jepa_cache.evaluation import readout
from jepa_cache.evaluation.figures import measure_above
from jepa_cache.evaluation.metrics import episode_means
from jepa_cache.evaluation.readout import describe_readout, fit_readout, pool_tokens
from jepa_cache.evaluation.windows import NoActionsFit, measure_windows
from tests.evaluation.evaluations import a_predictor, evaluation_of

PITCH = 1


def with_pitch(cache, monkeypatch, pitch_of):
    """The cache's evaluation with other states: pitch is `pitch_of` the steps' normed tokens [n, N, D]."""
    evaluation = evaluation_of(cache, a_predictor())
    dataset, manifest, true = cache.dataset, cache.dataset.manifest, cache.dataset.controls

    def controls(store, step_length=1):
        actions, states = true(store, step_length)
        tokens = np.empty((len(states), manifest.num_tokens, manifest.width), np.float16)
        dataset.read_tokens(store, 0, tokens)
        states = states.copy()
        states[:, PITCH] = pitch_of(evaluation.model.as_reps(torch.from_numpy(tokens))).numpy()
        return actions, states

    monkeypatch.setattr(dataset, "controls", controls)
    return evaluation


def test_positions_that_tokens_hold_are_read_and_errors_are_those_of_their_direction(cache, monkeypatch):
    direction = torch.randn(
        cache.dataset.manifest.num_tokens * cache.dataset.manifest.width, generator=torch.Generator().manual_seed(1)
    )
    monkeypatch.setattr(ridge, "RIDGES", (1e-6,))
    evaluation = with_pitch(cache, monkeypatch, lambda h: 40 + h.flatten(1) @ direction)
    errors = measure_windows(evaluation)
    assert errors.readout.columns == ("pitch",) and errors.readout.r2["pitch"][0] > 0.999
    copied = []
    for _, _, h in evaluation.iter_windows(errors.chosen, "again"):
        copied.append(((h[:, 1:5] - h[:, :4]).flatten(2) @ direction).square().numpy())
    copied = np.concatenate(copied)
    found = errors.teacher_forced["readout"]
    moved = copied > 0.1  # where it is not rounding
    ratio = found["copy_last"][moved] / copied[moved]  # one over the square of the pitch's spread over training steps
    assert np.allclose(ratio, np.median(ratio), rtol=0.05)
    sections, rows = measure_above(errors, evaluation.config.evaluate)
    for through, measure in (("tokens", "l1"), ("readout", "readout")):
        for name, row in zip(("shuffled_actions", "zero_actions", "no_actions", "copy_last"), rows, strict=True):
            one_step, key = errors.teacher_forced[measure], f"{through}_{name}_percent"
            other, true = (episode_means(one_step[which].mean(axis=1), errors.episodes) for which in (name, "model"))
            percent, (low, high) = (sections[section][key] for section in ("above", "above_ci"))
            assert percent == pytest.approx(100 * (other.mean() / true.mean() - 1)) and low <= percent <= high
            counts = [(other > true).sum(), len(true)]
            assert sections["above_episodes"][key] == counts
            shown = [row[f"{through}_{end}"] for end in ("percent", "percent_low", "percent_high", "episodes_above")]
            assert shown == [percent, low, high, f"{counts[0]} of {counts[1]}"]


def test_positions_that_tokens_do_not_hold_give_no_figure_but_the_reason(cache, monkeypatch):
    rng = np.random.default_rng(0)
    evaluation = with_pitch(cache, monkeypatch, lambda h: torch.from_numpy(rng.normal(size=len(h)).astype(np.float32)))
    found = fit_readout(evaluation)
    assert found.columns == () and found.r2["pitch"][0] < 0.1 and "nothing to read" in found.words
    monkeypatch.undo()
    still = fit_readout(with_pitch(cache, monkeypatch, lambda h: torch.zeros(len(h))))
    assert "pitch never change" in still.words
    none = replace(cache.dataset.space, positions=())
    monkeypatch.setattr(cache.dataset, "space", none)
    assert "say of no position" in describe_readout(fit_readout(evaluation))["readout_notes"]["columns"]


def test_of_many_tokens_the_means_of_neighbours_are_read(cache, monkeypatch):
    monkeypatch.setattr(readout, "MAX_NUMBERS", 20)
    tokens = torch.arange(2 * 3 * 4 * 8, dtype=torch.float32).reshape(2, 3, 4, 8)
    assert torch.equal(pool_tokens(tokens, (2, 2)), tokens.mean(dim=2))
    found = fit_readout(with_pitch(cache, monkeypatch, lambda h: h.mean(dim=1)[:, 3]))
    assert found.columns == ("pitch",) and found.r2["pitch"][0] > 0.999
    assert found.error(tokens, tokens + 1).shape == (2, 3)


def test_the_model_without_actions_finds_how_components_and_states_lead_on(cache):
    evaluation, training = evaluation_of(cache, a_predictor()), cache.dataset.segments_of("train", cache.config.split)
    fit, generator = NoActionsFit(evaluation, training), torch.Generator().manual_seed(0)
    names = sorted({segment.episode for segment in training})
    compressor = fit._predictor.compressor
    turn, pushed = torch.randn(2, compressor.latent_dim, compressor.latent_dim, generator=generator)

    def pairs(count):
        z, states = (
            torch.randn(count, 1, compressor.latent_dim, generator=generator),
            torch.randn(count, 2, 2, generator=generator),
        )
        after = z @ turn * 0.3 + states[:, :1] @ pushed[:2] + 1
        return compressor.expand(torch.cat([z, after], dim=1)), states

    for _ in range(20):
        fit.add(*pairs(40), [names[place % len(names)] for place in range(40)])
    h, states = pairs(50)
    told = fit.solve()(h[:, :1], torch.empty(50, 1, 0), states[:, :1]).tokens
    assert torch.allclose(told, h[:, 1:], atol=1e-3)
