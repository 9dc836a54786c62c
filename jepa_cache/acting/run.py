"""The experiment of stages/act.py: several trainings act from starts of their own, beside controls; figures, tables, a film.

Read first. `control.closed_loop` says what an episode is and when it is a success; `film.py` draws one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from jepa_cache.acting.film import Film, write_film
from jepa_cache.acting.simulator import FILM_FILES
from jepa_cache.api import Encoder, WorldModel
from jepa_cache.config.paths import default_num_threads
from jepa_cache.config.schema import CONTROLS, ActConfig, Config
from jepa_cache.control.closed_loop import (
    TASKS,
    Episode,
    EpisodeError,
    Goal,
    Policy,
    Simulator,
    Start,
    Task,
    build_no_motion,
    build_oracle,
    build_random_actions,
    build_readout_servo,
    draw_starts,
    find_goal,
    run_episode,
    summarize,
)
from jepa_cache.control.controller import Controller
from jepa_cache.control.costs import LATENTS
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.scaler import Scaler
from jepa_cache.evaluation.context import EvaluationContext, open_evaluation
from jepa_cache.evaluation.metrics import write_json, write_table
from jepa_cache.evaluation.planning import choose_settings
from jepa_cache.evaluation.readout import pool_tokens, read_steps
from jepa_cache.evaluation.verdict import UNTRAINED
from jepa_cache.files import replaced_files
from jepa_cache.predictor.heads import HEADS
from jepa_cache.ridge import fit_rows
from jepa_cache.sample.robot_episodes import NUM_RECORDED_LOOKS
from jepa_cache.training.signals import end_for_requeue
from jepa_cache.training.trainer import train

BuildPolicy = Callable[[Goal], Policy]

PLAN = "plan"
PICKING_SEED = 0
"""`act.start_seed` of the starts on which settings were picked; figures are those of another set."""


def train_seeds(config: Config, dataset: CachedDataset, scaler: Scaler, folder: Path, *, base: Path) -> dict[int, Path]:
    """Weights of `act.seeds`: the settings of stage two with each as `train.seed`, from the same cache; what is trained already is taken.

    Raises:
        ValueError: The settings of `act` do not go together, said before anything is trained.
        SystemExit: A training was stopped, with the exit code for a requeue: the same command resumes it.
    """
    if "other_goal" in config.act.controls and config.act.num_starts < 2:
        raise ValueError("act.controls has other_goal, the goal of the next start; set act.num_starts above 1")
    if config.act.cost == LATENTS and config.predictor.kind == "transformer":
        raise ValueError(
            f"act.cost is {LATENTS}, the distance of components, which predictor {config.predictor.name!r} does not have; take "
            "predictor=compressed, compressed256 or linear, or another act.cost"
        )
    weights = {}
    costs = tuple(dict.fromkeys((*config.train.costs, *({config.act.cost} & set(HEADS)))))
    for seed in config.act.seeds:
        # No logger: the trackers are for the training that the user asked for.
        own = replace(config, train=replace(config.train, seed=seed, loggers=(), costs=costs))
        result = train(own, dataset, scaler, folder / f"seed-{seed}/run", base=base)
        if result.stopped_by is not None:
            end_for_requeue(result.stopped_by, f"{result.step} of seed {seed}")
        assert result.weights is not None
        weights[seed] = result.weights
    return weights


def act_run(
    config: Config,
    dataset: CachedDataset,
    encoder: Encoder,
    weights: Mapping[int, Path],
    simulator: Simulator,
    out: Path,
) -> dict[str, Any]:
    """Act with the weights of each training seed, and with the controls that `act.controls` names; write figures, tables and a film to `out`.

    Each training seed has `act.num_starts` starts of its own, so that all episodes of a figure are of different starts; policies without
    a world model act from those of the first. What is written: metrics.json, and in run/ episodes.csv, report.html, film.gif, film.mp4, film.png.

    Raises:
        ValueError: The weights do not fit, or no episode of the planner came to its end.
    """
    torch.set_num_threads(default_num_threads())
    settings, task = config.act, TASKS[config.act.task]
    worlds = {seed: WorldModel.load(path, encoder) for seed, path in weights.items()}
    first = next(iter(weights))
    width = len(worlds[first].space.actions)
    loop = Loop(simulator, task, settings)
    figures, names = {}, [name for name in settings.controls if name != "unseen_looks" or settings.look == "plain"]
    for name in (PLAN, *names):
        look = "unseen" if name == "unseen_looks" else settings.look
        if name in (PLAN, "other_goal", "unseen_looks"):
            for place, (seed, world) in enumerate(worlds.items()):
                build = build_planner(world, settings, seed)
                loop.run(name, seed, place, build, look=look, other_goal=name == "other_goal")
        else:
            without = {
                "random_actions": lambda: build_random_actions(width, settings.start_seed),
                "no_motion": lambda: build_no_motion(width),
                "oracle": lambda: build_oracle(width),
                "readout_servo": lambda: build_readout_servo(
                    fit_readout(open_evaluation(config, dataset, weights[first]), worlds[first]), width
                ),
            }
            loop.run(name, None, 0, without[name](), look=look)
        figures[name] = summarize(loop.episodes_of(name), settings.replan_every)
        if name == PLAN and figures[PLAN]["num_failures"] == figures[PLAN]["num_starts"]:
            raise ValueError(f"no episode came to its end: {'; '.join(figures[PLAN]['failures'])}")
    by_seed = {str(seed): summarize(loop.episodes[PLAN, seed], settings.replan_every) for seed in worlds}
    metrics = {
        **figures[PLAN],
        **{name: figures[name] for name in names},
        "by_seed": by_seed,
        "seeds": list(weights),
        "task": task.name,
        "rule": task.rule,
        "look": settings.look,
        "goal_look": settings.goal_look,
        "start_seed": settings.start_seed,
        "settings_picked_on": f"starts of act.start_seed={PICKING_SEED}",
        "picked_on_these_starts": settings.start_seed == PICKING_SEED,
        "encoder_trained": dataset.manifest.encoder_trained,
        "dataset": config.dataset.name,
        "encoder": config.encoder.name,
        "predictor": config.predictor.name,
        "settings": asdict(settings),
    }
    films = [
        film_start(loop, worlds[first], number, first)
        for number in range(min(settings.num_filmed, settings.num_starts))
    ]
    with replaced_files(out / "run", "episodes.csv", stale=FILM_FILES) as folder:
        write_film([film for film in films if film is not None], metrics, folder)
        write_table(loop.rows, folder / "episodes.csv")
    write_json(metrics, out / "metrics.json")
    # What decides, for `dvc exp show`: the planner beside those that it has to beat.
    beside = {name: figures[name]["success"] for name in names if name in ("readout_servo", "other_goal")}
    write_json({"act": {"success": metrics["success"], **beside}}, out / "summary.json")
    return metrics


class Loop:
    """Runs policies from the starts of an experiment, and keeps what happened."""

    def __init__(self, simulator: Simulator, task: Task, settings: ActConfig) -> None:
        self.simulator, self.task, self.settings = simulator, task, settings
        self.episodes: dict[tuple[str, int | None], list[Episode]] = {}  # by policy and training seed
        self.rows: list[dict[str, Any]] = []
        self._goals: dict[str, Goal | EpisodeError] = {}

    def run(
        self, name: str, seed: int | None, place: int, build: BuildPolicy, *, look: str, other_goal: bool = False
    ) -> None:
        """Act from the starts of the training seed at `place`; with `other_goal` the policy is shown that of the next start."""
        starts = self.starts(place, look)
        title = name if seed is None else f"{name}, seed {seed}"
        for number, start in enumerate(tqdm(starts, desc=title, unit="episode", dynamic_ncols=True)):
            episode = self.act(start, build, shown=starts[(number + 1) % len(starts)] if other_goal else None)
            self.episodes.setdefault((name, seed), []).append(episode)
            self.rows.append(
                {
                    "policy": name,
                    "seed": seed,
                    "start": place * self.settings.num_starts + number,
                    "look": start.options["look"],
                    "start_m": episode.start_m,
                    "final_m": episode.final_m,
                    "success": int(episode.success),
                    "closer_than_half": int(episode.closer_than_half),
                    "failure": episode.failure,
                }
            )

    def episodes_of(self, name: str) -> list[Episode]:
        """Those of one policy, of all training seeds."""
        return [episode for (policy, _), some in self.episodes.items() if policy == name for episode in some]

    def starts(self, place: int, look: str) -> list[Start]:
        """The starts of the training seed at `place`, with their looks."""
        settings, first = self.settings, place * self.settings.num_starts
        drawn = draw_starts(self.task, settings.num_starts, settings.start_seed, first=first)
        starts = []
        for number, start in enumerate(drawn, start=first):
            # None is the plain look; another one for the goal: far beyond the numbers of starts.
            live = None if look == "plain" else NUM_RECORDED_LOOKS + number
            shown = live if settings.goal_look == "same" else NUM_RECORDED_LOOKS + 10**6 + number
            starts.append(start._replace(options=start.options | {"look": live}, goal=start.goal | {"look": shown}))
        return starts

    def act(
        self, start: Start, build: BuildPolicy, *, shown: Start | None = None, keep_frames: bool = False
    ) -> Episode:
        """One episode; judged by the start's own goal, whatever is shown."""
        goal = self.find_goal(start)
        if shown is not None and isinstance(goal, Goal):
            other = self.find_goal(shown._replace(goal=shown.goal | {"look": start.goal["look"]}))
            goal = goal._replace(frame=other.frame) if isinstance(other, Goal) else other
        if isinstance(goal, EpisodeError):
            return Episode(failure=str(goal))
        return run_episode(self.simulator, self.task, start, goal, build, keep_frames=keep_frames)

    def find_goal(self, start: Start) -> Goal | EpisodeError:
        """The goal of a start, looked up once, or why there is none."""
        key = repr((start.goal, start.way.tolist()))
        if key not in self._goals:
            try:
                self._goals[key] = find_goal(self.simulator, self.task, start)
            except EpisodeError as error:
                self._goals[key] = error
        return self._goals[key]


