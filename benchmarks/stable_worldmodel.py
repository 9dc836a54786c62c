"""This project's predictors on a peer's ground: stable-worldmodel's environments, expert, solvers, policies and success rule.

    python benchmarks/stable_worldmodel.py FOLDER                         # TwoRoom, `tiny`: a first look
    python benchmarks/stable_worldmodel.py FOLDER encoder=dino_small --costs readout time --predictors compressed linear
    python benchmarks/stable_worldmodel.py FOLDER encoder=dino_small --starts choose  # 50 other starts, to pick settings on
    python benchmarks/stable_worldmodel.py FOLDER --goal-seed 5           # other goals
    python benchmarks/stable_worldmodel.py FOLDER --task push_t           # their weak policy's episodes; hours on a CPU

Episodes are collected by their World, through a writer of ours, as one LeRobot data set; stage one encodes it once; every predictor and
seed is trained from that cache; each is evaluated by their `World.evaluate` under their rule: start at a recorded row, goal picture 25 rows
later, at most 50 steps of the environment. Beside it: no motion, their random policy, their expert, and their solver on the exact
dynamics with the distance of positions as its cost, which says what solver, budget and goals allow. What is there already is used again.
Everything lies in FOLDER: recordings, cache, runs, a checkout's settings (project/), results.json. docs/stable_worldmodel.md.
"""

import argparse
import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from jepa_cache.control.closed_loop import wilson  # noqa: E402
from jepa_cache.files import atomic_file, measure_bytes, publish_folder, temporary_folder  # noqa: E402
from jepa_cache.predictor.heads import HEADS  # noqa: E402

CAMERA = "observation.images.pixels"
FPS, BLOCK = 25, 5  # rows a second as their video writer has it, and rows of one step of the cache: their action_block
GOAL_OFFSET, BUDGET, SIZE = 25, 50, (224, 224)  # of their published table
STARTS = {"choose": 50, "report": 100}
PUBLISHED = {"two_room": "DINO-WM 100, PLDM 97, LeWM 87", "push_t": "DINO-WM 74, PLDM 78, LeWM 96"}
SOLVERS = {"cem": "CEMSolver", "icem": "ICEMSolver", "mppi": "MPPISolver"}
DEFAULTS = (
    *("scaler.states=ignore", "split.val_share=0.1", "train.preset=jump", "train.step_lengths=[1, 2]"),
    *("train.window_steps=4", "train.auto_steps=3", "train.num_steps=600", "train.num_warmup=60"),
)


@dataclass(frozen=True)
class Recording:
    """Episodes of one policy of theirs."""

    noise: float  # of the expert's actions, in their units
    repeat: float  # probability that it repeats its last action
    share: float  # of the episodes


@dataclass(frozen=True)
class Task:
    """An environment of theirs, what is recorded in it, and which goals are set."""

    env: str
    policy: tuple[str, str]  # module and class of the collecting policy
    training: tuple[Recording, ...]
    goals: Mapping[str, Recording]
    num_states: int


TASKS = {
    "two_room": Task(
        "swm/TwoRoom-v1",
        ("stable_worldmodel.envs.two_room.expert_policy", "ExpertPolicy"),
        (Recording(2.0, 0.1, 0.4), Recording(1.0, 0.1, 0.4), Recording(0.0, 0.0, 0.2)),
        {"noisy": Recording(1.0, 0.1, 1.0), "clean": Recording(0.0, 0.0, 1.0)},
        2,
    ),
    "push_t": Task(
        "swm/PushT-v1",
        ("stable_worldmodel.envs.pusht.expert_policy", "WeakPolicy"),
        (Recording(0.0, 0.0, 1.0),),
        {"weak": Recording(0.0, 0.0, 1.0)},
        7,
    ),
}
SET_UP = [
    {"method": "_set_state", "args": {"state": {"value": "state"}}},
    {"method": "_set_goal_state", "args": {"goal_state": {"value": "goal_state"}}},
]


