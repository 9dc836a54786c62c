"""Colours of tokens: the first three principal components as red, green and blue, in one basis for everything that is shown."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_FITTED = 8192  # tokens; three components of more are the same to the eye
PERCENTILES = (1, 99)  # of the fitted tokens, which span each colour's range


class TokenColours(NamedTuple):
    """A basis and a range.

    Attributes:
        mean: [D].
        components: [3, D].
        low: [3] component values shown as 0.
        span: [3] above `low`, shown as 1.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    span: np.ndarray

    def paint(self, tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Colours [T, H, W, 3] in [0, 1] of tokens [T, N, D]; what lies outside the range is clipped, not rescaled.

        Args:
            tokens: True or predicted.
            grid: (H, W) rows and columns.
        """
        components = (tokens.reshape(-1, tokens.shape[-1]) - self.mean) @ self.components.T
        return np.clip((components - self.low) / self.span, 0, 1).reshape(-1, *grid, 3)


def fit_colours(tokens: np.ndarray) -> TokenColours:
    """Fit the basis on true tokens [T, N, D], best of several episodes.

    Predictions are painted in the basis of true tokens: where they differ, the colour differs for that reason alone.
    """
    from sklearn.decomposition import PCA

    rows = tokens.reshape(-1, tokens.shape[-1])
    rows = rows[:: -(-len(rows) // MAX_FITTED)]
    fitted = PCA(3, svd_solver="full" if len(rows) < 500 else "covariance_eigh").fit(rows)
    low, high = np.percentile(fitted.transform(rows), PERCENTILES, axis=0)
    return TokenColours(fitted.mean_, fitted.components_, low, np.maximum(high - low, 1e-9))
