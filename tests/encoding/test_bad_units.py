"""Claims: one bad unit among good ones costs no other; all are named for what they are, and each known loss is counted.

The good ones land, also where the share of losses stops the stage. A unit that cannot be read has no store, and is tried again.
Names that are no UTF-8 lose nothing. One key for two recordings is refused, and equal recordings are named.
"""

import dataclasses
import errno
import gzip
import io
import json
import os
import tarfile

import pytest

from jepa_cache.cli.estimate import estimate_group
from jepa_cache.cli.inspect import inspect
from jepa_cache.config.loading import load_config
from jepa_cache.encoding.groups import scan_units
from jepa_cache.encoding.run import describe_result
from jepa_cache.sources.vpt import VptSource
from jepa_cache.store import digests
from jepa_cache.store.root import CacheRoot
from tests.encoded import encode, make_tiny_tar, read_episodes, run_stage_one, tiniest_config
from tests.makers import make_vpt_pair, write_tar, write_vpt_tar
from tests.workspace import SUITE_SETTINGS

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 1024\n"
PAGE = b"<!DOCTYPE html>\n<html><title>404</title></html>"
ALL = tiniest_config(max_skipped_share=1.0)


def reasons(manifest):
    return {recording["key"]: recording["reason"] for recording in manifest.skipped}


@pytest.fixture
def good(tmp_path):
    for seed, name in enumerate(("good0", "good1")):
        make_tiny_tar(tmp_path / "in", name, seed)
    return tmp_path / "in"


@pytest.fixture
def spoilt(good):
    """Two good tars and a bad one of each kind, with the words that name it."""
    whole = (good / "good0.tar").read_bytes()
    (good / "lfs.tar").write_bytes(LFS)
    (good / "page.tar").write_bytes(PAGE)
    (good / "zip.tar").write_bytes(gzip.compress(whole, mtime=0))
    (good / "empty.tar").write_bytes(b"")
    (good / "noise.tar").write_bytes(b"junk" * 1000)
    (good / "zeros.tar").write_bytes(bytes(10240))
    (good / "gone.tar").symlink_to(good / "nowhere")
    (good / "loop.tar").symlink_to("loop.tar")
    os.mkfifo(good / "pipe.tar")
    return {
        "lfs.tar": "Git LFS pointer, not the data; fetch it with `git lfs pull`",
        "page.tar": "HTML page",
        "zip.tar": "compressed with gzip",
        "empty.tar": "it is empty",
        "noise.tar": "no uncompressed tar",
        "zeros.tar": "holds no recording",
        "gone.tar": "a link to a file that is not there",
        "loop.tar": "a link to a file that is not there",
        "pipe.tar": "no plain file",
    }


def test_bad_units_are_all_named_for_what_they_are_and_the_good_ones_land(good, spoilt, tmp_path):
    manifest = run_stage_one(good, CacheRoot(tmp_path / "cache"), ALL)
    named = reasons(manifest)
    assert named.keys() == spoilt.keys()
    for key, words in spoilt.items():
        assert words in named[key] and str(tmp_path) not in named[key]
    assert sum(entry.num_episodes for entry in manifest.entries) == 2
    again = encode(good, tmp_path / "cache", ALL)
    assert again.num_encoded == 0 and again.manifest.to_bytes() == manifest.to_bytes()


def test_above_the_share_the_stage_fails_at_its_end_and_what_was_encoded_is_kept(good, spoilt, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"9 of 11 recordings were skipped \(82%\)"):
        encode(good, tmp_path / "cache", tiniest_config())
    shown = capsys.readouterr().out
    assert all(f"skipped: {key}" in shown for key in spoilt)
    for key in spoilt:
        (good / key).unlink()
    result = encode(good, tmp_path / "cache", tiniest_config())
    assert result.num_encoded == 0 and not result.manifest.skipped


