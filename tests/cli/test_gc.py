"""Claims of `jepa-cache gc`: nothing changes without --delete; what any manifest, unfinished encode or living writer needs stays.

What nothing needs goes, with its bytes told; a manifest that cannot be read stops the clean-up; --forget drops one of them.
"""

import os
import shutil

import pytest

from jepa_cache.files import temporary_folder
from jepa_cache.store.manifest import read_manifest, write_manifest
from jepa_cache.store.root import CacheRoot
from jepa_cache.store.usage import (
    RootInUseError,
    announce,
    held_alone,
    in_use,
    list_unfinished,
    settle,
    unfinished_path,
)
from tests.encoded import all_files
from tests.makers import make_vpt_pair, write_vpt_tar


def _orphan(checkout):
    """A copy of a token store under a recipe that no manifest lists."""
    store = checkout.root.path / "tokens" / ("0" * 32) / checkout.tokens().name
    shutil.copytree(checkout.tokens(), store)
    return store


def _bytes(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_an_encoded_root_holds_nothing_that_is_not_needed(checkout):
    before = checkout.files()
    result = checkout.run("gc", "--delete", "--json")
    assert result.code == 0 and result.document["unneeded"] == [] and result.document["num_bytes"] == 0
    assert checkout.files() == before
    (listing,) = result.document["listings"]
    assert listing["of_this_checkout"] and listing["num_missing"] == 0 and listing["num_units"] == 3
    kinds = [checkout.root.path / kind for kind in ("tokens", "actions", "controls")]
    assert listing["num_bytes"] == listing["only_bytes"] == sum(map(_bytes, kinds))


def test_what_no_manifest_needs_is_listed_and_removed_on_request_alone(checkout):
    before = checkout.files()
    store = _orphan(checkout)
    num_bytes = _bytes(store)
    listed = checkout.run("gc", "--json").document
    (entry,) = listed["unneeded"]
    assert (entry["path"], entry["num_bytes"], entry["kind"]) == (str(store), num_bytes, "tokens")
    assert listed["kept_bytes"] == listed["listings"][0]["num_bytes"] == listed["listings"][0]["only_bytes"]
    assert store.is_dir() and f"not needed: {store}" in checkout.run("gc").out
    assert "nothing was changed" in checkout.run("gc").out
    removed = checkout.run("gc", "--delete", "--json").document
    assert removed["deleted"] and removed["num_bytes"] == num_bytes
    assert not store.parent.exists() and checkout.files() == before


def test_stores_that_only_another_manifest_needs_stay_and_go_when_it_is_forgotten(checkout):
    whole, digest = checkout.files(), checkout.manifest.digest
    write_vpt_tar(checkout.recordings / "b.tar", {"z": make_vpt_pair(30, 77)})
    checkout.encode("encode.action_space=vpt36")
    assert checkout.run("gc", "--delete", "--json").document["unneeded"] == []
    assert whole.items() <= checkout.files().items()
    old = next(it for it in checkout.run("gc", "--json").document["listings"] if it["digest"] == digest)
    result = checkout.run("gc", "--forget", digest[:8], "--json").document
    assert result["num_bytes"] == old["only_bytes"] > 0 and whole.items() <= checkout.files().items()
    assert f"jepa-cache gc --delete --forget {digest[:8]}" in checkout.run("gc", "--forget", digest[:8]).out
    checkout.run("gc", "--forget", digest[:8], "--delete")
    assert checkout.run("gc", "--json").document["unneeded"] == []
    assert not checkout.root.manifest(digest).exists()
    assert checkout.run("verify").code == 0


def test_the_manifest_of_this_checkout_cannot_be_forgotten(checkout):
    before = checkout.files()
    result = checkout.run("gc", "--forget", checkout.manifest.digest, "--delete")
    assert result.code == 1 and "manifest of this checkout" in result.out and checkout.files() == before


def test_a_digest_that_is_too_short_or_unknown_is_wrong_usage(checkout):
    for text, fits in (("0123456789", 0), (checkout.manifest.digest[:5], 1)):
        result = checkout.run("gc", "--forget", text, "--delete")
        assert result.code == 2 and f"fits {fits}" in result.err


def test_a_manifest_that_cannot_be_read_stops_the_clean_up_until_it_is_forgotten(checkout):
    store = _orphan(checkout)
    bad = checkout.root.manifest("f" * 32)
    bad.write_text('{"manifest_version": 99}')
    listed = checkout.run("gc")
    assert listed.code == 1 and "cannot be read" in listed.out
    refused = checkout.run("gc", "--delete")
    assert refused.code == 1 and "is not known" in refused.err and store.is_dir() and bad.exists()
    assert checkout.run("gc", "--delete", "--forget", "f" * 32).code == 0
    assert not store.exists() and not bad.exists()


def test_a_manifest_is_forgotten_alone_and_only_by_a_beginning_that_fits_no_other(checkout):
    store = _orphan(checkout)
    bad = [checkout.root.manifest("f" * 31 + last) for last in "01"]
    for path in bad:
        path.write_text('{"manifest_version": 99}')
    several = checkout.run("gc", "--delete", "--forget", "f" * 31)
    assert several.code == 2 and "fits 2" in several.err
    refused = checkout.run("gc", "--delete", "--forget", bad[0].stem)
    assert refused.code == 1 and f"the manifest {bad[1].stem} needs is not known" in refused.err
    assert store.is_dir() and all(path.exists() for path in bad)


def test_a_running_encode_stops_the_clean_up_and_changes_nothing(checkout):
    store = _orphan(checkout)
    with in_use(checkout.root):
        result = checkout.run("gc", "--delete")
        assert result.code == 1 and "in use" in result.err and store.is_dir()
        assert checkout.run("gc").code == 0
    assert checkout.run("gc", "--delete").code == 0 and not store.exists()


def test_a_store_that_is_being_made_stays(checkout):
    store = _orphan(checkout)
    claim = checkout.root.claim(store)
    assert checkout.run("gc", "--delete", "--json").document["unneeded"] == [] and store.is_dir()
    claim.release()
    checkout.run("gc", "--delete")
    assert not store.exists()


def test_temporaries_of_living_writers_stay_and_those_of_dead_ones_go(checkout):
    folder = checkout.tokens().parent
    dead = folder / ".jepa-cache-0123456789ab-dead.zarr"
    dead.mkdir()
    (dead / "x").write_bytes(b"12345")
    half = checkout.root.path / "manifests/.jepa-cache-0123456789ab-half.json"
    half.write_bytes(b"{")
    with temporary_folder(folder / "living.zarr") as living:
        (living / "y").write_bytes(b"1")
        result = checkout.run("gc", "--delete", "--json").document
        assert living.is_dir() and not dead.exists()
    assert sorted(entry["num_bytes"] for entry in result["temporaries"]) == [1, 5] and not half.exists()


def test_uploads_that_were_never_finished_are_counted_once_and_removed_on_request_alone(checkout, monkeypatch):
    removed = []
    monkeypatch.setattr(CacheRoot, "find_abandoned", lambda _: {"tokens/f/u.zarr.attempt-1": 7})
    monkeypatch.setattr(CacheRoot, "remove_abandoned", lambda _, name: removed.append(name))
    for options in ((), ("--delete",)):
        assert removed == []
        document = checkout.run("gc", *options, "--json").document
        assert document["temporaries"] == [{"path": "tokens/f/u.zarr.attempt-1", "num_bytes": 7}]
        assert document["num_bytes"] == 7
    assert removed == ["tokens/f/u.zarr.attempt-1"]


def test_files_of_others_are_named_and_left(checkout):
    places = ("manifests/notes.txt", f"tokens/{'0' * 32}/file.zarr", "tokens/notes.txt", "work/notes.txt")
    for name in places:
        (checkout.root.path / name).parent.mkdir(exist_ok=True)
        (checkout.root.path / name).write_text("mine")
    folder = checkout.root.path / "controls" / ("0" * 32) / "folder.parquet"
    folder.mkdir(parents=True)
    result = checkout.run("gc", "--delete", "--json")
    named = {str(checkout.root.path / name) for name in (*places[:3], "work")} | {str(folder)}
    assert set(result.document["unknown"]) == named and folder.is_dir()
    assert all((checkout.root.path / name).read_text() == "mine" for name in places)
    assert all(f"left alone, not of this program: {path}" in checkout.run("gc").out for path in named)


def test_a_folder_that_is_no_root_is_refused_and_stays_as_it_is(checkout):
    mine = checkout.folder / "mine"
    for name in (".tmp-draft", "tokens/mymodel/x", "controls/x/log.parquet", f"tokens/{'0' * 32}/{'1' * 32}.zarr/x"):
        (mine / name).parent.mkdir(parents=True)
        (mine / name).write_text("x")
    before = all_files(mine)
    for options in ((), ("--delete",)):
        result = checkout.run("gc", f"cache.root={mine}", *options)
        assert result.code == 2 and f"{mine} is no cache root" in result.err and all_files(mine) == before


def test_folders_of_others_in_a_root_stay_whatever_they_are_called(checkout):
    """Of a store by its name and place, and of a manifest too; without store.json, or through a link, none of them is ours."""
    other = checkout.folder / "other"
    other.mkdir()
    shutil.copytree(checkout.tokens(), other / checkout.tokens().name)
    (checkout.root.path / "tokens" / ("1" * 32)).symlink_to(other)
    names = (
        f"tokens/{'0' * 32}/{'1' * 32}.zarr/x",
        "tokens/model/x",
        "controls/x/log.parquet",
        "manifests/pod.json",
        ".tmp-a/x",
    )
    for name in names:
        (checkout.root.path / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.root.path / name).write_text("mine")
    before = checkout.files()
    result = checkout.run("gc", "--delete", "--json").document
    assert result["unneeded"] == [] and checkout.files() == before and all_files(other)
    named = {path.removeprefix(f"{checkout.root.path}/") for path in result["unknown"]}
    assert named == {
        f"tokens/{'0' * 32}/{'1' * 32}.zarr",
        f"tokens/{'1' * 32}",
        "tokens/model",
        "controls/x",
        "manifests/pod.json",
        ".tmp-a",
    }


def test_what_the_manifest_of_this_checkout_lists_stays_though_the_root_lost_its_copy(checkout):
    checkout.root.manifest(checkout.manifest.digest).unlink()
    before = checkout.files()
    result = checkout.run("gc", "--delete", "--json")
    assert result.code == 0 and result.document["unneeded"] == [] and checkout.files() == before
    (listing,) = result.document["listings"]
    assert listing["of_this_checkout"] and listing["num_missing"] == 0


def test_files_that_vanish_while_they_are_looked_at_are_no_error(checkout):
    """Their names are listed and lead to nothing, as those of an encode that ends just now."""
    store = _orphan(checkout)
    (checkout.root.path / "unfinished").mkdir(exist_ok=True)
    for name in (store / "gone", checkout.root.path / "unfinished/gone.json"):
        name.symlink_to(checkout.folder / "nowhere")
    (entry,) = checkout.run("gc", "--json").document["unneeded"]
    assert entry["num_bytes"] == _bytes(checkout.tokens())


def test_what_an_interrupted_encode_has_made_is_kept_until_its_manifest_is_there(checkout, monkeypatch):
    """The record is written before the first store, and goes when a manifest lists everything in it."""
    manifest = checkout.manifest
    (checkout.recordings / "b.tar").unlink()

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jepa_cache.encoding.run._describe_group", stop)
        checkout.encode("encode.fps=4")
    made = sorted(
        path for path in checkout.root.path.glob("tokens/*/*.zarr") if path.parent.name != manifest.fingerprint
    )
    assert len(made) == 2 and len(list_unfinished(checkout.root)) == 1
    result = checkout.run("gc", "--delete", "--json").document
    assert result["unneeded"] == [] and all(path.is_dir() for path in made)
    (unfinished,) = [entry for entry in result["listings"] if entry["unfinished"]]
    assert unfinished["num_units"] == 2 and unfinished["dataset"] == "vpt"
    checkout.encode("encode.fps=4")
    assert list_unfinished(checkout.root) == []


def test_an_abandoned_encode_can_be_forgotten(checkout):
    part = checkout.manifest.parts[0]
    from jepa_cache.store.usage import WantedPart

    wanted = WantedPart(
        "0" * 32, part.action_fingerprint, part.source_fingerprint, (part.entries[0].unit_digest, "9" * 64)
    )
    store = _orphan(checkout)
    announce(checkout.root, "vpt", [wanted])
    (record,) = list_unfinished(checkout.root)
    assert checkout.run("gc", "--delete", "--json").document["unneeded"] == [] and store.is_dir()
    checkout.run("gc", "--delete", "--forget", record.digest)
    assert not store.exists() and list_unfinished(checkout.root) == []


def test_a_record_that_cannot_be_read_stops_everything(checkout):
    store = _orphan(checkout)
    path = checkout.root.path / "unfinished" / f"{'0' * 32}.json"
    path.parent.mkdir(exist_ok=True)
    for content in ("{", "[]", '{"dataset": "vpt"}', '{"dataset": "vpt", "parts": [{"units": []}]}'):
        path.write_text(content)
        result = checkout.run("gc", "--delete")
        assert result.code == 2 and f"{path} cannot be read" in result.err and store.is_dir()


def test_what_lies_in_unfinished_and_is_no_record_fails_no_encode(checkout, capsys):
    before = checkout.files()
    folder = checkout.root.path / "unfinished"
    folder.mkdir(exist_ok=True)
    (folder / "notes.json").write_text("mine")
    (folder / f"{'0' * 32}.json").write_bytes(b"\xff garbage")
    (folder / f"{'1' * 32}.json").mkdir()
    checkout.encode()
    out = capsys.readouterr().out
    assert all(f"note: {folder}/{name * 32}.json cannot be read" in out for name in "01")
    assert before.items() <= checkout.files().items()
    assert checkout.run("gc", "--delete").code == 2


def test_nothing_is_announced_where_all_is_there_and_no_dead_announcement_stays(checkout):
    from jepa_cache.store.usage import WantedPart

    part = checkout.manifest.parts[0]
    wanted = WantedPart(
        part.fingerprint,
        part.action_fingerprint,
        part.source_fingerprint,
        tuple(entry.unit_digest for entry in part.entries),
    )
    dead = checkout.root.path / "unfinished" / ".jepa-cache-0123456789ab-dead.json"
    dead.parent.mkdir(exist_ok=True)
    announce(checkout.root, "vpt", [wanted])
    assert list_unfinished(checkout.root) == []
    dead.write_text("{")
    more = wanted._replace(units=(*wanted.units, "9" * 64))
    announce(checkout.root, "vpt", [more])
    (record,) = list_unfinished(checkout.root)
    assert not dead.exists()
    written = unfinished_path(checkout.root, record.digest).stat()
    announce(checkout.root, "vpt", [more])
    assert unfinished_path(checkout.root, record.digest).stat() == written, "the same bytes are not written again"


def test_a_record_is_settled_by_a_manifest_that_lists_all_of_it_and_by_no_other(checkout):
    from dataclasses import replace

    manifest = checkout.manifest
    part = manifest.parts[0]
    from jepa_cache.store.usage import WantedPart

    units = tuple(entry.unit_digest for entry in part.entries)
    shutil.rmtree(checkout.tokens())
    announce(
        checkout.root, "vpt", [WantedPart(part.fingerprint, part.action_fingerprint, part.source_fingerprint, units)]
    )
    settle(checkout.root, replace(manifest, parts=(replace(part, entries=part.entries[1:]),)))
    assert len(list_unfinished(checkout.root)) == 1
    settle(checkout.root, manifest)
    assert list_unfinished(checkout.root) == []


def test_a_root_that_is_not_there_is_wrong_usage(checkout):
    result = checkout.run("gc", f"cache.root={checkout.folder / 'nowhere'}")
    assert result.code == 2 and "there is no cache root" in result.err
    assert not (checkout.folder / "nowhere").exists()


def test_recordings_are_wrong_usage(checkout):
    result = checkout.run("gc", checkout.recordings, "--delete")
    assert result.code == 2 and "takes key=value overrides only" in result.err


def test_a_dead_holder_leaves_no_lock(checkout):
    child = os.fork()
    if child == 0:
        with in_use(checkout.root):
            os._exit(0)
    os.waitpid(child, 0)
    assert checkout.run("gc", "--delete").code == 0


def test_another_user_s_lock_holds_as_well(checkout, monkeypatch):
    real = os.open

    def refuse_writing(name, flags, *arguments, **options):
        if flags & os.O_RDWR and str(name).endswith("in-use.lock"):
            raise PermissionError
        return real(name, flags, *arguments, **options)

    with in_use(checkout.root):
        monkeypatch.setattr(os, "open", refuse_writing)
        with pytest.raises(RootInUseError), held_alone(checkout.root):
            pass
    with held_alone(checkout.root):
        pass


def test_manifests_of_two_data_sets_are_told_apart_by_what_they_need_alone(checkout):
    from dataclasses import replace

    manifest = checkout.manifest
    part = manifest.parts[0]
    smaller = replace(manifest, parts=(replace(part, entries=part.entries[:1]),))
    write_manifest(smaller, [checkout.root.manifest(smaller.digest)])
    listings = {entry["digest"]: entry for entry in checkout.run("gc", "--json").document["listings"]}
    assert listings[smaller.digest]["only_bytes"] == 0 < listings[smaller.digest]["num_bytes"]
    whole = listings[manifest.digest]
    assert whole["only_bytes"] == whole["num_bytes"] - listings[smaller.digest]["num_bytes"]
    assert read_manifest(checkout.root.manifest(smaller.digest)) == smaller
    result = checkout.run("gc", "--forget", smaller.digest, "--json")
    listings = {entry["digest"]: entry for entry in result.document["listings"]}
    assert listings[manifest.digest]["only_bytes"] == whole["num_bytes"] == result.document["kept_bytes"]
    shutil.rmtree(checkout.tokens())
    listings = checkout.run("gc", "--json").document["listings"]
    assert [entry["num_missing"] for entry in listings] == [1, 1]


def test_a_damaged_manifest_in_the_checkout_stops_nothing(checkout):
    before = checkout.files()
    checkout.manifest_path.write_text("{")
    assert checkout.run("gc", "--delete").code == 0 and checkout.files() == before
