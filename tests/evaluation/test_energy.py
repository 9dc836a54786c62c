"""Energy of the true action among others, and the landscape around it, on a tiny cache.

Claims:
- energies equal those of whole passes over the context, with any batch size;
- an oracle ranks the true action first and its landscape is lowest there; one that says the opposite ranks it last; a predictor
  that ignores its actions gets exactly chance;
- other actions are recorded ones of other episodes, with the true slot; a turn of the view takes its mouse counts along;
- tables, metrics and pictures agree; axes that cannot be are refused with the way out.
"""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.actions import get_action_space
from jepa_cache.config.loading import load_config
from jepa_cache.config.parsing import ConfigError
from jepa_cache.control.motion import build_motion
from jepa_cache.evaluation.context import EvaluationContext, choose_windows
from jepa_cache.evaluation.energy import (
    MAP_STEPS,
    ActionPool,
    EnergyRanks,
    _choose_axes,
    measure_maps,
    measure_ranks,
    open_window,
    rank_table,
    shift_actions,
    write_energy,
)
from jepa_cache.predictor.model import ACPredictor, PredictorOutput
from jepa_cache.predictor.rollout import LatentModel, normalize_tokens
from tests.caches import GRID, WIDTH, make_cache
from tests.workspace import SUITE_SETTINGS

MIDDLE = MAP_STEPS // 2


class Oracle(torch.nn.Module):
    """Knows how the tokens of tests/caches.py follow from the yaw: 2 sin(yaw (1 + c % 2) + 0.8 token + 1.7 channel)."""

    def __init__(self, scaler, sign: float = 1.0) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.scaler, self.sign = scaler, sign

    def forward(self, tokens, actions, states, extrinsics=None, past=None, num_kept_steps=None) -> PredictorOutput:
        yaw = states[..., 0].double() * self.scaler.states.scale[0] + self.scaler.states.mean[0]
        turn = actions[..., 2].double() * self.scaler.actions.scale[2] + self.scaler.actions.mean[2]
        token, channel = torch.meshgrid(torch.arange(GRID[0] * GRID[1]), torch.arange(WIDTH), indexing="ij")
        angle = torch.deg2rad(yaw + turn)[..., None, None] * (1 + channel % 2) + 0.8 * token + 1.7 * channel
        return PredictorOutput(self.sign * 2 * torch.sin(angle).float(), [])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), "evaluate.energy_samples=20", "evaluate.energy_windows=3")


def a_predictor(action_weight: float = 1.0) -> ACPredictor:
    torch.manual_seed(0)
    predictor = ACPredictor(
        embed_dim=WIDTH, predictor_dim=16, depth=2, num_heads=2, action_dim=13, state_dim=2, grid=GRID
    ).eval()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.mul_(10)  # of the initial weights, so that actions matter
        predictor.action_encoder.weight.mul_(action_weight)
    return predictor


def evaluation_of(cache, predictor, **evaluate) -> EvaluationContext:
    config = replace(cache.config, evaluate=replace(cache.config.evaluate, **evaluate))
    return EvaluationContext(LatentModel(predictor), config, cache.dataset, cache.scaler, 5)


def test_energies_equal_those_of_whole_passes_whatever_the_batch(cache):
    evaluation = evaluation_of(cache, a_predictor())
    num_steps = evaluation.config.evaluate.num_context_steps + 1
    index, numbers = choose_windows(evaluation.held_out_segments(), num_steps, 3)
    window, true, _ = open_window(evaluation, index, numbers[4])
    place, context = index[numbers[4]], evaluation.config.evaluate.num_context_steps
    raw, states = cache.dataset.controls(place.store)
    rows = slice(place.start, place.start + context)
    assert np.array_equal(true, raw[place.start + context - 1])
    tokens = np.empty((context + 1, GRID[0] * GRID[1], WIDTH), np.float16)
    cache.dataset.read_tokens(place.store, place.start, tokens)
    h = normalize_tokens(torch.from_numpy(tokens))
    candidates = np.random.default_rng(0).normal(size=(9, 13)).astype(np.float32) * 20
    expected = []
    for candidate in candidates:
        actions = np.vstack([raw[rows][:-1], candidate])
        out = evaluation.model.predictor(
            h[None, :context],
            torch.from_numpy(cache.scaler.actions.apply(actions))[None],
            torch.from_numpy(cache.scaler.states.apply(states[rows]))[None],
        )
        expected.append((normalize_tokens(out.tokens[0, -1]) - h[context]).abs().mean().item())
    with torch.no_grad():
        assert window.energies(candidates) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.01
    some, other = (measure_ranks(evaluation_of(cache, a_predictor(), batch_size=size)) for size in (4, 20))
    assert some.energy == pytest.approx(other.energy, abs=1e-6) and some.ranks() == pytest.approx(other.ranks())


