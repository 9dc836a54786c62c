"""Claims: docs/store_format.md is enough to read a cache (`plain_reader` was written from it), and what it says is so."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jepa_cache.config.loading import REPOSITORY_ROOT
from jepa_cache.data.dataset import CachedDataset
from jepa_cache.store import layout
from jepa_cache.store.controls import publish_controls
from jepa_cache.store.quantisation import CODECS
from jepa_cache.store.recipe import canonical_json, fingerprint
from tests.caches import make_cache
from tests.store import plain_reader

DOCUMENT = (REPOSITORY_ROOT / "docs/store_format.md").read_text()


def rows_of(heading):
    """The rows of the table whose heading begins so, as cells without back-ticks."""
    lines = DOCUMENT[DOCUMENT.index(f"| {heading}") :].split("\n")
    table = lines[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("format"))


def test_the_plain_reader_imports_nothing_of_ours():
    tree = ast.parse(Path(plain_reader.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in modules if module.startswith(("jepa_cache", "tests", "zarr"))]


def test_a_training_set_read_by_the_document_is_the_one_that_we_read(cache):
    dataset: CachedDataset = cache.dataset
    stores = list(plain_reader.read_training_set(cache.root.path, cache.folder / "outputs/encode/manifest.json"))
    assert len(stores) == len(dataset.manifest.entries) == 2
    segments = []
    for number, (tokens, actions, states, runs, steps) in enumerate(stores):
        ours = np.empty(tokens.shape, np.float16)
        dataset.read_tokens(number, 0, ours)
        assert np.array_equal(tokens, ours.astype(np.float32))
        assert np.array_equal(actions, dataset.controls(number)[0], equal_nan=True)
        assert np.array_equal(states, dataset.controls(number)[1])
        segments += [(number, run["episode"], run["start"], run["stop"]) for run in runs]
        for run in runs:
            assert np.isnan(actions[run["stop"] - 1]).all()
            assert np.isfinite(actions[run["start"] : run["stop"] - 1]).all()
            assert set(steps["segment"][run["start"] : run["stop"]]) == {run["segment"]}
    assert segments == [tuple(segment) for segment in dataset.segments]


def test_the_example_values_follow_from_the_formula():
    examples = rows_of("dtype | stored |")
    assert {row[0].split(",")[0] for row in examples} == set(CODECS)
    for name, stored, *scales, value in examples:
        dtype = name.split(",")[0]
        number = int(stored, 0)
        if dtype == "float16":
            got = np.array(number, np.uint16).view(np.float16)
        elif dtype == "bfloat16":
            got = np.array(number << 16, np.uint32).view(np.float32)
        else:
            codes = plain_reader.to_codes(dtype, np.array([number], np.int8 if dtype == "int8" else np.uint8))
            got = plain_reader.formula(codes[int("odd" in name)], *(np.float32(scale) for scale in scales))
        assert got == np.float32(value), (name, stored)


def test_the_table_of_dtypes_is_what_is_written():
    rows = {row[0]: row for row in rows_of("dtype | `tokens` |")}
    assert list(rows) == list(CODECS)
    for name, scheme in CODECS.items():
        assert rows[name][1].startswith(f"{scheme.dtype} [n, N, D{' / 2' if scheme.codes_per_item == 2 else ''}]")
        assert bool(rows[name][2]) == bool(rows[name][3]) == (scheme.max_code is not None)
        fill = rows[name][4].split()[0]
        assert np.isnan(scheme.fill_value) if fill == "NaN" else scheme.fill_value == int(fill)


@pytest.mark.parametrize(("first", "schema"), [("row in", layout.STEPS_SCHEMA), ("0, 1", layout.SEGMENTS_SCHEMA)])
def test_the_columns_of_the_tables_are_those_that_are_written(first, schema):
    rows = rows_of(f"column | type | meaning |\n|---|---|---|\n| segment | int32 | {first}")
    names = {"float": "float32", "double": "float64"}
    written = [(field.name, names.get(str(field.type), str(field.type))) for field in schema]
    assert written == [(name, kind) for columns, kind, _ in rows for name in columns.split(", ")]


def test_every_key_of_a_manifest_is_in_the_document(cache):
    document = json.loads(cache.dataset.manifest.to_bytes())
    part = document["parts"][0]
    for key in {*document, *part, *part["entries"][0]}:
        assert re.search(rf"[`.]{key}[`\[]", DOCUMENT), f"{key} is not in the document"


def test_checksum_canonical_json_and_fingerprints_are_made_as_the_document_says(cache):
    assert plain_reader.crc32c(b"123456789") == 0xE3069283
    lines = [
        "{",
        '  "a": {',
        '    "c": {},',
        '    "d": [],',
        '    "\\u00e4": 1e-05',
        "  },",
        '  "b": [',
        "    1,",
        "    5.0",
    ]
    text = canonical_json({"b": [1, 5.0], "a": {"ä": 1e-5, "c": {}, "d": []}}).decode()
    assert text == "\n".join([*lines, "  ]", "}", ""])
    part = cache.dataset.manifest.parts[0]
    assert part.fingerprint == fingerprint(part.recipe) and part.action_fingerprint == fingerprint(part.action_recipe)


def test_the_seal_of_controls_is_made_as_the_document_says(tmp_path):
    rng = np.random.default_rng(0)
    controls = [
        (key, {"yaw": rng.standard_normal(ticks), "on": np.ones(ticks, bool), "slot": np.arange(ticks, dtype=np.int8)})
        for key, ticks in (("z", 5), ("a", 3))
    ]
    publish_controls(tmp_path / "source/c.parquet", controls)
    place, stated, computed = plain_reader.read_controls_seal(tmp_path / "source/c.parquet")
    assert place == "source/c" and stated == computed
    assert pq.ParquetFile(tmp_path / "source/c.parquet").num_row_groups == 2
