"""Claims: the experiment acts in the simulator from recordings to a film; what is reported is what was run, from starts of each seed's own.

The recordings are few and the trainings short: figures mean nothing here, their bookkeeping does.
"""

import base64
import csv
import dataclasses
import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from jepa_cache.acting.run import CONTROLS, Loop, act_run, build_planner, train_seeds
from jepa_cache.acting.simulator import open_simulator, write_nothing
from jepa_cache.api import Encoder, WorldModel
from jepa_cache.config.loading import load_config
from jepa_cache.control.closed_loop import TASKS, EpisodeError, Goal, build_no_motion, build_oracle
from jepa_cache.data.dataset import TRAIN, CachedDataset
from jepa_cache.data.scaler import fit_scaler
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.sample.robot_episodes import NUM_RECORDED_LOOKS, RobotSampleConfig, build_robot_sample
from jepa_cache.store.root import CacheRoot
from jepa_cache.training.signals import REQUEUE_EXIT_CODE
from jepa_cache.training.trainer import TrainResult
from tests.control.test_closed_loop import WIDTH, Point
from tests.robot_worlds import needs_robot
from tests.workspace import SUITE_SETTINGS

NUM_STEPS = 3  # of an episode; the oracle is then within 12 cm
FEW = ("act.num_starts=2", "act.seeds=[0, 3]", "act.num_samples=8", "act.num_rounds=2", "act.num_filmed=3")


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    """The folder of results, the metrics, a world model, the settings and the simulator."""
    folder = tmp_path_factory.mktemp("acted")
    config = load_config(
        SUITE_SETTINGS,
        [
            "dataset=sample_robot",
            "predictor=compressed",
            "train.preset=jump",
            "encode.device=cpu",
            "split.val_share=0.0",
            *("train.num_steps=20", "train.num_warmup=2", "train.step_lengths=[1, 2]"),
            *FEW,
        ],
    )
    small = {"num_random": 4, "num_reach": 0, "num_push": 0, "num_steps": 8, "random_looks": 0.0, "size": 64}
    dataset = dataclasses.replace(config.dataset, sample=config.dataset.sample | small)
    predictor = dataclasses.replace(config.predictor, num_components=8, predictor_dim=16)
    config = dataclasses.replace(config, dataset=dataset, predictor=predictor, members=((dataset, 1.0),))
    build_robot_sample(folder / "shards/sample_robot", RobotSampleConfig(**dataset.sample), num_workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setitem(TASKS, "reach", dataclasses.replace(TASKS["reach"], num_steps=NUM_STEPS, within_m=0.12))
        patch.setenv("JEPA_RUNS_HOME", str(folder / "runs"))
        root = CacheRoot(folder / "cache")
        manifest = encode_dataset(config, [], base=folder, root=root).manifest
        cached = CachedDataset(manifest, root)
        scaler = fit_scaler(cached, cached.segments_of(TRAIN, config.split, config.filter), config.scaler)
        weights = train_seeds(config, cached, scaler, folder / "seeds", base=folder)
        encoder = Encoder.open(config, folder)
        simulator = open_simulator(config)
        metrics = act_run(config, cached, encoder, weights, simulator, folder / "act")
    world = WorldModel.load(weights[0], encoder)
    yield SimpleNamespace(out=folder / "act", metrics=metrics, world=world, config=config, simulator=simulator)
    simulator.close()


@needs_robot
def test_figures_of_every_policy_are_those_of_the_table(acted):
    metrics, summary = (json.loads((acted.out / name).read_text()) for name in ("metrics.json", "summary.json"))
    beside = {name: metrics[name]["success"] for name in ("readout_servo", "other_goal") if name in metrics}
    assert summary == {"act": {"success": metrics["success"], **beside}}, "few columns of `dvc exp show`"
    names = {"success", "success_ci", "closer_than_half", "final_distance_m", "num_starts", "seconds_per_plan"}
    assert names <= set(metrics) and metrics["seeds"] == [0, 3] and set(CONTROLS) <= set(metrics)
    assert metrics["settings_picked_on"] == "starts of act.start_seed=0" and not metrics["picked_on_these_starts"]
    with (acted.out / "run/episodes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, figures in (("plan", metrics), *((name, metrics[name]) for name in CONTROLS)):
        own = [row for row in rows if row["policy"] == name]
        assert names <= set(figures) and figures["num_starts"] == len(own) and figures["num_failures"] == 0
        assert figures["success"] == np.mean([int(row["success"]) for row in own])
        assert figures["final_distance_m"] == pytest.approx(np.mean([float(row["final_m"]) for row in own]))
    planned = [(row["seed"], row["start"]) for row in rows if row["policy"] == "plan"]
    assert planned == [("0", "0"), ("0", "1"), ("3", "2"), ("3", "3")], "each seed has starts of its own"
    assert (
        metrics["oracle"]["success"] == 1
        and "after 3 actions" in metrics["rule"]
        and metrics["no_motion"]["success"] == 0
    )
    assert metrics["by_seed"]["3"]["num_starts"] == 2
    looks = {row["look"] for row in rows if row["policy"] == "unseen_looks"}
    assert len(looks) == 4 and all(int(look) >= NUM_RECORDED_LOOKS for look in looks)
    assert {row["look"] for row in rows if row["policy"] == "plan"} == {""}


@needs_robot
def test_the_film_shows_every_moment_and_the_page_holds_it(acted):
    gif = Image.open(acted.out / "run/film.gif")
    moments = 1 + NUM_STEPS + 2
    assert gif.n_frames == 2 * moments, "more are to be filmed than there are starts"
    assert Image.open(acted.out / "run/film.png").width > 700
    assert (acted.out / "run/film.png").stat().st_size < 200_000
    with av.open(str(acted.out / "run/film.mp4")) as container:
        assert len(list(container.decode(video=0))) == 4 * moments
    page = (acted.out / "run/report.html").read_text()
    assert base64.b64encode((acted.out / "run/film.gif").read_bytes()).decode() in page and "readout servo" in page


@needs_robot
def test_the_planner_takes_the_picture_and_not_the_place(acted):
    """A goal's true place is for the judge alone: the same picture gives the same actions whatever it says."""
    observation, _ = acted.simulator.reset(options={"position": (0.45, 0.0, 0.2), "block": (0.5, 0.15)})
    frame = acted.simulator.reset(options={"position": (0.55, 0.1, 0.1), "block": (0.5, -0.15)})[0]["frame"]
    build = build_planner(acted.world, acted.config.act, 0)
    there, elsewhere = (build(Goal(frame, np.full(3, x), np.full(3, x)))(observation) for x in (0.0, 0.4))
    assert np.array_equal(there, elsewhere) and np.abs(there[:3]).max() <= 0.06 and not there[3:].any()


@needs_robot
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("encode.fps=3.0", "encode.fps must be 5"),
        ("encode.mode=tubelet", "encode.mode must be frame"),
        ("encode.cameras=[exterior_1, wrist]", "encode.cameras must name one of exterior_1, exterior_2, wrist"),
    ],
)
def test_a_cache_that_does_not_fit_the_simulator_is_refused_before_anything_is_trained(override, named):
    with pytest.raises(ValueError, match=named):
        open_simulator(load_config(SUITE_SETTINGS, ["dataset=sample_robot", override]))