def test_an_oracle_ranks_the_true_action_first_and_its_opposite_last(cache):
    best, worst = (measure_ranks(evaluation_of(cache, Oracle(cache.scaler, sign))) for sign in (1.0, -1.0))
    assert best.ranks().mean() < 0.02 and rank_table(best)[0]["share"] > 0.99
    assert worst.ranks().mean() > 0.9  # not 1: the L1 distance to the opposite is not largest exactly there
    assert (best.others - best.energy > 0.1).all() and best.energy.max() < 0.01


def test_a_predictor_that_ignores_its_actions_gets_exactly_chance(cache, tmp_path):
    (tmp_path / "pictures").mkdir()
    sections = write_energy(
        evaluation_of(cache, a_predictor(action_weight=0.0), energy_samples=30, batch_size=7), tmp_path
    )
    assert sections["energy"]["mean_rank"] == 0.5 and sections["energy_ci"]["mean_rank"] == [0.5, 0.5]
    assert sections["energy"]["top10_rate"] == pytest.approx(0.1, abs=1e-12)
    assert abs(sections["energy"]["margin_l1"]) < 1e-6


def test_places_that_are_tied_are_equally_likely():
    ranks = EnergyRanks(["a", "b", "c"], np.array([0, 1, 19]), np.array([0, 2, 0]), np.zeros(3), np.zeros(3), 20)
    assert ranks.ranks() == pytest.approx([0, 2 / 19, 1])
    assert ranks.bins()[0, 0] == 1 and ranks.bins()[2, 9] == 1
    assert ranks.bins()[1, :3] == pytest.approx([1 / 3, 2 / 3, 0])
    assert ranks.bins().sum(axis=1) == pytest.approx(1)


def test_other_actions_are_recorded_ones_of_other_episodes_with_the_slot_that_the_frame_shows(cache):
    segments = cache.dataset.segments
    pool, own = ActionPool(cache.dataset, segments), segments[0]
    true = cache.dataset.controls(own.store)[0][own.start]
    drawn = pool.draw(2000, true, own, np.random.default_rng(0))
    assert np.array_equal(drawn[:, 4:], np.tile(true[4:], (2000, 1)))

    def rows(some) -> set[bytes]:
        return {row.tobytes() for s in some for row in cache.dataset.controls(s.store)[0][s.start : s.stop - 1, :4]}

    found = {row.tobytes() for row in np.ascontiguousarray(drawn[:, :4])}
    assert found <= rows(segments[1:]) and not found & (rows([own]) - rows(segments[1:]))
    assert len(found) == len(rows(segments[1:]))  # each of about 200 came up in 2000 draws
    with pytest.raises(ValueError, match="there are none"):
        ActionPool(cache.dataset, [own]).draw(3, true, own, np.random.default_rng(0))


