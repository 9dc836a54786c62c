"""Pictures of an evaluation.

Claims:
- true and predicted tokens of all strips are coloured in one basis, fitted on the true ones;
- every column of horizon.csv that has an interval is drawn, new ones too;
- the animation has a picture for each step that shows that step's frame, tokens and error, and is small;
- recorded actions are those between the steps of the segments, never one that leads out of them;
- a strip shows the window's own anchor frames where the recording is here, and a grey cell that says so where it is not;
- pictures are whole files.
"""

import hashlib

import numpy as np
import pytest
from PIL import Image

from jepa_cache.actions import Column
from jepa_cache.evaluation.pictures import (
    HELD_OUT,
    LABELS,
    Strip,
    TokenColours,
    build_strips,
    draw_actions,
    draw_horizon,
    draw_pictures,
    draw_strip,
    draw_training,
    read_segment_actions,
    spread_positions,
    write_animation,
)
from jepa_cache.evaluation.windows import PREDICTIONS, WindowErrors, measure_windows
from jepa_cache.media.video import open_video
from jepa_cache.store.digests import DigestTable
from tests.caches import TICKS_PER_STEP, Cache, make_cache
from tests.evaluation.evaluations import a_predictor, evaluation_of
from tests.makers import make_vpt_pair, write_vpt_tar

RNG = np.random.default_rng(0)
RED, GREY = (255, 0, 0), (0xEE, 0xEE, 0xEE)


def make_strip(frames: bool = True) -> Strip:
    tokens = RNG.standard_normal((5, 6, 8))
    colours = TokenColours(tokens)
    true, predicted = colours.paint(tokens, (2, 3)), colours.paint(RNG.standard_normal((3, 6, 8)), (2, 3))
    pictures = np.full((5, 48, 64, 3), (255, 0, 0), np.uint8) if frames else None
    return Strip("an episode, steps 0 to 4", pictures, true, predicted, RNG.random((3, 2, 3)))


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


def test_a_strip_shows_its_frames_and_grey_cells_where_the_recording_is_missing(tmp_path):
    red, grey = {}, {}
    for frames in (True, False):
        draw_strip(make_strip(frames=frames), tmp_path / "strip.png")
        red[frames], grey[frames] = (share_of(tmp_path / "strip.png", colour) for colour in (RED, GREY))
    assert 0.05 < red[True] < 0.3 and red[False] == 0 and grey[False] > grey[True] + 0.05


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


