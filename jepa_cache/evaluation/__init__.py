"""How well a predictor foresees held-out episodes, against baselines and action ablations, from the cache alone."""
