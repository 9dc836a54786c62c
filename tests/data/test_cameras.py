"""Claims: a step of joined cameras has the stored tokens of each of them, at the same row of the controls, one below the other.

Episodes that a camera lacks are left out and named, and so are steps; nothing is encoded for it. Every predictor trains on them, and
weights of joined and of single cameras refuse each other's data.
"""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from jepa_cache import api
from jepa_cache.config.parsing import ConfigError
from jepa_cache.config.schema import ScalerConfig
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.data.loader import WindowLoader
from jepa_cache.data.scaler import fit_scaler
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation.context import open_evaluation
from jepa_cache.evaluation.run import evaluate_run
from jepa_cache.store.root import CacheRoot
from jepa_cache.training.trainer import train
from tests.caches import make_config
from tests.droid_makers import SERIALS, make_episode, write_raw
from tests.encoded import encode, tiniest_config

CAMERAS = ("exterior_1", "exterior_2")
NAMES = [f"ILIAD/success/2023-04-21/made-{seed}" for seed in range(6)]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Encodes, as a dtype, six episodes from two cameras: of made-4 one is missing, that of made-5 ends before the other one."""
    folder = tmp_path_factory.mktemp("cameras")
    for seed in range(6):
        path = write_raw(folder / "raw", make_episode(seed, 45))
        video = path / "recordings/MP4" / f"{SERIALS['exterior_2']}.mp4"
        if seed == 4:
            video.unlink()
        if seed == 5:
            shorter = make_episode(9, 45, num_frames=30).videos["exterior_2"]
            video.write_bytes(shorter)

    def encode_as(dtype):
        config = tiniest_config("droid_raw", cameras=CAMERAS, fps=5.0, dtype=dtype, max_skipped_share=1.0)
        return encode(folder / "raw", folder / "cache", config).manifest, CacheRoot(folder / "cache")

    return encode_as


@pytest.fixture(scope="module")
def recorded(record):
    return record("float16")


def open_both(recorded):
    return CachedDataset(*recorded, joins_cameras=True), CachedDataset(*recorded)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_joined_step_has_every_cameras_tokens_at_its_row_and_the_rest_is_named(record, dtype, capsys):
    joined, apart = open_both(record(dtype))
    said = capsys.readouterr().err
    assert "1 episodes were not seen by all" in said and "made-4, by exterior_1 alone" in said
    assert "5 of 75 steps of exterior_1" in said
    assert joined.cameras == CAMERAS and joined.manifest.grid == (4, 2) and joined.manifest.num_tokens == 8
    assert sorted(it.episode for it in joined.segments) == [name for name in NAMES if name != NAMES[4]]
    of = {(it.episode, joined.manifest.stores[it.store][0].camera): it for it in apart.segments}
    loaders = []
    for dataset, runs in (
        (joined, joined.segments),
        *((apart, [of[name, c] for name in NAMES if (name, c) in of]) for c in CAMERAS),
    ):
        scaler = fit_scaler(joined, joined.segments, ScalerConfig("standard", "standard"))
        index = WindowIndex(runs, 2, (1, 3), time_reversal=True)
        loaders.append((WindowLoader(dataset, index, scaler), index))
    (loader, index), *singles = loaders
    for number in range(0, len(index), 5):
        window, (whole,) = index[number], loader.iterate([[number]], torch.device("cpu"))
        segment = index.segments[window.segment]
        for view, (single, others) in enumerate(singles):
            own = next(it for it in others.segments if it.episode == segment.episode)
            place = window._replace(store=own.store, start=window.start - segment.start + own.start)
            match = next(n for n in range(len(others)) if others[n]._replace(segment=0) == place._replace(segment=0))
            (part,) = single.iterate([[match]], torch.device("cpu"))
            assert torch.equal(whole.tokens[:, :, 4 * view : 4 * (view + 1)], part.tokens)
            assert torch.equal(whole.actions, part.actions) and torch.equal(whole.states, part.states)


@pytest.mark.parametrize("predictor", ["tiny", "linear"])
def test_predictors_train_on_joined_cameras_and_weights_refuse_data_that_is_joined_otherwise(
    recorded, tmp_path, predictor
):
    joined, apart = open_both(recorded)
    overrides = ("dataset=droid_raw", "encode.cameras=[exterior_1, exterior_2]", "split.val_share=0.5", "split.seed=4")
    ways = {"joined": (joined, "cache.join_cameras=true"), "apart": (apart, "cache.join_cameras=false")}
    weights, configs = {}, {}
    for name, (dataset, way) in ways.items():
        configs[name] = make_config(*overrides, f"predictor={predictor}", way, "train.time_reversal=true")
        split, filters = configs[name].split, configs[name].filter
        scaler = fit_scaler(dataset, dataset.segments_of("train", split, filters), configs[name].scaler)
        AcceleratorState._reset_state(reset_partial_state=True)
        weights[name] = train(configs[name], dataset, scaler, tmp_path / name, base=tmp_path).weights
    if predictor == "linear":
        metrics = evaluate_run(configs["joined"], joined, weights["joined"], tmp_path / "evaluate")
        assert 0 < metrics["val"]["teacher_forcing_l1"] < 2
    for name, other in (("joined", "apart"), ("apart", "joined")):
        with pytest.raises(ValueError, match=r"cameras joined into a step \(cache.join_cameras\).*exterior_1"):
            open_evaluation(configs[name], ways[name][0], weights[other])
    encoder = object.__new__(api.Encoder)
    encoder.recipe = api._comparable_recipe(joined.manifest.recipe)
    with pytest.raises(ValueError, match=r"joined cameras \(exterior_1, exterior_2\)"):
        api.WorldModel.load(weights["joined"], encoder)


def test_cameras_that_cannot_be_joined_are_refused_in_words(recorded):
    manifest, root = recorded
    with pytest.raises(ValueError, match=r"the manifest has \[exterior_1\]\. Name them"):
        CachedDataset(replace(manifest, parts=manifest.parts[:1]), root, joins_cameras=True)
    with pytest.raises(ConfigError, match=r"join_cameras needs two cameras or more.*got \[\]"):
        make_config("cache.join_cameras=true")
