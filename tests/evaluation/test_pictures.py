"""Pictures of an evaluation.

Claims:
- true and foreseen tokens of all films are coloured in one basis, fitted on the true ones;
- every column of horizon.csv that has an interval is drawn, new ones too;
- films are of the windows that their words say; each panel holds every step, and what was given but not foreseen is grey;
- a film shows the window's own anchor frames, the errors that were measured and the recorded frames nearest to what is foreseen: of a predictor
  that knows the truth the true ones; where the recording is not here, words say so;
- an arrow points where the action turns, and is as long as it is large.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jepa_cache.evaluation.figures import describe_windows
from jepa_cache.evaluation.pictures import (
    FRAME_WIDTH,
    GONE,
    GREY,
    LABELS,
    TOKEN_WIDTH,
    Film,
    TokenColours,
    choose_films,
    describe_moves,
    draw_horizon,
    draw_training,
    put_side_by_side,
    write_films,
)
from jepa_cache.evaluation.windows import PREDICTIONS, WindowErrors, measure_windows
from jepa_cache.media.video import open_video
from jepa_cache.store.digests import DigestTable
from tests.caches import TICKS_PER_STEP, Cache, make_recorded
from tests.evaluation.evaluations import Oracle, a_predictor, evaluation_of

RNG = np.random.default_rng(0)


def share_of(path, colour: tuple[int, int, int]) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return float((pixels == np.array(colour, np.uint8)).all(axis=-1).mean())


def test_equal_tokens_have_equal_colours_in_the_basis_of_all_where_they_stand_on_the_grid():
    many = RNG.standard_normal((40, 300, 8)) * np.array([9, 7, 5, 1, 1, 1, 1, 1])
    assert np.allclose(np.abs(TokenColours(many).basis.components_), np.eye(3, 8), atol=0.1), "up to chance"
    one = np.zeros((1, 6, 8))
    one[0, 4, 0] = 1.0  # row 1, column 1 of 2 x 3
    first = TokenColours(one + 1e-6 * RNG.standard_normal(one.shape)).paint(one, (2, 3))[0, :, :, 0]
    assert np.argwhere(np.abs(first - np.median(first)) > 0.5).tolist() == [[1, 1]]
    tokens = RNG.standard_normal((4, 6, 8))
    colours = TokenColours(tokens)
    true = colours.paint(tokens, (2, 3))
    assert true.shape == (4, 2, 3, 3) and np.array_equal(colours.paint(tokens[2:], (2, 3)), true[2:])
    assert true.min() == 0 and true.max() == 1 and len(np.unique(true.round(6))) > 50
    far = colours.paint(100 * RNG.standard_normal((2, 6, 8)), (2, 3))
    assert ((far == 0) | (far == 1)).mean() > 0.9, "clipped and not rescaled"


def test_the_error_against_horizon_shows_every_prediction(tmp_path):
    assert set(PREDICTIONS) == set(LABELS)
    rows = [
        {"horizon": step}
        | {
            f"{name}{end}": rank + step / 10 + shift
            for rank, name in enumerate(LABELS)
            for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
        }
        for step in range(1, 5)
    ]
    rows[0] |= {"next_actions": None, "next_actions_low": None, "next_actions_high": None}
    draw_horizon(rows, tmp_path / "horizon.png", note="made up")
    image = Image.open(tmp_path / "horizon.png")
    assert image.format == "PNG" and image.width > 600 and image.height > 400
    for name, (_, colour) in LABELS.items():
        assert share_of(tmp_path / "horizon.png", tuple(bytes.fromhex(colour[1:]))) > 0.0003, name


def test_films_are_the_best_of_those_that_move_most_the_median_and_the_worst_window():
    copied = np.array([0.1] * 17 + [0.9, 1.0, 0.2])
    gains = np.array([0.0, *np.linspace(0.05, 0.45, 16), 0.3, 0.2, 0.9])
    errors = SimpleNamespace(open_loop={"l1": {"copy_last": copied[:, None], "model": (copied * (1 - gains))[:, None]}})
    films = choose_films(errors)
    best, median, worst = (film.position for film in films)
    assert best == 17, "of the two that move most, not number 19, whose gain is largest"
    assert sorted(gains)[10] == gains[median] and worst == 0
    assert "2 of 20 windows" in films[0].reason and "median of 20" in films[1].reason
    same = SimpleNamespace(open_loop={"l1": {name: np.ones((1, 4)) for name in ("copy_last", "model")}})
    assert [film.position for film in choose_films(same)] == [0], "one window is one film"


def test_pictures_are_the_last_cells_of_a_sheet_whole_and_the_others_are_grey(tmp_path):
    tall = np.full((40, 20, 3), (255, 0, 0), np.uint8)
    put_side_by_side([tall, None], 4, (40, 40), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (40, 160, 3)
    assert (sheet[:, :80] == GREY).all() and (sheet[:, 120:] == GREY).all()
    assert (sheet[:, 92:108] == (255, 0, 0)).all() and (sheet[:, 80:88] == 0).all(), "neither stretched nor cut"


def test_arrows_point_where_the_view_turns_and_show_how_far(cache):
    actions = np.zeros((1, 2, 2, 13))
    actions[0, :, 0, 2:4] = (30, 40), (-25, 0)  # to the right and down; to the left
    described = describe_moves(evaluation_of(cache, a_predictor()), cache.scaler.actions.apply(actions))
    first, second = described[0][0][0], described[0][1][0]
    assert first["angle"] == pytest.approx(np.degrees(np.arctan2(40, 30)), abs=1e-3), "clockwise, as a screen has it"
    assert (first["length"], second["length"]) == (pytest.approx(1), pytest.approx(0.5, abs=1e-4))
    assert abs(second["angle"]) == pytest.approx(180, abs=1e-3) and second["words"] == "dyaw -25 deg, dpitch +0 deg"
    assert described[0][0][1]["length"] < 1e-4


# --- from a recording -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Cache, dict[str, bytes], WindowErrors]:
    """A cache whose one unit is a tar shard of videos that is on this machine, and its measured windows."""
    cache, _, videos = make_recorded(tmp_path_factory.mktemp("recorded"), 5)
    return cache, videos, measure_windows(evaluation_of(cache, a_predictor()))


def films_of(cache: Cache, predictor, errors: WindowErrors, positions: list[int], out) -> list[dict]:
    (out / "pictures").mkdir()
    evaluation, films = evaluation_of(cache, predictor), [Film("a", "b", position) for position in positions]
    write_films(films, errors, describe_windows(evaluation, errors), evaluation, out)
    return json.loads((out / "measurements/films.json").read_text())["films"]


def cells(path, count: int) -> list[np.ndarray]:
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.split(sheet, count, axis=1)


def test_a_film_shows_its_own_frames_and_the_measured_errors_and_nothing_before_it_is_foreseen(recorded, tmp_path):
    cache, videos, errors = recorded
    DigestTable().digest_unit([cache.folder / "shards/a.tar"])  # as the encode of this machine did
    (film,) = films_of(cache, a_predictor(), errors, [7], tmp_path)
    window, segment = errors.chosen.windows[7], errors.chosen.segments[7]
    start, context = window.start - segment.start, cache.config.evaluate.num_context_steps
    num_steps = context + cache.config.evaluate.horizon
    with open_video(videos[segment.episode]) as video:
        expected = video.read((start + np.arange(num_steps)) * TICKS_PER_STEP)
    assert start > 0 and film["place"].startswith(f"{segment.episode}, from step {start} (")
    happened, foreseen, _, copied = film["panels"]
    shown = cells(tmp_path / "pictures" / happened["frames"], num_steps)
    for cell, frame in zip(shown, expected, strict=True):
        scaled = Image.fromarray(frame).resize((FRAME_WIDTH, cell.shape[0]))
        assert np.abs(cell - np.asarray(scaled)).mean() < 6, "but for what a JPEG loses"
    for panel, name in ((foreseen, "model"), (film["panels"][2], "shuffled_actions"), (copied, "copy_last")):
        assert panel["token_words"] == [None] * context + [
            f"L1 {error:.3f}" for error in errors.open_loop["l1"][name][7]
        ]
        tokens = cells(tmp_path / "pictures" / panel["tokens"], num_steps)
        assert [bool((cell == GREY).all()) for cell in tokens] == [True] * context + [False] * 4
        assert tokens[0].shape[1] == TOKEN_WIDTH
    true = cells(tmp_path / "pictures" / happened["tokens"], num_steps)
    copies = cells(tmp_path / "pictures" / copied["tokens"], num_steps)[context:]
    assert all((copy == true[context - 1]).all() for copy in copies)
    assert all(words.startswith("nearest: ") and GONE not in words for words in foreseen["frame_words"][context:])
    assert len(happened["moves"]) == num_steps and happened["moves"][0] is None


def test_a_predictor_that_knows_the_truth_foresees_what_is_nearest_to_the_true_frames(recorded, tmp_path):
    cache, _, _ = recorded
    oracle = Oracle(cache.scaler)
    errors = measure_windows(evaluation_of(cache, oracle))
    DigestTable().digest_unit([cache.folder / "shards/a.tar"])
    for film in films_of(cache, oracle, errors, [2, 9], tmp_path):
        context = cache.config.evaluate.num_context_steps
        happened, foreseen, other, _ = film["panels"]
        assert foreseen["frame_words"][context:] == ["nearest: the true step"] * 4
        assert other["frame_words"] != foreseen["frame_words"], "with other actions it foresees something else"
        pictures = [
            cells(tmp_path / "pictures" / panel["frames"], context + 4)[context:] for panel in (happened, foreseen)
        ]
        assert np.abs(np.subtract(*pictures)).mean() < 3


def test_where_the_recording_is_gone_the_words_say_so(cache, tmp_path):
    errors = measure_windows(evaluation_of(cache, a_predictor()))
    (film,) = films_of(cache, a_predictor(), errors, [3], tmp_path)
    happened, foreseen, *_ = film["panels"]
    assert all(panel["frames"] is None for panel in film["panels"]) and not list(tmp_path.glob("pictures/*.jpg"))
    assert set(happened["frame_words"]) == {GONE}
    assert all(words.startswith("nearest: ") and words.endswith(GONE) for words in foreseen["frame_words"][-4:])


def test_the_course_of_a_training_is_drawn_with_held_out_losses_where_there_are_some(tmp_path):
    """Empty cells are those of training steps without a validation."""
    sizes = []
    for number, held_out in enumerate(("", "0.9")):
        (tmp_path / "train.csv").write_text(f"step,total,val_total\n10,1.5,\n20,1.2,{held_out}\n30,1.0,{held_out}\n")
        draw_training(tmp_path / "train.csv", tmp_path / f"{number}.png")
        sizes.append(len((tmp_path / f"{number}.png").read_bytes()))
    assert 1000 < sizes[0] != sizes[1]
