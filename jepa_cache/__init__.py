"""Encode recordings once with a frozen V-JEPA 2 encoder; train the action-conditioned predictor many times from the cache.

Axes in every docstring: B batch, F sampled frames, M native control rows, h w pixels, T steps, H W patch grid,
N = H*W tokens per step, D token width, A action size, S state size, K rollout horizon.
"""
