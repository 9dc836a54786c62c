"""A campaign (`make test-long`): whatever happens to any file of a root is found by `verify`, and never read as other numbers.

Random damage of ten kinds to files of ten kinds, in three dtypes: bits flipped, cut, lengthened, a page of zeros, a page repeated,
another unit's file in place, removed. CAMPAIGN_TRIALS (4) and CAMPAIGN_SEED (0) make it longer and another one.
"""

import os
import random
import shutil

import pytest

from tests.encoded import read_everything, same_numbers

pytestmark = pytest.mark.long
NUM_TRIALS = int(os.environ.get("CAMPAIGN_TRIALS", "4"))
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
FILES = {
    "token chunks": "tokens/*/*.zarr/tokens/c/*/0/0",
    "token scales": "tokens/*/*.zarr/token_scales/c/**/*",
    "channels": "tokens/*/*.zarr/channel_*/c/*",
    "actions": "actions/*/*.zarr/actions/c/*/*",
    "states": "actions/*/*.zarr/states/c/*/*",
    "zarr.json": "*/*/*.zarr/**/zarr.json",
    "store.json": "*/*/*.zarr/store.json",
    "tables": "tokens/*/*.zarr/*.parquet",
    "controls": "controls/*/*.parquet",
    "manifest": "manifests/*.json",
}
PAGE = 4096


def flip(content, rng, path):
    return _flip(content, rng.randrange(len(content)), rng)


def flip_at_end(content, rng, path):
    """In the index of a shard, the footer of a table."""
    return _flip(content, len(content) - 1 - rng.randrange(min(len(content), 1028)), rng)


def cut(content, rng, path):
    return content[: rng.choice([0, 1, len(content) // 2, len(content) - 1, rng.randrange(len(content))])]


def lengthen(content, rng, path):
    return content + bytes(rng.choice([1, 4, PAGE]))


def zero_page(content, rng, path):
    start = rng.randrange(len(content)) // PAGE * PAGE
    size = min(PAGE, len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def repeat_page(content, rng, path):
    size = max(1, min(PAGE, len(content) // 3))
    return content[:size] + content[:size] + content[2 * size :]


def swap(content, rng, path):
    """The same file of another unit."""
    unit = _unit_of(path)
    others = [other for other in sorted(unit.parent.glob(f"*{unit.suffix}")) if other != unit]
    files = [file for other in others if (file := other / path.relative_to(unit)).is_file()]
    return rng.choice(files).read_bytes() if files else content


def remove(content, rng, path):
    return None


KINDS = (flip, flip, flip, flip_at_end, cut, lengthen, zero_page, repeat_page, swap, remove)


def _flip(content, position, rng):
    damaged = bytearray(content)
    damaged[position] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _unit_of(path):
    """The store or file of a unit, directly under the folder of a fingerprint."""
    return next(
        place
        for place in (path, *path.parents)
        if place.parent.parent.name in ("tokens", "actions", "controls", "cache")
    )


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_damage_of_any_kind_is_found_and_never_read_as_other_numbers(checkout, dtype, files):
    if dtype != "float16":
        shutil.rmtree(checkout.root.path)
        checkout.encode(f"encode.dtype={dtype}")
    paths = sorted(path for path in checkout.root.path.glob(FILES[files]) if path.is_file())
    if not paths:
        pytest.skip(f"{dtype} stores have no {files}")
    expected, rng, num_damaged, wrong = (
        read_everything(checkout.root, checkout.manifest),
        random.Random(f"{SEED} {files} {dtype}"),
        0,
        [],
    )
    for kind in KINDS * NUM_TRIALS:
        path = rng.choice(paths)
        content = path.read_bytes()
        damaged = kind(content, rng, path)
        if damaged == content:
            continue
        num_damaged += 1
        path.unlink() if damaged is None else path.write_bytes(damaged)
        wrong += [
            f"{kind.__name__} {path}: {problem}" for problem in _look(checkout, path, expected, f"encode.dtype={dtype}")
        ]
        path.write_bytes(content)
    assert wrong == [] and num_damaged > NUM_TRIALS * 5
    assert checkout.run("verify", f"encode.dtype={dtype}").code == 0


def _look(checkout, path, expected, override):
    """What is not as it should be while this file is damaged."""
    name = _unit_of(path).stem
    try:
        got = read_everything(checkout.root, checkout.manifest)
        if any(key not in got or not same_numbers(values, got[key]) for key, values in expected.items()):
            yield "reads as other numbers"
    except ValueError as error:
        if name not in str(error):
            yield f"reading names another place: {error}"
    result = checkout.run("verify", "--json", override)
    if result.code != 1:
        yield f"verify ends with {result.code}: {result.err[-200:]}"
    elif not any(name in finding["problem"] for finding in result.document["findings"]):
        yield f"verify names another place: {result.document['findings']}"
