"""Claims of `jepa-cache export cache`: a root of its own that stage two reads, of whole units, every byte checked on the way.

It holds a manifest, a card with recipes, weights and licences (unknown where they are), and checksums of every file.
"""

import hashlib
import json
import re
import shutil
import subprocess

import pytest

from jepa_cache import files as ground_floor
from jepa_cache.config.loading import load_config
from jepa_cache.data.cache import open_dataset
from jepa_cache.store import export as store_export
from jepa_cache.store.export import CHECKSUMS
from jepa_cache.store.manifest import read_manifest
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.usage import held_alone
from tests.cli.test_verify import flip
from tests.encoded import write_store_json


def _manifest(out):
    (path,) = (out / "manifests").glob("*.json")
    return read_manifest(path)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_everything_is_exported_with_the_same_manifest_and_bytes(checkout, tmp_path):
    before = checkout.files()
    result = checkout.run("export", "cache", tmp_path / "out", "--json")
    assert result.code == 0 and result.document["num_units"] == 3
    files = _files(tmp_path / "out")
    assert before.items() <= files.items() and checkout.files() == before
    assert set(files) - set(before) == {"README.md", "provenance.json", CHECKSUMS}
    assert _manifest(tmp_path / "out") == checkout.manifest
    made_with = json.loads(files["provenance.json"])["made_with"]
    assert len(made_with) == 2, "of one machine: one store of two episodes, and twice the same of one"


def test_what_is_exported_is_forced_to_the_disk_and_left_alone_by_clean_ups_beside(checkout, tmp_path, monkeypatch):
    synced, real_sync, real_copy = set(), ground_floor.sync, store_export._copy

    def sync(path):
        synced.add(re.sub(r"\.jepa-cache-[0-9a-f]{12}-", "", str(path.relative_to(tmp_path))))
        real_sync(path)

    def copy(source, target, on_bytes):
        digest = real_copy(source, target, on_bytes)
        CacheRoot(tmp_path / "out").remove_stale_temporaries()
        return digest

    monkeypatch.setattr(ground_floor, "sync", sync)
    monkeypatch.setattr(store_export, "_copy", copy)
    assert (
        checkout.run("export", "cache", tmp_path / "out", "--units", checkout.manifest.entries[0].unit_digest).code == 0
    )
    assert {f"out/{name}" for name in _files(tmp_path / "out")} < synced


def remake(store, **card):
    """A store that is whole, but not the one that was listed; `card` are the entries that differ."""
    document = json.loads((store / "store.json").read_bytes())
    document["content"]["card"] |= card
    write_store_json(store / "store.json", document)


def test_a_store_that_is_whole_but_not_the_listed_one_is_never_exported_and_never_left(checkout, tmp_path):
    out = tmp_path / "out"
    checkout.run("export", "cache", out)
    before = _files(out)
    remake(CacheRoot(out).tokens(checkout.manifest.fingerprint, checkout.manifest.entries[0].unit_digest), notes=["x"])
    assert checkout.run("export", "cache", out).code == 0 and _files(out) == before
    for number, store in enumerate((checkout.tokens(), checkout.actions(1))):
        remake(store, notes=["x"])
        result = checkout.run("export", "cache", tmp_path / f"{number}")
        assert result.code == 2 and f"{store} is not the store that the manifest lists" in result.err
        assert not (tmp_path / f"{number}/manifests").exists()
        shutil.rmtree(store)
        shutil.copytree(out / store.relative_to(checkout.root.path), store)


def test_the_manifest_of_some_units_keeps_what_was_left_out_of_them(checkout):
    remake(checkout.tokens(), skipped=[{"key": "s", "reason": "no video"}], notes=["slow"])
    remake(checkout.actions(), excluded={"e": "no keys"})
    first = checkout.manifest.entries[0]
    (part,) = store_export.select_units(checkout.manifest, checkout.root, lambda _, entry: entry == first).parts
    assert part.skipped == ({"key": "s", "reason": "no video"}, {"key": "e", "reason": "no keys"})
    assert part.notes == ("slow",) and part.entries == (first,)


def test_stage_two_reads_an_exported_root(checkout, tmp_path):
    out = tmp_path / "out"
    checkout.run("export", "cache", out, "--episodes", "z")
    shutil.copy(next((out / "manifests").iterdir()), checkout.manifest_path)
    shutil.rmtree(checkout.root.path)
    dataset = open_dataset(load_config(checkout.folder, [f"cache.root={out}"]), checkout.folder)
    assert [segment.episode for segment in dataset.segments] == ["z"]
    actions, states = dataset.controls(0)
    assert len(actions) == len(states) == dataset.manifest.num_steps
    assert checkout.run("verify", f"cache.root={out}").code == 0
    assert checkout.run("gc", f"cache.root={out}", "--json").document["unneeded"] == []
    assert checkout.run("gc", f"cache.root={out}", "--json").document["unknown"] == []


def test_a_unit_brings_all_of_its_episodes_and_that_is_told(checkout, tmp_path):
    result = checkout.run("export", "cache", tmp_path / "out", "--episodes", "x", "--json")
    assert (result.document["num_episodes"], result.document["num_episodes_asked"]) == (2, 1)
    text = checkout.run("export", "cache", tmp_path / "again", "--episodes", "x").out
    assert "1 episodes were asked for; their units are whole, so 1 others came along" in text


