"""Claims: any window of any array reads back exactly, wherever chunks and shards end and in whatever order they lie, from threads.

No more files are open than the bound; each chunk is checked once; what is missing, damaged or another format's is named with
its place and what to type, and never reads as numbers.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec

from jepa_cache.store import layout, reader
from jepa_cache.store.layout import read_store_file, write_store_file
from jepa_cache.store.reader import ArrayReader, StoreDamagedError
from jepa_cache.store.writer import TokenWriter, table
from tests.makers import flip

CHUNK, SHARD_CHUNKS = 3, 4
DTYPES = ("uint8", "int8", "uint16", "float16", "float32")
SHARD = CHUNK * SHARD_CHUNKS


def make_values(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return values.view(dtype).reshape(shape)


def write_array(path, values, *, name="tokens", chunk=CHUNK, shard=SHARD, fill_value=0):
    """An array as `store.layout` makes them, with small chunks."""
    group = zarr.open_group(path, mode="a", zarr_format=3)
    rest = values.shape[1:]
    array = group.create_array(
        name,
        shape=values.shape,
        chunks=(chunk, *rest),
        shards=(shard, *rest),
        dtype=values.dtype.name,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        fill_value=fill_value,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return list_files(path, {name: reader.list_checksums(path, name)})


def list_files(path, crc32c):
    """Write store.json anew, so that what a test did to a file passes for what was written."""
    (path / layout.STORE_FILE).unlink(missing_ok=True)
    write_store_file(path, path, {}, {}, crc32c)
    return path


def same_bits(one, other):
    return one.tobytes() == other.tobytes()


def read_window(array, start, num_steps):
    out = np.empty((num_steps, *array.shape[1:]), array.dtype)
    array.read(start, out)
    return out


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def few_open_shards(monkeypatch):
    """At most two open shards in the whole process."""
    pool = reader.OpenShards(2)
    monkeypatch.setattr(reader, "OPEN_SHARDS", pool)
    return pool


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rest=st.lists(st.integers(1, 4), max_size=3),
    num_steps=st.integers(1, 3 * SHARD + 2),
    chunk=st.integers(1, 4),
    shard_chunks=st.integers(1, 5),
    verify=st.booleans(),
    data=st.data(),
)
def test_any_window_of_any_array_is_read_as_it_was_written(
    tmp_path_factory, dtype, rest, num_steps, chunk, shard_chunks, verify, data
):
    values = make_values(dtype, (num_steps, *rest))
    path = write_array(tmp_path_factory.mktemp("store"), values, name="other", chunk=chunk, shard=chunk * shard_chunks)
    with ArrayReader(path, "other", verify_checksums=verify) as array:
        assert (array.shape, array.dtype) == (values.shape, values.dtype)
        for _ in range(6):
            start = data.draw(st.integers(0, num_steps))
            count = data.draw(st.integers(0, num_steps - start))
            assert same_bits(read_window(array, start, count), values[start : start + count])


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(SHARD_CHUNKS)), gap=st.integers(0, 9), data=st.data())
def test_chunks_may_lie_in_any_order_with_gaps_between_them(tmp_path_factory, order, gap, data):
    values = make_values("float16", (SHARD, 2, 5))
    path = write_array(tmp_path_factory.mktemp("store"), values)
    (file,) = path.glob("tokens/c/0/0/0")
    stored = values[:CHUNK].nbytes + 4
    raw, body, index = file.read_bytes(), b"", np.empty((SHARD_CHUNKS, 2), "<u8")
    for chunk in order:
        body += b"\xaa" * gap
        index[chunk] = len(body), stored
        body += raw[chunk * stored : (chunk + 1) * stored]
    checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    file.write_bytes(body + index.tobytes() + checksum)
    with ArrayReader(path) as array:
        for _ in range(2):  # the second time without checksums
            assert same_bits(read_window(array, 0, SHARD), values)
        start = data.draw(st.integers(0, SHARD - 1))
        assert same_bits(read_window(array, start, SHARD - start), values[start:])


def test_threads_read_the_same_while_their_files_push_each_other_out(tmp_path, few_open_shards):
    values = make_values("float16", (6 * SHARD, 4, 5))
    path = write_array(tmp_path, values)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(150):
            start = int(rng.integers(0, len(values)))
            count = int(rng.integers(1, min(2 * SHARD, len(values) - start) + 1))
            if not same_bits(read_window(array, start, count), values[start : start + count]):
                wrong.append(start)

    before = open_files()
    with ArrayReader(path) as array, ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert wrong == []
    assert open_files() == before


def test_no_more_files_are_open_than_the_bound_however_many_stores_are_read(tmp_path, few_open_shards):
    values = make_values("int8", (3 * SHARD, 2))
    readers = [ArrayReader(write_array(tmp_path / str(number), values)) for number in range(5)]
    before, most = open_files(), 0
    for _ in range(2):
        for array in readers:
            assert same_bits(read_window(array, 0, len(values)), values)
            most = max(most, open_files())
    assert most - before <= 2 * 2 and len(few_open_shards) == 2  # a shard's own descriptor and that of its map
    for array in readers:
        array.close()
    assert open_files() == before and len(few_open_shards) == 0


def test_reads_that_end_early_are_continued(tmp_path, monkeypatch):
    values = make_values("float16", (2 * SHARD, 3, 7))
    whole = os.preadv

    def short(descriptor, buffers, offset):
        return whole(descriptor, [memoryview(buffers[0]).cast("B")[:11]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with ArrayReader(write_array(tmp_path, values)) as array:
        for _ in range(2):  # with and without checksums
            assert same_bits(read_window(array, 2, 2 * SHARD - 5), values[2:-3])


def make_store(path, num_steps=40):
    """A token store as stage one writes it, with episode "early" up to step 20 and "late" from there."""
    columns = {field.name: np.zeros(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    segments = {"segment": [0, 1], "episode": ["early", "late"], "start": [0, 20], "stop": [20, num_steps]}
    tokens = np.random.default_rng(0).standard_normal((num_steps, 3, 5)).astype(np.float16)
    with TokenWriter(path, num_tokens=3, width=5) as writer:
        writer.append(tokens)
        tables = table(layout.STEPS_SCHEMA, columns), table(layout.SEGMENTS_SCHEMA, segments | {"step_hz": [5.0, 5.0]})
        writer.publish(*tables, {}, {})
    return tokens


@pytest.mark.parametrize(("chunk", "episodes"), [(0, "episode early"), (2, "episode early, late"), (4, "episode late")])
def test_damage_names_store_chunk_episode_and_what_to_type(tmp_path, chunk, episodes):
    make_store(tmp_path / "a.zarr")
    flip(layout.shard_path(tmp_path / "a.zarr", 0), chunk * (8 * 30 + 4) + 77)
    first, last = chunk * 8, chunk * 8 + 8
    expected = (
        rf"chunk {chunk} \(steps {first} to {last}, {episodes}\) in .*a\.zarr.*checksum.*`jepa-cache verify --repair`"
    )
    with ArrayReader(tmp_path / "a.zarr") as tokens, pytest.raises(StoreDamagedError, match=expected):
        tokens.read(first + 1, np.empty((1, 3, 5), np.float16))


def test_each_chunk_is_checked_once(tmp_path, monkeypatch):
    checked, real = [], reader.crc32c_of
    monkeypatch.setattr(reader, "crc32c_of", lambda *parts: checked.append(sum(map(len, parts))) or real(*parts))
    values = make_values("uint8", (SHARD, 6))
    with ArrayReader(write_array(tmp_path, values)) as array:
        for start in (1, 2, 1):
            read_window(array, start, 4)
        assert sum(checked) == 2 * CHUNK * 6
        array.check_chunk(0)
        assert sum(checked) == 3 * CHUNK * 6


def test_without_checksums_no_chunk_is_checked_unless_requested(tmp_path):
    values = make_values("uint8", (SHARD, 6))
    path = write_array(tmp_path, values)
    flip(path / "tokens/c/0/0", 0)
    with ArrayReader(path, verify_checksums=False) as array:
        assert not same_bits(read_window(array, 0, SHARD), values)
        with pytest.raises(StoreDamagedError, match="checksum"):
            array.check_chunk(0)


def test_another_stores_chunks_are_not_read_as_this_ones(tmp_path):
    ours, theirs = (write_array(tmp_path / str(seed), make_values("uint8", (2 * SHARD, 6), seed)) for seed in (1, 2))
    shutil.copy(theirs / "tokens/c/1/0", ours / "tokens/c/1/0")
    with ArrayReader(ours) as array:
        read_window(array, 0, SHARD)
        for chunk in range(SHARD_CHUNKS, 2 * SHARD_CHUNKS):
            for read in (
                lambda chunk=chunk: read_window(array, chunk * CHUNK, 1),
                lambda chunk=chunk: array.check_chunk(chunk),
            ):
                with pytest.raises(StoreDamagedError, match=rf"chunk {chunk} .*c/1/0: it is another chunk than was"):
                    read()


@pytest.mark.parametrize("chunk", [1, 3])
def test_large_windows_are_copied_out_of_memory_and_read_where_that_cannot_be_told(tmp_path, monkeypatch, chunk):
    values = make_values("float16", (3 * SHARD, 30_000))
    windows, real = [(start, count) for start in range(0, 2 * SHARD, 5) for count in (3, 4, 13)], reader.OpenShard.copy
    copied = []
    monkeypatch.setattr(reader.OpenShard, "copy", lambda *given: copied.append(given[2]) or real(*given))
    with ArrayReader(write_array(tmp_path, values, chunk=chunk)) as array:
        read_window(array, 0, len(values))
        for flag in (os.RWF_NOWAIT, 1 << 30):  # the latter no kernel knows
            monkeypatch.setattr(os, "RWF_NOWAIT", flag)
            copied.clear()
            for start, count in windows:
                assert same_bits(read_window(array, start, count), values[start : start + count])
            assert bool(copied) == (flag != 1 << 30)


INDEX_BYTES = 16 * SHARD_CHUNKS + 4


def with_index(raw, change):
    """A shard whose index was changed and signed again."""
    index = np.frombuffer(raw[-INDEX_BYTES:-4], "<u8").reshape(-1, 2).copy()
    change(index)
    return raw[:-INDEX_BYTES] + index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")


SHORTER = r"tokens/c/0/0 is shorter than its shard index says; run `jepa-cache verify --repair`"
HARMED = {
    "a byte lost in front": (lambda raw: raw[1:], SHORTER),
    "a chunk lost in front": (lambda raw: raw[CHUNK * 6 + 4 :], SHORTER),
    "index alone": (lambda raw: raw[-INDEX_BYTES:], SHORTER),
    "index cut": (lambda raw: raw[: 1 - INDEX_BYTES], "the shard index at the end of .*tokens/c/0/0 is damaged"),
    "index flipped": (
        lambda raw: raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:],
        "the shard index at the end of .* is damaged",
    ),
    "length": (
        lambda raw: with_index(raw, lambda index: index.__setitem__((1, 1), 21)),
        "chunk 1 .*gives it 21 bytes instead of 22",
    ),
    "never written": (
        lambda raw: with_index(raw, lambda index: index.__setitem__(1, reader.MISSING)),
        "chunk 1 .*does not list it; run `jepa-cache verify --repair`",
    ),
    "gone": (None, "tokens/c/0/0 is missing; run `jepa-cache verify --repair`"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("harmed", HARMED)
def test_what_is_missing_or_harmed_in_a_shard_is_named_and_does_not_read_as_numbers(tmp_path, harmed, verify):
    path = write_array(tmp_path, values := make_values("uint8", (2 * SHARD, 6)))
    file, (harm, said) = path / "tokens/c/0/0", HARMED[harmed]
    raw = file.read_bytes()
    file.unlink() if harm is None else file.write_bytes(harm(raw))
    with ArrayReader(path, verify_checksums=verify) as array:
        assert same_bits(read_window(array, SHARD, SHARD), values[SHARD:])
        for start, count in ((CHUNK, 1), (CHUNK - 1, 2), (CHUNK, 2 * CHUNK)):
            with pytest.raises(StoreDamagedError, match=said):
                read_window(array, start, count)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("width", [6, 60_000])
def test_a_file_that_is_cut_while_it_is_open_is_named_by_chunk(tmp_path, verify, width):
    """The wide one is copied out of the mapped file, where a page that is gone would end the process."""
    path = write_array(tmp_path, make_values("uint8", (SHARD, width)))
    with ArrayReader(path, verify_checksums=verify) as array:
        read_window(array, 0, SHARD)
        os.truncate(path / "tokens/c/0/0", 2 * (CHUNK * width + 4) + 1)
        with pytest.raises(StoreDamagedError, match=r"chunk 2 .*the file ends inside it"):
            read_window(array, 0, SHARD)


def test_a_disk_that_cannot_be_read_is_named_by_chunk(tmp_path, monkeypatch):
    make_store(tmp_path / "a.zarr")
    whole = os.preadv

    def failing(descriptor, buffers, offset):
        if offset < 8 * 30 + 4 + 100 <= offset + sum(map(len, buffers)):  # inside chunk 1
            raise OSError(5, "Input/output error")
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    expected = r"chunk 1 \(steps 8 to 16, episode early\).*Input/output error.*repair"
    for verify in (True, False):
        tokens = ArrayReader(tmp_path / "a.zarr", verify_checksums=verify)
        with tokens, pytest.raises(StoreDamagedError, match=expected):
            tokens.read(0, np.empty((40, 3, 5), np.float16))


def test_buffers_of_another_form_and_windows_outside_the_array_are_refused(tmp_path):
    strided = np.empty((4, 12), np.uint8)[:, ::2]
    with ArrayReader(write_array(tmp_path, make_values("uint8", (SHARD, 6)))) as array:
        for out in (np.empty((4, 6), np.int8), np.empty((4, 5), np.uint8), np.empty((4, 3, 2), np.uint8), strided):
            with pytest.raises(ValueError, match=r"C-contiguous uint8 \[T, 6\]"):
                array.read(0, out)
        for start, count in ((-1, 2), (SHARD - 1, 2), (SHARD + 1, 0)):
            with pytest.raises(IndexError, match=f"holds steps 0 to {SHARD}"):
                read_window(array, start, count)


OTHERS = {
    "compressed": lambda array, inner: inner["codecs"].insert(1, {"name": "zstd", "configuration": {"level": 0}}),
    "big endian": lambda array, inner: inner["codecs"][0]["configuration"].update(endian="big"),
    "index first": lambda array, inner: inner.update(index_location="start"),
    "no shards": lambda array, inner: array.update(codecs=[{"name": "bytes"}, {"name": "crc32c"}]),
    "float64": lambda array, inner: array.update(data_type="float64"),
    "cut across": lambda array, inner: inner["chunk_shape"].__setitem__(1, 3),
    "uneven": lambda array, inner: inner["chunk_shape"].__setitem__(0, CHUNK + 2),
    "empty": lambda array, inner: array.clear(),
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_array_of_another_format_is_refused_by_name(tmp_path, what):
    path = write_array(tmp_path, make_values("float16", (SHARD, 6)))
    file = path / "tokens/zarr.json"
    array = json.loads(file.read_text())
    OTHERS[what](array, array["codecs"][0]["configuration"])
    file.write_text(json.dumps(array))
    with pytest.raises(StoreDamagedError, match=r"tokens/zarr\.json has changed.*repair"):
        ArrayReader(path)
    list_files(path, {"tokens": []})  # as if it had been written so
    with pytest.raises(StoreDamagedError, match=r"tokens/zarr\.json.* this program's format.*repair"):
        ArrayReader(path)


def test_a_device_in_the_place_of_a_small_file_is_damage_and_is_not_read_without_end(tmp_path):
    (tmp_path / "store.json").symlink_to("/dev/zero")
    with pytest.raises(StoreDamagedError, match=r"store\.json is no file"):
        read_store_file(tmp_path)
