"""Claims: a bit that flips anywhere in the cache is reported by name when the file is read or verified; it is never read as numbers.

Every file of a unit is tried: token chunks and their checksums, shard indexes, actions and states, zarr.json, store.json,
both Parquet tables and the controls, and the manifest.
"""

import random
import re

import pytest

from jepa_cache.store.controls import iter_controls
from jepa_cache.store.layout import check_store
from jepa_cache.store.manifest import read_manifest, write_manifest
from jepa_cache.store.root import LOCK_FILE, MARKER, CacheRoot
from tests.encoded import encode, make_tiny_tar, read_everything, same_numbers, tiniest_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One unit in the cache, with its manifest in the root, and everything that reading it gives."""
    base = tmp_path_factory.mktemp("flips")
    manifest = encode(make_tiny_tar(base / "in", "a", num_frames=45), base / "cache", tiniest_config()).manifest
    root = CacheRoot(base / "cache")
    path = root.manifest(manifest.digest)
    write_manifest(manifest, [path])
    return root, path, read_everything(root, manifest)


def verify_everything(root, path):
    """What `jepa-cache verify --read-data` looks at: every byte, and the digests that the manifest lists."""
    for part, entry in read_manifest(path).stores:
        tokens, actions, controls = (root.store(key) for key in part.keys(entry))
        for store, digest in ((tokens, entry.tokens_digest), (actions, entry.actions_digest)):
            if check_store(store, read_data=True).digest != digest:
                raise ValueError(f"{store} is not the store that the manifest lists")
        list(iter_controls(controls))


KINDS = (
    *("tokens/c", "actions/c", "states/c", "zarr.json", "store.json", "steps.parquet", "segments.parquet"),
    *("controls", "manifests"),
)


def chosen(root, kind):
    return sorted(path for path in root.path.rglob("*") if path.is_file() and kind in str(path.relative_to(root.path)))


def check_flip(cache, path, position, bit):
    """Flip one bit: verification names the place; reading does, or gives what was there."""
    root, manifest, expected = cache
    place = f"byte {position} bit {bit} of {path.relative_to(root.path)}"
    unit = path.name if path.parent.name == "manifests" else path.relative_to(root.path).parts[2]
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(ValueError, match=re.escape(unit)):
            verify_everything(root, manifest)
            pytest.fail(f"{place}: verification does not notice")
        try:
            found = read_everything(root, read_manifest(manifest))
        except ValueError as error:
            assert unit in str(error), f"{place}: the message names another place"
        else:
            wrong = [key for key in expected if key not in found or not same_numbers(expected[key], found[key])]
            assert not wrong, f"{place}: {wrong} read as other values without an error"
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_reported_and_never_read_as_numbers(cache, kind, every):
    rng = random.Random(kind)
    for path in chosen(cache[0], kind):
        size = path.stat().st_size
        flips = [(position, bit) for position in range(0, size, max(1, size // 4000)) for bit in range(8)]
        if not every:
            flips = [(position, rng.randrange(8)) for position in {0, size - 1, *rng.choices(range(size), k=12)}]
        for position, bit in flips:
            check_flip(cache, path, position, bit)


def test_every_file_of_the_root_is_of_one_of_these_kinds(cache):
    files = {path for path in chosen(cache[0], "") if path.name not in (MARKER, LOCK_FILE)}
    assert {path for kind in KINDS for path in chosen(cache[0], kind)} == files
    assert all(chosen(cache[0], kind) for kind in KINDS)