def test_units_are_chosen_by_digest_by_file_name_and_by_split(checkout, tmp_path):
    checkout.run("status", checkout.recordings)  # the digest table learns the names
    entry = checkout.manifest.entries[1]
    checkout.run("export", "cache", tmp_path / "digest", "--units", entry.unit_digest[:8])
    assert [it.unit_digest for it in _manifest(tmp_path / "digest").entries] == [entry.unit_digest]
    checkout.run("export", "cache", tmp_path / "name", "--units", "a.tar", "--units", "b.tar")
    assert sorted(it.num_episodes for it in _manifest(tmp_path / "name").entries) == [1, 2]
    checkout.run("export", "cache", tmp_path / "both", "--units", "[ab].tar", "--episodes", "[wz]")
    assert [it.num_episodes for it in _manifest(tmp_path / "both").entries] == [1]
    val = checkout.run("export", "cache", tmp_path / "val", "--split", "val", "split.val_share=1", "--json")
    assert val.document["num_episodes_asked"] == 4
    none = checkout.run("export", "cache", tmp_path / "none", "--split", "train", "split.val_share=1", "--json")
    assert none.code == 1 and "nothing to export" in none.document["error"] and not (tmp_path / "none").exists()


def test_checksums_cover_every_file_and_hold(checkout, tmp_path):
    out = tmp_path / "out"
    checkout.run("export", "cache", out)
    listed = dict(reversed(line.split("  ", 1)) for line in (out / CHECKSUMS).read_text().splitlines())
    assert set(listed) == {name for name in _files(out) if name != CHECKSUMS}
    assert all(
        hashlib.sha256(content).hexdigest() == listed[name] for name, content in _files(out).items() if name in listed
    )
    subprocess.run(["sha256sum", "--quiet", "-c", CHECKSUMS], cwd=out, check=True)


def test_the_card_says_where_it_comes_from_and_what_is_not_known(checkout, tmp_path):
    out = tmp_path / "out"
    checkout.run("export", "cache", out, "--episodes", "z")
    card = json.loads((out / "provenance.json").read_bytes())
    manifest = checkout.manifest
    assert card["encoder"]["weights"] == manifest.recipe["encoder"]["weights"] and card["encoder"]["trained"] is False
    assert card["encoder"]["licence"] == "none: seeded random weights"
    assert card["parts"][0]["recipe"] == manifest.recipe
    assert card["parts"][0]["licence_of_recordings"] == card["parts"][0]["origin_of_recordings"] == "unknown"
    assert card["selection"]["from_manifest"] == manifest.digest and card["selection"]["episodes"] == ["z"]
    assert card["made_with"][0]["device"] == "cpu" and "torch" in card["made_with"][0]["versions"]
    (unit,) = card["parts"][0]["units"]
    assert unit["tokens_digest"] in {entry.tokens_digest for entry in manifest.entries}
    text = (out / "README.md").read_text()
    assert "UNTRAINED" in text and "unknown: fill in" in text and card["manifest"] in text
    assert str(checkout.folder) not in text + (out / "provenance.json").read_text()


def test_a_damaged_store_is_never_exported(checkout, tmp_path):
    flip(checkout.tokens(1) / "tokens/c/0/0/0", 100)
    result = checkout.run("export", "cache", tmp_path / "out", "--json")
    assert result.code == 2 and "sha256 differs" in result.document["error"] and "jepa-cache repair" in result.err
    store = CacheRoot(tmp_path / "out").tokens(checkout.manifest.fingerprint, checkout.manifest.entries[1].unit_digest)
    assert not store.exists() and not (tmp_path / "out/manifests").exists()


def test_an_interrupted_export_goes_on(checkout, tmp_path):
    flip(checkout.tokens(2) / "tokens/c/0/0/0", 100)
    checkout.run("export", "cache", tmp_path / "out")
    first = CacheRoot(tmp_path / "out").tokens(checkout.manifest.fingerprint, checkout.manifest.entries[0].unit_digest)
    time = (first / "store.json").stat().st_mtime_ns
    flip(checkout.tokens(2) / "tokens/c/0/0/0", 100)
    assert checkout.run("export", "cache", tmp_path / "out").code == 0
    assert (first / "store.json").stat().st_mtime_ns == time
    (first.parent / ".jepa-cache-0123456789ab-dead.zarr").mkdir()  # of an export that was killed
    flip(first / "steps.parquet", 200)
    assert checkout.run("export", "cache", tmp_path / "out").code == 0
    assert checkout.run("verify", f"cache.root={tmp_path / 'out'}").code == 0
    assert not list((tmp_path / "out").rglob(".jepa-cache-*"))


@pytest.mark.parametrize("what", ["file", "foreign", "other export", "inside", "the root"])
def test_a_folder_that_holds_something_else_is_refused(checkout, tmp_path, what):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "foreign":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif what == "other export":
        checkout.run("export", "cache", out, "--episodes", "z")
    else:
        out = checkout.root.path / "out" if what == "inside" else checkout.root.path
    before = _files(tmp_path)
    result = checkout.run("export", "cache", out, "--json")
    said = {"file": "is a file", "foreign": "holds mine.txt", "other export": "holds another export"}
    assert result.code == 1 and said.get(what, "lies in the cache root") in result.document["error"]
    assert _files(tmp_path) == before


def test_an_export_waits_for_no_clean_up_but_is_refused(checkout, tmp_path):
    with held_alone(checkout.root):
        result = checkout.run("export", "cache", tmp_path / "out", "--json")
    assert result.code == 1 and "in use" in result.document["error"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("--episodes", "nobody"), ("--units", "nothing"), ("--units", "12345"), ("--split", "test"), ("x",)]
)
def test_wrong_choices_are_wrong_usage(checkout, tmp_path, arguments):
    if "12345" in arguments:  # too few digits, though they fit
        arguments = ("--units", checkout.manifest.entries[0].unit_digest[:5])
    result = checkout.run("export", "cache", tmp_path / "out", *arguments)
    assert result.code == 2 and result.err.startswith("error: ") and not (tmp_path / "out").exists()
