"""The optimiser's groups, and the schedules; the official schedules' values are golden vectors (tests/test_golden.py).

Claims:
- biases and 1-d tensors do not decay, frozen ones are in no group, rates are set group by group;
- warm-up meets the peak, the plateau is flat, the last training step has exactly the final rate, and later ones keep it;
- schedules without warm-up or decay work.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch

from jepa_cache.training.optim import (
    build_optimizer,
    parameter_groups,
    set_rates,
    warmup_cosine,
    warmup_stable_decay,
)
from tests.predictor.makers import build

RATES = {"start_lr": 0.1, "peak_lr": 1.0, "final_lr": 0.01}
WSD = partial(warmup_stable_decay, num_steps=100, num_warmup=20, num_anneal=30, **RATES)
COSINE = partial(warmup_cosine, num_steps=100, num_warmup=20, **RATES)


@pytest.mark.parametrize("schedule", [WSD, COSINE])
def test_a_rate_rises_in_the_warmup_and_never_after_and_ends_at_the_final_one(schedule):
    rates = [schedule(k) for k in range(1, 101)]
    assert rates[0] == pytest.approx(0.1 + 0.9 / 20, abs=1e-12)
    assert all(a < b for a, b in pairwise(rates[:20])) and all(a >= b for a, b in pairwise(rates[19:]))
    assert max(rates) == rates[19] == 1.0
    assert schedule(100) == schedule(150) == pytest.approx(0.01, abs=1e-15)


def test_the_stable_part_is_the_peak_and_schedules_without_warmup_or_decay_work():
    assert [WSD(k) for k in range(20, 71)] == [1.0] * 51
    assert WSD(71) == pytest.approx(1.0 - 0.99 / 30, abs=1e-12)
    assert COSINE(60) == pytest.approx((1.0 + 0.01) / 2, abs=1e-12)
    flat = partial(warmup_stable_decay, num_steps=10, num_warmup=0, num_anneal=0, **RATES)
    assert [flat(k) for k in (1, 5, 10, 11)] == [1.0] * 4
    assert warmup_cosine(10, num_steps=10, num_warmup=10, **RATES) == 1.0


def test_biases_and_norm_scales_do_not_decay_and_frozen_parameters_are_in_no_group():
    predictor = build()
    decayed, plain = parameter_groups(predictor, 0.04)
    names = {id(parameter): name for name, parameter in predictor.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.04, 0.0)
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    assert all("bias" in names[id(p)] or p.ndim == 1 for p in plain["params"])
    grouped = {names[id(p)] for group in (decayed, plain) for p in group["params"]}
    assert grouped == {name for name in names.values() if not name.startswith("extrinsics_encoder")}
    model = torch.nn.Module()
    model.position_bias = torch.nn.Parameter(torch.zeros(3, 3))
    (plain,) = parameter_groups(model, 0.04)
    assert plain["weight_decay"] == 0.0


def test_rates_are_set_and_groups_without_decay_keep_none():
    optimizer = build_optimizer(build(), lr=1.0, weight_decay=0.5)
    set_rates(optimizer, 3e-4, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
