"""Claims: stage one into a bucket gives what it gives in a folder, to every machine that asks; nobody encodes it again.

Two caches of this machine stand for two machines: they share nothing but the bucket.
"""

import shutil

import pytest

from jepa_cache.cli.export import export_manifest
from jepa_cache.encoding import run
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.verification import repair_manifest
from jepa_cache.store.check import Finding, check_manifest
from jepa_cache.store.collection import list_root, remove_unneeded
from jepa_cache.store.recipe import StoreKey
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, make_tiny_tar, read_everything, same_numbers, tiniest_config
from tests.store.s3_server import Fault

NUM_UNITS = 2


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in")
    for seed in range(NUM_UNITS):
        make_tiny_tar(folder, f"unit-{seed}", seed=seed)
    return folder


def encode(recordings, root):
    return encode_dataset(tiniest_config(), [str(recordings)], base=recordings, root=root)


@pytest.fixture(scope="module")
def in_a_folder(recordings, tmp_path_factory):
    root = CacheRoot(tmp_path_factory.mktemp("folder"))
    return encode(recordings, root).manifest, root


def attempts_of(root):
    """Of every place the attempts that lie in the bucket."""
    found = {}
    for key in root.bucket.list(""):
        place, separator, rest = key.partition(".attempt-")
        if separator:
            found.setdefault(place, set()).add(rest.split("/")[0])
    return found


def test_a_bucket_gives_what_a_folder_gives_through_dropped_connections(server, machines, recordings, in_a_folder):
    server.faults += [
        Fault("PUT .*/tokens/c/", "refuse", times=2),
        Fault("PUT .*/tokens/.*commit.json", "deaf"),
        Fault("GET .*/actions/c/", "deaf", times=2),
        Fault("GET .*/tokens/c/", "cut", 10, times=3),
    ]
    manifest, folder = in_a_folder
    assert encode(recordings, machines("a")).manifest.to_bytes() == manifest.to_bytes()
    root, expected = machines("b"), read_everything(folder, manifest)
    read_everything(root, manifest)  # pulls
    root.bucket.delete(list(root.bucket.list("tokens")))  # from now on this machine's copies are read
    read = read_everything(root, manifest)
    assert read.keys() == expected.keys() and all(same_numbers(read[name], expected[name]) for name in expected)


def test_a_machine_with_an_empty_cache_finds_exports_and_repairs_what_another_encoded(
    server, machines, recordings, in_a_folder, monkeypatch, tmp_path
):
    encode(recordings, machines("a"))
    (manifest, folder), root = in_a_folder, machines("b")
    monkeypatch.setattr(run, "load_encoder", lambda *_, **__: pytest.fail("the encoder was loaded"))
    server.requests.clear()
    result = encode(recordings, root)
    assert (result.num_encoded, result.manifest.to_bytes()) == (0, manifest.to_bytes())
    assert all(".check-" in request for request in server.requests if request.startswith("PUT"))

    assert root.refresh() == []
    export_manifest(manifest, root, tmp_path / "bucket", tmp_path)
    export_manifest(manifest, folder, tmp_path / "folder", tmp_path)
    assert all_files(tmp_path / "bucket") == all_files(tmp_path / "folder")

    # A copy here that is damaged is no damage in the bucket.
    (part,), entry = manifest.parts, manifest.entries[0]
    findings, whole = [], {}
    for key in part.keys(entry):
        place = root.store(key)
        assert root.fetch(place)
        path = place / ("tokens/c/0/0/0" if key.kind == "tokens" else "store.json") if place.is_dir() else place
        whole[path] = path.read_bytes()
        content = bytearray(whole[path])
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
        findings.append(Finding(key, place, "as a reader said"))
    before = root.bucket.list("")
    repaired = repair_manifest(manifest, findings, tiniest_config(), [str(recordings)], base=recordings, root=root)
    assert {*repaired.repaired} == {finding.path for finding in findings} and repaired.complete and len(whole) == 3
    assert check_manifest(manifest, root) == []
    assert root.bucket.list("") == before and all(path.read_bytes() == content for path, content in whole.items())


def test_what_is_damaged_in_the_bucket_is_made_again_and_nothing_else(machines, recordings, in_a_folder, capsys):
    encode(recordings, machines("a"))
    root = machines("b")
    before = attempts_of(root)
    one, two = (entry.unit_digest[:32] for entry in in_a_folder[0].entries)
    names = [(one, "/tokens/c/"), (two, "/actions/c/"), (two, ".parquet.attempt-")]
    keys = list(root.bucket.list(""))
    lost = [next(key for key in keys if f"{unit}." in key and name in key) for unit, name in names]
    root.bucket.delete(lost)
    result = encode(recordings, machines("b"))
    assert (result.num_encoded, result.manifest.to_bytes()) == (1, in_a_folder[0].to_bytes())
    assert lost[0] in capsys.readouterr().out
    after = attempts_of(root)
    assert {place for place in before if before[place] != after[place]} == {key.split(".attempt-")[0] for key in lost}


def test_a_clean_up_anywhere_keeps_what_other_machines_want_and_removes_the_rest(machines, recordings):
    manifest = encode(recordings, machines("a")).manifest
    root = machines("b")
    assert root.refresh() == []
    contents = list_root(root)
    in_bucket = sum(found["size"] for key, found in root.bucket.list("").items() if not key.endswith("commit.json"))
    manifest_bytes = len(manifest.to_bytes())
    assert (contents.num_bytes(contents.stores), contents.unneeded()) == (in_bucket - manifest_bytes, {})
    (part,), entry = manifest.parts, manifest.entries[0]
    other = StoreKey("actions", "0" * 32, entry.unit_digest[:32])  # of an encode on another machine, interrupted
    encoder = machines("a")
    shutil.copytree(encoder.store(part.keys(entry)[1]), encoder.store(other))
    encoder.publish(encoder.store(other))
    root = machines("b")  # which looks again by itself
    remove_unneeded(root)
    assert len(attempts_of(root)) == 3 * NUM_UNITS + 2, "nothing was removed"
    assert root.fetch(root.store(other))
    remove_unneeded(root, {manifest.digest}, grace_days=0)
    assert not root.bucket.list("")
