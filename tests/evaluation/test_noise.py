"""The noise floor, on tiny caches.

Claims:
- tokens made again in memory are those of a cache that was written in that dtype, and so are the errors on them;
- distances of neighbouring steps are those of the files;
- dtypes that the width does not allow are left out and said; a cache of codes gives the error that its manifest records;
- the table and the metrics agree, and int8 changes less than the coarser float8.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_cache.data.loader import WindowLoader, dequantise
from jepa_cache.data.windows import WindowIndex
from jepa_cache.evaluation.noise import measure_floor, read_channels, recorded_rmse, restore, write_noise
from tests.caches import GRID, WIDTH, make_cache
from tests.evaluation.evaluations import a_predictor, evaluation_of, read_rows


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_tokens_made_again_are_those_of_a_cache_in_that_dtype(cache, tmp_path, dtype):
    other = make_cache(tmp_path, "evaluate.noise_windows=3", dtype=dtype)
    read = [
        WindowLoader(c.dataset, WindowIndex(c.dataset.segments, 6), c.scaler).read([40, 130]) for c in (cache, other)
    ]
    for row, number in enumerate((40, 130)):
        store = WindowIndex(cache.dataset.segments, 6)[number].store
        made = restore(read[0].tokens[row].numpy(), dtype, read_channels(cache.dataset, store))
        assert np.array_equal(made, dequantise(read[1].tokens, read[1].scales)[row].numpy())
    (floor, _), (own, _) = (measure_floor(evaluation_of(one, a_predictor())) for one in (cache, other))
    for error in ("one_step", "rollout"):
        there = floor[f"{error}_l1"] + floor[f"own_change_{error}_{dtype}_l1"]
        assert there == pytest.approx(own[f"{error}_l1"], abs=1e-6)
    assert not [name for name in own if "change" in name or "stored" in name]


def test_bfloat16_keeps_eight_bits():
    tokens = np.array([[[1.0, 1.00390625, 1.01171875, -3.0]]], np.float16)  # 1 + 1/256 is half way, to even
    assert restore(tokens, "bfloat16", None).tolist() == [[[1.0, 1.0, 1.015625, -3.0]]]


def test_neighbouring_steps_and_their_distances_are_those_of_the_files(cache, tmp_path):
    evaluation, settings = evaluation_of(cache, a_predictor()), cache.config.evaluate
    per_episode = {}
    for segment in evaluation.held_out_segments():
        last = segment.stop - segment.start - 6
        for offset in np.linspace(0, last, settings.noise_windows).round().astype(int):
            tokens = np.empty((6, GRID[0] * GRID[1], WIDTH), np.float16)
            cache.dataset.read_tokens(segment.store, segment.start + int(offset), tokens)
            h = torch.nn.functional.layer_norm(torch.from_numpy(tokens).double(), [WIDTH], eps=1e-5).numpy()
            per_episode.setdefault(segment.episode, []).append(np.abs(np.diff(h, axis=0)).mean(axis=(1, 2)))
    sections = write_noise(evaluation, tmp_path)
    expected = np.array(list(per_episode.values()))
    assert sections["noise"]["adjacent_l1"] == pytest.approx(expected.mean(), abs=1e-5)
    quietest = np.percentile(expected.reshape(len(expected), -1), 10, axis=1).mean()
    assert sections["noise"]["quietest_l1"] == pytest.approx(quietest, abs=1e-5)


def test_the_table_and_the_metrics_agree(cache, tmp_path, capsys):
    sections = write_noise(evaluation_of(cache, a_predictor()), tmp_path)
    assert "noise floor without int4: int4 needs a token width" in capsys.readouterr().err
    rows = {row["dtype"]: row for row in read_rows(tmp_path / "measurements/noise.csv")}
    assert list(rows) == ["float16", "bfloat16", "int8", "float8_e4m3"]
    noise, interval = sections["noise"], sections["noise_ci"]
    for dtype in ("bfloat16", "int8", "float8_e4m3"):
        row = rows[dtype]
        for measure in ("one_step", "rollout"):
            assert float(row[f"{measure}_change"]) == noise[f"change_{measure}_{dtype}_l1"]
            key = f"change_{measure}_{dtype}_l1"
            assert [float(row[f"{measure}_change_{end}"]) for end in ("low", "high")] == interval[key]
            change = float(row[f"{measure}_l1"]) - float(rows["float16"][f"{measure}_l1"])
            assert change == pytest.approx(noise[key])
    assert 0 < noise["stored_int8_rmse"] < noise["stored_float8_e4m3_rmse"] < 0.1
    assert abs(noise["change_one_step_int8_l1"]) < abs(noise["own_change_one_step_float8_e4m3_l1"])
    assert noise["own_change_one_step_float8_e4m3_l1"] != noise["change_one_step_float8_e4m3_l1"]


def test_a_cache_gives_the_error_that_its_manifest_records(cache):
    assert recorded_rmse(cache.dataset) is None  # tests/caches.py records none
    manifest = cache.dataset.manifest
    (part,) = manifest.parts
    entries = tuple(
        replace(entry, num_steps=steps, reconstruction_rmse=rmse)
        for entry, steps, rmse in zip(part.entries, (30, 10), (0.1, 0.3), strict=True)
    )
    recorded = type("Dataset", (), {"manifest": replace(manifest, parts=(replace(part, entries=entries),))})
    assert recorded_rmse(recorded) == pytest.approx(np.sqrt((30 * 0.01 + 10 * 0.09) / 40))
