"""Claims of pooling: each square's mean, in float32 and before any cast, rows after rows; what does not split is refused."""

import numpy as np
import pytest
import torch

from jepa_cache.encoder.checkpoints import build_encoder
from jepa_cache.encoder.frozen import FrozenEncoder
from jepa_cache.encoder.pooling import pool_tokens


def plain_mean(tokens, grid, pool):
    """The definition, token by token."""
    rows, columns = grid
    by_patch = tokens.double().unflatten(-2, grid)
    means = [
        by_patch[..., row : row + pool, column : column + pool, :].mean(dim=(-3, -2))
        for row in range(0, rows, pool)
        for column in range(0, columns, pool)
    ]
    return torch.stack(means, dim=-2).float()


@pytest.mark.parametrize(("grid", "pool"), [((4, 4), 2), ((4, 6), 2), ((6, 3), 3), ((24, 24), 2)])
def test_each_token_is_the_mean_of_its_square(grid, pool):
    tokens = torch.randn(2, 3, grid[0] * grid[1], 5)
    got = pool_tokens(tokens, grid, pool)
    assert got.shape == (2, 3, grid[0] * grid[1] // pool**2, 5)
    torch.testing.assert_close(got, plain_mean(tokens, grid, pool), atol=1e-6, rtol=0)


def test_half_precision_is_averaged_in_float32():
    # In float16 the sum of four would be infinite.
    tokens = torch.full((1, 4, 2), 60000.0, dtype=torch.float16)
    got = pool_tokens(tokens, (2, 2), 2)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.full((1, 1, 2), 60000.0))


def test_one_leaves_every_token_and_dtype_as_it_is():
    tokens = torch.randn(1, 6, 2).half()
    assert pool_tokens(tokens, (2, 3), 1) is tokens


@pytest.mark.parametrize("grid", [(3, 4), (4, 3)])
def test_a_grid_that_does_not_split_is_refused(grid):
    with pytest.raises(ValueError, match=rf"encode\.pool 2 .* {grid[0]} x {grid[1]}"):
        pool_tokens(torch.zeros(1, 12, 2), grid, 2)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_encoder_gives_the_means_of_what_it_gives_unpooled(preset, wide_state, compute_dtype):
    options = {"device": "cpu", "compute_dtype": compute_dtype}
    whole, pooled = (FrozenEncoder(preset, build_encoder(preset, wide_state), pool=pool, **options) for pool in (1, 2))
    clips = whole.preprocess(np.random.default_rng(2).integers(0, 256, (8, 40, 40, 3), dtype=np.uint8)).view(
        2, 4, 3, 32, 32
    )
    got = pooled.encode(clips)
    assert got.shape == (2, 2, pooled.num_tokens, 48) and pooled.num_tokens == 1 and whole.num_tokens == 4
    torch.testing.assert_close(got, plain_mean(whole.encode(clips), (2, 2), 2), atol=1e-6, rtol=0)
