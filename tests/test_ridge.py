"""Claims: both closed forms give scikit-learn's ridge regressions; each target's strength is chosen on episodes not fitted to."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from jepa_cache import ridge


@pytest.mark.parametrize("num_rows", [20, 200])
def test_both_forms_are_those_of_scikit_learn(num_rows, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, 50)) @ rng.normal(size=(50, 50)) + 3
    y = x[:, :2] @ rng.normal(size=(2, 3)) + rng.normal(size=(num_rows, 3))
    strength = 0.1 * ((x - x.mean(axis=0)) ** 2).sum() / min(x.shape)
    expected = Ridge(alpha=strength).fit(x, y).predict(x)
    monkeypatch.setattr(ridge, "RIDGES", (0.1,))
    weight, bias, r2 = ridge.fit_rows(*map(torch.from_numpy, (x, y)), ["a", "b"] * (num_rows // 2))
    np.testing.assert_allclose(x @ weight.numpy() + bias.numpy(), expected, atol=1e-6)
    told = np.empty_like(y)
    for first in (0, 1):  # each episode is told by the other
        told[first::2] = Ridge(alpha=strength).fit(x[1 - first :: 2], y[1 - first :: 2]).predict(x[first::2])
    np.testing.assert_allclose(
        r2, 1 - ((y - told) ** 2).sum(axis=0) / ((y - y.mean(axis=0)) ** 2).sum(axis=0), atol=1e-6
    )
    rows = torch.from_numpy(np.hstack([np.ones((num_rows, 1)), x, y]))
    sums = ridge.sum_products(rows.unflatten(0, (4, -1)), 3)
    weights = ridge.solve_sums(sums, strength / num_rows)
    np.testing.assert_allclose(rows[:, :51] @ weights, expected, atol=1e-6)
    error = ridge.squared_error(weights, sums) + (y**2).sum()
    assert error == pytest.approx(((expected - y) ** 2).sum())
    np.testing.assert_allclose(ridge.variances(sums), x.var(axis=0))


def test_each_target_s_strength_is_chosen_on_episodes_that_were_not_fitted_to():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(60, 500, generator=generator), torch.randn(60, 1, generator=generator).double()
    x[:, 0] *= 20
    y = torch.cat([noise, x[:, :1].double() + 7], dim=1)
    episodes = [f"episode {row // 10}" for row in range(60)]
    fit = ridge.fit_rows(x, y, episodes)
    explained = 1 - (x @ fit.weight + fit.bias - y).var(dim=0) / y.var(dim=0)
    assert -0.1 < explained[0] < 0.5, "with more numbers than rows any target can be told of the rows fitted to"
    assert explained[1] > 0.9 > 0.1 > fit.r2[0] and fit.r2[1] > 0.9
    for column in (0, 1):
        alone = ridge.fit_rows(x, y[:, column : column + 1], episodes)
        torch.testing.assert_close(fit.weight[:, column], alone.weight[:, 0])
    with pytest.raises(ValueError, match="there is one only \\(episode 0\\)"):
        ridge.fit_rows(x[:10], y[:10], episodes[:10])