def build_planner(
    world: WorldModel, settings: ActConfig, seed: int, foreseen: list[torch.Tensor] | None = None
) -> BuildPolicy:
    """The policy that is to be proven: a controller for each goal; `foreseen` takes the tokens [N, E] at the end of each plan."""
    named = choose_settings(settings)
    motion = world.build_motion(named)  # here: what it warns of is said once and not for each goal

    def build(goal: Goal) -> Policy:
        controller = Controller(
            world,
            goal.frame,
            named,
            motion=motion,
            cost=settings.cost,
            num_context_steps=settings.num_context_steps,
            replan_every=settings.replan_every,
            seed=seed,
        )

        def policy(observation: Mapping[str, np.ndarray]) -> np.ndarray:
            action, plan = controller.act(observation["frame"], observation["state"]), controller.plan
            if foreseen is not None:
                now = observation["frame"][None], observation["state"][None]
                foreseen.append(world.predict(*now, plan.found, motion=motion)[-1])
            return action

        return policy

    return build


def fit_readout(evaluation: EvaluationContext, world: WorldModel) -> Callable[[np.ndarray], np.ndarray]:
    """A ridge regression from the tokens of a frame [h, w, 3] to the end effector's place [3] m, fitted on training episodes."""
    x, places, episodes = read_steps(evaluation, evaluation.training_segments(), range(3))
    weight, bias, _ = fit_rows(x, torch.from_numpy(places), episodes)
    grid = evaluation.dataset.manifest.grid
    return lambda frame: (pool_tokens(world.see(frame[None]), grid)[0] @ weight + bias).double().cpu().numpy()


