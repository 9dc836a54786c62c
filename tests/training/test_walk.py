"""Claims: one training step, without logging or saving, enters at most 10 files of the project (traced with sys.settrace), and they stay few.

The walk is that of the loop's thread: rates, batch, forward pass, loss, backward pass, update. The reader's threads have read the batch before.
"""

import sys
from pathlib import Path

import pytest

import jepa_cache
from jepa_cache.training import trainer
from tests.caches import make_config

PACKAGE = Path(jepa_cache.__file__).parent


@pytest.mark.usefixtures("runs")
def test_a_training_step_enters_at_most_ten_files(cache, tmp_path, monkeypatch):
    entered, set_rates, steps = set(), trainer.set_rates, []

    def trace(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            entered.add(str(path.relative_to(PACKAGE)))

    def watched(*rates):
        steps.append(rates)
        sys.settrace(trace if len(steps) == 3 else None)  # from here to the rates of the step after it
        set_rates(*rates)

    monkeypatch.setattr(trainer, "set_rates", watched)
    before = sys.gettrace()
    config = make_config("train.log_every=100", "train.validate_every=0", "train.checkpoint_every=100")
    try:
        trainer.train(config, cache.dataset, cache.scaler, tmp_path / "run", base=tmp_path)
    finally:
        sys.settrace(before)
    walk = sorted({*entered, "training/trainer.py"})
    assert {"training/step.py", "training/losses.py", "predictor/model.py"} <= set(walk)
    assert len(walk) <= 10, walk
