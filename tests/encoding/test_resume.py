"""Claims: what was encoded under a recipe is found again and never encoded twice; only what is missing or damaged is made."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from jepa_cache.encoding import decoding, pipeline
from jepa_cache.encoding.run import encode_dataset
from jepa_cache.encoding.verification import repair_manifest
from jepa_cache.media.probe import DecodeError
from jepa_cache.store import layout
from jepa_cache.store.check import check_units
from jepa_cache.store.root import CacheRoot
from tests.encoded import all_files, encode, make_tars, make_tiny_tar, read_episodes, tiniest_config
from tests.makers import make_vpt_pair, write_vpt_tar

CONFIG = tiniest_config()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    episodes = {"a": {"x": 45, "y": 38}, "b": {"z": 41}, "c": {"w": 40}}
    return make_tars(tmp_path_factory.mktemp("recordings"), episodes)


@pytest.fixture(scope="module")
def complete(folder, tmp_path_factory):
    """One uninterrupted run: its result, root and every file."""
    root = tmp_path_factory.mktemp("complete") / "cache"
    return encode(folder, root, CONFIG), root, all_files(root)


@pytest.fixture
def root(complete, tmp_path):
    """A copy of that root."""
    return shutil.copytree(complete[1], tmp_path / "cache")


@pytest.fixture
def opened(monkeypatch):
    """Bytes of the videos that are opened."""
    videos, real = [], decoding.open_video
    monkeypatch.setattr(decoding, "open_video", lambda video, *a, **k: videos.append(video) or real(video, *a, **k))
    return videos


@pytest.fixture
def no_encoder(monkeypatch):
    """Building an encoder or opening a video fails."""

    def fail(*_, **__):
        raise AssertionError("an encoder was built or a video opened")

    monkeypatch.setattr("jepa_cache.encoder.frozen.FrozenEncoder.__init__", fail)
    monkeypatch.setattr(decoding, "open_video", fail)


def stores_in(files):
    """The files of stores alone, without manifests and locks."""
    return {name: content for name, content in files.items() if name.startswith(("tokens/", "actions/", "controls/"))}


def test_a_second_run_encodes_nothing_and_touches_no_file_whatever_the_tars_are_called(
    folder, complete, root, tmp_path, no_encoder
):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    recordings = shutil.copytree(folder, tmp_path / "in")
    (recordings / "a.tar").rename(recordings / "renamed.tar")
    for place in (folder, recordings):
        second = encode(place, root, CONFIG)
        assert second.manifest.to_bytes() == complete[0].manifest.to_bytes()
        assert (second.num_encoded, second.num_units, second.timing) == (0, 3, None)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_another_action_space_needs_no_video_and_no_encoder(folder, complete, root, no_encoder):
    second = encode(folder, root, tiniest_config(action_space="vpt36"))
    assert second.manifest.fingerprint == complete[0].manifest.fingerprint
    old, new = read_episodes(complete[0], root), read_episodes(second, root)
    for key in old:
        # vpt36 is vpt13 with 23 buttons between the mouse and the slots.
        assert np.array_equal(np.delete(new[key]["actions"], slice(4, 27), 1), old[key]["actions"], equal_nan=True)
        assert set(np.unique(new[key]["actions"][:-1, 4:27])) == {0.0, 1.0}


def test_controls_that_are_gone_or_damaged_are_read_again_without_decoding(folder, complete, root, no_encoder, capsys):
    gone, cut, flipped = root.glob("controls/*/*")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 4] ^= 0x10
    gone.unlink()
    os.truncate(cut, cut.stat().st_size - 100)
    flipped.write_bytes(content)
    for path in root.glob("actions/*/*/store.json"):
        path.unlink()
    encode(folder, root, CONFIG)
    assert capsys.readouterr().out.count("damaged, reading the controls from the recordings again") == 2
    assert all_files(root) == complete[2]


def test_a_tar_that_is_added_removed_or_replaced_touches_no_other(folder, complete, tmp_path, opened):
    recordings, root = shutil.copytree(folder, tmp_path / "in"), tmp_path / "cache"
    encode(recordings, root, CONFIG, inputs=["a.tar", "b.tar"])
    assert len(opened) == 3
    added = encode(recordings, root, CONFIG)
    assert (len(opened), added.num_encoded) == (4, 1)
    assert added.manifest.to_bytes() == complete[0].manifest.to_bytes()
    assert stores_in(all_files(root)) == stores_in(complete[2])
    (recordings / "b.tar").unlink()
    without = encode(recordings, root, CONFIG)
    assert (without.num_encoded, without.num_units, len(opened)) == (0, 2, 4)
    write_vpt_tar(recordings / "c.tar", {"w": make_vpt_pair(40, 77)})
    replaced = encode(recordings, root, CONFIG)
    assert (replaced.num_encoded, len(opened)) == (1, 5)
    assert stores_in(complete[2]).items() <= all_files(root).items()


def test_a_tar_that_is_changed_while_it_is_encoded_is_named_and_nothing_is_published(tmp_path, monkeypatch):
    recordings, root = make_tiny_tar(tmp_path / "in", "a"), tmp_path / "cache"
    real = pipeline._OpenUnit.encode

    def change(self, stream):
        with (recordings / "a.tar").open("ab") as file:
            file.write(bytes(10240))
        return real(self, stream)

    monkeypatch.setattr(pipeline._OpenUnit, "encode", change)
    with pytest.raises(ValueError, match=r"a\.tar was changed while it was being encoded"):
        encode(recordings, root, CONFIG)
    assert not stores_in(all_files(root))
    monkeypatch.undo()
    assert encode(recordings, root, CONFIG).num_encoded == 1


@pytest.mark.parametrize("name", ["tokens/c/0/0/0", layout.SEGMENTS_FILE, layout.STORE_FILE])
def test_a_damaged_store_is_named_and_encoded_again_alone(folder, complete, root, opened, capsys, name):
    manifest = complete[0].manifest
    path = CacheRoot(root).tokens(manifest.fingerprint, manifest.entries[1].unit_digest) / name
    path.unlink() if name == layout.SEGMENTS_FILE else os.truncate(path, path.stat().st_size // 2)
    result = encode(folder, root, CONFIG)
    assert result.num_encoded == 1 and 1 <= len(opened) <= 2
    assert f"damaged, encoding it again: {path}" in capsys.readouterr().out
    assert all_files(root) == complete[2]


def test_a_recording_that_one_recipe_cannot_use_is_there_for_another(tmp_path):
    folder, root = make_tars(tmp_path / "in", {"a": {"long": 70, "short": 20}}), tmp_path / "cache"
    clip = encode(folder, root, tiniest_config(mode="clip", frames_per_clip=16, max_skipped_share=0.5))
    assert [recording["key"] for recording in clip.manifest.skipped] == ["short"]
    frame = encode(folder, root, CONFIG)
    assert read_episodes(frame, root).keys() == {"long", "short"} and frame.manifest.skipped == ()


def test_actions_made_for_other_steps_are_made_again(folder, complete, tmp_path, monkeypatch):
    root, real, opened = tmp_path / "cache", decoding.open_video, []

    def open_second_only(video, decoder, **options):
        opened.append(video)
        if len(opened) == 1:
            raise DecodeError("nothing of it on this machine")
        return real(video, decoder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "open_video", open_second_only)
        partly = encode(folder, root, tiniest_config(decoder="pyav", max_skipped_share=0.5, num_decoders=1))
    assert len(partly.manifest.skipped) == 1
    expected, episodes = read_episodes(complete[0], complete[1]), read_episodes(encode(folder, root, CONFIG), root)
    for key in expected:
        assert np.array_equal(episodes[key]["actions"], expected[key]["actions"], equal_nan=True)


def test_a_repair_finds_the_units_of_all_members_of_a_mixture_that_share_a_recipe(tmp_path):
    members, root, base = [], CacheRoot(tmp_path / "cache"), tmp_path / "in"
    for seed, name in enumerate("ab"):
        make_tiny_tar(base / name, name, seed)
        members.append((dataclasses.replace(CONFIG.dataset, name=name, inputs=(name,)), 0.5))
    config = dataclasses.replace(CONFIG, members=tuple(members))
    manifest = encode_dataset(config, [], base=base, root=root).manifest
    for part, entry in manifest.stores:
        shutil.rmtree(root.store(part.keys(entry)[0]))
    findings = check_units(manifest.stores, root)
    repair = repair_manifest(manifest, findings, config, [], base=base, root=root)
    assert repair.complete and len(repair.repaired) == 2 and not check_units(manifest.stores, root)
