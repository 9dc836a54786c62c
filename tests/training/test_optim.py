"""The optimiser's groups, and the schedules of learning rate and weight decay.

Claims:
- biases and 1-d tensors do not decay, frozen ones are in no group, rates are set group by group;
- warm-up meets the peak, the plateau is flat, and the last training step has exactly the final rate;
- schedules without warm-up or decay work, and hold their last value beyond the end;
- weight decay moves monotonically between its ends.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch

from jepa_cache.predictor.model import ACPredictor
from jepa_cache.training.optim import (
    build_optimizer,
    cosine_weight_decay,
    parameter_groups,
    set_rates,
    warmup_cosine,
    warmup_stable_decay,
)

RATES = {"start_lr": 0.1, "peak_lr": 1.0, "final_lr": 0.01}
WSD = partial(warmup_stable_decay, num_steps=100, num_warmup=20, num_anneal=30, **RATES)
COSINE = partial(warmup_cosine, num_steps=100, num_warmup=20, **RATES)


def test_stable_part_is_the_peak_and_ends_meet_it():
    assert [WSD(k) for k in range(20, 71)] == [1.0] * 51
    assert WSD(19) == pytest.approx(0.1 + 0.95 * 0.9, abs=1e-12)
    assert WSD(71) == pytest.approx(1.0 - 0.99 / 30, abs=1e-12)


@pytest.mark.parametrize("schedule", [WSD, COSINE])
def test_last_train_step_has_the_final_rate_and_later_ones_keep_it(schedule):
    assert schedule(100) == pytest.approx(0.01, abs=1e-15)
    assert schedule(150) == schedule(100)


@pytest.mark.parametrize("schedule", [WSD, COSINE])
def test_rate_rises_in_the_warmup_and_never_after(schedule):
    rates = [schedule(k) for k in range(1, 101)]
    assert rates[0] == pytest.approx(0.1 + 0.9 / 20, abs=1e-12)
    assert all(a < b for a, b in pairwise(rates[:20]))
    assert all(a >= b for a, b in pairwise(rates[19:]))
    assert max(rates) == rates[19] == 1.0


def test_cosine_is_half_way_in_the_middle():
    assert COSINE(60) == pytest.approx((1.0 + 0.01) / 2, abs=1e-12)


def test_schedules_without_warmup_or_decay_work():
    flat = partial(warmup_stable_decay, num_steps=10, num_warmup=0, num_anneal=0, **RATES)
    assert [flat(k) for k in (1, 5, 10, 11)] == [1.0] * 4
    assert warmup_cosine(10, num_steps=10, num_warmup=10, **RATES) == 1.0


@pytest.mark.parametrize(("start", "final"), [(0.04, 0.4), (0.4, 0.04), (0.04, 0.04)])
def test_weight_decay_moves_monotonically_between_its_ends(start: float, final: float):
    values = [
        cosine_weight_decay(k, num_steps=50, start_weight_decay=start, final_weight_decay=final) for k in range(1, 51)
    ]
    assert values[-1] == pytest.approx(final, abs=1e-15)
    assert values[24] == pytest.approx((start + final) / 2, abs=1e-12)
    assert sorted(values, reverse=start > final) == values


def build() -> ACPredictor:
    sizes = {"embed_dim": 10, "predictor_dim": 24, "depth": 2, "num_heads": 2, "action_dim": 5, "state_dim": 3}
    return ACPredictor(**sizes, grid=(2, 2))


def test_biases_and_norm_scales_do_not_decay_and_frozen_ones_are_in_no_group():
    predictor = build()
    decayed, plain = parameter_groups(predictor, 0.04)
    names = {id(parameter): name for name, parameter in predictor.named_parameters()}
    assert decayed["weight_decay"] == 0.04
    assert plain["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    assert all("bias" in names[id(p)] or p.ndim == 1 for p in plain["params"])
    grouped = {names[id(p)] for group in (decayed, plain) for p in group["params"]}
    assert grouped == {name for name in names.values() if not name.startswith("extrinsics_encoder")}


def test_rates_are_set_and_groups_without_decay_keep_none():
    optimizer = build_optimizer(build(), lr=1.0, weight_decay=0.5)
    set_rates(optimizer, 3e-4, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]


def test_a_wider_tensor_named_bias_does_not_decay():
    model = torch.nn.Module()
    model.position_bias = torch.nn.Parameter(torch.zeros(3, 3))
    (plain,) = parameter_groups(model, 0.04)
    assert plain["weight_decay"] == 0.0
