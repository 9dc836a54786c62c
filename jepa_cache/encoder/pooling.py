"""Fewer tokens of a step: the mean of neighbouring patches."""

import torch
from torch import Tensor


def pool_tokens(tokens: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """Average each square of pool x pool patches, in float32.

    Args:
        tokens: [..., H*W, D], rows after rows, any float dtype.
        grid: H, W.
        pool: side of the squares, in patches; 1 returns the tokens as they are.

    Returns:
        [..., H/pool * W/pool, D] float32, rows after rows.

    Raises:
        ValueError: the grid does not split into such squares.
    """
    if pool == 1:
        return tokens
    rows, columns = grid
    if rows % pool or columns % pool:
        raise ValueError(
            f"encode.pool {pool} needs a grid that splits into squares of {pool} x {pool} patches; this encoder's is {rows} x "
            f"{columns}. Choose a divisor of both"
        )
    squares = tokens.to(torch.float32).unflatten(-2, (rows // pool, pool, columns // pool, pool))
    return squares.mean(dim=(-4, -2)).flatten(-3, -2)
