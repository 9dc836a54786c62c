"""Energy of the true action among others, and the landscape around it, on a tiny cache.

Claims:
- the energy of the true action is its prediction's error;
- an oracle ranks the true action first and its landscape is lowest there; one that says the opposite ranks it last; a predictor
  that ignores its actions gets exactly chance;
- other actions are recorded ones of other episodes, with the true slot; a turn of the view takes its mouse counts along;
- metrics and pictures are left; axes that cannot be are refused with the way out.
"""

import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.evaluation import energy
from jepa_cache.evaluation.context import choose_windows
from jepa_cache.evaluation.energy import (
    MAP_STEPS,
    MIDDLE,
    ActionPool,
    check_axes,
    choose_axes,
    iter_one_steps,
    measure_maps,
    measure_ranks,
    rank_actions,
    shift_actions,
    write_energy,
)
from jepa_cache.evaluation.run import MEASUREMENTS
from tests.evaluation.evaluations import Oracle, a_predictor, evaluation_of


def pool_of(evaluation) -> ActionPool:
    return ActionPool(evaluation.dataset, evaluation.training_segments() + evaluation.held_out_segments())


def test_the_energy_of_the_true_action_is_the_error_of_what_is_predicted_with_it(cache):
    evaluation = evaluation_of(cache, a_predictor())
    chosen = choose_windows(evaluation.held_out_segments(), evaluation.config.evaluate.num_context_steps + 1, 3)
    for step, number, _ in iter_one_steps(evaluation, chosen):
        batch, h = evaluation.read_windows(chosen.index, [number])
        predicted = evaluation.model.teacher_forcing(h, batch.actions, batch.states)[0, -1]
        error = (predicted - h[0, -1]).abs().mean().item()
        assert step.energies(step.true[None]) == pytest.approx(error, abs=1e-5)


def test_an_oracle_ranks_the_true_action_first_and_its_opposite_last(cache):
    evaluations = [evaluation_of(cache, Oracle(cache.scaler, sign)) for sign in (1.0, -1.0)]
    (best, bins, _), (worst, _, _) = (measure_ranks(one, pool_of(one)) for one in evaluations)
    assert best["energy"]["mean_rank"] < 0.02 and bins[:, 0].mean() > 0.99
    assert worst["energy"]["mean_rank"] > 0.9  # not 1: the L1 distance to the opposite is not largest exactly there
    assert best["energy"]["margin_l1"] > 0.1 and best["energy"]["true_l1"] < 0.01


def test_a_predictor_that_ignores_its_actions_gets_exactly_chance(cache):
    evaluation = evaluation_of(cache, a_predictor(action_weight=0.0), energy_samples=30, batch_size=7)
    sections, _, _ = measure_ranks(evaluation, pool_of(evaluation))
    assert sections["energy"]["mean_rank"] == 0.5 and sections["energy_ci"]["mean_rank"] == [0.5, 0.5]
    assert sections["energy"]["top10_rate"] == pytest.approx(0.1, abs=1e-12)
    assert abs(sections["energy"]["margin_l1"]) < 1e-6


def test_places_that_are_tied_are_equally_likely():
    ranks, bins = rank_actions(np.array([0, 1, 19]), np.array([0, 2, 0]), 20)
    assert ranks == pytest.approx([0, 2 / 19, 1])
    assert bins[0, 0] == 1 and bins[2, 9] == 1 and bins.sum(axis=1) == pytest.approx(1)
    assert bins[1, :3] == pytest.approx([1 / 3, 2 / 3, 0])


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
    maps = measure_maps(evaluation, pool_of(evaluation))
    segments = {segment.episode: segment for segment in evaluation.held_out_segments()}
    assert [one.episode for one in maps] == sorted(segments)
    assert any(segment.start for segment in segments.values())  # so that rows of the store are no steps of the episode
    for one in maps:
        assert one.axes == (("dyaw", "deg"), ("dpitch", "deg"))
        turns = one.energies[:, MIDDLE]  # along dyaw
        assert turns.argmin() == MIDDLE and (turns[[0, -1]] > 0.1).all()
        assert np.ptp(one.energies, axis=1).max() < 1e-6  # the oracle's tokens do not follow the pitch
        segment = segments[one.episode]
        raw = cache.dataset.controls(segment.store)[0]
        assert one.grid[:, MIDDLE] == pytest.approx(raw[segment.start + one.first_step + 1, 2:4]), "after two steps"
        assert 0 <= one.first_step < segment.stop - segment.start


