"""The action-conditioned predictor: its network, open-loop prediction, and its weight files. Knows no store and no data set."""
