"""Claims of `jepa-cache inspect --batch` and data/frames.py: what is shown is the batch that training draws first.

Scaled and raw columns belong together; every window is named by its episode, frames and ticks; the frames are the ones that its
steps were made of; what cannot be shown is said.
"""

import hashlib
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from accelerate import Accelerator
from typer.testing import CliRunner

from jepa_cache.actions import get_action_space
from jepa_cache.cli.inspect import inspect, render_page
from jepa_cache.cli.inspect_batch import describe_columns, encode_picture, measure_spread
from jepa_cache.data.cache import Segment
from jepa_cache.data.frames import read_frames
from jepa_cache.media.video import open_video
from jepa_cache.predictor.rollout import as_reps
from jepa_cache.store.digests import DigestTable
from jepa_cache.training.batches import TrainingData
from tests.browser import measure_widths
from tests.caches import OVERRIDES, TICKS_PER_STEP, make_cache
from tests.makers import make_vpt_pair, write_vpt_tar
from tests.workspace import copy_settings

NUM_STEPS = 12
EVIL = "<script>alert(1)<"  # no slash: that would be a folder in the tar


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A checkout with a cache whose one unit is a tar shard of videos; its key of the digest table is kept by each test."""
    folder = tmp_path_factory.mktemp("batch")
    copy_settings(folder)
    names = [*(f"episode-{number}" for number in range(4)), EVIL]
    pairs = {name: make_vpt_pair(NUM_STEPS * TICKS_PER_STEP, seed=seed) for seed, name in enumerate(names)}
    tar = write_vpt_tar(folder / "shards/a.tar", pairs)
    units = {hashlib.sha256(tar.read_bytes()).hexdigest(): names}
    cache = make_cache(folder, units=units, num_steps=NUM_STEPS)
    return cache, tar, {key: video for key, (video, _) in pairs.items()}


@pytest.fixture
def here(recorded, monkeypatch):
    """The command line in that checkout, whose recordings are known on this machine."""
    cache, tar, _ = recorded
    monkeypatch.chdir(cache.folder)
    DigestTable().digest_unit([tar])

    def run(*argv):
        app = typer.Typer()
        app.command()(inspect)
        return CliRunner().invoke(
            app, ["--batch", *OVERRIDES, f"cache.root={cache.folder}/cache", *map(str, argv)], catch_exceptions=True
        )

    return run


def test_the_batch_is_the_one_that_training_draws_first(recorded, here):
    cache, _, _ = recorded
    report = json.loads(here("--json").stdout)
    data = TrainingData(cache.config, cache.dataset, cache.scaler, Accelerator(cpu=True))
    batch = data.loader.read(data.sampler.numbers(0).tolist())
    expected = {
        "tokens": batch.tokens,
        "h": as_reps(batch.tokens, cache.config.train.normalize_reps),
        "actions": batch.actions,
        "states": batch.states,
    }
    for tensor in report["tensors"]:
        values = expected.pop(tensor["name"])
        assert tensor["shape"] == list(values.shape) and f"torch.{tensor['dtype']}" == str(values.dtype)
        spread = tensor["spread"]
        assert (spread["minimum"], spread["maximum"]) == (float(values.min()), float(values.max()))
        assert spread["mean"] == pytest.approx(float(values.double().mean()), abs=1e-9)
        assert spread["std"] == pytest.approx(float(values.double().std(unbiased=False)), rel=1e-9)
    assert not expected and report["settings"]["num_windows"] == data.num_windows


def test_scaled_columns_are_the_raw_ones_through_the_scaler(recorded, here):
    cache, _, _ = recorded
    report = json.loads(here("--json").stdout)
    for name, scaler in (("actions", cache.scaler.actions), ("states", cache.scaler.states)):
        assert [column["name"] for column in report[name]] == list(scaler.names)
        for column, mean, scale in zip(report[name], scaler.mean, scaler.scale, strict=True):
            scaled, raw = column["scaled"], column["raw"]
            assert scaled["maximum"] == pytest.approx((raw["maximum"] - mean) / scale, abs=1e-6)
            assert scaled["std"] == pytest.approx(raw["std"] / scale, abs=1e-6)
    assert report["actions"][0]["raw"]["maximum"] > 20 > 3 > report["actions"][0]["scaled"]["maximum"]


def test_windows_are_named_by_their_place_in_the_recording(recorded, here):
    cache, _, videos = recorded
    result = here()
    assert result.exit_code == 0, result.output
    windows = json.loads(here("--json").stdout)["windows"]
    assert len(windows) == cache.config.train.batch_size
    for window in windows:
        assert window["episode"] in videos and (window["dataset"], window["camera"], window["phase"]) == (
            "sample",
            None,
            0,
        )
        steps = range(window["first_step"], window["first_step"] + cache.config.train.window_steps)
        assert window["frames"] == window["ticks"] == [TICKS_PER_STEP * step for step in steps]
        last = window["first_step"] + cache.config.train.window_steps - 1
        assert f"{window['episode']}, steps {window['first_step']} to {last} (sample)" in result.output
    assert {window["first_step"] for window in windows} != {0}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_a_frame_a_step_and_names_in_the_data_cannot_write_into_it(recorded, here, tmp_path):
    cache, _, _ = recorded
    assert here("--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    parser = _Tags()
    parser.feed(page)
    images = [attrs["src"] for tag, attrs in parser.tags if tag == "img"]
    assert len(images) == cache.config.train.batch_size * cache.config.train.window_steps
    assert len(set(images)) > 5 and all(image.startswith("data:image/jpeg;base64,") for image in images)
    assert not {tag for tag, _ in parser.tags} & {"script", "link", "iframe"} and "http" not in page.replace(
        "http-equiv", ""
    )


def test_names_are_escaped_and_the_page_fits_a_phone(tmp_path):
    values, spread = np.ones((1, 1, 13)), measure_spread([np.ones(3)])
    report = {
        "settings": {"dataset": EVIL},
        "tensors": [{"name": EVIL, "axes": "B", "shape": [3], "dtype": "float", "meaning": EVIL, "spread": spread}],
        "actions": describe_columns(get_action_space("vpt13").actions, values, values),
        "states": [],
        "windows": [
            {
                "name": EVIL,
                "frames": [0, 4],
                "ticks": [0, 4],
                "raw_actions": values[0].tolist(),
                "pictures": [encode_picture(np.zeros((48, 64, 3), np.uint8), 160)] * 2,
            }
        ],
    }
    page = render_page(batch=report)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4
    (width,) = measure_widths([page], 360, tmp_path)
    assert width <= 360, "a phone does not scroll the page sideways"


def test_a_recording_that_is_gone_is_said_in_place_of_frames(here, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    assert here("--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "not on this machine any more" in page and "<img" not in page


@pytest.mark.parametrize("argv", [["shards"], ["--limit", "3"]])
def test_recordings_are_no_argument_of_a_batch(here, argv):
    result = here(*argv)
    assert isinstance(result.exception, ValueError) and "--batch shows the data set that is encoded" in str(
        result.exception
    )


def test_a_scaler_of_other_episodes_is_refused_as_training_does(here):
    assert "the scaler was fitted on other segments" in str(here("split.val_share=0").exception)


def test_a_folder_in_which_nothing_is_encoded_says_what_to_run(tmp_path, here, monkeypatch):
    copy_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "run `python stages/encode.py` first" in str(here().exception)


def test_frames_of_windows_that_overlap_are_those_of_their_steps_in_any_order(recorded):
    cache, tar, videos = recorded
    DigestTable().digest_unit([tar])
    runs = []
    for segment in cache.dataset.segments[:3]:
        runs += [segment._replace(start=segment.start + a, stop=segment.start + b) for a, b in ((5, 9), (2, 7), (5, 9))]
    runs = runs[::-1]
    starts = {segment.episode: segment.start for segment in cache.dataset.segments}
    for run, frames in zip(runs, read_frames(cache.config, cache.dataset, runs), strict=True):
        with open_video(videos[run.episode]) as video:
            expected = video.read((np.arange(run.start, run.stop) - starts[run.episode]) * TICKS_PER_STEP)
        np.testing.assert_array_equal(frames, expected)


def test_an_episode_that_its_recording_does_not_hold_is_an_error(recorded):
    cache, tar, _ = recorded
    DigestTable().digest_unit([tar])
    with pytest.raises(ValueError, match=r"a\.tar has the digest .* 'nobody', but does not hold it"):
        read_frames(cache.config, cache.dataset, [Segment(0, "nobody", 0, 4)])


def test_spreads_are_those_of_all_values_together():
    parts = [np.random.default_rng(seed).normal(1e3, 2, (3, 5)).astype(np.float32) for seed in range(4)]
    whole = np.stack(parts).astype(np.float64)
    spreads = [measure_spread(parts), measure_spread([np.array([np.nan, 2.0]), np.array([np.inf])])]
    assert list(spreads[0].values()) == pytest.approx([whole.min(), whole.mean(), whole.max(), whole.std(), 0])
    assert list(spreads[1].values()) == [2.0, 2.0, 2.0, 0.0, 2]
    assert list(measure_spread([np.array([np.nan])]).values()) == [None, None, None, None, 1]
