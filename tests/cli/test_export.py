"""Claims of `jepa-cache export cache`: a root of its own that stage two reads, of whole units, every byte checked on the way.

It holds a manifest, a card with recipes, weights and licences (unknown where they are), and checksums of every file.
"""

import hashlib
import json
import shutil
import subprocess

import pytest

from jepa_cache.config.loading import load_config
from jepa_cache.data.cache import open_dataset
from jepa_cache.store.export import CHECKSUMS
from jepa_cache.store.manifest import read_manifest
from jepa_cache.store.root import CacheRoot
from tests.cli.test_verify import flip


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
    flip(first / "steps.parquet", 200)
    assert checkout.run("export", "cache", tmp_path / "out").code == 0
    assert checkout.run("verify", f"cache.root={tmp_path / 'out'}").code == 0
    assert not list((tmp_path / "out").rglob(".tmp-*"))


@pytest.mark.parametrize("what", ["file", "foreign", "other export", "inside"])
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
        out = checkout.root.path / "out"
    before = _files(tmp_path)
    result = checkout.run("export", "cache", out, "--json")
    assert result.code == 1 and "error" in result.document and _files(tmp_path) == before


@pytest.mark.parametrize("arguments", [("--episodes", "nobody"), ("--units", "nothing"), ("--split", "test"), ("x",)])
def test_wrong_choices_are_wrong_usage(checkout, tmp_path, arguments):
    result = checkout.run("export", "cache", tmp_path / "out", *arguments)
    assert result.code == 2 and result.err.startswith("error: ") and not (tmp_path / "out").exists()
