"""Claims: every dtype is written whole, the same content always as the same bytes, and other Zarr readers get our numbers.

A store is whole or absent, and says what its dtype cost. Damage: test_reader.py, tests/encoding/test_flips.py; places: tests/cli/test_places.py.
"""

import warnings

import numpy as np
import pytest

from jepa_cache.store import layout
from jepa_cache.store.layout import check_store, read_store_file, write_store_file
from jepa_cache.store.quantisation import CODECS, encode, measure_channels
from jepa_cache.store.reader import ArrayReader, StoreDamagedError
from jepa_cache.store.writer import STAGING_FILE, TokenWriter, table
from tests.encoded import all_files, store_json
from tests.makers import flip
from tests.store import plain_reader

N, D, STEPS = 3, 64, 530
CODED = [name for name, scheme in CODECS.items() if scheme.max_code is not None]
SCALE_ARRAYS = ("token_scales", "channel_scales", "channel_means")
ARRAYS = {name: ["tokens", *(SCALE_ARRAYS if name in CODED else [])] for name in CODECS}


def tables(num_steps):
    columns = {field.name: np.arange(num_steps) for field in layout.STEPS_SCHEMA} | {"gui": np.zeros(num_steps, bool)}
    segments = {"segment": [0], "episode": ["a"], "start": [0], "stop": [num_steps], "step_hz": [5.0]}
    return table(layout.STEPS_SCHEMA, columns), table(layout.SEGMENTS_SCHEMA, segments)


