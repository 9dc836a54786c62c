"""Plans of one displacement, and plans in spaces of any robot's vectors, by true trainings on a tiny cache.

Claims:
- a predictor trained on mixed step lengths plans one displacement to goals several steps ahead, scored in metres; a gripper that stood
  still in training is not searched, and a predictor of single steps is warned of;
- in `vector_sum` and `vector_last`, with one action column and with two, with states and without, plans are searched within the quantiles
  of recorded actions and end nearer than not moving (commands: than random ones) and than for another goal; still columns keep their value; how
  states follow is said;
- the world model of such weights plans, scores candidates, is a solver's cost model and controls without states, in metres or any units;
- weights that do not say what was recorded are refused, and so is a search of nothing;
- a limit that no column obeys is refused where it was given, and any searched column can be narrowed.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.actions import get_action_space
from jepa_cache.api import WorldModel
from jepa_cache.control.controller import Controller
from jepa_cache.control.motion import build_motion
from jepa_cache.control.planner import warn_of_reach
from jepa_cache.data.recorded import Recorded
from jepa_cache.evaluation import planning
from jepa_cache.evaluation.planning import describe_plans, plan_run
from jepa_cache.predictor.checkpoints import load_predictor
from jepa_cache.training.trainer import train
from tests.caches import make_cache, make_tokens

JUMP = (
    *("predictor=compressed", "train.step_lengths=[1,2,3,4]", "train.window_steps=2", "train.auto_steps=1"),
    *("train.num_steps=150", "train.batch_size=32", "train.lr=0.01", "train.loss_exp=2.0", "train.validate_every=0"),
    *("train.log_every=150", "train.checkpoint_every=150", "train.num_warmup=20", "train.num_anneal=60"),
    *(
        "plan.settings=jump",
        "plan.num_samples=40",
        "plan.num_rounds=4",
        "plan.horizons=[1,3]",
        "plan.num_context_steps=null",
    ),
    *("plan.starts_per_episode=1", "plan.num_random=4", "split.val_share=0.5"),
)
UNITS = {digit * 64: [f"episode-{digit}{number}" for number in range(6)] for digit in "ab"}


class Seen:
    """Stands for an encoder: a frame's first two numbers are the yaw, as 256 a + b tenths of a degree."""

    device, frames_per_step = torch.device("cpu"), 1

    def tokens(self, frames):
        first = frames.reshape(len(frames), -1).astype(np.float64)
        return torch.from_numpy(make_tokens((256 * first[:, 0] + first[:, 1]) / 10).astype(np.float32))


def frame_of(yaw_deg):
    tenths = round(10 * yaw_deg) % 3600
    frame = np.zeros((2, 2, 3), np.uint8)
    frame.flat[:2] = divmod(tenths, 256)
    return frame


