"""Stage two's input: which episodes, which windows, scaled how, and batches of them read from the cache."""
