"""Claims of `jepa-cache gc`: nothing changes without --delete; what any manifest, a recent encode or a living writer needs stays.

What nothing needs goes, with its bytes told; a manifest that cannot be read stops the clean-up; --forget drops one of them.
"""

import os
import shutil
import time

from jepa_cache.store.collection import GRACE_DAYS
from tests.encoded import all_files
from tests.makers import make_vpt_pair, write_vpt_tar

NOW = ("--grace-days", "0")


def _orphan(checkout, fingerprint="0" * 32):
    """A copy of a token store under a recipe that no manifest lists."""
    store = checkout.root.path / "tokens" / fingerprint / checkout.tokens().name
    shutil.copytree(checkout.tokens(), store)
    return store


def _age(store, days):
    os.utime(store / "store.json", 2 * (time.time() - 86400 * days,))


def _bytes(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_an_encoded_root_holds_nothing_that_is_not_needed(checkout):
    before = checkout.files()
    result = checkout.run("gc", *NOW, "--delete", "--json")
    assert result.code == 0 and result.document["unneeded"] == [] and result.document["num_bytes"] == 0
    assert checkout.files() == before
    (listing,) = result.document["listings"]
    assert listing["of_this_checkout"] and listing["num_missing"] == 0 and listing["num_units"] == 3
    kinds = [checkout.root.path / kind for kind in ("tokens", "actions", "controls")]
    assert listing["num_bytes"] == listing["only_bytes"] == sum(map(_bytes, kinds))


def test_what_no_manifest_needs_is_listed_and_removed_on_request_alone(checkout):
    before = checkout.files()
    store, dead = _orphan(checkout), checkout.tokens().parent / ".jepa-cache-0123456789ab-dead.zarr"
    dead.mkdir()
    (dead / "x").write_bytes(b"12345")  # of a writer that died
    num_bytes = _bytes(store)
    listed = checkout.run("gc", *NOW, "--json").document
    (entry,) = listed["unneeded"]
    assert (entry["path"], entry["num_bytes"], entry["kind"]) == (str(store), num_bytes, "tokens")
    assert listed["kept_bytes"] == listed["listings"][0]["num_bytes"] == listed["listings"][0]["only_bytes"]
    assert store.is_dir() and f"not needed: {store}" in checkout.run("gc", *NOW).out
    assert "nothing was changed" in checkout.run("gc", *NOW).out
    removed = checkout.run("gc", *NOW, "--delete", "--json").document
    assert removed["deleted"] and removed["num_bytes"] == num_bytes + 5
    assert removed["temporaries"] == listed["temporaries"] == [{"path": str(dead), "num_bytes": 5}]
    assert not store.parent.exists() and checkout.files() == before


def test_stores_that_only_another_manifest_needs_stay_and_go_when_it_is_forgotten(checkout):
    whole, first = checkout.files(), checkout.manifest
    write_vpt_tar(checkout.recordings / "b.tar", {"z": make_vpt_pair(30, 77)})
    checkout.encode("encode.action_space=vpt36")
    document = checkout.run("gc", *NOW, "--delete", "--json").document
    assert document["unneeded"] == [] and whole.items() <= checkout.files().items()
    listings = {entry["digest"]: entry for entry in document["listings"]}
    old, own = listings[first.digest], listings[checkout.manifest.digest]
    shared = _bytes(checkout.root.path / "tokens") + _bytes(checkout.root.path / "controls")
    assert 0 < old["only_bytes"] < old["num_bytes"] and own["num_bytes"] - own["only_bytes"] < shared
    assert old["num_bytes"] - old["only_bytes"] == own["num_bytes"] - own["only_bytes"], "what both need"
    told = checkout.run("gc", "--forget", first.digest[:8], "--json").document
    assert told["num_bytes"] == old["only_bytes"] and told["kept_bytes"] == own["num_bytes"]
    assert whole.items() <= checkout.files().items()
    assert f"jepa-cache gc --delete --forget {first.digest[:8]}" in checkout.run("gc", "--forget", first.digest[:8]).out
    checkout.run("gc", "--forget", first.digest[:8], "--delete")  # without days of grace
    assert checkout.run("gc", *NOW, "--json").document["unneeded"] == []
    assert not checkout.root.manifest(first.digest).exists() and checkout.run("verify").code == 0
    refused = checkout.run("gc", "--forget", checkout.manifest.digest, "--delete")
    assert refused.code == 1 and "manifest of this checkout" in refused.err and checkout.run("verify").code == 0
    assert checkout.run("gc", "--forget", checkout.manifest.digest[:5]).code == 2, "too short to be meant"


def test_a_manifest_that_cannot_be_read_stops_the_clean_up_until_it_is_forgotten(checkout):
    store = _orphan(checkout)
    bad = checkout.root.manifest("f" * 32)
    bad.write_text('{"manifest_version": 99}')
    listed = checkout.run("gc")
    assert listed.code == 1 and "cannot be read" in listed.out
    refused = checkout.run("gc", *NOW, "--delete")
    assert refused.code == 1 and "is not known" in refused.err and store.is_dir() and bad.exists()
    assert checkout.run("gc", *NOW, "--delete", "--forget", "f" * 32).code == 0
    assert not store.exists() and not bad.exists()


def test_files_and_folders_of_others_in_a_root_are_named_and_left_whatever_they_are_called(checkout):
    """Of a store by its name and place, and of a manifest too; without store.json, or through a link, none of them is ours."""
    root, other = checkout.root.path, checkout.folder / "other"
    shutil.copytree(checkout.tokens(), other / checkout.tokens().name)
    (root / "tokens" / ("1" * 32)).symlink_to(other)
    (root / "controls" / ("0" * 32) / "folder.parquet").mkdir(parents=True)
    (root / "unfinished").mkdir()  # records of earlier versions fail no encode and stay
    (root / f"unfinished/{'0' * 32}.json").write_bytes(b"\xff garbage")
    checkout.encode()
    zeros = f"tokens/{'0' * 32}"
    files = ("manifests/pod.json", "tokens/notes.txt", f"{zeros}/file.zarr", f"{zeros}/{'1' * 32}.zarr/x", ".tmp-a/x")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    before = checkout.files()
    result = checkout.run("gc", *NOW, "--delete", "--json").document
    assert result["unneeded"] == [] and checkout.files() == before and all_files(other)
    named = {name.removesuffix("/x") for name in files} | {f"tokens/{'1' * 32}", f"controls/{'0' * 32}/folder.parquet"}
    assert set(result["unknown"]) == {str(root / name) for name in named}
    assert f"left alone, not of this program: {root}/.tmp-a" in checkout.run("gc", *NOW).out


def test_what_the_manifest_of_this_checkout_lists_stays_though_the_root_lost_its_copy(checkout):
    checkout.root.manifest(checkout.manifest.digest).unlink()
    before = checkout.files()
    result = checkout.run("gc", *NOW, "--delete", "--json")
    assert result.code == 0 and result.document["unneeded"] == [] and checkout.files() == before
    (listing,) = result.document["listings"]
    assert listing["of_this_checkout"] and listing["num_missing"] == 0
    checkout.root.manifest(checkout.manifest.digest).write_bytes(checkout.manifest_path.read_bytes())
    checkout.manifest_path.write_text("{")  # which the root's copy speaks for
    before = checkout.files()
    assert checkout.run("gc", *NOW, "--delete").code == 0 and checkout.files() == before


def test_what_no_manifest_lists_is_kept_for_days_after_the_last_store_of_its_recipe(checkout):
    """As a running encode or an interrupted one has made it: its manifest comes last."""
    before, whole, (first, second) = (
        checkout.files(),
        checkout.tokens(),
        (_orphan(checkout), _orphan(checkout, "1" * 32)),
    )
    young = first.with_name(checkout.tokens(1).name)
    shutil.copytree(checkout.tokens(1), young)
    for store, days in ((whole, 1000), (first, 1000), (young, GRACE_DAYS - 0.1), (second, GRACE_DAYS + 0.1)):
        _age(store, days)
    document = checkout.run("gc", "--json").document
    assert [entry["path"] for entry in document["unneeded"]] == [str(second)]
    assert document["recent_bytes"] == _bytes(first) + _bytes(young)
    assert "kept for 14 days after the last store of their recipe, in no manifest: 2 stores" in checkout.run("gc").out
    checkout.run("gc", "--delete")
    assert first.is_dir() and young.is_dir() and not second.exists()
    assert "with: jepa-cache gc --delete --grace-days 0" in checkout.run("gc", *NOW).out
    checkout.run("gc", *NOW, "--delete")
    assert checkout.files() == before


def test_what_somebody_holds_stays(checkout):
    """A running encode the root, another encoder a store; a file that vanishes meanwhile nothing."""
    store = _orphan(checkout)
    (store / "gone").symlink_to(checkout.folder / "nowhere")

    with checkout.root.shared_lock():
        result = checkout.run("gc", *NOW, "--delete")
        assert result.code == 1 and "in use" in result.err and store.is_dir()
        assert checkout.run("gc").code == 0
    claim = checkout.root.claim(store)
    assert checkout.run("gc", *NOW, "--delete", "--json").document["unneeded"] == [] and store.is_dir()
    claim.release()
    checkout.run("gc", *NOW, "--delete")
    assert not store.exists()


def test_what_is_no_root_or_no_setting_is_wrong_usage(checkout):
    for argument, said in (
        (f"cache.root={checkout.folder / 'nowhere'}", "there is no cache root"),
        (checkout.recordings, "takes key=value or FILE.yaml only"),
        ("--grace-days=-1", "grace-days"),
    ):
        result = checkout.run("gc", argument, "--delete")
        assert result.code == 2 and said in result.err
    assert not (checkout.folder / "nowhere").exists()