def film_start(loop: Loop, world: WorldModel, number: int, seed: int) -> Film | None:
    """The planner's episode from one of the first seed's starts once more, with what it foresaw; None where it failed."""
    start = loop.starts(0, loop.settings.look)[number]
    goal, foreseen = loop.find_goal(start), []
    episode = loop.act(start, build_planner(world, loop.settings, seed, foreseen), keep_frames=True)
    if episode.failure:
        return None
    seen = world.see(np.stack(episode.frames)).cpu().numpy()
    aim = world.see(goal.frame[None])[0].cpu().numpy()
    return Film(episode, goal.frame, seen, torch.stack(foreseen).cpu().numpy(), aim, loop.task)


def describe_acting(metrics: Mapping[str, Any]) -> str:
    """The figures in a few lines."""
    lines = [f"{metrics['task']}: {metrics['rule']}"]
    for name, words in (
        ("", f"planner, {len(metrics['seeds'])} training seeds"),
        *((name, name.replace("_", " ")) for name in CONTROLS),
    ):
        if name and name not in metrics:
            continue
        one = metrics[name] if name else metrics
        low, high = one["success_ci"]
        end = "" if one["final_distance_m"] is None else f", ends {100 * one['final_distance_m']:.1f} cm away"
        failed = f"; {one['num_failures']} failed ({'; '.join(one['failures'])})" if one["num_failures"] else ""
        lines.append(
            f"  {words}: {one['success']:.2f} [{low:.2f}, {high:.2f}] of {one['num_starts']} starts, closer than half "
            f"{one['closer_than_half']:.2f}{end}{failed}"
        )
    lines.append(f"  a plan takes {metrics['seconds_per_plan']:.3f} s; 95 % intervals over starts (Wilson)")
    if metrics["picked_on_these_starts"]:
        lines.append("  settings were picked on these starts: take figures from another act.start_seed")
    if not metrics["encoder_trained"]:
        lines.append(f"  {UNTRAINED}")
    return "\n".join(lines)