@pytest.mark.parametrize(("height", "flat"), [(1e-6, True), (0.2, False)])
def test_a_map_without_a_landscape_is_drawn_in_one_colour_and_called_flat(tmp_path, monkeypatch, height, flat):
    figures, line = [], np.linspace(-1, 1, MAP_STEPS)
    monkeypatch.setattr(energy, "save_figure", lambda figure, path: figures.append(figure))
    bowl = 0.5 + height / 2 * (line[:, None] ** 2 + line[None] ** 2)
    axes = (("dyaw", "deg"), ("dpitch", "deg"))
    energy.draw_maps([energy.EnergyMap("episode", 0, axes, np.stack([line, line]), bowl)], tmp_path / "x", note="")
    titled = [(axes.get_title(), axes.collections[0]) for axes in figures[0].axes if axes.get_title()]
    for title, mesh in titled:
        colours = mesh.to_rgba(mesh.get_array()).reshape(-1, 4)
        assert ("flat" in title, np.ptp(colours, axis=0).max() < 0.05) == (flat, flat), title
    assert len(titled) == 2


def test_a_turn_takes_its_mouse_counts_along_and_nothing_else_moves():
    space = get_action_space("vpt13")
    true = np.arange(13, dtype=np.float32)
    shifted = shift_actions(space, true, [2, 3], np.array([[-3.0, 0.0, 3.0], [0.0, 1.5, 0.0]]))
    change = shifted - true
    assert change[2, 0, :4] == pytest.approx([20, 0, 3, 0]) and change[0, 1, :4] == pytest.approx([-20, 10, -3, 1.5])
    assert np.array_equal(shifted[1, 0], true) and (change[..., 4:] == 0).all()


@pytest.mark.parametrize(
    ("space", "requested", "still", "expected"),
    [
        ("pose7", None, (), ("dx", "dz")),
        ("pose7", None, ("dz",), ("dx", "dy")),
        ("pose7", ("dy", "dz"), ("dz",), ("dy",)),
        ("vpt13", None, (), ("dyaw", "dpitch")),
        ("vpt25", None, (), ("cameraX", "cameraY")),
        ("vector_last3x1", None, ("action_0",), ("action_1", "action_2")),
        ("vector_last2x1", None, ("action_0",), ("action_1",)),
    ],
)
def test_the_axes_suit_the_action_space_and_what_changes(space, requested, still, expected):
    space = get_action_space(space)
    moving = np.array([column.name not in still for column in space.actions])
    assert choose_axes(space, requested, moving) == list(expected)


def test_axes_that_cannot_be_are_refused_before_anything_is_measured(cache):
    assert MEASUREMENTS["energy"].check is check_axes
    for name in ("mouse_dx", "no_such_column", "jump"):
        words = rf"energy_axes: '{name}' cannot be an axis of vpt13; choose two of dyaw, dpitch"
        with pytest.raises(ValueError, match=words):
            check_axes(evaluation_of(cache, None, energy_axes=("dyaw", name)))


def test_metrics_and_pictures_are_left(cache, tmp_path):
    (tmp_path / "pictures").mkdir()
    evaluation = evaluation_of(cache, a_predictor())
    sections = write_energy(evaluation, tmp_path)
    assert set(sections) == {"energy", "energy_ci"}
    assert sections["energy"]["num_windows"] == 9 and sections["energy"]["num_samples"] == 20
    for name in ("energy_ranks.png", "energy_maps.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
