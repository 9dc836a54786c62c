"""Claims: what is written is what is read, by us and by other Zarr readers; a store is whole or absent; damage is named."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_cache.store import layout
from jepa_cache.store.layout import check_store, read_store_file
from jepa_cache.store.reader import StoreDamagedError, TokenReader
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


def write_store(path, tokens, pieces=(7,)):
    with TokenWriter(path, num_tokens=N, width=D) as writer:
        start, turn = 0, 0
        while start < len(tokens):
            size = pieces[turn % len(pieces)]
            writer.append(tokens[start : start + size])
            start, turn = start + size, turn + 1
        return writer.publish(*tables(len(tokens)), {"recipe": {}}, {"device": "cpu"})


@settings(max_examples=15, deadline=None)
@given(num_steps=st.integers(1, 1200), pieces=st.lists(st.integers(1, 600), min_size=1, max_size=4), data=st.data())
def test_any_run_of_steps_reads_back_what_was_appended(tmp_path_factory, num_steps, pieces, data):
    tokens, path = make_tokens(num_steps), tmp_path_factory.mktemp("store") / "a.zarr"
    write_store(path, tokens, pieces)
    with TokenReader(path) as reader:
        for _ in range(10):
            start = data.draw(st.integers(0, num_steps - 1))
            out = np.empty((data.draw(st.integers(1, num_steps - start)), N, D), np.float16)
            reader.read(start, out)
            assert np.array_equal(out, tokens[start : start + len(out)])


def test_the_shards_are_whole_and_aligned(tmp_path):
    write_store(tmp_path / "a.zarr", make_tokens(1100))
    assert [layout.shard_path(tmp_path / "a.zarr", shard).is_file() for shard in range(4)] == [True, True, True, False]
    metadata = json.loads((tmp_path / "a.zarr/tokens/zarr.json").read_text())
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [512, N, D]
    assert metadata["fill_value"] == "NaN"


@pytest.mark.parametrize("keep", [0, 5, 511, 512, 513, 1024])
def test_rolling_back_forgets_an_episode_wherever_it_began(tmp_path, keep):
    tokens, later = make_tokens(1300), make_tokens(40, seed=1)
    with TokenWriter(tmp_path / "a.zarr", num_tokens=N, width=D) as writer:
        writer.append(tokens)
        writer.roll_back(keep)
        writer.append(later)
        writer.publish(*tables(keep + 40), {}, {})
    out = np.empty((keep + 40, N, D), np.float16)
    with TokenReader(tmp_path / "a.zarr") as reader:
        reader.read(0, out)
    assert np.array_equal(out, np.concatenate([tokens[:keep], later]))


def test_non_finite_tokens_are_refused(tmp_path):
    tokens = make_tokens(4)
    tokens[2, 0, 0] = np.inf
    with (
        TokenWriter(tmp_path / "a.zarr", num_tokens=N, width=D) as writer,
        pytest.raises(ValueError, match="non-finite"),
    ):
        writer.append(tokens)


def test_the_second_of_two_writers_leaves_the_first_store_untouched(tmp_path):
    tokens, path = make_tokens(30), tmp_path / "a.zarr"
    with TokenWriter(path, num_tokens=N, width=D) as late:
        late.append(tokens)
        assert write_store(path, tokens)
        before = path.stat().st_ino
        assert not late.publish(*tables(30), {"recipe": {}}, {})
    assert path.stat().st_ino == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_the_same_content_has_the_same_digest_whatever_made_it(tmp_path):
    for name, device, pieces in (("a", "cpu", (7,)), ("b", "cuda", (100, 3))):
        with TokenWriter(tmp_path / f"{name}.zarr", num_tokens=N, width=D) as writer:
            for start in range(0, 600, pieces[0]):
                writer.append(make_tokens(600)[start : start + pieces[0]])
            writer.publish(*tables(600), {"recipe": {"x": 1}}, {"device": device})
    one, other = (read_store_file(tmp_path / f"{name}.zarr") for name in "ab")
    assert one.digest == other.digest and one.provenance != other.provenance


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["steps.parquet", "segments.parquet", "zarr.json", "tokens/zarr.json", "store.json"])
def test_a_changed_or_missing_small_file_is_named(tmp_path, name):
    write_store(tmp_path / "a.zarr", make_tokens(10))
    for copy in "bc":
        shutil.copytree(tmp_path / "a.zarr", tmp_path / f"{copy}.zarr")
    (tmp_path / "a.zarr" / name).unlink()
    with pytest.raises(StoreDamagedError, match=name):
        check_store(tmp_path / "a.zarr")
    flip(tmp_path / "b.zarr" / name, 5)
    with pytest.raises(StoreDamagedError, match=name):
        check_store(tmp_path / "b.zarr", read_data=True)
    shutil.copy(tmp_path / "c.zarr" / name, tmp_path / "b.zarr" / name)
    flip(tmp_path / "b.zarr" / name, -20)
    with pytest.raises(StoreDamagedError, match=rf"{name}.*sha256 differs"):
        check_store(tmp_path / "b.zarr", read_data=True)


@pytest.mark.parametrize("name", ["../b", "/etc/passwd", "tokens/../../b", "a//b"])
def test_a_store_that_lists_files_outside_itself_is_refused(tmp_path, name):
    write_store(tmp_path / "a.zarr", make_tokens(10))
    path = tmp_path / "a.zarr/store.json"
    document = json.loads(path.read_bytes())
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
    with TokenReader(tmp_path / "a.zarr") as reader, pytest.raises(StoreDamagedError, match="missing"):
        reader.read(0, np.empty((1, N, D), np.float16))
