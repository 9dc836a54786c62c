"""What the training of compressed and linear predictors promises, with the true parts on a tiny cache.

Claims:
- a compressed predictor starts from given weights with their compressor, and is refused LoRA and several processes;
- latents are compressed once: no token is read after the training has begun, and they are those of the steps they stand for;
- the kept share and the ridge are chosen on every other training episode, under components that were fitted to the rest alone;
- the linear predictor is one training step, found again by the same command; it fits a linear world exactly, whatever the scale, and
  takes the ridge and the columns that err least on episodes that were left out together with those most like them;
- `stop_share` validates and stops by training episodes put aside: held-out ones change nothing of a training, nor do those put aside
  decide more than when it stops;
- evaluation takes all of them, and their card names their kind.
"""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.actions import Column, get_action_space
from jepa_cache.config.parsing import ConfigError
from jepa_cache.data.dataset import TRAIN, CachedDataset
from jepa_cache.data.loader import Batch
from jepa_cache.evaluation.context import open_evaluation
from jepa_cache.predictor.checkpoints import CheckpointError, build_predictor, load_predictor
from jepa_cache.predictor.compressed import LatentRidge
from jepa_cache.predictor.rollout import normalize_tokens
from jepa_cache.training import ridge, trainer
from jepa_cache.training.batches import TrainingData
from jepa_cache.training.distributed import start_processes
from jepa_cache.training.losses import Objective
from jepa_cache.training.run import predictor_arguments
from tests.caches import make_config
from tests.training.runs import bits, rows, run

pytestmark = pytest.mark.usefixtures("runs")

COMPRESSED, LINEAR = ("predictor=compressed", "train.loss_exp=2.0"), ("predictor=linear",)


def test_tokens_are_read_before_the_first_training_step_only(cache, tmp_path, monkeypatch):
    train_step, read_tokens, late, begun = trainer.train_step, CachedDataset.read_tokens, [], []

    def step(*arguments):
        begun.append(True)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(
        CachedDataset, "read_tokens", lambda *arguments: (late.extend(begun[:1]), read_tokens(*arguments))
    )
    assert run(cache, tmp_path, *COMPRESSED).num_trained == len(begun) == 12
    assert not late


@pytest.mark.parametrize("kind", [COMPRESSED, LINEAR])
def test_the_kept_share_is_that_of_episodes_to_which_its_components_were_not_fitted(cache, tmp_path, kind, capsys):
    predictor, _ = load_predictor(run(cache, tmp_path, *kind).weights)
    segments = sorted(cache.dataset.segments_of(TRAIN, cache.config.split), key=lambda segment: segment.episode)
    assert len(segments) == 5
    tokens = np.empty((5, 30, 4, 8), np.float16)
    for segment, out in zip(segments, tokens, strict=True):
        cache.dataset.read_tokens(segment.store, segment.start, out)
    h = normalize_tokens(torch.from_numpy(tokens))
    by_hand = deepcopy(predictor)
    by_hand.compressor.fit(lambda: [h[::2]], predictor.whitening)
    windows = h[1::2].unfold(1, 5, 1).flatten(0, 1).movedim(-1, 1)
    by_hand.fit_share([windows])
    assert float(predictor.kept_share) == pytest.approx(float(by_hand.kept_share), rel=1e-3)
    by_hand.compressor.fit(lambda: [h], predictor.whitening)
    torch.testing.assert_close(predictor.compressor.scale, by_hand.compressor.scale, rtol=1e-3, atol=0)
    said = capsys.readouterr().out
    assert "chosen on 2 of 5 training episodes" in said and "with so few" in said


@pytest.mark.parametrize("kind", [COMPRESSED, LINEAR])
def test_training_learns_what_the_actions_do_and_evaluation_takes_it(cache, tmp_path, kind):
    steps = () if kind is LINEAR else ("train.num_steps=150", "train.lr=0.01")
    result = run(cache, tmp_path, *kind, *steps)
    last = {name: float(value) for name, value in rows(result)[-1].items() if value}
    least = 0.1 if kind is COMPRESSED else 0.03  # a strong ridge: it is chosen with two of five episodes left out
    assert min(last["val_gap_copy_last"], last["val_gap_shuffled_actions"]) > least
    predictor, card = load_predictor(result.weights)
    assert card["architecture"]["kind"] == kind[0].partition("=")[2]
    context = open_evaluation(make_config(*kind), cache.dataset, result.weights)
    assert context.device.type == "cpu" and type(context.model.predictor) is type(predictor)


def test_starting_weights_bring_their_compressor(cache, tmp_path):
    first = run(cache, tmp_path, *COMPRESSED)
    start = first.weights.rename(tmp_path / "start.safetensors")
    again = run(cache, tmp_path, *COMPRESSED, f"train.init={start}", "train.stop_share=0.4")
    before, after = bits(start), bits(again.weights)
    assert before["compressor.components"] == after["compressor.components"]
    assert before["core.leave.weight"] != after["core.leave.weight"]
    with pytest.raises(CheckpointError, match=r"missing: predictor_embed\.weight"):
        run(cache, tmp_path, f"train.init={start}")