def import_peer() -> types.ModuleType:
    """Import stable_worldmodel, also where torchvision or lancedb is missing, of which it needs one name each while it is imported.

    The stand-ins go again at once: transformers asks for torchvision's transforms as soon as torchvision seems to be there.
    """
    wanted: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.tv_tensors": {"Image": torch.as_tensor},
        "lancedb": {},
        "lancedb.permutation": {"Permutation": object},
    }
    missing = {name for name in ("torchvision", "lancedb") if importlib.util.find_spec(name) is None}
    stand_ins = [name for name in wanted if name.partition(".")[0] in missing]
    for name in stand_ins:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(
            wanted[name], __path__=[], __spec__=importlib.machinery.ModuleSpec(name, loader=None)
        )
    try:
        return importlib.import_module("stable_worldmodel")
    except ImportError as error:
        raise SystemExit(
            f"{error}. Install it beside this project: pip install --no-deps stable-worldmodel==0.1.1, and gymnasium cloudpickle "
            "farama-notifications loguru opencv-python-headless (Push-T: pygame pymunk shapely); docs/stable_worldmodel.md"
        ) from error
    finally:
        for name in stand_ins:
            del sys.modules[name]


class LerobotWriter:
    """A writer of theirs (`World.collect(writer=...)`) that leaves a LeRobot v3.0 data set: two files for all episodes.

    One store of the cache is made of it, whatever the number of episodes. Pictures are kept without loss.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str], fps: int = FPS) -> None:
        """Write to `folder`, which must not be there; `columns` are names in the data set to theirs."""
        self._folder, self._columns, self._fps = folder, dict(columns), fps
        self._rows: dict[str, list[Any]] = {name: [] for name in ("timestamp", "episode_index", *self._columns)}
        self._listed: list[dict[str, Any]] = []
        self._num_frames = 0

    def __enter__(self) -> "LerobotWriter":
        """Begin; what was written appears as a whole when the block ends without an error."""
        import av

        self._stack = contextlib.ExitStack()
        self._temporary = self._stack.enter_context(temporary_folder(self._folder))
        video = self._temporary / f"videos/{CAMERA}/chunk-000/file-000.mp4"
        video.parent.mkdir(parents=True)
        self._container = av.open(str(video), "w")
        self._stream = self._container.add_stream(
            "libx264rgb", rate=self._fps, options={"qp": "0", "g": "25", "bf": "0"}
        )
        self._stream.pix_fmt = "rgb24"
        return self

    def write_episode(self, ep_data: Mapping[str, Sequence[Any]]) -> None:
        """Add an episode: `pixels` [T] of [h, w, 3] uint8 and the columns [T]; row t's action leads from row t to t+1."""
        import av

        pixels = ep_data["pixels"]
        index, start = len(self._listed), self._num_frames
        if index == 0:
            self._stream.height, self._stream.width = pixels[0].shape[:2]
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self._num_frames
            self._container.mux(self._stream.encode(frame))
            self._num_frames += 1
        self._rows["timestamp"] += [row / self._fps for row in range(len(pixels))]
        self._rows["episode_index"] += [index] * len(pixels)
        for name, theirs in self._columns.items():
            self._rows[name] += [np.asarray(row, np.float32).ravel() for row in ep_data[theirs]]
        places = {f"{kind}/{what}_index": 0 for kind in ("data", f"videos/{CAMERA}") for what in ("chunk", "file")}
        times = {"from_timestamp": start / self._fps, "to_timestamp": self._num_frames / self._fps}
        times = {f"videos/{CAMERA}/{name}": value for name, value in times.items()}
        self._listed.append({"episode_index": index, "length": len(pixels), **places, **times})

    def write_episodes(self, episodes: Iterable[Mapping[str, Sequence[Any]]]) -> None:
        """Add episodes one by one."""
        for episode in episodes:
            self.write_episode(episode)

    def __exit__(self, *failure: Any) -> None:
        """Write the rows and lists, and let the data set appear; nothing is left of a failed block."""
        with self._stack:
            if failure[0] is not None:
                return
            self._container.mux(self._stream.encode())
            self._container.close()
            for path, table in {
                "data/chunk-000/file-000.parquet": pa.table(self._rows),
                "meta/episodes/chunk-000/file-000.parquet": pa.Table.from_pylist(self._listed),
            }.items():
                (self._temporary / path).parent.mkdir(parents=True)
                pq.write_table(table, self._temporary / path)
            features = {name: {"dtype": "float32", "names": None} for name in self._columns}
            info = {
                "codebase_version": "v3.0",
                "fps": self._fps,
                "chunks_size": 1000,
                "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
                "features": {CAMERA: {"dtype": "video", "names": ["height", "width", "channels"]}, **features},
            }
            (self._temporary / "meta/info.json").write_text(json.dumps(info, indent=1))
            publish_folder(self._temporary, self._folder)


