"""Claims of store/sizing.py: stores take the bytes and files that were foretold, at real widths to a thousandth, at small ones to a fiftieth."""

import numpy as np
import pytest

from jepa_cache.store import layout
from jepa_cache.store.quantisation import CODECS, get_codec
from jepa_cache.store.sizing import measure_actions, measure_arrays, measure_tokens
from jepa_cache.store.writer import TokenWriter, table


def _write(path, dtype, num_steps, num_tokens, width):
    rng = np.random.default_rng(0)
    with TokenWriter(path, num_tokens=num_tokens, width=width, dtype=dtype) as writer:
        for start in range(0, num_steps, 64):
            shape = (min(64, num_steps - start), num_tokens, width)
            tokens = rng.standard_normal(shape).astype(np.float16)
            writer.append(tokens.view(np.uint16) & 0x3FFF if get_codec(dtype).given == "uint16" else tokens)
        columns = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA} | {
            "gui": np.zeros(num_steps, bool)
        }
        columns["frame"] = columns["tick"] = 4 * np.arange(num_steps)
        columns["idle"] = rng.integers(0, 5, num_steps) / 4
        columns["luma_mean"] = columns["luma_std"] = rng.random(num_steps)
        segments = {"segment": [0], "episode": ["e"], "start": [0], "stop": [num_steps], "step_hz": [5.0]}
        writer.publish(
            table(layout.STEPS_SCHEMA, columns),
            table(layout.SEGMENTS_SCHEMA, segments),
            {"recipe": {}, "skipped": []},
            {},
        )
    files = [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files), len(files)


@pytest.mark.parametrize("dtype", CODECS)
def test_a_store_of_vit_l_tokens_takes_what_was_foretold(tmp_path, dtype):
    """21 steps of 256 x 1024: two chunks are full, and the third takes as much though five of its steps are."""
    num_bytes, num_files = _write(tmp_path / "store.zarr", dtype, 21, 256, 1024)
    planned = measure_tokens(dtype, 21, 1, 256, 1024)
    assert planned.num_bytes == pytest.approx(num_bytes, rel=1e-3) and planned.num_files == num_files


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_store_of_small_tokens_takes_what_was_foretold(tmp_path, dtype):
    """Here what is listed of the chunks counts."""
    num_bytes, _ = _write(tmp_path / "store.zarr", dtype, 1500, 16, 64)
    assert measure_tokens(dtype, 1500, 1, 16, 64).num_bytes == pytest.approx(num_bytes, rel=2e-2)


@pytest.mark.parametrize("num_steps", [1, 8, 9, 511, 512, 513, 1025])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_shards_that_are_full_begun_and_just_begun_are_foretold_to_the_byte(tmp_path, dtype, num_steps):
    _write(tmp_path / "store.zarr", dtype, num_steps, 16, 64)
    arrays = {}
    for file in (tmp_path / "store.zarr").glob("*/c/**/*"):
        if file.is_file():
            array = file.relative_to(tmp_path / "store.zarr").parts[0]
            num_bytes, num_files = arrays.get(array, (0, 0))
            arrays[array] = (num_bytes + file.stat().st_size, num_files + 1)
    names = ["tokens", "token_scales", "channel_scales", "channel_means"][: len(arrays)]
    assert [arrays[name] for name in names] == measure_arrays(dtype, num_steps, 16, 64)


def test_actions_take_four_bytes_a_number(tmp_path):
    from jepa_cache.store.controls import write_actions

    columns = [{"name": f"column_{i}", "unit": "", "kind": "continuous"} for i in range(15)]
    rng = np.random.default_rng(0)
    actions, states = (rng.standard_normal((3000, count)).astype(np.float32) for count in (13, 2))
    write_actions(
        tmp_path / "a.zarr", actions, states, {"actions": columns[:13], "states": columns[13:], "excluded": {}}
    )
    files = [file for file in (tmp_path / "a.zarr").rglob("*") if file.is_file()]
    planned = measure_actions(3000, 15)
    assert planned.num_bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)
    assert planned.num_files == len(files)