def test_lora_and_several_processes_are_refused(cache, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"train\.lora_rank is for transformers; predictor 'linear' is linear"):
        make_config(*LINEAR, "train.lora_rank=2")
    accelerator = start_processes(make_config("train.device=cpu").train)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    for kind in (COMPRESSED, LINEAR):
        with pytest.raises(ValueError, match="is trained by one process, in seconds to minutes; 2 were started"):
            run(cache, tmp_path, *kind)


# --- linear -----------------------------------------------------------------------------------------------------------------


def test_the_linear_predictor_is_one_training_step_that_is_not_done_twice(cache, tmp_path):
    result = run(cache, tmp_path, *LINEAR)
    assert (result.step, result.num_trained, result.num_steps) == (1, 1, 1)
    assert [(row["step"], row["epoch"]) for row in rows(result)] == [("1", "1.0")]
    weights = bits(result.weights)
    again = run(cache, tmp_path, *LINEAR, "train.num_steps=99")
    assert (again.num_trained, again.run, bits(again.weights)) == (0, result.run, weights)
    assert bits(run(cache, tmp_path, *LINEAR, fresh=True).weights) == weights


class LinearWorld:
    """Windows of a world whose latents follow a `LatentRidge` of given weights, in place of the data of a training."""

    def __init__(self, core: LatentRidge, *, num_episodes: int, noise: float = 0.0, scale: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(1)
        self.num_windows, self._per_episode = num_episodes * 20, 20
        z = torch.randn(self.num_windows, 1, 6, generator=draw) * scale
        actions = torch.randn(self.num_windows, 1, 3, generator=draw)
        states = torch.randn(self.num_windows, 2, 2, generator=draw)
        moved = z + core.change(z, actions, states[:, :1]).detach() + noise * torch.randn(z.shape, generator=draw)
        self._batch = torch.stack([z, moved], dim=1), actions, states

    def episodes_of(self, numbers):
        return [f"episode-{number // self._per_episode}" for number in numbers]

    recordings_of = episodes_of

    def batches_in_order(self):
        for numbers in np.array_split(np.arange(self.num_windows), 7):
            yield Batch(*(part[torch.from_numpy(numbers)] for part in self._batch), numbers)


def fit(world: LinearWorld) -> LatentRidge:
    core = LatentRidge(6, 3, 2, num_products=4)
    settings = replace(make_config("train.window_steps=2", "train.auto_steps=1").train, normalize_reps=False)
    report = ridge.fit_step(core, Objective(core, settings, torch.device("cpu")), world, ridge.choose(core, world))
    assert len(report.windows) == len(report.jloss_by_window) == world.num_windows
    return core


def random_core() -> LatentRidge:
    torch.manual_seed(0)
    core = LatentRidge(6, 3, 2, num_products=4)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter)
    return core


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_linear_world_is_fitted_exactly(scale):
    true = random_core()
    found = fit(LinearWorld(true, num_episodes=20, scale=scale))
    torch.testing.assert_close(found.weight, true.weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.bias, true.bias, atol=1e-3 * scale, rtol=1e-3)


def test_the_ridge_grows_with_the_noise_and_beats_none(monkeypatch):
    true, chosen = random_core(), {}
    with torch.no_grad():
        true.weight.mul_(0.03)
    for noise in (1e-3, 1.0):
        world = LinearWorld(true, num_episodes=3, noise=noise)
        error = lambda core: (core.weight - true.weight).square().mean().item()  # noqa: E731
        by_ridge, best = {}, error(fit(world))
        for candidate in ridge.RIDGES:
            with monkeypatch.context() as patched:
                patched.setattr(ridge, "RIDGES", (candidate,))
                by_ridge[candidate] = error(fit(world))
        chosen[noise] = next(key for key, value in by_ridge.items() if value == best)
    assert chosen[1e-3] < chosen[1.0]
    assert by_ridge[chosen[1.0]] < 0.5 * by_ridge[min(by_ridge)]


def test_the_ridge_is_judged_by_the_episodes_that_are_set_apart_alone():
    class Contrary(LinearWorld):
        def batches_in_order(self):
            for batch in super().batches_in_order():
                contrary = torch.from_numpy(batch.numbers < 40)
                before, after = batch.tokens[contrary].unbind(dim=1)
                batch.tokens[contrary, 1] = 2 * before - after
                yield batch

    contrary, others = {"episode-0", "episode-1"}, {f"episode-{number}" for number in range(2, 8)}
    world = Contrary(random_core(), num_episodes=8, noise=0.1)
    assert ridge.choose(random_core(), world, contrary).ridge == max(ridge.RIDGES)
    assert ridge.choose(random_core(), world, others).ridge <= 1