def test_the_animation_shows_each_step_with_its_own_panels(tmp_path):
    frames = np.broadcast_to(50 * np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 32, 48, 3))
    error = np.stack([np.full((2, 3), level) for level in (0.0, 0.5, 1.0)])
    strip = make_strip()._replace(frames=frames, error=error)
    path, brightness = tmp_path / "rollout.gif", []
    write_animation(strip, path)
    assert path.stat().st_size < 300_000
    with Image.open(path) as animation:
        assert animation.n_frames == 5
        for step in range(5):
            animation.seek(step)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
            centre = lambda row, column: np.median(pixels[row - 9 : row + 9, column - 9 : column + 9])  # noqa: B023, E731
            assert abs(centre(int(height * 0.6), width // 2) - 50 * step) < 12
            brightness.append(centre(int(height * 1.55), int(width * 1.4)))
    assert brightness[0] == brightness[1] > 200, "context steps have no error, their panel is grey"
    assert brightness[2] < 20 < brightness[3] < brightness[4]


def test_actions_of_held_out_and_training_episodes_are_both_drawn(tmp_path):
    columns = [Column("dyaw", "deg", "continuous"), Column("still", "", "continuous"), Column("jump", "", "binary")]
    training = np.stack([RNG.standard_normal(500), np.zeros(500), RNG.random(500) < 0.5], axis=1)
    draw_actions(columns, training, training[:40], tmp_path / "actions.png")
    assert share_of(tmp_path / "actions.png", tuple(bytes.fromhex(HELD_OUT[1:]))) > 0.005


# --- from a recording -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Cache, dict[str, bytes], WindowErrors]:
    """A cache whose one unit is a tar shard of videos that is on this machine, and its measured windows."""
    folder = tmp_path_factory.mktemp("recorded")
    pairs = {f"episode-{number}": make_vpt_pair(12 * TICKS_PER_STEP, seed=number) for number in range(5)}
    tar = write_vpt_tar(folder / "shards/a.tar", pairs)
    units = {hashlib.sha256(tar.read_bytes()).hexdigest(): list(pairs)}
    cache = make_cache(folder, units=units, num_steps=12)
    videos = {key: video for key, (video, _) in pairs.items()}
    return cache, videos, measure_windows(evaluation_of(cache, a_predictor()))


def strips_of(recorded, positions: list[int]) -> list[Strip]:
    cache, _, errors = recorded
    DigestTable().digest_unit([cache.folder / "shards/a.tar"])  # as the encode of this machine did
    return build_strips(positions, errors, evaluation_of(cache, a_predictor()))


def test_a_strip_shows_the_anchor_frames_of_its_own_window(recorded):
    cache, videos, errors = recorded
    (strip,) = strips_of(recorded, [7])
    window, segment = errors.chosen.windows[7], errors.chosen.segments[7]
    start = window.start - segment.start
    num_steps = cache.config.evaluate.num_context_steps + cache.config.evaluate.horizon
    video = open_video(videos[segment.episode])
    expected = video.read((start + np.arange(num_steps)) * TICKS_PER_STEP)
    video.close()
    assert start > 0 and np.array_equal(strip.frames, expected)
    assert strip.title.startswith(f"{segment.episode}, steps {start} to {start + num_steps - 1}")
    assert (len(strip.true), len(strip.predicted), len(strip.error)) == (num_steps, 4, 4)
    assert np.allclose(strip.error.mean(axis=(1, 2)), errors.horizon["model"][7], atol=1e-5)
    assert not np.isclose(strip.predicted, strip.true[-4:]).all(axis=-1).any(), "what was predicted, not what is true"


def test_all_strips_share_one_basis_and_actions_stay_inside_their_segments(recorded):
    cache, _, errors = recorded
    together = strips_of(recorded, [0, 1])
    assert np.allclose(strips_of(recorded, [1])[0].true, together[1].true, atol=1e-5)
    overlap = errors.chosen.windows[1].start - errors.chosen.windows[0].start
    assert 0 < overlap < len(together[0].true)
    assert np.allclose(together[0].true[overlap:], together[1].true[:-overlap], atol=1e-6), "the same steps, twice"
    segments = cache.dataset.segments_of("val", cache.config.split)
    actions = read_segment_actions(cache.dataset, segments)
    assert len(actions) == sum(segment.stop - segment.start - 1 for segment in segments) and np.isfinite(actions).all()


def test_an_evaluation_leaves_its_pictures(recorded, tmp_path):
    cache, _, errors = recorded
    row = {"horizon": 1, "model": 0.5, "model_low": 0.4, "model_high": 0.6}
    draw_pictures(errors, evaluation_of(cache, a_predictor(), num_context_steps=1, horizon=1), [row], tmp_path)
    expected = ["actions.png", "horizon.png", "rollout1.gif", "strip1.png", "strip2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            image.verify()


def test_positions_are_spread_and_never_twice():
    assert (
        spread_positions(160, 2) == [40, 120] and spread_positions(3, 8) == [0, 1, 2] and spread_positions(1, 2) == [0]
    )


def test_the_course_of_a_training_is_drawn_with_held_out_losses_where_there_are_some(tmp_path):
    """Empty cells are those of training steps without a validation."""
    sizes = []
    for number, held_out in enumerate(("", "0.9")):
        (tmp_path / "train.csv").write_text(f"step,total,val_total\n10,1.5,\n20,1.2,{held_out}\n30,1.0,{held_out}\n")
        draw_training(tmp_path / "train.csv", tmp_path / f"{number}.png")
        sizes.append(len((tmp_path / f"{number}.png").read_bytes()))
    assert 1000 < sizes[0] != sizes[1]
