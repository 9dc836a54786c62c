"""Heads of costs, fitted by real trainings on a tiny cache.

Claims:
- angles are told as sine and cosine, and what never changes is not told;
- pairs of steps are of one segment, as far apart as said, and never mix training episodes put aside with the others;
- the training that is asked for heads fits them once, with the same weights as without, and finds them again; a damaged one is fitted
  again, one that is not asked for goes, and one of another predictor is refused;
- each cost of a predictor is 0 at its goal, counts the last step or all, and one that is not there is refused with the way to it;
- an export takes them along.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.actions import Column
from jepa_cache.cli.export import ExportFormat, export_predictor
from jepa_cache.control.costs import COSTS, choose_cost, load_costs
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.predictor.checkpoints import CheckpointError, load_predictor, read_card, save_state
from jepa_cache.predictor.heads import head_path, load_head
from jepa_cache.training import heads
from tests.training.runs import bits, run

pytestmark = pytest.mark.usefixtures("runs")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heads, "TIME_UPDATES", 20)
    monkeypatch.setattr(heads, "TIME_CHECK_EVERY", 10)


def test_angles_are_told_as_sine_and_cosine_and_what_never_changes_is_not():
    columns = [Column("yaw", "deg in (-180, 180]", "continuous"), Column("x", "m", "continuous")]
    columns += [Column("rx", "rad", "continuous"), Column("gripper", "0 open, 1 closed", "continuous")]
    states = np.array([[180.0, 1.0, 0.5, 1.0], [-180.0, 2.0, 0.5, 1.0], [0.0, 3.0, 0.5, 1.0]])
    names, targets = heads.list_targets(states, columns)
    assert names == ["cos yaw", "x"]  # the sine of these yaws is 0
    np.testing.assert_allclose(targets, [[-1, 1], [-1, 2], [1, 3]], atol=1e-12)


def test_pairs_are_of_one_segment_and_as_far_apart_as_said():
    rng = np.random.default_rng(0)
    segment = np.repeat([0, 1, 2, 5], [4, 9, 1, 6])
    start = np.concatenate(
        [100 * number + np.sort(rng.choice(40, size, False)) for number, size in ((0, 4), (1, 9), (2, 1), (5, 6))]
    )
    for some in ((0, 5), (1, 2)):
        rows = np.flatnonzero(np.isin(segment, some))
        one, other, apart = heads._pairs(segment, start, rows, [3])(400)
        assert (segment[one] == segment[other]).all() and (apart == np.abs(start[one] - start[other])).all()
        assert set(one) | set(other) == set(rows)


def test_heads_are_fitted_once_and_found_again_and_move_no_weight(cache, tmp_path, monkeypatch):
    plain = run(cache, tmp_path)
    weights, of_run = bits(plain.weights), plain.run
    asked = ("train.costs=[readout,time]",)
    result = run(cache, tmp_path, *asked)
    assert (result.run, result.num_trained, bits(result.weights)) == (of_run, 0, weights)
    fitted = {name: bits(head_path(result.weights, name)) for name in ("readout", "time")}
    assert json.loads(json.dumps(read_card(head_path(result.weights, "readout"))["r2"]))
    with monkeypatch.context() as patch:
        patch.setattr(CachedDataset, "read_tokens", lambda *_: pytest.fail("a head that is there is not fitted again"))
        run(cache, tmp_path, *asked)
    (of_run / "readout.safetensors").write_bytes((of_run / "readout.safetensors").read_bytes()[:-1])
    run(cache, tmp_path, *asked)
    assert {name: bits(head_path(result.weights, name)) for name in fitted} == fitted
    run(cache, tmp_path, "train.costs=[time]")
    assert not head_path(result.weights, "readout").exists() and head_path(result.weights, "time").exists()
    other = run(cache, tmp_path, "train.costs=[time]", "train.seed=1")
    assert other.run != of_run and bits(head_path(other.weights, "time")) != fitted["time"]


def test_every_cost_is_0_at_its_goal_and_one_that_is_not_there_names_the_way(cache, tmp_path):
    result = run(cache, tmp_path, "predictor=compressed", "train.loss_exp=2.0", "train.costs=[readout,time]")
    predictor, card = load_predictor(result.weights)
    costs = load_costs(result.weights, card, predictor, torch.device("cpu"))
    assert set(costs) == set(COSTS)
    h = torch.nn.functional.layer_norm(torch.randn(5, 3, 4, 8, generator=torch.Generator().manual_seed(0)), (8,))
    for name in COSTS:
        last, every = (choose_cost(costs, name, steps) for steps in ("last", "sum"))
        of_steps = torch.stack([last(h[:, step : step + 1], h[0, 0]) for step in range(3)], dim=1)
        assert of_steps[0, 0] == pytest.approx(0, abs=2e-4) and (of_steps[1:] > 1e-4).all()
        torch.testing.assert_close(last(h, h[0, 0]), of_steps[:, -1])
        torch.testing.assert_close(every(h, h[0, 0]), of_steps.sum(dim=1))
    out = tmp_path / "out/world.safetensors"
    export_predictor(str(result.weights), out, form=ExportFormat.SAFETENSORS)
    assert set(load_costs(out, card, predictor, torch.device("cpu"))) == set(COSTS)
    official = run(cache, tmp_path)
    predictor, card = load_predictor(official.weights)
    few = load_costs(official.weights, card, predictor, torch.device("cpu"))
    for name, said in (
        (
            "readout",
            r"no cost 'readout'; .*train_predictor.py train.costs=\[readout\].* in seconds .*here there are tokens, tokens_l2",
        ),
        ("latents", "no cost 'latents'; .*predictor=compressed"),
        ("metres", "unknown cost 'metres'; known: tokens, tokens_l2, latents, readout, time"),
    ):
        with pytest.raises(ValueError, match=said):
            choose_cost(few, name)
    with pytest.raises(ValueError, match="are last or sum; got 'first'"):
        choose_cost(few, "tokens", "first")
    assert choose_cost(few, replace(few["tokens"], steps="sum")).steps == "sum"
    with pytest.raises(
        CheckpointError, match=r"beside another predictor \(its run, tokens_fingerprint, normalize_reps"
    ):
        load_head(head_path(out, "time"), "time", {})
    with pytest.raises(CheckpointError, match="holds the cost 'time' of a predictor; name the predictor's own"):
        load_predictor(head_path(out, "time"))
    head = load_head(head_path(out, "time"), "time")
    save_state(head.state_dict(), head_path(out, "readout"), read_card(head_path(out, "time")))
    with pytest.raises(CheckpointError, match="holds no cost 'readout'"):
        load_head(head_path(out, "readout"), "readout")