class StartsAndGoals:
    """A writer of theirs that keeps a start and the row `GOAL_OFFSET` later of each episode that is long enough, and a data set of them.

    Each start is of another episode. Of a data set `World.evaluate(dataset=...)` reads the first and the last row of each, as here.
    """

    column_names = ("pixels", "state", "proprio")

    def __init__(self, seed: int) -> None:
        """Draw starts by `seed`."""
        self._rng = np.random.default_rng(seed)
        self.pairs: list[dict[str, np.ndarray]] = []

    def __enter__(self) -> "StartsAndGoals":
        """Begin."""
        return self

    def __exit__(self, *failure: Any) -> None:
        """End."""

    def write_episodes(self, episodes: Iterable[Mapping[str, Sequence[Any]]]) -> None:
        """Keep two rows of each episode."""
        for episode in episodes:
            if len(episode["pixels"]) > GOAL_OFFSET:
                row = int(self._rng.integers(len(episode["pixels"]) - GOAL_OFFSET))
                self.pairs.append(
                    {
                        name: np.stack([episode[name][row], episode[name][row + GOAL_OFFSET]])
                        for name in self.column_names
                    }
                )

    def load_chunk(self, episodes_idx: np.ndarray, start: np.ndarray, end: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """Pairs of the numbers given; pictures [2, 3, h, w], as their readers have them."""
        chosen = [
            {name: torch.from_numpy(rows) for name, rows in self.pairs[number].items()} for number in episodes_idx
        ]
        return [{**pair, "pixels": pair["pixels"].permute(0, 3, 1, 2)} for pair in chosen]


class ExactRooms:
    """The dynamics of TwoRoom themselves and the distance of positions: a cost model that says what solver, budget and goals allow."""

    def __init__(self, env: Any) -> None:
        """Read walls, door and speed of an (unwrapped) environment with a vertical wall."""
        assert env.wall_axis == 1
        radius = float(env.variation_space["agent"]["radius"].value.item())
        self._speed = float(env.variation_space["agent"]["speed"].value.item())
        self._low, self._high = env.BORDER_SIZE + radius, env.IMG_SIZE - env.BORDER_SIZE - radius
        self._centre, reach = float(env.WALL_CENTER), env.wall_thickness // 2 + radius
        self._left, self._right = self._centre - reach, self._centre + reach
        self._door, self._half = float(env.door_positions[0]), float(env.door_sizes[0]) + 1.75

    def get_cost(self, info_dict: Mapping[str, Any], action_candidates: torch.Tensor) -> torch.Tensor:
        """Distance [B, S] of the last position from the goal's, pixels."""
        at, goal = (torch.as_tensor(info_dict[name])[:, :, -1].float() for name in ("state", "goal_state"))
        actions = action_candidates.clamp(-1, 1).unflatten(-1, (-1, 2)).flatten(2, 3)  # [B, S, rows, 2]
        for row in range(actions.shape[2]):
            to = (at + self._speed * actions[:, :, row]).clamp(self._low, self._high)
            x, outside = to[..., 0], (to[..., 1] - self._door).abs() > self._half
            left = at[..., 0] < self._centre
            x = torch.where(left & (x > self._left) & outside, torch.full_like(x, self._left - 0.5), x)
            x = torch.where(~left & (x < self._right) & outside, torch.full_like(x, self._right + 0.5), x)
            at = torch.stack([x, to[..., 1]], dim=-1)
        return (at - goal).norm(dim=-1)


class Line(NamedTuple):
    """One row of the result."""

    goals: str
    name: str
    successes: int
    starts: int
    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        low, high = (100 * end for end in wilson(self.successes, self.starts))
        share = f"{self.successes}/{self.starts} = {100 * self.successes / self.starts:.0f} %"
        return f"{self.goals:6} {self.name:44} {share:14} [{low:.0f}, {high:.0f}]  {self.wall_s:.0f} s, {self.cpu_s:.0f} CPU s"


class Bench:
    """One folder: its recordings, cache, weights and results."""

    def __init__(self, given: argparse.Namespace) -> None:
        """Make a checkout of the settings, and import the peer."""
        self.given, self.task, self.swm = given, TASKS[given.task], import_peer()
        self.folder = given.folder.resolve()
        self.project, self.weights = self.folder / "project", self.folder / "weights"
        self.recordings = [
            self.folder / f"recordings/{given.task}-{given.episodes}-{number}"
            for number in range(len(self.task.training))
        ]
        self.overrides = [f"dataset={given.task}", *DEFAULTS, *given.overrides]
        self.spent: dict[str, list[float]] = {}  # wall and CPU seconds of what was done now
        for name in ("stages", "configs"):
            shutil.copytree(ROOT / name, self.project / name, dirs_exist_ok=True)
        shutil.copy(ROOT / "params.yaml", self.project)
        preset = {
            "source": "lerobot",
            "source_options": {"camera": CAMERA, "actions": ["action"], "states": ["observation.state"]},
            "inputs": [str(path) for path in self.recordings],
            **{"fps": FPS // BLOCK, "mode": "frame", "frames_per_clip": 16, "sample": None},
            **{"action_space": f"vector_sum2x{self.task.num_states}"},
            **{"scale_actions": "standard", "scale_states": "standard"},
        }
        (self.project / f"configs/dataset/{given.task}.yaml").write_text(json.dumps(preset))  # JSON is YAML
        os.environ |= {
            "JEPA_CACHE_HOME": str(self.folder / "cache"),
            "JEPA_RUNS_HOME": str(self.folder / "runs"),
            "PYTHONPATH": str(ROOT),
        }

    def collect(self) -> None:
        """Record the training episodes, a LeRobot data set for each kind."""
        for number, (path, recording) in enumerate(zip(self.recordings, self.task.training, strict=True)):
            if not path.is_dir():
                with self.measured("collect"):
                    writer = LerobotWriter(path, {"action": "action", "observation.state": "state"})
                    self.record(writer, recording, round(recording.share * self.given.episodes), 10_000 * (1 + number))

    def record(self, writer: Any, recording: Recording, episodes: int, seed: int) -> None:
        """Record episodes of the task's policy; episode i begins from the environment's seed `seed + i`."""
        module, name = self.task.policy
        noise = {"action_noise": recording.noise, "action_repeat_prob": recording.repeat}
        options = noise if name == "ExpertPolicy" else {}
        world = self.swm.World(self.task.env, num_envs=4, image_shape=SIZE, max_episode_steps=100)
        world.set_policy(getattr(importlib.import_module(module), name)(seed=seed, **options))
        world.collect(writer=writer, episodes=episodes, seed=seed)
        world.close()

    def train(self) -> list[tuple[str, Path]]:
        """Encode once and train every predictor and seed from the cache; their names and folders of weights."""
        self.stage("encode", "encode", *self.overrides)
        self.stage("fit_scaler", "fit_scaler", *self.overrides)
        trained = []
        for predictor in self.given.predictors:
            for seed in self.given.seeds:
                settings = [*self.overrides, f"predictor={self.preset(predictor)}", f"train.seed={seed}"]
                settings.append(f"train.costs=[{', '.join(name for name in HEADS if name in self.given.costs)}]")
                self.stage("train", "train_predictor", *settings)
                trained.append((f"{predictor} seed {seed}", self.weights / f"{predictor}-{seed}"))
                shutil.rmtree(trained[-1][1], ignore_errors=True)
                shutil.copytree(self.project / "outputs/train", trained[-1][1])
        return trained

    def preset(self, predictor: str) -> str:
        """A preset like `predictor` with as many components as were asked for."""
        text = (self.project / f"configs/predictor/{predictor}.yaml").read_text()
        name = f"{predictor}-{self.given.components}"
        sized = re.sub(r"(?m)^num_components: \d+", f"num_components: {self.given.components}", text)
        (self.project / f"configs/predictor/{name}.yaml").write_text(sized)
        return name

    def stage(self, what: str, name: str, *overrides: str) -> None:
        """Run a stage script in the checkout."""
        with self.measured(what):
            command = [sys.executable, str(self.project / f"stages/{name}.py"), *overrides]
            subprocess.run(command, cwd=self.project, check=True)

    @contextlib.contextmanager
    def measured(self, what: str) -> Iterator[None]:
        """Add the wall and CPU seconds of a block, with the processes it started, to those of `what`."""
        before = [time.time(), cpu_s()]
        yield
        passed = [time.time() - before[0], cpu_s() - before[1]]
        self.spent[what] = [sum(pair) for pair in zip(passed, self.spent.get(what, [0.0, 0.0]), strict=True)]

    def pairs(self, kind: str) -> "StartsAndGoals":
        """The starts and goals of one kind; those to choose on and those to report are of other episodes."""
        number, wanted = list(self.task.goals).index(kind), self.given.num_starts
        seed = 1_000_000 * (1 + self.given.goal_seed) + 100_000 * number + 50_000 * (self.given.starts == "report")
        path = self.folder / f"goals/{self.given.task}-{seed}-{wanted}.npz"
        writer = StartsAndGoals(seed)
        if path.is_file():
            with np.load(path) as columns:
                loaded = {name: columns[name] for name in writer.column_names}
            writer.pairs = [{name: rows[number] for name, rows in loaded.items()} for number in range(wanted)]
            return writer
        begun = seed
        while len(writer.pairs) < wanted:
            self.record(writer, self.task.goals[kind], wanted, begun)
            begun += wanted
        writer.pairs = writer.pairs[:wanted]
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file, **{name: np.stack([pair[name] for pair in writer.pairs]) for name in writer.column_names}
            )
        return writer

    def evaluate(self, trained: Sequence[tuple[str, Path]]) -> list[Line]:
        """Every line for every kind of goals, printed as it is known."""
        lines, worlds = [], {name: self.load(folder) for name, folder in trained}
        for kind in self.task.goals:
            pairs = self.pairs(kind)
            for name, policy in self.policies(worlds):
                begun = time.time(), cpu_s()
                world = self.swm.World(
                    self.task.env, num_envs=len(pairs.pairs), image_shape=SIZE, max_episode_steps=10 * BUDGET
                )
                world.set_policy(policy)
                numbers = list(range(len(pairs.pairs)))
                with contextlib.redirect_stdout(io.StringIO()):  # their solvers print each solution
                    result = world.evaluate(
                        dataset=pairs,
                        episodes_idx=numbers,
                        start_steps=[0 for _ in numbers],
                        goal_offset=GOAL_OFFSET,
                        eval_budget=BUDGET,
                        callables=SET_UP,
                    )
                world.close()
                took = time.time() - begun[0], cpu_s() - begun[1]
                lines.append(Line(kind, name, int(result["episode_successes"].sum()), len(numbers), *took))
                print(lines[-1], flush=True)
        return lines

    def policies(self, worlds: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Every line's name and policy."""
        from stable_worldmodel.policy import BasePolicy, RandomPolicy

        class NoMotion(BasePolicy):
            def get_action(self, info_dict: Mapping[str, Any], **_: Any) -> np.ndarray:
                return np.zeros(self.env.action_space.shape, np.float32)

        yield "no motion", NoMotion()
        yield "their random policy", RandomPolicy(seed=0)
        if self.given.task == "two_room":
            from stable_worldmodel.envs.two_room.expert_policy import ExpertPolicy

            yield "their expert", ExpertPolicy(seed=0)
            env = self.swm.World(self.task.env, num_envs=1, image_shape=SIZE)
            env.reset(seed=0)
            yield "exact dynamics, distance of positions", self.planned(ExactRooms(env.envs.envs[0].unwrapped))
        for name, world in worlds.items():
            for cost in self.given.costs:
                yield f"{name}, {cost}", self.planned(world.cost_model(BLOCK, -1.0, 1.0, cost))

    def planned(self, model: Any) -> Any:
        """Their policy and solver over a cost model."""
        from stable_worldmodel import solver
        from stable_worldmodel.policy import PlanConfig, WorldModelPolicy

        given = self.given
        sizes = {
            "num_samples": given.samples,
            "n_steps": given.rounds,
            "topk": max(2, given.samples // 10),
            "batch_size": 10,
        }
        searched = getattr(solver, SOLVERS[given.solver])(model, **sizes)
        return WorldModelPolicy(
            searched, PlanConfig(horizon=given.horizon, receding_horizon=given.replan, action_block=BLOCK)
        )

    def load(self, folder: Path) -> Any:
        """The world model of weights, with the encoder of the settings."""
        from jepa_cache.api import Encoder, WorldModel
        from jepa_cache.config.loading import load_config

        with contextlib.chdir(self.project):
            name = load_config(self.project, self.overrides).encoder.name
            if not hasattr(self, "_encoder"):
                self._encoder = Encoder.load(name, [text for text in self.overrides if not text.startswith("encoder=")])
            return WorldModel.load(folder / "run/predictor.safetensors", self._encoder)


def cpu_s() -> float:
    """CPU seconds of this process and of those it started that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def convert(source: str, folder: Path, state: str) -> None:
    """Write any data set that their `load_dataset` opens (video, folder, hdf5, lance) as a LeRobot data set."""
    path = Path(source).resolve()
    videos = {
        video.parent.name for video in path.glob("*/ep_0.mp4")
    }  # their reader of this format does not look itself
    dataset = import_peer().data.load_dataset(str(path), **({"video_keys": sorted(videos)} if videos else {}))
    with LerobotWriter(folder, {"action": "action", "observation.state": state}) as writer:
        for number in tqdm(range(len(dataset.lengths)), "episodes", disable=None):
            rows = {
                name: np.asarray(column)
                for name, column in dataset.load_episode(number).items()
                if name in ("pixels", "action", state)
            }
            writer.write_episode({**rows, "pixels": rows["pixels"].transpose(0, 2, 3, 1)})
    print(f"wrote {folder}; next: python stages/encode.py {folder} dataset=lerobot, with camera {CAMERA} in its preset")


def main(argv: list[str] | None = None) -> None:
    """Collect, encode, train and evaluate; print the lines and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="everything lies here")
    parser.add_argument(
        "overrides", nargs="*", help="settings of the stages, such as encoder=dino_small train.num_steps=3000"
    )
    parser.add_argument("--task", choices=TASKS, default="two_room")
    parser.add_argument("--episodes", type=int, default=300, help="of training")
    parser.add_argument("--predictors", nargs="+", default=["compressed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--components", type=int, default=256, help="of predictors: 64 lose where the agent is")
    parser.add_argument("--costs", nargs="+", default=["tokens_l2"], help="of plan.cost")
    parser.add_argument(
        "--starts", choices=STARTS, default="report", help="50 to pick settings on, or 100 others to report"
    )
    parser.add_argument("--num-starts", type=int)
    parser.add_argument("--goal-seed", type=int, default=0, help="of the goals' episodes")
    parser.add_argument("--solver", choices=SOLVERS, default="cem")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--horizon", type=int, default=5, help=f"steps of {BLOCK} rows that are planned")
    parser.add_argument("--replan", type=int, default=1, help="of them carried out before the next plan")
    parser.add_argument("--convert", metavar="DATASET", help="only write this data set of theirs to FOLDER as LeRobot")
    parser.add_argument("--state", default="state", help="column of --convert that holds states")
    given = parser.parse_intermixed_args(argv)
    given.num_starts = given.num_starts or STARTS[given.starts]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if given.convert:
        convert(given.convert, given.folder, given.state)
        return
    bench = Bench(given)
    bench.collect()
    trained = bench.train()
    lines = bench.evaluate(trained)
    sizes = {name: measure_bytes(bench.folder / name) / 1e9 for name in ("recordings", "cache")}
    files = sum(1 for path in (bench.folder / "cache").rglob("*") if path.is_file())
    print(f"published, of their data and goals, in % of starts: {PUBLISHED[given.task]}")
    spent = ", ".join(f"{name} {wall:.0f} s ({cpu:.0f} of CPU)" for name, (wall, cpu) in bench.spent.items())
    print(f"{spent}; recordings {sizes['recordings']:.3f} GB, cache {sizes['cache']:.3f} GB in {files} files")
    said = {name: str(value) for name, value in vars(given).items()}
    document = {"given": said, "lines": [line._asdict() for line in lines], "spent_s": bench.spent, "gigabytes": sizes}
    output = bench.folder / f"results-{given.starts}.json"
    with atomic_file(output) as temporary:
        temporary.write_text(json.dumps(document, indent=1))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
