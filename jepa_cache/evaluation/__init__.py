"""How well a predictor foresees held-out episodes, against baselines and controls, from the cache alone."""