def test_other_data_sets_have_no_simulator_and_leave_what_dvc_asks_for(tmp_path):
    assert open_simulator(load_config(SUITE_SETTINGS)) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run/film.gif").write_text("of an earlier experiment")
    write_nothing(tmp_path, "none")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"nothing_done": "none"}
    assert json.loads((tmp_path / "summary.json").read_text()) == {}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["episodes.csv"]


def a_loop(*overrides, **faults):
    settings = load_config(SUITE_SETTINGS, ["act.num_starts=6", *overrides]).act
    return Loop(Point(**faults), TASKS["reach"], settings)


def test_another_goal_is_shown_and_the_own_one_judges():
    shown, loop = [], a_loop()

    def build(goal):
        shown.append(goal)
        return build_oracle(WIDTH)(goal)

    loop.run("other_goal", 0, 0, build, look="plain", other_goal=True)
    own = [loop.find_goal(start) for start in loop.starts(0, "plain")]
    for goal, mine, next_one in zip(shown, own, [*own[1:], own[0]], strict=True):
        assert np.array_equal(goal.frame, next_one.frame) and np.array_equal(goal.place, mine.place)
    assert all(episode.success for episode in loop.episodes["other_goal", 0]), "the oracle reads the place"


@pytest.mark.parametrize(("goal_look", "same"), [("same", True), ("other", False)])
def test_looks_are_those_that_were_asked_for(goal_look, same):
    loop = a_loop(f"act.goal_look={goal_look}")
    starts = [start for look in ("unseen", "plain") for place in (0, 1) for start in loop.starts(place, look)]
    assert all((start.options["look"] == start.goal["look"]) is same for start in starts)
    assert [start.options["look"] for start in starts] == [
        *range(NUM_RECORDED_LOOKS, NUM_RECORDED_LOOKS + 12),
        *[None] * 12,
    ]


def test_a_goal_that_cannot_be_had_is_a_failed_episode_and_no_success():
    loop = a_loop(raises=1)
    loop.run("plan", 0, 0, build_no_motion(WIDTH), look="plain")
    assert isinstance(loop.find_goal(loop.starts(0, "plain")[0]), EpisodeError)
    assert all("unstable" in row["failure"] and not row["success"] for row in loop.rows) and len(loop.rows) == 6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("act.num_starts=1",), "set act.num_starts above 1"),
        (("act.cost=latents",), "predictor 'tiny' does not have; take predictor="),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_trained(tmp_path, overrides, said):
    config = load_config(SUITE_SETTINGS, ["dataset=sample_robot", "predictor=tiny", *overrides])
    with pytest.raises(ValueError, match=said):
        train_seeds(config, None, None, tmp_path, base=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_signal_while_it_trains_ends_with_the_exit_code_for_a_requeue(tmp_path, capsys, monkeypatch):
    config = load_config(SUITE_SETTINGS, ["dataset=sample_robot", "act.seeds=[3, 4]"])
    stopped = TrainResult(None, tmp_path, 7, 7, 600, "SIGINT")
    monkeypatch.setattr("jepa_cache.acting.run.train", lambda *_, **__: stopped)
    with pytest.raises(SystemExit) as ended:
        train_seeds(config, None, None, tmp_path, base=tmp_path)
    assert ended.value.code == REQUEUE_EXIT_CODE
    assert (
        "stopped by SIGINT at training step 7 of seed 3; the same command resumes. Exit code 75"
        in capsys.readouterr().out
    )
