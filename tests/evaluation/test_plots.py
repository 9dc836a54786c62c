"""Pictures of an evaluation.

Claims:
- true and predicted tokens of all strips are coloured in one basis, fitted on the true ones;
- every column of horizon.csv that has an interval is drawn, new ones too;
- the animation has a picture for each step that shows that step's frame, tokens and error, and is small;
- recorded actions are those between the steps of the segments, never one that leads out of them;
- a strip shows the window's own anchor frames where the recording is here, and a grey cell that says so where it is not;
- a recording with the right digest that lacks the episode is an error; pictures are whole PNG files of a sensible size.
"""

import hashlib

import numpy as np
import pytest
from PIL import Image

from jepa_cache.actions import Column
from jepa_cache.evaluation.context import open_evaluation
from jepa_cache.evaluation.pictures import (
    GAP,
    HELD_OUT,
    LABELS,
    LINE,
    NUM_STRIPS,
    PANEL_WIDTH,
    Strip,
    build_strips,
    draw_actions,
    draw_horizon,
    draw_strip,
    fit_colours,
    fit_window_colours,
    list_series,
    read_segment_actions,
    spread_positions,
    write_animation,
)
from jepa_cache.evaluation.run import evaluate_run
from jepa_cache.evaluation.windows import PREDICTIONS, measure_windows
from jepa_cache.media.video import open_video
from jepa_cache.store.digests import DigestTable
from jepa_cache.training.trainer import train
from tests.caches import TICKS_PER_STEP, Cache, make_cache
from tests.makers import make_vpt_pair, write_vpt_tar

RNG = np.random.default_rng(0)


def make_strip(frames: bool = True) -> Strip:
    tokens = RNG.standard_normal((5, 6, 8))
    colours = fit_colours(tokens)
    true, predicted = colours.paint(tokens, (2, 3)), colours.paint(RNG.standard_normal((3, 6, 8)), (2, 3))
    pictures = np.full((5, 48, 64, 3), (255, 0, 0), np.uint8) if frames else None
    return Strip("an episode, steps 0 to 4", pictures, true, predicted, RNG.random((3, 2, 3)))


def share_of(path, colour: tuple[int, int, int]) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return float((pixels == np.array(colour, np.uint8)).all(axis=-1).mean())


def test_equal_tokens_have_equal_colours_wherever_they_stand():
    tokens = RNG.standard_normal((4, 6, 8))
    colours = fit_colours(tokens)
    true = colours.paint(tokens, (2, 3))
    assert true.shape == (4, 2, 3, 3) and np.array_equal(colours.paint(tokens[2:], (2, 3)), true[2:])
    assert true.min() == 0 and true.max() == 1 and len(np.unique(true.round(6))) > 50


def test_what_lies_far_outside_is_clipped_and_not_rescaled():
    far = fit_colours(RNG.standard_normal((4, 6, 8))).paint(100 * RNG.standard_normal((2, 6, 8)), (2, 3))
    assert ((far == 0) | (far == 1)).mean() > 0.9


def test_the_basis_of_many_tokens_is_that_of_all_of_them_up_to_chance():
    tokens = RNG.standard_normal((40, 300, 8)) * np.array([9, 7, 5, 1, 1, 1, 1, 1])
    components = fit_colours(tokens).components
    assert np.allclose(np.abs(components), np.eye(3, 8), atol=0.1)


def test_colours_follow_rows_and_columns_of_the_grid():
    tokens = np.zeros((1, 6, 8))
    tokens[0, 4, 0] = 1.0  # row 1, column 1 of 2 x 3
    first = fit_colours(tokens + 1e-6 * RNG.standard_normal(tokens.shape)).paint(tokens, (2, 3))[0, :, :, 0]
    odd = np.abs(first - np.median(first)) > 0.5
    assert np.argwhere(odd).tolist() == [[1, 1]]


def test_a_strip_is_a_png_and_shows_its_frames(tmp_path):
    draw_strip(make_strip(), tmp_path / "strip.png")
    image = Image.open(tmp_path / "strip.png")
    assert image.format == "PNG" and 600 < image.width < 2000 and 400 < image.height < 1500
    assert 0.05 < share_of(tmp_path / "strip.png", (255, 0, 0)) < 0.3