def test_the_landscape_has_the_true_action_in_its_middle_and_an_oracles_valley_there(cache):
    evaluation = evaluation_of(cache, Oracle(cache.scaler))
    maps = measure_maps(evaluation)
    assert maps.axes == ("dyaw", "dpitch") and maps.units == ("deg", "deg")
    assert maps.episodes == sorted({segment.episode for segment in evaluation.held_out_segments()})
    turns = maps.energies[:, :, MIDDLE]  # along dyaw
    assert (turns.argmin(axis=1) == MIDDLE).all() and (turns[:, [0, -1]] > 0.1).all()
    assert np.ptp(maps.energies, axis=2).max() < 1e-6  # the oracle's tokens do not follow the pitch
    assert maps.above_true()[MIDDLE, MIDDLE] == 0
    assert any(
        segment.start for segment in evaluation.held_out_segments()
    )  # so that rows of the store are no steps of the episode
    for episode, first_step, grid in zip(maps.episodes, maps.first_steps, maps.grids, strict=True):
        segment = next(s for s in evaluation.held_out_segments() if s.episode == episode)
        raw = cache.dataset.controls(segment.store)[0]
        assert grid[:, MIDDLE] == pytest.approx(raw[segment.start + first_step + 1, 2:4])  # after two context steps
        assert 0 <= first_step < segment.stop - segment.start


def test_a_turn_takes_its_mouse_counts_along_and_nothing_else_moves():
    space = get_action_space("vpt13")
    true = np.arange(13, dtype=np.float32)
    shifted = shift_actions(true, [2, 3], np.array([[-3.0, 0.0, 3.0], [0.0, 1.5, 0.0]]), build_motion(space).complete)
    change = shifted - true
    assert change[2, 0, :4] == pytest.approx([20, 0, 3, 0]) and change[0, 1, :4] == pytest.approx([-20, 10, -3, 1.5])
    assert np.array_equal(shifted[1, 0], true) and (change[..., 4:] == 0).all()


@pytest.mark.parametrize(
    ("space", "asked", "still", "expected"),
    [
        ("pose7", None, (), ("dx", "dz")),
        ("pose7", None, ("dz",), ("dx", "dy")),
        ("pose7", ("dy", "gripper"), (), "cannot be an axis of pose7; choose two of dx, dy"),
        ("pose7", ("dy", "dz"), ("dz",), "never changes"),
        ("vpt13", None, (), ("dyaw", "dpitch")),
        ("vpt13", ("mouse_dx", "dyaw"), (), "'mouse_dx' cannot be an axis"),
        ("vpt25", None, (), ("cameraX", "cameraY")),
        ("vector_last3x1", None, ("action_0",), ("action_1", "action_2")),
        ("vector_last2x1", None, ("action_0",), None),
    ],
)
def test_the_axes_suit_the_action_space_and_what_changes(space, asked, still, expected):
    space = get_action_space(space)
    moving = np.array([column.name not in still for column in space.actions])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            _choose_axes(space, asked, moving)
    else:
        assert _choose_axes(space, asked, moving) == expected


@pytest.mark.parametrize(
    "override",
    [
        "evaluate.energy_samples=55",
        "evaluate.energy_axes=[dx]",
        "evaluate.energy_axes=[dx,dx]",
        "evaluate.noise_windows=0",
    ],
)
def test_settings_that_cannot_work_are_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config(SUITE_SETTINGS, [override])


def test_tables_metrics_and_pictures_agree(cache, tmp_path):
    (tmp_path / "pictures").mkdir()
    evaluation = evaluation_of(cache, a_predictor())
    sections = write_energy(evaluation, tmp_path)
    ranks = measure_ranks(evaluation)
    assert set(sections) == {"energy", "energy_ci"}
    assert sections["energy"]["num_windows"] == 9 and sections["energy"]["num_samples"] == 20
    assert sections["energy"]["mean_rank"] == pytest.approx(ranks.ranks().mean())  # three windows of each episode
    with (tmp_path / "measurements/energy_ranks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and float(rows[0]["share"]) == pytest.approx(sections["energy"]["top10_rate"])
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1)
    with (tmp_path / "measurements/energy_maps.csv").open(newline="") as file:
        listing = list(csv.DictReader(file))
    assert len(listing) == 3
    for row in listing:
        with (tmp_path / f"measurements/energy_map{row['map']}.csv").open(newline="") as file:
            cells = {(float(c["x"]), float(c["y"])): float(c["energy"]) for c in csv.DictReader(file)}
        assert len(cells) == MAP_STEPS**2
        assert cells[float(row["x_true"]), float(row["y_true"])] == float(row["energy_true"])
    for name in ("energy_ranks.png", "energy_maps.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
