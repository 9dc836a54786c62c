"""The offline score of plans.

Claims:
- distances between ends are metres, angles on SO(3), degrees on the circle and between directions;
- a predictor that knows the world ends near the recorded ends and gets "yes"; one that ignores its actions never does;
- what is compared with is right: not moving and the recorded actions are integrated again from the cache's own actions, and the other
  goal is a recorded step of another held-out episode, searched for with the same samples;
- fewer than six episodes never get a "yes";
- a run that fails leaves the last one as it was; equal runs leave equal metrics.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from jepa_cache.actions import get_action_space
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation import planning
from jepa_cache.evaluation.context import EvaluationContext
from jepa_cache.evaluation.planning import (
    OTHER_GOAL,
    PLAN,
    RANDOM,
    ZERO,
    describe_plans,
    judge_plans,
    plan_run,
    score_plans,
    score_translations,
    summarize_plans,
)
from jepa_cache.poses import rotation_angle
from tests.caches import Cache
from tests.encoded import all_files
from tests.evaluation.evaluations import Oracle, evaluation_of, read_rows


@pytest.fixture(scope="module")
def cache(trained) -> Cache:
    return trained.cache


def quick_config(cache, **changes):
    """Few samples: where the search itself does not matter."""
    few = {"num_samples": 6, "num_rounds": 2, "horizons": (1, 2)}
    return replace(cache.config, plan=replace(cache.config.plan, **few | changes))


def knowing(cache, config=None, *, blind: bool = False) -> EvaluationContext:
    return replace(evaluation_of(cache, Oracle(cache.scaler, blind=blind)), config=config or cache.config)


def rows_of(score) -> list[dict]:
    return [dict(zip(score.table, row, strict=True)) for row in zip(*score.table.values(), strict=True)]


@pytest.fixture(scope="module")
def score(cache):
    """Of the predictor that knows the world."""
    return score_plans(knowing(cache))


def test_ends_are_compared_in_metres_and_radians_or_on_the_circle_and_between_directions():
    one, other = np.random.default_rng(0).uniform(-3, 3, (2, 200, 3))
    other[:50] = one[:50] + 1e-7
    rotations = [Rotation.from_euler("xyz", angles) for angles in (one, other)]
    assert np.allclose(rotation_angle(one, other), (rotations[0] * rotations[1].inv()).magnitude(), atol=1e-9)
    found = get_action_space("pose7").motion.distances(np.array([0.3, 0.0, 0.4, 0.0, 0.0, 0.2, 0.5]), np.zeros(7))
    assert found == pytest.approx({"position_m": 0.5, "rotation_rad": 0.2, "gripper": 0.5})
    found = get_action_space("vpt13").motion.distances(
        np.array([[179.0, 0.0], [0.0, 80.0]]), np.array([[-179.0, 0.0], [90.0, 80.0]])
    )
    assert found["yaw_deg"] == pytest.approx([2.0, 90.0])
    # At 80 degrees of pitch a quarter turn moves the view by little.
    quarter = 2 * np.degrees(np.arcsin(np.sin(np.pi / 4) * np.cos(np.radians(80))))
    assert found["camera_deg"] == pytest.approx([2.0, quarter])


def test_a_predictor_that_knows_the_world_ends_where_the_recorded_actions_did(cache, score):
    metrics = summarize_plans(score, cache.config)
    assert score.distances[0] == "camera_deg" and metrics["num_episodes"] >= 6
    assert metrics["num_plans"] == metrics["num_episodes"] * 3
    for horizon in (1, 2, 3):
        plan, zero = (metrics["val"][f"yaw_deg_{kind}_h{horizon}"] for kind in (PLAN, ZERO))
        assert plan < 0.5 * zero, f"{horizon} steps: plans end {plan:.1f} degrees away, not moving {zero:.1f}"
    answers = {kind: judged["answer"] for kind, judged in judge_plans(metrics, score).items()}
    assert answers == dict.fromkeys((ZERO, RANDOM, OTHER_GOAL), "yes")


def test_a_gap_is_judged_by_its_side_of_0_and_by_the_paired_test_and_five_episodes_never_get_a_yes(cache, score):
    metrics = summarize_plans(score, cache.config)
    for interval, p, answer in (
        ((0.1, 0.3), 0.01, "yes"),
        ((0.1, 0.3), 0.06, "unclear"),
        ((-0.1, 0.3), 0.01, "unclear"),
        ((0.0, 0.0), 1.0, "unclear"),
        ((-0.3, -0.1), 0.01, "no"),
    ):
        given = {"val_ci": dict.fromkeys(metrics["val_ci"], interval), "p_value": dict.fromkeys(metrics["p_value"], p)}
        found = {judged["answer"] for judged in judge_plans(metrics | given, score).values()}
        assert found == {answer}, (interval, p)
    first = np.isin(score.table["episode"], sorted(set(score.table["episode"]))[:5])
    few = score._replace(table={name: values[first] for name, values in score.table.items()})
    metrics = summarize_plans(few, cache.config)
    assert metrics["val_ci"][f"camera_deg_gap_{RANDOM}_h1"][0] > 0, "the intervals alone would say yes"
    assert "yes" not in {judged["answer"] for judged in judge_plans(metrics, few).values()}


def test_a_predictor_that_ignores_its_actions_is_not_called_a_planner(cache):
    score = score_plans(knowing(cache, quick_config(cache), blind=True))
    metrics = summarize_plans(score, cache.config)
    verdict = judge_plans(metrics, score)
    assert verdict[ZERO]["answer"] != "yes"
    assert verdict[OTHER_GOAL]["answer"] == "unclear"
    assert metrics["val"][f"camera_deg_gap_{OTHER_GOAL}_h1"] == 0, "one step: no goal can move what actions do not"
    assert (np.ptp(score.energies, axis=1)[score.table["horizon"] == 1] == 0).all()


def test_what_plans_are_compared_with_follows_from_the_recorded_actions(cache, score):
    held_out = {segment.episode: segment for segment in cache.dataset.segments_of("val", cache.config.split)}
    yaw = [column.name for column in cache.dataset.space.actions].index("dyaw")
    wrapped = lambda turn: abs((turn + 180) % 360 - 180)  # noqa: E731
    for row in rows_of(score):
        segment = held_out[row["episode"]]
        assert row["first_step"] >= cache.config.plan.num_context_steps - 1
        first = segment.start + row["first_step"]
        turned = cache.dataset.controls(segment.store)[0][first : first + row["horizon"], yaw].sum(dtype=np.float64)
        assert row["recorded_dyaw"] == pytest.approx(turned, abs=1e-4)
        # Yaw alone: the made pitch stays far from its limits, so sums are ends.
        assert row["yaw_deg_zero"] == pytest.approx(wrapped(turned), abs=1e-3) == row["yaw_deg_moved"]
        assert row["yaw_deg_plan"] == pytest.approx(wrapped(row["planned_dyaw"] - turned), abs=1e-3)


def test_equal_runs_leave_equal_metrics_a_table_and_a_picture_and_one_that_fails_changes_nothing(
    cache, trained, tmp_path, monkeypatch
):
    metrics = plan_run(quick_config(cache), cache.dataset, trained.weights, tmp_path)
    written, rows = json.loads((tmp_path / "metrics.json").read_text()), read_rows(tmp_path / "plans.csv")
    assert written["val"] == metrics["val"] and len(rows) == metrics["num_plans"]
    distances = [float(row["camera_deg_plan"]) for row in rows if row["horizon"] == "2"]
    assert metrics["val"]["camera_deg_plan_h2"] == pytest.approx(np.mean(distances)), "one plan an episode"
    assert (tmp_path / "plans.png").read_bytes()[:4] == b"\x89PNG" and metrics["timing"]["samples_per_s"] > 0
    words = describe_plans(metrics)
    assert "camera_deg, plans end nearer than not moving" in words and "random weights" not in words
    assert "nearer than the same search for another episode's goal" in words
    assert "random weights" in describe_plans(metrics | {"encoder_trained": False})
    before, again = all_files(tmp_path), []
    monkeypatch.setattr(planning, "draw_plans", lambda _, metrics, *rest, note: again.append(dict(metrics)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan_run(quick_config(cache), cache.dataset, trained.weights, tmp_path)
    assert again == [written] and len(before) == 4 and all_files(tmp_path) == before


def test_the_action_score_is_80_for_recorded_translations_and_falls_by_8_a_centimetre_of_mean_error():
    plans = {
        f"{what}_{axis}": np.zeros(2) for what in ("planned", "recorded") for axis in ("dx", "dy", "dz", "dgripper")
    }
    plans["planned_dy"] = np.array([0.0, -0.06])
    plans["recorded_dgripper"] += 1
    score = score_translations(plans)
    assert np.allclose(score["action_l1_m"], [0, 0.02]) and np.allclose(score["action_score"], [80, 64])
    assert score_translations({"planned_dyaw": np.zeros(2)}) == {}


def test_a_plan_is_given_the_recorded_steps_before_it_and_keeps_the_keys_of_the_last_action(cache, monkeypatch):
    given, real = [], planning.plan_actions

    def spy(model, context, goal, *rest, **options):
        given.append((context, goal, options))
        return real(model, context, goal, *rest, **options)

    monkeypatch.setattr(planning, "plan_actions", spy)
    evaluation = knowing(cache, quick_config(cache))
    rows = rows_of(score_plans(evaluation))
    episodes = {segment.episode: segment for segment in evaluation.held_out_segments()}
    tokens = {
        name: evaluation.read_windows(WindowIndex([it], it.stop - it.start), [0])[1][0] for name, it in episodes.items()
    }
    for (context, goal, own), (same, other, again), row in zip(given[::2], given[1::2], rows, strict=True):
        assert same is context
        assert all(np.array_equal(own[name], again[name]) for name in ("base_action", "noise")), (
            "the same but for its goal"
        )
        segment, now = episodes[row["episode"]], row["first_step"]
        actions, states = (values[segment.start : segment.stop] for values in cache.dataset.controls(segment.store))
        assert np.array_equal(context.states, states[now - 1 : now + 1])
        assert np.array_equal(context.actions, actions[now - 1 : now])
        assert np.array_equal(own["base_action"], actions[now - 1])
        h = tokens[row["episode"]]
        assert torch.equal(context.tokens, h[now - 1 : now + 1]) and torch.equal(goal, h[now + row["horizon"]])
        sources = {name for name, steps in tokens.items() if (steps == other).all(dim=2).all(dim=1).any()}
        assert sources and row["episode"] not in sources, "a recorded step of another held-out episode"
