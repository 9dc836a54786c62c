"""The offline score of plans.

Claims:
- distances between ends are metres, angles on SO(3), degrees on the circle and between directions;
- a predictor that knows the world ends near the recorded ends and gets "yes"; one that ignores its actions never does;
- what is compared with is right: not moving and the recorded actions are integrated again from the cache's own actions, and the other
  goal is a recorded step of another held-out episode, searched for with the same samples;
- fewer than six episodes never get a "yes";
- a run that fails leaves the last one as it was; equal runs leave equal metrics; a space without motion is refused.
"""

import csv
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from jepa_cache.actions import get_action_space
from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import PlanConfig
from jepa_cache.control.planner import SETTINGS
from jepa_cache.evaluation import planning
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.planning import (
    OTHER_GOAL,
    PLAN,
    RANDOM,
    ZERO,
    choose_settings,
    describe_plans,
    describe_timing,
    judge_plans,
    plan_run,
    score_plans,
    summarize_plans,
)
from jepa_cache.poses import rotation_angle
from jepa_cache.predictor.model import PredictorOutput
from jepa_cache.predictor.rollout import LatentModel, as_reps
from jepa_cache.training.trainer import train
from tests.caches import make_cache, make_config, make_tokens
from tests.encoded import all_files

PLANS = (
    "split.val_share=0.4",
    "plan.starts_per_episode=1",
    "plan.num_context_steps=2",
    "plan.num_samples=40",
    "plan.num_rounds=5",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    units = {hashlib.sha256(name.encode()).hexdigest(): [f"episode-{name}{n}" for n in range(6)] for name in "abc"}
    return make_cache(tmp_path_factory.mktemp("cache"), *PLANS, encoder_trained=True, units=units)


class World(nn.Module):
    """Knows the made world: tokens are waves of the yaw. Keeps no past worth the name."""

    def __init__(self, cache, *, blind: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.scaler, self.blind = cache.scaler, blind
        self.column = [column.name for column in cache.dataset.space.actions].index("dyaw")

    def forward(self, tokens, actions, states, extrinsics=None, past=None, num_kept_steps=None):
        def raw(scaler, values, column):
            return values[..., column].double() * scaler.scale[column] + scaler.mean[column]

        yaw = raw(self.scaler.states, states, 0)
        if not self.blind:
            yaw = yaw + raw(self.scaler.actions, actions, self.column)
        made = torch.from_numpy(np.stack([make_tokens(row.numpy()) for row in yaw]).astype(np.float32))
        return PredictorOutput(made, [(torch.zeros(len(tokens), 1, 1, 1),) * 2])


def quick_config(cache):
    """One plan per episode and horizon, few samples: where the search itself does not matter."""
    return replace(
        cache.config,
        plan=replace(cache.config.plan, starts_per_episode=1, num_samples=6, num_rounds=2, horizons=(1, 2)),
    )


def reps_of(cache, segment) -> torch.Tensor:
    """Layer-normed tokens [T, N, D] of a whole segment."""
    tokens = np.empty(
        (segment.stop - segment.start, cache.dataset.manifest.num_tokens, cache.dataset.manifest.width), np.float16
    )
    cache.dataset.read_tokens(segment.store, segment.start, tokens)
    return as_reps(torch.from_numpy(tokens), True)


def evaluation_of(cache, **options) -> EvaluationContext:
    return EvaluationContext(LatentModel(World(cache, **options).eval()), cache.config, cache.dataset, cache.scaler, 5)


# --- distances ------------------------------------------------------------------------------------------------------------


def test_rotation_angles_are_those_of_scipy_small_and_large_and_at_half_a_turn():
    rng = np.random.default_rng(0)
    one, other = rng.uniform(-3, 3, (2, 200, 3))
    other[:50] = one[:50] + 1e-7 * rng.standard_normal((50, 3))
    rotations = [Rotation.from_euler("xyz", angles) for angles in (one, other)]
    expected = (rotations[0] * rotations[1].inv()).magnitude()
    assert np.allclose(rotation_angle(one, other), expected, atol=1e-9)
    assert rotation_angle(np.zeros(3), np.array([np.pi, 0, 0])) == pytest.approx(np.pi)


def test_pose_ends_are_compared_in_metres_radians_and_gripper():
    true, reached = np.zeros(7), np.array([0.3, 0.0, 0.4, 0.0, 0.0, 0.2, 0.5])
    found = get_action_space("pose7").motion.distances(reached, true)
    assert {name: round(float(value), 9) for name, value in found.items()} == {
        "position_m": 0.5,
        "rotation_rad": 0.2,
        "gripper": 0.5,
    }


def test_view_ends_are_compared_on_the_circle_and_between_directions():
    found = get_action_space("vpt13").motion.distances(
        np.array([[179.0, 0.0], [0.0, 80.0]]), np.array([[-179.0, 0.0], [90.0, 80.0]])
    )
    assert found["yaw_deg"] == pytest.approx([2.0, 90.0])
    # At 80 degrees of pitch a quarter turn moves the view by little.
    assert found["camera_deg"] == pytest.approx(
        [2.0, 2 * np.degrees(np.arcsin(np.sin(np.pi / 4) * np.cos(np.radians(80))))]
    )


@pytest.fixture(scope="module")
def score(cache):
    """Of the predictor that knows the world."""
    return score_plans(evaluation_of(cache))


# --- the score ------------------------------------------------------------------------------------------------------------


def test_a_predictor_that_knows_the_world_ends_where_the_recorded_actions_did(cache, score):
    metrics = summarize_plans(score, cache.config)
    assert score.names[0] == "camera_deg" and metrics["num_episodes"] >= 6
    assert metrics["num_plans"] == metrics["num_episodes"] * 3
    for horizon in (1, 2, 3):
        plan, zero = (metrics["val"][f"yaw_deg_{kind}_h{horizon}"] for kind in (PLAN, ZERO))
        assert plan < 0.5 * zero, f"{horizon} steps: plans end {plan:.1f} degrees away, not moving {zero:.1f}"
    verdict = judge_plans(metrics, score)
    assert {kind: judged["answer"] for kind, judged in verdict.items()} == dict.fromkeys(
        (ZERO, RANDOM, OTHER_GOAL), "yes"
    )
    assert "nearer than the same search for another episode's goal" in describe_plans(
        metrics | {"verdict": verdict, "timing": describe_timing(score), "encoder_trained": True, "comparable": True}
    )


@pytest.mark.parametrize(
    ("interval", "p", "answer"),
    [
        ((0.1, 0.3), 0.01, "yes"),
        ((0.1, 0.3), 0.06, "unclear"),
        ((-0.1, 0.3), 0.01, "unclear"),
        ((0.0, 0.0), 1.0, "unclear"),
        ((-0.3, -0.1), 0.01, "no"),
    ],
)
def test_a_gap_is_judged_by_its_side_of_0_and_by_the_paired_test(score, interval, p, answer):
    keys = [f"camera_deg_gap_{kind}_h{horizon}" for kind in (ZERO, RANDOM, OTHER_GOAL) for horizon in (1, 2, 3)]
    ends = [f"camera_deg_{kind}_h{h}" for kind in (PLAN, ZERO, RANDOM, OTHER_GOAL) for h in (1, 2, 3)]
    metrics = {
        "val": dict.fromkeys((*keys, *ends), 0.2),
        "val_ci": dict.fromkeys(keys, interval),
        "p_value": dict.fromkeys(keys, p),
    }
    assert {judged["answer"] for judged in judge_plans(metrics, score).values()} == {answer}


def test_fewer_than_six_episodes_never_get_a_yes(cache, score):
    first = sorted({record.episode for record in score.records})[:5]
    few = replace(score, records=[record for record in score.records if record.episode in first])
    metrics = summarize_plans(few, cache.config)
    low = min(metrics["val_ci"][f"camera_deg_gap_{RANDOM}_h{horizon}"][0] for horizon in (1, 2, 3))
    assert low > 0, "the intervals alone would say yes"
    assert "yes" not in {judged["answer"] for judged in judge_plans(metrics, few).values()}


def test_a_predictor_that_ignores_its_actions_is_not_called_a_planner(cache):
    score = score_plans(replace(evaluation_of(cache, blind=True), config=quick_config(cache)))
    metrics = summarize_plans(score, cache.config)
    verdict = judge_plans(metrics, score)
    assert verdict[ZERO]["answer"] != "yes"
    assert verdict[OTHER_GOAL]["answer"] == "unclear"
    assert metrics["val"][f"camera_deg_gap_{OTHER_GOAL}_h1"] == 0, "one step: no goal can move what actions do not"
    assert all(np.ptp(record.energies) == 0 for record in score.records if record.horizon == 1)


def test_what_plans_are_compared_with_follows_from_the_recorded_actions(cache, score):
    names = [column.name for column in cache.dataset.space.actions]
    held_out = cache.dataset.segments_of("val", cache.config.split)
    camera = [names.index(name) for name in score.searched]
    for record in score.records:
        segment = next(s for s in held_out if s.episode == record.episode)
        actions, _ = cache.dataset.controls(segment.store)
        first = segment.start + record.first_step
        assert record.first_step >= cache.config.plan.num_context_steps - 1
        moves = actions[first : first + record.horizon][:, camera].astype(np.float64)
        assert np.allclose(record.recorded, moves.sum(axis=0), atol=1e-4)
        # Yaw alone: the made pitch stays far from its limits, so sums are ends.
        turned = (moves[:, 0].sum() + 180) % 360 - 180
        assert record.distances[ZERO]["yaw_deg"] == pytest.approx(abs(turned), abs=1e-3)
        assert record.moved["yaw_deg"] == pytest.approx(abs(turned), abs=1e-3)
        planned = record.planned[0]
        off = abs((planned - moves[:, 0].sum() + 180) % 360 - 180)
        assert record.distances[PLAN]["yaw_deg"] == pytest.approx(off, abs=1e-3)


def test_the_search_is_repeatable_and_another_seed_is_another_search(cache):
    quick = quick_config(cache)
    scores = [
        score_plans(replace(evaluation_of(cache), config=replace(quick, plan=replace(quick.plan, seed=seed))))
        for seed in (0, 0, 1)
    ]
    planned = [[record.planned.tolist() for record in score.records] for score in scores]
    assert planned[0] == planned[1] != planned[2]


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", str(folder / "runs"))
        return train(cache.config, cache.dataset, cache.scaler, folder / "train/run", base=folder).weights


def test_a_run_that_fails_while_it_draws_leaves_the_last_one_as_it_was(cache, trained, tmp_path, monkeypatch):
    plan_run(quick_config(cache), cache.dataset, trained, tmp_path)
    before = all_files(tmp_path)
    monkeypatch.setattr(planning, "draw_plans", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan_run(quick_config(cache), cache.dataset, trained, tmp_path)
    assert len(before) == 4 and all_files(tmp_path) == before


def test_a_run_leaves_metrics_times_a_table_and_a_picture(cache, trained, tmp_path):
    metrics, _ = (plan_run(quick_config(cache), cache.dataset, trained, tmp_path / run) for run in "ab")
    files = [(tmp_path / run / "metrics.json").read_bytes() for run in "ab"]
    assert files[0] == files[1]
    written = json.loads(files[0])
    assert written["val"] == metrics["val"] and "timing" not in written
    rows = list(csv.DictReader((tmp_path / "a/plans.csv").open()))
    assert len(rows) == metrics["num_plans"]
    distances = [float(row["camera_deg_plan"]) for row in rows if row["horizon"] == "2"]
    assert metrics["val"]["camera_deg_plan_h2"] == pytest.approx(np.mean(distances)), "one plan an episode"
    assert (tmp_path / "a/plans.png").read_bytes()[:4] == b"\x89PNG"
    words = describe_plans(metrics)
    assert "camera_deg, plans end nearer than not moving" in words and "random weights" not in words
    assert "random weights" in describe_plans(metrics | {"encoder_trained": False})
    assert metrics["timing"]["samples_per_s"] > 0


def test_a_space_without_motion_is_refused(cache):
    blind = evaluation_of(cache)
    blind.dataset.space, space = replace(blind.dataset.space, motion=None), blind.dataset.space
    try:
        with pytest.raises(ValueError, match="does not say where an action leads"):
            score_plans(blind)
    finally:
        blind.dataset.space = space


# --- settings -------------------------------------------------------------------------------------------------------------


def test_own_numbers_of_samples_keep_the_share_of_elites(cache):
    plan: PlanConfig = replace(cache.config.plan, settings="world_model", num_samples=None, num_rounds=None)
    assert choose_settings(plan) == SETTINGS["world_model"]
    own = choose_settings(replace(plan, num_samples=80, num_rounds=3))
    assert (own.num_samples, own.num_elites, own.num_rounds) == (80, 2, 3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("plan.settings=notebok", "did you mean 'notebook'"),
        ("plan.num_samples=1", r"plan\.num_samples must be at least 2"),
        ("plan.horizons=[]", r"plan\.horizons must have at least 1 item"),
        ("plan.horizons=[1,1]", r"plan\.horizons names 1 more than once"),
        ("plan.max_rotation_rad=-1.0", "must be at least 0"),
        ("plan.max_step_m=0.0", r"plan\.max_step_m must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, words):
    with pytest.raises(ConfigError, match=words):
        make_config(override)


def test_a_plan_is_given_the_recorded_steps_before_it_and_keeps_the_keys_of_the_last_action(cache, monkeypatch):
    given, real = [], planning.plan_actions

    def spy(predictor, context, goal, motion, settings, **options):
        given.append((context, goal, settings.horizon, options["base_action"], options["noise"]))
        return real(predictor, context, goal, motion, settings, **options)

    monkeypatch.setattr(planning, "plan_actions", spy)
    records = score_plans(replace(evaluation_of(cache), config=quick_config(cache))).records
    held_out = {segment.episode: segment for segment in cache.dataset.segments_of("val", cache.config.split)}
    wanted, others = given[::2], given[1::2]
    for (context, _, horizon, base, noise), again in zip(wanted, others, strict=True):
        assert again[0] is context and again[2] == horizon
        assert np.array_equal(again[3], base) and np.array_equal(again[4], noise), "the same search but for its goal"
    recorded = {name: reps_of(cache, segment) for name, segment in held_out.items()}
    for (_, goal, *_), record in zip(others, records, strict=True):
        among = {name for name, h in recorded.items() if bool((h == goal).flatten(1).all(dim=1).any())}
        assert among and record.episode not in among, "a recorded step of another held-out episode"
    for (context, goal, horizon, base, _), record in zip(wanted, records, strict=True):
        segment = held_out[record.episode]
        actions, states = cache.dataset.controls(segment.store)
        now = segment.start + record.first_step
        assert np.array_equal(context.states, states[now - 1 : now + 1]) and np.array_equal(base, actions[now - 1])
        assert np.array_equal(context.actions, actions[now - 1 : now])
        wave = torch.from_numpy(
            make_tokens(states[now - 1 : now + horizon + 1, 0].astype(np.float64)).astype(np.float32)
        )
        h = torch.nn.functional.layer_norm(wave, wave.shape[-1:], eps=1e-5)
        # The cache holds float16 of the yaw before it was stored as float32.
        assert torch.allclose(context.tokens, h[:2], atol=5e-3) and torch.allclose(goal, h[1 + horizon], atol=5e-3)
