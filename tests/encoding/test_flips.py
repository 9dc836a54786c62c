"""Claims: a bit that flips anywhere in the cache is reported by name when the file is read or verified; it is never read as numbers.

Every file of a unit is tried: token chunks and their checksums, shard indexes, actions and states, zarr.json, store.json,
both Parquet tables and the controls, and the manifest.
"""

import random

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


def read_manifest_and_all(root, path):
    return read_everything(root, read_manifest(path))


def verify_everything(root, path):
    """What `jepa-cache verify --read-data` looks at: every byte against what was written, and the digests of the manifest."""
    manifest = read_manifest(path)
    for part, entry in manifest.stores:
        for store, digest in (
            (root.tokens(part.fingerprint, entry.unit_digest), entry.tokens_digest),
            (root.actions(part.action_fingerprint, entry.unit_digest), entry.actions_digest),
        ):
            if check_store(store, read_data=True).digest != digest:
                raise ValueError(f"{store} is not the store that the manifest lists")
        for _ in iter_controls(root.controls(part.source_fingerprint, entry.unit_digest)):
            pass


def files_of(root):
    return sorted(path for path in root.path.rglob("*") if path.is_file() and path.name not in (MARKER, LOCK_FILE))


def kinds():
    return [
        "tokens/c",
        "actions/c",
        "states/c",
        "zarr.json",
        "store.json",
        "steps.parquet",
        "segments.parquet",
        "controls",
        "manifests",
    ]


def chosen(root, kind):
    return [path for path in files_of(root) if kind in str(path.relative_to(root.path))]


def flip_and_look(cache, path, position, bit):
    """Flip one bit; returns "read" and "verify" with the error of each, None where there was none."""
    root, manifest, expected = cache
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    path.write_bytes(damaged)
    outcome = {}
    try:
        for name, look in (("read", read_manifest_and_all), ("verify", verify_everything)):
            try:
                found = look(root, manifest)
                outcome[name] = None
                if name == "read":
                    wrong = [key for key in expected if key not in found or not same_numbers(expected[key], found[key])]
                    assert not wrong, (
                        f"byte {position} bit {bit} of {path}: {wrong} read as other values without an error"
                    )
            except ValueError as error:
                outcome[name] = error
    finally:
        path.write_bytes(content)
    return outcome


def check_flip(cache, path, position, bit):
    place = f"byte {position} bit {bit} of {path.relative_to(cache[0].path)}"
    outcome = flip_and_look(cache, path, position, bit)
    assert outcome["verify"] is not None, f"{place}: verification does not notice"
    for error in filter(None, outcome.values()):
        unit = path.relative_to(cache[0].path).parts[2] if path.parent.name != "manifests" else path.name
        assert unit in str(error), f"{place}: the message names another place: {error}"


@pytest.mark.parametrize("kind", kinds())
def test_a_flipped_bit_is_reported_and_never_read_as_numbers(cache, kind):
    random_bits = random.Random(kind)
    for path in chosen(cache[0], kind):
        size = path.stat().st_size
        for position in sorted({0, size - 1, *(random_bits.randrange(size) for _ in range(12))}):
            check_flip(cache, path, position, random_bits.randrange(8))


@pytest.mark.long
@pytest.mark.parametrize("kind", kinds())
def test_every_flipped_bit_is_reported_and_never_read_as_numbers(cache, kind):
    for path in chosen(cache[0], kind):
        size = path.stat().st_size
        for position in range(0, size, max(1, size // 4000)):
            for bit in range(8):
                check_flip(cache, path, position, bit)


def test_every_file_of_the_root_is_of_one_of_these_kinds(cache):
    assert all(any(kind in str(path.relative_to(cache[0].path)) for kind in kinds()) for path in files_of(cache[0]))
    assert all(chosen(cache[0], kind) for kind in kinds())