def test_what_holds_within_a_scene_alone_is_left_out_as_likes_are_left_out_together():
    """Eight scenes with latents of their own, two episodes each: what the last action does differs from one scene to another."""

    class Scenes(LinearWorld):
        def __init__(self, core):
            super().__init__(core, num_episodes=16, noise=0.1)
            draw = torch.Generator().manual_seed(2)
            scene = torch.arange(self.num_windows) // 40
            tokens, actions, _ = self._batch
            looks, turned = torch.randn(2, 8, 1, 6, generator=draw)[:, scene]
            tokens += 3 * looks[:, None]
            tokens[:, 1] += actions[:, :, 2:] * turned

    true = random_core()
    with torch.no_grad():
        true.weight.zero_()
        true.weight[:, 8:10] = 1.0
    world = Scenes(true)
    names = [Column(name, "m", "continuous") for name in ("dx", "dy", "droll", "x", "y")]
    space = replace(get_action_space("pose7"), actions=names[:3], states=names[3:], positions=("x", "y"))
    core = LatentRidge(6, 3, 2, num_products=4)
    choice = ridge.choose(core, world, space=space)
    assert choice.words == f"ridge {choice.ridge:g}, columns of x, y alone"
    settings = replace(make_config("train.window_steps=2", "train.auto_steps=1").train, normalize_reps=False)
    ridge.fit_step(core, Objective(core, settings, torch.device("cpu")), world, choice)
    z, states = torch.randn(5, 6), torch.randn(5, 2)
    still, *pushed = [core.change(z, row.expand(5, 3), states) for row in torch.cat([torch.zeros(1, 3), torch.eye(3)])]
    assert torch.equal(pushed[2], still) and not torch.equal(pushed[0], still)


def test_columns_that_are_not_named_change_nothing_and_unknown_ones_are_refused(cache, tmp_path):
    names = [column.name for column in (*cache.dataset.space.actions, *cache.dataset.space.states)]
    chosen = [names[0], names[-1]]
    config = make_config(*LINEAR)
    named = replace(config, predictor=replace(config.predictor, columns=tuple(chosen), ridge=0.5))
    predictor = build_predictor(predictor_arguments(named, cache.dataset))
    torch.nn.init.normal_(predictor.core.weight)
    num_actions, num_states = len(cache.dataset.space.actions), len(cache.dataset.space.states)
    z, actions, states = torch.randn(3, 6), torch.randn(3, num_actions), torch.randn(3, num_states)
    before = predictor.core.change(z, actions, states)
    actions[:, 1:] += 1
    states[:, :-1] += 1
    assert torch.equal(predictor.core.change(z, actions, states), before)
    actions[:, 0] += 1
    assert not torch.equal(predictor.core.change(z, actions, states), before)
    wrong = replace(named, predictor=replace(named.predictor, columns=("dxx",)))
    with pytest.raises(ValueError, match=r"columns of predictor 'linear': action space vpt13 has none called 'dxx'"):
        predictor_arguments(wrong, cache.dataset)


def test_one_training_episode_is_refused_by_the_linear_predictor():
    with pytest.raises(ValueError, match="one training episode only"):
        fit(LinearWorld(random_core(), num_episodes=1))


# --- stop_share -------------------------------------------------------------------------------------------------------------


def training_data(cache, *overrides: str) -> TrainingData:
    config = make_config(*overrides)
    return TrainingData(config, cache.dataset, cache.scaler, start_processes(config.train))


def test_episodes_put_aside_are_training_episodes_that_are_not_trained_on(cache):
    data = training_data(cache, "train.stop_share=0.4")
    training = {segment.episode for segment in cache.dataset.segments_of(TRAIN, cache.config.split)}
    kept = set(data.episodes_of(np.arange(data.num_windows)))
    aside = {data._val_index.segments[data._val_index[number].segment].episode for number in data.validation}
    assert kept and aside and kept | aside == training and not kept & aside
    with pytest.raises(ValueError, match="leaves none aside; set it between"):
        training_data(cache, "train.stop_share=0.001")


def test_held_out_episodes_change_nothing_of_a_training_that_stops_by_its_own(cache, tmp_path, monkeypatch):
    how = ("train.stop_share=0.4", "train.patience=1", "train.validate_every=2", "train.select=best", *COMPRESSED)
    result = run(cache, tmp_path, *how)
    segments_of = cache.dataset.segments_of
    monkeypatch.setattr(
        cache.dataset, "segments_of", lambda split, *rest: segments_of(split, *rest) if split == TRAIN else 1 / 0
    )
    again = run(cache, tmp_path, *how, fresh=True)
    assert (bits(again.weights), rows(again)) == (bits(result.weights), rows(result))
    assert any(row["val_total"] for row in rows(result))
