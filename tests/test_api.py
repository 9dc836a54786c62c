"""Encoder and world model from Python.

Claims:
- tokens of given frames are those that the cache holds, bit for bit for whole episodes, in frame and in tubelet mode;
- a plan from frames is the plan from the cached tokens; an exported predictor plans the same;
- a predictor of another encoder, pooling or dtype, or of clip mode is refused, naming the difference;
- the rate of frames is that of the recordings; where a card does not say it or rates differ, there is a warning;
- frames, states, actions, goals and settings that do not fit are refused;
- what is foreseen of candidates is what the rollout makes of each of them alone;
- the examples of README.md and docs/planning.md run as they stand there.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from jepa_cache.api import Encoder, WorldModel
from jepa_cache.cli.export import ExportFormat, export_predictor
from jepa_cache.control.motion import build_motion
from jepa_cache.control.planner import SETTINGS, Context, plan_actions
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.episodes import Dataset
from jepa_cache.data.scaler import fit_scaler
from jepa_cache.predictor.checkpoints import load_predictor
from jepa_cache.predictor.rollout import LatentModel, as_reps
from jepa_cache.store.root import CacheRoot
from jepa_cache.training.trainer import train
from tests.caches import make_config
from tests.encoded import STRIDE, decode_all, encode, make_tars, read_video

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs/planning.md"
SMALL = ("dataset=vpt", "encoder=tiny", "encode.device=cpu")
QUICK = replace(SETTINGS["notebook"], num_samples=6, num_elites=2, num_rounds=2)


class Trained(NamedTuple):
    """A workspace after training, and one of its episodes as a camera and a game gave it."""

    folder: Path
    weights: Path
    dataset: CachedDataset
    frames: np.ndarray  # [F, h, w, 3]
    states: np.ndarray  # [F, S]
    actions: np.ndarray  # [F-1, A]
    tokens: torch.Tensor  # [F, N, D] float32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEPA_RUNS_HOME", str(folder / "runs"))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        config = make_config(*SMALL)
        make_tars(folder / "shards", {"one": {f"episode-{number}": 30 for number in range(6)}})
        dataset = CachedDataset(
            encode(folder / "shards", folder / "cache", config).manifest, CacheRoot(folder / "cache")
        )
        scaler = fit_scaler(dataset, dataset.segments_of("train", config.split), config.scaler)
        train(config, dataset, scaler, folder / "outputs/train/run", base=folder)
    segment = dataset.segments[0]
    tokens = np.empty((segment.stop - segment.start, 16, 64), np.float16)
    dataset.read_tokens(segment.store, segment.start, tokens)
    actions, states = (values[segment.start : segment.stop] for values in dataset.controls(segment.store))
    frames = decode_all(read_video(folder / "shards", segment.episode))[::STRIDE][: len(tokens)]
    weights = folder / "outputs/train/run/predictor.safetensors"
    return Trained(folder, weights, dataset, frames, states, actions[:-1], torch.from_numpy(tokens).float())


@pytest.fixture(scope="module")
def world(trained):
    return WorldModel.load(trained.weights, Encoder.load("tiny", ["encode.device=cpu"]))


def rewrite_card(weights, target, **changes):
    """The same weights with another card; a change to None takes the entry out."""
    with safe_open(weights, "pt") as file:
        card = json.loads(file.metadata()["card"]) | changes
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iteration)
    kept = {key: value for key, value in card.items() if value is not None}
    save_file(tensors, target, {"card": json.dumps(kept)})
    return target


def test_tokens_from_frames_are_those_in_the_cache(trained):
    encoder = Encoder.load("tiny", ["encode.device=cpu"])
    tokens = encoder.tokens(trained.frames)
    assert tokens.dtype == torch.float32 and torch.equal(tokens, trained.tokens)
    # Other batch shapes: the last bit of a float16 of size 4 at most.
    alone = torch.cat([encoder.tokens(frame[None]) for frame in trained.frames])
    torch.testing.assert_close(alone, trained.tokens, atol=4e-3, rtol=0)


def test_tokens_of_tubelets_are_those_in_the_cache(trained, tmp_path):
    settings = ("encode.mode=tubelet", "encode.device=cpu", "encode.dtype=bfloat16")
    manifest = encode(trained.folder / "shards", tmp_path / "cache", make_config(*SMALL, *settings)).manifest
    dataset = CachedDataset(manifest, CacheRoot(tmp_path / "cache"))
    segment = next(run for run in dataset.segments if run.episode == trained.dataset.segments[0].episode)
    stored = np.empty((segment.stop - segment.start, 16, 64), np.uint16)
    dataset.read_tokens(segment.store, segment.start, stored)
    encoder = Encoder.load("tiny", settings)
    tokens = encoder.tokens(trained.frames[: 2 * len(stored)])
    assert encoder.frames_per_step == 2
    assert torch.equal(tokens, torch.from_numpy(stored).view(torch.bfloat16).float())
    with pytest.raises(ValueError, match="groups of 2; got 3 frames"):
        encoder.tokens(trained.frames[:3])
    with pytest.raises(ValueError, match="groups of 2; got 0 frames"):
        encoder.tokens(trained.frames[:0])


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_plan_from_frames_is_the_plan_from_cached_tokens(trained, world, num_steps):
    states, actions = trained.states[:num_steps], trained.actions[: num_steps - 1]
    given = {"actions": actions} if num_steps > 1 else {}
    plan = world.plan(trained.frames[:num_steps], states, trained.frames[5], settings=QUICK, seed=4, **given)
    predictor, card = load_predictor(trained.weights)
    h = as_reps(trained.tokens, True)
    expected = plan_actions(
        LatentModel(predictor.eval()),
        Context(h[:num_steps], actions.astype(np.float64), states.astype(np.float64)),
        h[5],
        build_motion(world.space),
        QUICK,
        scaler=world._scaler,
        base_action=actions[-1] if num_steps > 1 else np.zeros(len(world.space.actions)),
        seed=4,
    )
    np.testing.assert_allclose(plan.energies, expected.energies, atol=1e-3)
    np.testing.assert_allclose(plan.actions, expected.actions, atol=1e-3)
    assert card["action_space"] == world.space.name and world.fps == 5.0
    if num_steps > 1:  # the slot stays as it was
        assert actions[-1, 4:].sum() == 1
        np.testing.assert_array_equal(plan.actions[:, 4:], np.tile(actions[-1, 4:], (2, 1)))


@pytest.mark.parametrize("form", list(ExportFormat))
def test_an_exported_predictor_plans_the_same(trained, world, tmp_path, form):
    out = tmp_path / ("world.pt" if form is ExportFormat.OFFICIAL else "world.safetensors")
    export_predictor(str(trained.weights), out, form=form)
    exported = WorldModel.load(out, Encoder.load("tiny", ["encode.device=cpu"]))
    plans = [
        model.plan(trained.frames[:1], trained.states[:1], trained.frames[2], settings=QUICK)
        for model in (world, exported)
    ]
    np.testing.assert_array_equal(plans[0].actions, plans[1].actions)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encode.pool=2", r"pool: None -> 2"),
        ("encode.dtype=bfloat16", r"dtype: 'float16' -> 'bfloat16'"),
        ("encode.compute_dtype=bfloat16", r"compute_dtype: 'float32' -> 'bfloat16'"),
        ("encode.mode=tubelet", r"sampling.mode: 'frame' -> 'tubelet'"),
    ],
)
def test_an_encoder_of_other_settings_is_refused(trained, override, said):
    with pytest.raises(ValueError, match=said):
        WorldModel.load(trained.weights, Encoder.load("tiny", ["encode.device=cpu", override]))


def test_clip_mode_and_files_that_are_not_there_are_refused(trained, world, tmp_path):
    with pytest.raises(ValueError, match="clip mode, where the tokens of a step have seen later frames"):
        WorldModel.load(rewrite_card(trained.weights, tmp_path / "clip.safetensors", mode="clip"), world._encoder)
    with pytest.raises(ValueError, match=r"do not exist|cannot be read"):
        WorldModel.load(tmp_path / "nothing.safetensors", world._encoder)


def test_the_rate_of_frames_is_that_of_the_recordings_and_not_the_requested_one(trained, world, tmp_path, caplog):
    card = load_predictor(trained.weights)[1]
    assert card["step_hz"] == [5.0, 5.0, 5.0] and world.step_hz == (5.0, 5.0, 5.0)
    asked = {"tokens_recipe": card["tokens_recipe"] | {"sampling": card["tokens_recipe"]["sampling"] | {"fps": 8.0}}}

    def load(**changes):
        caplog.clear()
        weights = rewrite_card(trained.weights, tmp_path / "changed.safetensors", **asked, **changes)
        return WorldModel.load(weights, world._encoder)

    assert load().fps == 5.0 and not caplog.records
    assert load(step_hz=[3.75, 5.0, 5.0]).fps == 5.0 and "came at 3.75 to 5 Hz" in caplog.text
    old = load(step_hz=None)
    assert (old.fps, old.step_hz) == (8.0, None)
    assert (
        "fps is the requested 8 Hz. Every ceil(video rate / 8)-th frame" in caplog.text and "train again" in caplog.text
    )
    tubelets = SimpleNamespace(frames_per_step=2, device=torch.device("cpu"))
    assert WorldModel(tubelets, *load_predictor(trained.weights)).fps == 10.0, "two frames a step"


def test_what_does_not_fit_a_plan_is_refused(trained, world):
    frame, state, goal, array = (
        trained.frames[:1],
        trained.states[:1],
        trained.frames[2],
        "must be a numpy array .* got",
    )
    pair = {"frames": trained.frames[:2], "states": trained.states[:2]}
    for said, changes in (
        ("unknown planner settings 'robot'; known: cem", {"settings": "robot"}),
        ("2 steps have 1 actions between them", pair),
        (r"states must be \[1, 2\].*got \[2, 2\]", {"states": trained.states[:2]}),
        (r"actions must be \[1, 13\].*got \[2, 13\]", {**pair, "actions": trained.actions[:2]}),
        ("states: column yaw .* a finite number; got nan", {"states": state * np.nan}),
        ("a goal is one step, hence 1 frames; got 2", {"goal": trained.frames[2:4]}),
        ("at least one step, hence 1 frames; got 0", {"frames": frame[:0], "states": state[:0]}),
        (r"base_action must be \[13\].*got \[2\]", {"base_action": np.zeros(2)}),
        ("base_action: column .* holds 0 or 1; got 9", {"base_action": np.full(13, 9.0)}),
        ("actions: column .* holds 0 or 1; got 9", {**pair, "actions": np.full((1, 13), 9.0)}),
        ("uint8", {"frames": frame.astype(np.float32)}),
        (f"frames {array} list. Of a list take np.stack", {"frames": list(frame)}),
        (rf"frames {array} Tensor.*\.cpu\(\)\.numpy\(\)", {"frames": torch.from_numpy(frame)}),
        (rf"frames {array} uint8 \[\d+, \d+, 3\].* frame\[None\]", {"frames": frame[0]}),
        (rf"frames {array} uint8 \[\d+, 3, ", {"frames": frame.transpose(0, 3, 1, 2)}),
        (r"the same camera and size: frames are \[\d+, \d+, 3\], the goal is \[8, 8, 3\]", {"goal": goal[:8, :8]}),
        (r"the goal is one colour throughout, \[7, 7, 7\]", {"goal": np.full_like(goal, 7)}),
    ):
        given = {"frames": frame, "states": state, "goal": goal, "settings": QUICK, **changes}
        with pytest.raises(ValueError, match=said):
            world.plan(**given)
    far = np.zeros((1, 3, 1, 13))
    far[..., [column.name for column in world.space.actions].index("dyaw")] = 1e38
    with pytest.raises(ValueError, match=r"3 of 3 energies are not finite.* largest action is 1e\+38"):
        world.energies(frame, goal, far[0], state)
    with pytest.raises(
        ValueError, match=r"second argument is an Encoder; got 'tiny'. Load one: Encoder.load\(\"tiny\"\)"
    ):
        WorldModel.load(trained.weights, "tiny")
    with pytest.raises(ValueError, match=r"got 'encode.device=cpu'. Write \['encode.device=cpu'\]"):
        Encoder.load("tiny", "encode.device=cpu")
    with pytest.raises(ValueError, match=r"frames must be a numpy array .* got list"):
        world._encoder.tokens(list(frame))


class Game:
    """A recorded episode as an environment that takes any action."""

    def __init__(self, frames, states):
        self._seen = [{"frame": frame, "state": state} for frame, state in zip(frames, states, strict=True)]
        self.actions = []

    def reset(self):
        self.actions.clear()
        return self._seen[0], {}

    def step(self, action):
        self.actions.append(action)
        return self._seen[len(self.actions)], 0.0, False, len(self.actions) == 4, {}


def test_what_is_foreseen_of_candidates_is_what_the_rollout_makes_of_each(trained, world):
    frames, states, taken = trained.frames[:3], trained.states[:3], trained.actions[:2]
    candidates = np.stack([trained.actions[2:4], trained.actions[4:6]])
    seen = world.predict(frames, states, candidates, taken=taken, batch_size=1)
    assert seen.shape == (2, 2, 16, 64)
    for one, actions in zip(seen, candidates, strict=True):
        torch.testing.assert_close(world.predict(frames, states, actions, taken=taken), one)
    energies = world.energies(frames, trained.frames[6], candidates, states, taken=taken)
    aim = world.see(trained.frames[6:7])[0]
    np.testing.assert_allclose((seen[:, -1] - aim).abs().mean(dim=(1, 2)), energies, rtol=1e-5)
    many = world.predict(
        np.stack([frames, frames]), np.stack([states, states]), candidates, taken=np.stack([taken, taken])
    )
    torch.testing.assert_close(many, torch.stack([seen, seen]))
    with pytest.raises(ValueError, match=r"actions must be \[.., samples, horizon, 13\]; got \[13\]"):
        world.predict(frames, states, trained.actions[0], taken=taken)


@pytest.fixture
def cached(trained, monkeypatch):
    """`Dataset.open` gives the cache of `trained`, and its folder is the present one."""
    config = make_config(*SMALL, "split.exact_below=40")
    monkeypatch.chdir(trained.folder)
    monkeypatch.setenv(
        "XDG_STATE_HOME", str(trained.folder / "cache-state")
    )  # where it is noted which file is which unit
    monkeypatch.setattr(Dataset, "open", lambda: Dataset(trained.dataset, config))


def test_the_example_of_the_first_page_runs(trained, cached):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {"frame": trained.frames[0], "state": trained.states[0], "goal": trained.frames[5]}
    names["candidates"] = np.stack([trained.actions[:2]] * 5)
    exec(block, names)
    assert names["tokens"].shape == (5, 2, 16, 64) and names["batch"].actions.shape[1:] == (3, 13)
    assert names["run"].tokens.shape[1:] == (16, 64) and names["plan"].actions.shape[1:] == (13,)


def test_the_notebook_runs_from_its_first_cell_to_its_last(trained, cached, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "docs/first_steps.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["energies"].shape == (2,) and names["foreseen"].shape[1:] == (16, 64)
    assert any(frames is not None for frames in names["dataset"].frames(names["key"]))


def test_the_examples_of_the_manual_run(trained, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    monkeypatch.chdir(trained.folder)
    game = Game(trained.frames, trained.states)
    names = {"frames": trained.frames, "states": trained.states, "actions": trained.actions, "env": game}
    names |= {"np": np, "torch": torch}
    for block in blocks:
        exec(block, names)
    assert torch.equal(names["tokens"], trained.tokens)
    assert names["plan"].actions.shape == (2, 13) and np.isfinite(names["plan"].actions).all()
    assert names["energies"].shape == (3,) and names["best"].shape == (2, 13)
    assert len(game.actions) == 4 and all(action.shape == (13,) for action in game.actions)
    assert names["costs"].shape == (1, 5) and len(set(names["costs"][0].tolist())) == 1
