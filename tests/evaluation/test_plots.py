"""Pictures of an evaluation.

Claims:
- true and predicted tokens are coloured in one basis, fitted on the true ones;
- a strip shows the window's own anchor frames where the recording is here, and a grey cell that says so where it is not;
- a recording with the right digest that lacks the episode is an error; pictures are whole PNG files of a sensible size.
"""

import hashlib

import numpy as np
import pytest
from PIL import Image

from jepa_cache.evaluation.plots import LABELS, Strip, draw_horizon, draw_strip, token_colours
from jepa_cache.evaluation.report import NUM_STRIPS, evaluate_run
from jepa_cache.evaluation.strips import build_strip
from jepa_cache.evaluation.subject import open_subject
from jepa_cache.evaluation.windows import PREDICTIONS, measure_windows
from jepa_cache.media.video import open_video
from jepa_cache.store.digests import DigestTable
from jepa_cache.training.trainer import train
from tests.caches import TICKS_PER_STEP, Cache, make_cache
from tests.makers import make_vpt_pair, write_vpt_tar

RNG = np.random.default_rng(0)


def make_strip(frames: bool = True) -> Strip:
    true, predicted = token_colours(RNG.standard_normal((5, 6, 8)), RNG.standard_normal((3, 6, 8)), (2, 3))
    pictures = np.full((5, 48, 64, 3), (255, 0, 0), np.uint8) if frames else None
    return Strip("an episode, steps 0 to 4", pictures, true, predicted, RNG.random((3, 2, 3)))


def share_of(path, colour: tuple[int, int, int]) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return float((pixels == np.array(colour, np.uint8)).all(axis=-1).mean())


def test_equal_tokens_have_equal_colours_in_both_rows():
    tokens = RNG.standard_normal((4, 6, 8))
    true, same = token_colours(tokens, tokens[2:], (2, 3))
    assert true.shape == (4, 2, 3, 3) and np.array_equal(same, true[2:])
    assert true.min() == 0 and true.max() == 1 and len(np.unique(true.round(6))) > 50


def test_the_basis_is_of_the_true_tokens_alone():
    tokens = RNG.standard_normal((4, 6, 8))
    one, _ = token_colours(tokens, tokens[:1], (2, 3))
    other, far = token_colours(tokens, 100 * RNG.standard_normal((2, 6, 8)), (2, 3))
    assert np.array_equal(one, other)
    assert ((far == 0) | (far == 1)).mean() > 0.9, "what lies far outside is clipped, not rescaled"


def test_colours_follow_rows_and_columns_of_the_grid():
    tokens = np.zeros((1, 6, 8))
    tokens[0, 4, 0] = 1.0  # row 1, column 1 of 2 x 3
    true, _ = token_colours(tokens + 1e-6 * RNG.standard_normal(tokens.shape), tokens, (2, 3))
    first = true[0, :, :, 0]
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
    assert set(LABELS) <= set(PREDICTIONS)
    rows = [
        {"horizon": step} | {f"{name}{end}": rank + step / 10 + shift for rank, name in enumerate(LABELS) for end, shift in
        (("", 0.0), ("_low", -0.1), ("_high", 0.1))}
        for step in range(1, 5)
    ]  # fmt: skip
    draw_horizon(rows, tmp_path / "horizon.png", note="made up")
    image = Image.open(tmp_path / "horizon.png")
    assert image.format == "PNG" and image.width > 600 and image.height > 400
    for _, colour in LABELS.values():
        assert share_of(tmp_path / "horizon.png", tuple(bytes.fromhex(colour[1:]))) > 0.001, colour


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
    subject = open_subject(config, cache.dataset, weights)
    errors = measure_windows(subject)
    strip = build_strip(position, errors, subject)
    window = errors.index[errors.numbers[position]]
    segment = errors.index.segments[window.segment]
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
    expected = ["horizon.png", *(f"strip{number + 1}.png" for number in range(NUM_STRIPS))]
    assert sorted(path.name for path in (out / "pictures").iterdir()) == expected
    for path in (out / "pictures").iterdir():
        with Image.open(path) as image:
            image.verify()