def test_a_missing_recording_shows_grey_cells(tmp_path):
    draw_strip(make_strip(), tmp_path / "with.png")
    draw_strip(make_strip(frames=False), tmp_path / "without.png")
    grey = [share_of(tmp_path / f"{name}.png", (0xEE, 0xEE, 0xEE)) for name in ("with", "without")]
    assert grey[1] > grey[0] + 0.05 and share_of(tmp_path / "without.png", (255, 0, 0)) == 0


def test_the_error_against_horizon_shows_every_prediction(tmp_path):
    assert set(PREDICTIONS) == set(LABELS)
    names = {name: colour for name, (_, colour) in LABELS.items()} | {"something_new": "#637939"}
    rows = [
        {"horizon": step, "num_windows": 7}
        | {f"{name}{end}": rank + step / 10 + shift for rank, name in enumerate(names)
        for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1))}
        for step in range(1, 5)
    ]  # fmt: skip
    rows[0] |= {"next_actions": None, "next_actions_low": None, "next_actions_high": None}
    assert list_series(list(rows[0])) == list(names)
    draw_horizon(rows, tmp_path / "horizon.png", note="made up")
    image = Image.open(tmp_path / "horizon.png")
    assert image.format == "PNG" and image.width > 600 and image.height > 400
    for name, colour in names.items():
        assert share_of(tmp_path / "horizon.png", tuple(bytes.fromhex(colour[1:]))) > 0.0003, name