def make_tokens(num_steps=STEPS, seed=0):
    """What the writer takes for every dtype: tokens with some large channels."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((num_steps, N, D)) * rng.uniform(0.1, 9, D) + rng.uniform(-5, 5, D)).astype(np.float16)


def given(tokens, dtype):
    if dtype != "bfloat16":
        return tokens
    return (tokens.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write(path, dtype, pieces, *, made=None, **options):
    """Publish a store of these pieces; None takes the last one back."""
    with TokenWriter(path, num_tokens=N, width=D, dtype=dtype) as opened:
        starts = [0]
        for piece in pieces:
            if piece is None:
                opened.roll_back(starts.pop())
            else:
                starts.append(opened.num_steps)
                opened.append(given(piece, dtype), **options)
        opened.publish(*tables(opened.num_steps), {"recipe": {"dtype": dtype}}, made or {})
    return path


def read_all(path, name="tokens"):
    with ArrayReader(path, name) as reader:
        out = np.empty(reader.shape, reader.dtype)
        reader.read(0, out)
        return out


@pytest.fixture(scope="module", params=CODECS)
def store(request, tmp_path_factory):
    """(dtype, path, the tokens given) of a store of two shards."""
    path = tmp_path_factory.mktemp(request.param) / "a.zarr"
    return request.param, write(path, request.param, [make_tokens()]), make_tokens()


def test_what_is_read_is_the_code_of_what_was_given(store):
    dtype, path, tokens = store
    if dtype not in CODED:
        assert np.array_equal(read_all(path), given(tokens, dtype))
        return
    channels = measure_channels([tokens], D)
    codes, scales = zip(*(encode(step, dtype, channels) for step in tokens), strict=True)
    assert np.array_equal(read_all(path), codes) and np.array_equal(read_all(path, "token_scales"), scales)
    assert np.array_equal(read_all(path, "channel_scales"), channels.scales)
    assert np.array_equal(read_all(path, "channel_means"), channels.means)


def by_xarray(path):
    return {name: array.values for name, array in pytest.importorskip("xarray").open_zarr(path).items()}


def by_tensorstore(path):
    tensorstore, arrays = pytest.importorskip("tensorstore"), {}
    for folder in (folder for folder in path.iterdir() if folder.is_dir()):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
        arrays[folder.name] = tensorstore.open(spec).result().read().result()
    return arrays


@pytest.mark.parametrize("read", [by_xarray, by_tensorstore])
def test_other_readers_give_the_same_numbers_without_warnings(store, read):
    dtype, path, _ = store
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays = read(path)
    assert sorted(arrays) == sorted(ARRAYS[dtype]) and not (path / STAGING_FILE).exists()
    for name, array in arrays.items():
        assert array.dtype == read_all(path, name).dtype and np.array_equal(array, read_all(path, name))


def test_xarray_applies_the_formula_by_the_names_of_the_dimensions(tmp_path):
    path = write(tmp_path / "a.zarr", "int8", [make_tokens(20)])
    opened = pytest.importorskip("xarray").open_zarr(path)
    values = opened.tokens.astype("float32") * opened.token_scales * opened.channel_scales + opened.channel_means
    assert values.dims == ("step", "token", "channel") and np.array_equal(values, plain_reader.read_tokens(path))


def test_the_array_says_how_it_is_to_be_read(store):
    zarr = pytest.importorskip("zarr")
    dtype, path, _ = store
    attributes = dict(zarr.open_group(path, mode="r")["tokens"].attrs)
    assert attributes == ({} if dtype == "float16" else {"scheme": dtype, "meaning": CODECS[dtype].meaning})


@pytest.mark.parametrize("dtype", CODECS)
def test_the_same_content_gives_the_same_bytes_however_it_came(tmp_path, dtype):
    tokens, other = make_tokens(), make_tokens(600, seed=1)
    whole = write(tmp_path / "a/0/0.zarr", dtype, [tokens])
    for keep in (1, 100, 511, 512, 513):  # where the episode that is taken back began; it reaches over a shard's end
        pieces = write(tmp_path / f"{keep}/0/0.zarr", dtype, [tokens[:keep], other, None, tokens[keep:]])
        assert all_files(whole) == all_files(pieces), keep


@pytest.mark.parametrize("num_steps", [1, 8, 10, 512, 700])
def test_arrays_are_byte_for_byte_what_zarr_writes(tmp_path, num_steps):
    written = write(tmp_path / "a.zarr", "int8", [make_tokens(num_steps)])
    array = layout.create_tokens_array(tmp_path / "b.zarr", N, D, "int8")
    scales = layout.create_token_scales(tmp_path / "b.zarr", N, D, "int8")
    for it, name in ((array, "tokens"), (scales, "token_scales")):
        it.resize((num_steps, *it.shape[1:]))
        it[:] = read_all(written, name)
        assert all_files(tmp_path / "b.zarr" / name) == all_files(written / name)
    check_store(written, read_data=True)


@pytest.mark.parametrize("dtype", CODECS)
def test_an_empty_store_is_a_store(tmp_path, dtype):
    assert check_store(write(tmp_path / "a.zarr", dtype, [])).metadata["num_steps"] == 0


@pytest.mark.parametrize("name", ["tokens", *SCALE_ARRAYS])
def test_a_store_whose_bytes_changed_while_it_was_written_is_not_published(tmp_path, monkeypatch, name):
    def flipped(folder, *given):
        flip(next(path for path in (folder / name / "c").rglob("0") if path.is_file()), 3)
        write_store_file(folder, *given)

    monkeypatch.setattr(layout, "write_store_file", flipped)
    with pytest.raises(StoreDamagedError, match=f"{name}.*checksum"):
        write(tmp_path / "a.zarr", "int8", [make_tokens(20)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_error_of_a_cast_is_the_one_that_was_measured_and_none_is_invented(tmp_path, dtype):
    tokens = make_tokens(20)
    errors = np.array([[0.01, 0.09, 0.123456], *[[0.0, 0.0, 0.0]] * 19])
    measured = write(tmp_path / "a.zarr", dtype, [tokens], errors=errors)
    assert read_store_file(measured).metadata["reconstruction"] == {"max_abs": 0.123, "relative_rmse": 0.333}
    rolled_back = write(tmp_path / "c.zarr", dtype, [tokens, tokens, None], errors=errors)
    assert read_store_file(rolled_back).metadata == read_store_file(measured).metadata
    assert read_store_file(write(tmp_path / "b.zarr", dtype, [tokens])).metadata["reconstruction"] is None


def test_what_a_dtype_cannot_hold_and_tokens_of_another_form_are_refused(tmp_path):
    path, tokens = tmp_path / "a.zarr", make_tokens(4)
    for dtype, width, said in (
        ("int2", D, "known: float16, bfloat16, int8"),
        ("int4", 96, "int4 needs a token width that is a multiple of 64; got 96"),
    ):
        with pytest.raises(ValueError, match=said):
            TokenWriter(path, num_tokens=N, width=width, dtype=dtype)
    infinite = tokens.copy()
    infinite[2, 0, 0] = np.inf
    for dtype, wrong, said in (
        ("bfloat16", tokens, "must be uint16"),
        ("float16", infinite, "non-finite"),
        ("float16", tokens[:, :2], r"must be float16 \[T, 3, 64\]"),
    ):
        with TokenWriter(path, num_tokens=N, width=D, dtype=dtype) as opened, pytest.raises(ValueError, match=said):
            opened.append(wrong)
    with TokenWriter(path, num_tokens=N, width=D) as opened:
        opened.append(tokens)
        with pytest.raises(ValueError, match="has 3 rows, but 4 steps"):
            opened.publish(*tables(3), {}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_made_a_store_is_recorded_and_no_part_of_its_digest(tmp_path):
    stores = (write(tmp_path / name, "float16", [make_tokens(3)], made={"device": name}) for name in ("cpu", "cuda"))
    one, other = map(read_store_file, stores)
    assert one.digest == other.digest and one.provenance != other.provenance


def test_a_store_that_lists_files_outside_itself_is_refused(tmp_path):
    write(tmp_path / "a.zarr", "float16", [make_tokens(10)])
    path = tmp_path / "a.zarr/store.json"
    raw = path.read_bytes()
    for name in ("../b", "/etc/passwd", "tokens/../../b", "a//b"):
        path.write_bytes(raw)
        with store_json(path.parent) as document:
            document["content"]["files"][name] = document["content"]["files"]["steps.parquet"]
        with pytest.raises(StoreDamagedError, match="leads out of the store"):
            read_store_file(tmp_path / "a.zarr")