def test_inspect_and_estimate_list_the_same_bad_units(good, spoilt, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = dataclasses.replace(load_config(SUITE_SETTINGS, ["dataset=vpt", "encoder=tiny"]))
    (group,), _ = scan_units(config, [str(good)], good)
    unusable = []
    assert estimate_group(group, group.units, unusable)["unusable"] == len(unusable)
    listed = {recording.key: recording.reason for recording in unusable}
    inspect([str(good), "dataset=vpt"])
    shown = capsys.readouterr().out
    for key, words in spoilt.items():
        if key != "zeros.tar":  # the estimate reads headers of videos alone, and it has none
            assert words in listed[key]
        assert any(key in line and words in line for line in shown.splitlines())


def test_one_page_under_three_names_is_three_losses(good, tmp_path):
    for name in ("a.tar", "b.tar", "c.tar"):
        (good / name).write_bytes(PAGE)
    assert reasons(encode(good, tmp_path / "cache", ALL).manifest).keys() == {"a.tar", "b.tar", "c.tar"}


def test_a_unit_without_permission_is_named_and_the_others_land(good, tmp_path, monkeypatch):
    real = digests.file_digest

    def refuse(path):
        if path.name == "good0.tar":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(digests, "file_digest", refuse)
    result = encode(good, tmp_path / "cache", ALL)
    assert reasons(result.manifest) == {"good0.tar": "good0.tar cannot be read: Permission denied"}
    monkeypatch.undo()
    assert encode(good, tmp_path / "cache", ALL).num_encoded == 1, "tried again"


def test_a_unit_whose_reading_breaks_off_has_no_store_and_the_others_land(good, tmp_path, monkeypatch):
    write_tar(
        good / "x.tar",
        [
            (f"{key}.{suffix}", content)
            for key in "ab"
            for suffix, content in zip(("mp4", "jsonl"), make_vpt_pair(9, 7), strict=True)
        ],
    )
    real = VptSource.iter_episodes

    def failing(self, unit):
        for number, recording in enumerate(real(self, unit)):
            if number == 1:
                raise OSError(errno.EIO, "the disk is gone", str(unit.path))
            yield recording

    monkeypatch.setattr(VptSource, "iter_episodes", failing)
    root = CacheRoot(tmp_path / "cache")
    manifest = run_stage_one(good, root, ALL)
    assert reasons(manifest) == {"x.tar": "x.tar cannot be read: the disk is gone"}
    assert len(list(root.path.glob("tokens/*/*.zarr"))) == len(manifest.entries) == 2
    assert not list(root.path.rglob(".tmp-*"))
    monkeypatch.undo()
    again = encode(good, root.path, ALL)
    assert again.num_encoded == 1 and not again.manifest.skipped


def test_the_stage_calls_a_skipped_recording_by_its_present_name_and_the_manifest_stays(tmp_path, capsys):
    old, new = tmp_path / "data/old", tmp_path / "data/new"
    old.mkdir(parents=True)
    video, fields = make_vpt_pair(12, 0, size=(32, 32))[0], {"fps": 20, "actions": [[0.5, 1.0]] * 12}
    (old / "good.mp4").write_bytes(video)
    (old / "good.json").write_text(json.dumps({**fields, "states": [[0.0, 1.0]] * 12}))
    (old / "bad.json").write_text("{}")
    (old / "bad.mp4").write_bytes(video)
    overrides = ["dataset=mp4_json", "encoder=tiny", "encode.device=cpu", "encode.action_space=vector_sum2x2"]
    config = load_config(SUITE_SETTINGS, [*overrides, "encode.max_skipped_share=0.5"])
    first = encode(tmp_path / "data", tmp_path / "cache", config)
    assert "skipped: old/bad: " in capsys.readouterr().out
    old.rename(new)
    again = encode(tmp_path / "data", tmp_path / "cache", config)
    assert "skipped: new/bad: " in capsys.readouterr().out
    assert again.manifest.to_bytes() == first.manifest.to_bytes() and again.num_encoded == 0


def test_names_that_are_no_utf8_lose_nothing(good, tmp_path):
    pair = make_vpt_pair(9, 5, size=(32, 32))
    with tarfile.open(good / os.fsdecode(b"st\xfcck.tar"), "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for suffix, content in zip(("mp4", "jsonl"), pair, strict=True):
            header = tarfile.TarInfo(f"caf\xe9.{suffix}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    result = encode(good, tmp_path / "cache", tiniest_config())
    assert read_episodes(result, tmp_path / "cache").keys() == {"episode-0", "episode-1", r"caf\xe9"}


def test_different_recordings_under_one_key_are_refused_and_both_stay_encoded(good, tmp_path):
    write_vpt_tar(good / "z.tar", {"episode-0": make_vpt_pair(9, 7, size=(32, 32)), "a": make_vpt_pair(9, 8)})
    with pytest.raises(
        ValueError, match=r"keys that name different .*: 1 \(episode-0 in (good0|z)\.tar and episode-0 in"
    ) as error:
        encode(good, tmp_path / "cache")
    assert "good1" not in str(error.value)
    write_vpt_tar(good / "z.tar", {"session2/episode-0": make_vpt_pair(9, 7, size=(32, 32)), "a": make_vpt_pair(9, 8)})
    assert encode(good, tmp_path / "cache").num_encoded == 1


def test_recordings_with_the_same_content_are_named_whatever_their_keys_and_units(good, tmp_path):
    pairs = [make_vpt_pair(9, seed, size=(32, 32)) for seed in (5, 6)]
    other_rows = pairs[0][0], make_vpt_pair(9, 6, size=(32, 32))[1]
    write_vpt_tar(good / "y.tar", {"a": pairs[0], "b": pairs[1], "copy": pairs[0], "other rows": other_rows})
    write_vpt_tar(good / "z.tar", {"a": pairs[0], "again": pairs[1]})
    result = encode(good, tmp_path / "cache", tiniest_config())
    (note,) = result.notes
    assert note.startswith("recordings that repeat another one: 3 (")
    groups = [set(group.split(" = ")) for group in note[:-1].partition("(")[2].split("; ")]
    assert {"a in y.tar", "copy in y.tar", "a in z.tar"} in groups and {"b in y.tar", "again in z.tar"} in groups
    assert note in describe_result(result, CacheRoot(tmp_path / "cache"))