def panel(picture: Image.Image, number: int) -> np.ndarray:
    """Pixels of one of the animation's four panels: rows and columns of its inside."""
    height = (picture.height - LINE - GAP) // 2 - LINE - GAP
    left = GAP + (number % 2) * (PANEL_WIDTH + GAP)
    top = 2 * LINE + GAP + (number // 2) * (height + LINE + GAP)
    return np.asarray(picture.convert("RGB").crop((left, top, left + PANEL_WIDTH, top + height)))


def test_the_animation_shows_each_step_with_its_own_panels(tmp_path):
    strip = make_strip()
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[:] = 50 * np.arange(5)[:, None, None, None]
    strip = strip._replace(frames=frames, error=np.stack([np.full((2, 3), level) for level in (0.0, 0.5, 1.0)]))
    path = tmp_path / "rollout.gif"
    write_animation(strip, path)
    assert path.stat().st_size < 300_000
    with Image.open(path) as animation:
        assert animation.n_frames == 5
        errors = []
        for step in range(5):
            animation.seek(step)
            picture = animation.convert("RGB")
            assert abs(float(np.median(panel(picture, 0))) - 50 * step) < 12
            cells = [(1, strip.true[step])] + ([(2, strip.predicted[step - 2])] if step >= 2 else [])
            for number, colours in cells:
                pixels = panel(picture, number)
                height = len(pixels)
                centre = pixels[height // 4 :: height // 2, PANEL_WIDTH // 6 :: PANEL_WIDTH // 3][:2, :3]
                assert np.abs(centre / 255 - colours).max() < 0.12, (step, number)
            errors.append(panel(picture, 3).mean())
    assert errors[0] == pytest.approx(errors[1], abs=1), "context steps have no error"
    assert errors[2] < 20 < errors[3] < errors[4]


def test_actions_of_held_out_and_training_episodes_are_both_drawn(tmp_path):
    columns = [Column("dyaw", "deg", "continuous"), Column("still", "", "continuous"), Column("jump", "", "binary")]
    training = np.stack([RNG.standard_normal(500), np.zeros(500), RNG.random(500) < 0.5], axis=1)
    draw_actions(columns, training, training[:40], tmp_path / "actions.png")
    assert share_of(tmp_path / "actions.png", tuple(bytes.fromhex(HELD_OUT[1:]))) > 0.005
    many = [Column(f"column{number}", "", "continuous") for number in range(40)]
    draw_actions(many, np.zeros((9, 40)), np.zeros((5, 40)), tmp_path / "many.png")
    assert Image.open(tmp_path / "many.png").height < 2000, "24 of them"


# --- from a recording -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> tuple[Cache, dict[str, bytes]]:
    """A cache whose one unit is a tar shard of videos that is on this machine."""
    monkeypatch.setenv("JEPA_RUNS_HOME", str(tmp_path / "runs"))
    pairs = {f"episode-{number}": make_vpt_pair(12 * TICKS_PER_STEP, seed=number) for number in range(5)}
    tar = write_vpt_tar(tmp_path / "shards/a.tar", pairs)
    units = {hashlib.sha256(tar.read_bytes()).hexdigest(): list(pairs)}
    cache = make_cache(tmp_path, "train.num_steps=6", units=units, num_steps=12)
    assert DigestTable().digest_unit([tar]) in units
    return cache, {key: video for key, (video, _) in pairs.items()}


def strip_of(cache: Cache, position: int) -> tuple[Strip, str, int]:
    config, folder = cache.config, cache.folder
    weights = train(config, cache.dataset, cache.scaler, folder / "train/run", base=folder).weights
    evaluation = open_evaluation(config, cache.dataset, weights)
    errors = measure_windows(evaluation)
    (strip,) = build_strips([position], errors, evaluation, fit_window_colours(errors, evaluation))
    window = errors.chosen.windows[position]
    segment = errors.chosen.segments[position]
    assert np.allclose(strip.error.mean(axis=(1, 2)), errors.horizon["model"][position], atol=1e-5)
    return strip, segment.episode, window.start - segment.start


def test_a_strip_shows_the_anchor_frames_of_its_own_window(recorded):
    cache, videos = recorded
    strip, episode, start = strip_of(cache, 7)
    num_steps = cache.config.evaluate.num_context_steps + cache.config.evaluate.horizon
    video = open_video(videos[episode])
    expected = video.read((start + np.arange(num_steps)) * TICKS_PER_STEP)
    video.close()
    assert start > 0 and np.array_equal(strip.frames, expected)
    assert strip.title.startswith(f"{episode}, steps {start} to {start + num_steps - 1}")
    assert (len(strip.true), len(strip.predicted), len(strip.error)) == (num_steps, 4, 4)


def test_all_strips_share_one_basis_and_actions_stay_inside_their_segments(recorded):
    cache, _ = recorded
    weights = train(cache.config, cache.dataset, cache.scaler, cache.folder / "train/run", base=cache.folder).weights
    evaluation = open_evaluation(cache.config, cache.dataset, weights)
    errors = measure_windows(evaluation)
    colours = fit_window_colours(errors, evaluation)
    together = build_strips([0, 1], errors, evaluation, colours)
    assert np.allclose(build_strips([1], errors, evaluation, colours)[0].true, together[1].true, atol=1e-5)
    overlap = errors.chosen.windows[1].start - errors.chosen.windows[0].start
    assert 0 < overlap < len(together[0].true)
    assert np.allclose(together[0].true[overlap:], together[1].true[:-overlap], atol=1e-6), "the same steps, twice"
    segments = evaluation.held_out_segments()
    actions = read_segment_actions(cache.dataset, segments)
    assert len(actions) == sum(segment.stop - segment.start - 1 for segment in segments) and np.isfinite(actions).all()


def test_positions_are_spread_and_never_twice():
    assert (
        spread_positions(160, 2) == [40, 120] and spread_positions(3, 8) == [0, 1, 2] and spread_positions(1, 2) == [0]
    )


def test_a_recording_that_is_gone_or_changed_is_not_shown(recorded):
    cache, _ = recorded
    with (cache.folder / "shards/a.tar").open("ab") as file:
        file.write(b"more")
    assert strip_of(cache, 0)[0].frames is None


def test_a_recording_without_the_episode_is_an_error(recorded, monkeypatch):
    cache, _ = recorded
    monkeypatch.setattr(
        "jepa_cache.data.frames.build_source", lambda *_: type("Empty", (), {"iter_episodes": lambda *_: []})()
    )
    with pytest.raises(ValueError, match=r"a\.tar has the digest .* does not hold it"):
        strip_of(cache, 0)


def test_an_evaluation_leaves_its_pictures_and_none_of_an_earlier_one(recorded):
    cache, _ = recorded
    out = cache.folder / "evaluate"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures/strip9.png").touch()
    weights = train(cache.config, cache.dataset, cache.scaler, cache.folder / "train/run", base=cache.folder).weights
    evaluate_run(cache.config, cache.dataset, weights, out)
    expected = [
        "actions.png",
        "horizon.png",
        "rollout1.gif",
        *(f"strip{number + 1}.png" for number in range(NUM_STRIPS)),
    ]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == expected
    for path in (out / "pictures").iterdir():
        with Image.open(path) as image:
            image.verify()
