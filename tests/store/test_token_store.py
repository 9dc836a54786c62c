"""Claims: what is written is what is read, by us and by other Zarr readers; a store is whole or absent; damage is named."""

import json
import os

import numpy as np
import pytest

from jepa_cache.store import layout
from jepa_cache.store.layout import check_store, read_store_file
from jepa_cache.store.reader import ArrayReader, StoreDamagedError
from jepa_cache.store.writer import TokenWriter, table
from tests.encoded import write_store_json

N, D = 3, 5


def make_tokens(num_steps, seed=0):
    return np.random.default_rng(seed).standard_normal((num_steps, N, D)).astype(np.float16)


def tables(num_steps):
    columns = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    for name in ("segment", "frame", "tick"):
        columns[name] = np.arange(num_steps)
    segments = {"segment": [0], "episode": ["a"], "start": [0], "stop": [num_steps], "step_hz": [5.0]}
    return table(layout.STEPS_SCHEMA, columns), table(layout.SEGMENTS_SCHEMA, segments)


def write_store(path, tokens, device="cpu"):
    with TokenWriter(path, num_tokens=N, width=D) as writer:
        writer.append(tokens)
        return writer.publish(*tables(len(tokens)), {"recipe": {}}, {"device": device})


def test_what_made_a_store_is_recorded_and_no_part_of_its_digest(tmp_path):
    for name in ("cpu", "cuda"):
        assert write_store(tmp_path / name, make_tokens(3), name)
    one, other = (read_store_file(tmp_path / name) for name in ("cpu", "cuda"))
    assert one.digest == other.digest and one.provenance != other.provenance


@pytest.mark.parametrize("keep", [0, 5, 511, 512, 513, 1024])
def test_rolling_back_forgets_an_episode_wherever_it_began(tmp_path, keep):
    tokens, later = make_tokens(1300), make_tokens(40, seed=1)
    with TokenWriter(tmp_path / "a.zarr", num_tokens=N, width=D) as writer:
        writer.append(tokens)
        writer.roll_back(keep)
        writer.append(later)
        writer.publish(*tables(keep + 40), {}, {})
    out = np.empty((keep + 40, N, D), np.float16)
    with ArrayReader(tmp_path / "a.zarr") as reader:
        reader.read(0, out)
    assert np.array_equal(out, np.concatenate([tokens[:keep], later]))


def test_tokens_that_are_not_finite_or_of_another_form_are_refused(tmp_path):
    tokens = make_tokens(4)
    tokens[2, 0, 0] = np.inf
    with TokenWriter(tmp_path / "a.zarr", num_tokens=N, width=D) as writer:
        for given, said in ((tokens, "non-finite"), (tokens[:, :2], r"must be float16 \[T, 3, 5\]")):
            with pytest.raises(ValueError, match=said):
                writer.append(given)
        writer.append(make_tokens(2))
        with pytest.raises(ValueError, match="has 3 rows, but 2 steps"):
            writer.publish(*tables(3), {}, {})
    assert list(tmp_path.iterdir()) == []


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["steps.parquet", "segments.parquet", "zarr.json", "tokens/zarr.json", "store.json"])
def test_a_changed_or_missing_small_file_is_named(tmp_path, name):
    write_store(tmp_path / "a.zarr", make_tokens(10))
    path = tmp_path / "a.zarr" / name
    raw = path.read_bytes()
    for offset in (5, -20):
        flip(path, offset)
        with pytest.raises(StoreDamagedError, match=name):
            check_store(tmp_path / "a.zarr", read_data=True)
        path.write_bytes(raw)
    path.unlink()
    with pytest.raises(StoreDamagedError, match=f"{name} is missing"):
        check_store(tmp_path / "a.zarr")


def test_a_store_that_lists_files_outside_itself_is_refused(tmp_path):
    write_store(tmp_path / "a.zarr", make_tokens(10))
    path = tmp_path / "a.zarr/store.json"
    raw = path.read_bytes()
    for name in ("../b", "/etc/passwd", "tokens/../../b", "a//b"):
        document = json.loads(raw)
        document["content"]["files"][name] = document["content"]["files"]["steps.parquet"]
        write_store_json(path, document)  # signed again
        with pytest.raises(StoreDamagedError, match="leads out of the store"):
            read_store_file(tmp_path / "a.zarr")


@pytest.mark.parametrize("end", [b"", b"\n\n", b" "])
def test_not_even_the_last_newline_of_store_json_may_change(tmp_path, end):
    write_store(tmp_path / "a.zarr", make_tokens(10))
    path = tmp_path / "a.zarr/store.json"
    path.write_bytes(path.read_bytes().removesuffix(b"\n") + end)
    with pytest.raises(StoreDamagedError, match=r"store\.json has changed"):
        check_store(tmp_path / "a.zarr")


def test_a_shard_that_is_cut_short_or_gone_is_named(tmp_path):
    write_store(tmp_path / "a.zarr", make_tokens(600))
    os.truncate(layout.shard_path(tmp_path / "a.zarr", 1), 100)
    with pytest.raises(StoreDamagedError, match=r"has 100 bytes"):
        check_store(tmp_path / "a.zarr")
    layout.shard_path(tmp_path / "a.zarr", 0).unlink()
    with ArrayReader(tmp_path / "a.zarr") as reader, pytest.raises(StoreDamagedError, match="missing"):
        reader.read(0, np.empty((1, N, D), np.float16))