def planned(folder, *overrides):
    """What a training wrote, and the score of its plans."""
    cache = make_cache(folder, *JUMP, *overrides, units=UNITS, encoder_trained=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", str(folder / "runs"))
        result = train(cache.config, cache.dataset, cache.scaler, folder / "train/run", base=folder)
    return result.weights, plan_run(cache.config, cache.dataset, result.weights, folder / "plan")


def assert_reaches(metrics, name, least="zero"):
    for horizon in (1, 3):
        plan, least_of, other = (metrics["val"][f"{name}_{kind}_h{horizon}"] for kind in ("plan", least, "other_goal"))
        assert plan < 0.6 * min(least_of, other), f"{name}, {horizon} steps: {plan:.3g}, {least_of:.3g}, {other:.3g}"


def test_one_displacement_is_planned_to_goals_several_steps_ahead_in_metres(tmp_path, caplog, monkeypatch):
    searches, real = [], planning.plan_actions

    def spy(model, context, goal, motion, settings, **options):
        searches.append((len(context.tokens), settings.horizon, *(motion.high / motion.step_high), options["cost"]))
        return real(model, context, goal, motion, settings, **options)

    monkeypatch.setattr(planning, "plan_actions", spy)
    changes = ("plan.max_step_m=0.04", "plan.cost=latents", "plan.cost_steps=sum")
    metrics = planned(tmp_path, "encode.action_space=pose7", *changes)[1]
    assert {search[:-1] for search in searches} == {(1, 1, 4.0)}, "one step is seen, one action planned, as far as four"
    assert {(search[-1].view is not None, search[-1].steps) for search in searches} == {(True, "sum")}
    assert_reaches(metrics, "position_m")
    assert metrics["searched"] == ["dx"], "all else stood still"
    assert metrics["val"]["position_m_moved_h3"] > metrics["val"]["position_m_moved_h1"] > 0.005
    assert not caplog.records
    warn_of_reach(4.0, {"description": {"train": {"step_lengths": [1]}}})
    assert "trained on single steps only" in caplog.text


@pytest.mark.parametrize(("space", "states"), [("vector_sum1x1", "ignore"), ("vector_last2x2", "standard")])
def test_vectors_plan_within_what_was_recorded(tmp_path, space, states):
    weights, metrics = planned(tmp_path, f"encode.action_space={space}", f"scaler.states={states}")
    least = "zero" if "sum" in space else "random"  # an absolute command that holds is near the next one
    assert_reaches(metrics, "action", least)
    assert metrics["searched"] == ["action_0"], "a column that stood still is not searched"
    assert_reaches(metrics, "state", least)
    assert metrics["change_r2"]["state_0"] > 0.9 and "states follow actions by a linear fit" in describe_plans(metrics)
    predictor, card = load_predictor(weights)
    card["tokens_recipe"]["sampling"]["fps"] = 5.0
    world = WorldModel(Seen(), predictor, card)
    low, high = world.recorded.action_low[0], world.recorded.action_high[0]
    now, aim = (10.0, 28.0) if "sum" in space else (40.0, 58.0)
    frame, goal = (frame_of(yaw * (1.0 if "sum" in space else 0.2)) for yaw in (now, aim))
    rows = np.full((1, len(world.space.states)), 0.25)
    rows[0, 0] = now
    state = rows if states == "standard" else None
    plan = world.plan(frame[None], state, goal, settings="jump")
    reached = plan.actions[0, 0] + (now if "sum" in space else 0)
    assert abs(reached - aim) < 9 and 4 * low <= plan.actions[0, 0] <= 4 * high
    assert (plan.actions[:, 1:] == 0.25).all()
    given = world.energies(frame[None], goal, np.stack([plan.actions, 0 * plan.actions + plan.actions.mean()]), state)
    assert given.shape == (2,) and given[0] == pytest.approx(
        world.energies(frame[None], goal, plan.actions[None], state)[0], abs=1e-6
    )
    info = {"pixels": frame[None, None], "goal": goal[None, None]} | ({} if state is None else {"proprio": state[None]})
    model = world.cost_model(1, -1e9, 1e9, state=None if state is None else "proprio")
    costs = model.get_cost(info, torch.from_numpy(plan.actions[None, None]))
    assert costs.shape == (1, 1) and float(costs) == pytest.approx(given[0], abs=1e-6)
    action = Controller(world, goal).act(frame, None if state is None else state[0])
    assert low <= action[0] <= high and (action[0] > 3 or "last" in space)
    with pytest.raises(ValueError, match="goal frames must be of one camera and size"):
        Controller(world, [goal, goal[1:]])
    with pytest.raises(ValueError, match="one colour throughout"):
        Controller(world, [goal, np.full_like(goal, 9)])
    with pytest.raises(ValueError, match=r"a goal frame must be a numpy array .* got NoneType"):
        Controller(world, [None])


def test_what_only_recordings_tell_is_asked_of_them():
    space, rows = get_action_space("vector_sum2x1"), ((0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"only the recordings tell .* Train again"):
        build_motion(space)
    still = Recorded((0.1, 0.2), (0.1, 0.2), *rows, change=((0.0,),) * 4, change_r2=(0.0,), action_std=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"nothing is left to search: .* action_0, action_1 hardly moved"):
        build_motion(space, recorded=still)
    assert build_motion(space, recorded=replace(still, action_low=(-1.0, 0.2))).still.tolist() == [0.0, 0.2]
    pose = get_action_space("pose7")
    zeros = (0.0,) * 7
    seen = Recorded(zeros, zeros, zeros, zeros, action_std=(0.01, 0.01, 1e-4, 0.1, 0.1, 0.1, 1e-3))
    assert build_motion(pose, recorded=seen).names == ("dx", "dy")
    assert build_motion(pose, recorded=seen, fixed=("dgripper", "dy")).names == ("dx",), (
        "what is still may be fixed too"
    )
    assert build_motion(pose, recorded=replace(seen, action_std=())).names == ("dx", "dy", "dz", "dgripper"), (
        "older cards"
    )


def test_a_limit_that_nothing_obeys_is_refused_and_columns_are_narrowed_within_what_was_recorded():
    """A limit that was dropped without a word would let an arm of unnamed columns move as far as it ever did."""
    sums, last, pose = map(get_action_space, ("vector_sum2x1", "vector_last2x1", "pose7"))
    rows = ((-1.0, 0.2), (1.0, 0.8), (0.0,), (1.0,))
    seen = Recorded(*rows, change=((0.0,),) * 4, change_r2=(0.0,), action_std=(1.0, 1.0))
    view = get_action_space("vpt13")
    for space, limit in (
        (sums, {"max_step_m": 0.03}),
        (last, {"max_rotation_rad": 0.1}),
        (last, {"reach": 4.0}),
        (pose, {"max_turn_deg": 30.0}),
        (view, {"max_step_m": 0.05}),
    ):
        recorded = seen if space.name.startswith("vector") else None
        with pytest.raises(ValueError, match=rf"no column of .* obeys {next(iter(limit))}=.*fixed=.*within=\{{'"):
            build_motion(space, recorded=recorded, **limit)
        motion = build_motion(space, recorded=recorded, defaults=limit, max_rotation_rad=0.0, reach=1.0)
        np.testing.assert_array_equal(motion.low, build_motion(space, recorded=recorded).low)
    motion = build_motion(sums, recorded=seen, within={"action_0": (-0.1, 3.0)}, reach=2.0)
    assert (motion.step_low.tolist(), motion.step_high.tolist()) == ([-0.1, 0.2], [1.0, 0.8])
    assert (motion.low.tolist(), motion.high.tolist()) == ([-0.2, 0.2], [2.0, 1.6])
    assert build_motion(pose, within={"dz": (0.0, 0.01)}).high.tolist() == [0.05, 0.05, 0.01, 0.75]
    for within, said in (
        ({"action_7": (0.0, 1.0)}, r"takes columns that are searched \(action_0, action_1\); got action_7"),
        ({"action_1": (0.9, 1.0)}, r"got \(0.9, 1.0\) for action_1, which goes from 0.2 to 0.8"),
        ({"action_0": (0.1, -0.1)}, r"is \(low, high\)"),
        ({"action_0": (np.nan, 0.1)}, r"is \(low, high\)"),
    ):
        with pytest.raises(ValueError, match=said):
            build_motion(sums, recorded=seen, within=within)
