"""Claims: a bad recording or unit costs no other; each is named for what it is, and beyond a set share there is no manifest.

The good ones land, also where the share of losses stops the stage. A unit that cannot be read has no store, and is tried
again. Names that are no UTF-8 lose nothing. One key for two recordings is refused, and equal recordings are named.
"""

import errno
import gzip
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest

from jepa_cache.actions import get_action_space
from jepa_cache.cli.estimate import estimate_group
from jepa_cache.cli.inspect import inspect
from jepa_cache.data.dataset import find_differences
from jepa_cache.encoding import decoding
from jepa_cache.encoding.groups import scan_units
from jepa_cache.encoding.run import describe_result
from jepa_cache.sources.vpt import VptSource
from jepa_cache.store import digests
from jepa_cache.store.root import CacheRoot
from tests.encoded import damage_middle, encode, make_tiny_tar, read_episodes, tiniest_config
from tests.makers import make_rows, make_video, make_vpt_pair, to_jsonl, write_tar, write_vpt_tar

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c\nsize 1024\n"
PAGE = b"<!DOCTYPE html>\n<html><title>404</title></html>"
ALL = tiniest_config(max_skipped_share=1.0)
SMALL = {"size": (32, 32)}


def reasons(manifest):
    return {recording["key"]: recording["reason"] for recording in manifest.skipped}


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_every_kind_of_bad_recording_is_named_with_its_reason_and_the_others_rows_stay_right(tmp_path, decoder):
    if decoder == "decord":
        pytest.importorskip("decord")
    pairs = {key: make_vpt_pair(60, seed, **SMALL) for seed, key in enumerate("abc")}
    short_rows, old_rows = make_rows(60, 7), make_rows(60, 8)
    for row in old_rows[20:]:
        del row["hotbar"]
    good = {
        "a": pairs["a"],
        "badline": (pairs["b"][0], to_jsonl(short_rows).replace(b'"dx":', b'"dx:', 1)),
        "c": pairs["c"],
    }
    bad = {
        "broken": (damage_middle(pairs["b"][0]), pairs["b"][1]),
        "novideo": (b"not a video", pairs["b"][1]),
        "old": (pairs["b"][0], to_jsonl(old_rows)),
        "short": make_vpt_pair(9, 5, **SMALL),
    }
    members = [
        (f"{key}.{suffix}", content)
        for key, pair in sorted({**good, **bad}.items())
        for suffix, content in zip(("mp4", "jsonl"), pair, strict=True)
    ]
    write_tar(tmp_path / "in/x.tar", [("alone.mp4", pairs["b"][0]), *members])
    write_vpt_tar(tmp_path / "whole/x.tar", good)
    # Batches of one clip: some of the broken recording's tokens have been written when it breaks.
    encoding = {"mode": "clip", "frames_per_clip": 4, "decoder": decoder, "max_skipped_share": 0.7}
    result = encode(tmp_path / "in", tmp_path / "cache", tiniest_config(batch_size=1, **encoding))
    expected = encode(tmp_path / "whole", tmp_path / "other", tiniest_config(batch_size=1, **encoding))
    words = {
        "alone": "jsonl",
        "broken": "undecodable packets: 30; the first at frame 30 of 60",
        "novideo": "opened",
        "old": "tick 20",
        "short": "clip mode needs 4",
    }
    named = reasons(result.manifest)
    assert named.keys() == words.keys() and all(words[key] in named[key] for key in words)
    assert any("badline" in note and "line 1" in note for note in result.manifest.notes), "its good lines are used"
    if decoder == "pyav":  # decord decodes ahead, and may report the damage before its first frames
        assert result.timing.num_frames > expected.timing.num_frames + 12, "more than the recording without actions"
    # The reason is the same in every run: it holds no time, no place and nothing of the batches.
    again = encode(tmp_path / "in", tmp_path / "cache8", tiniest_config(batch_size=8, **encoding))
    assert again.manifest.skipped == result.manifest.skipped
    assert not re.search(r"\d\d:\d\d:\d\d", str(named)) and str(tmp_path) not in str(named)
    one, two = read_episodes(result, tmp_path / "cache"), read_episodes(expected, tmp_path / "other")
    assert np.isnan(one.pop("old")["actions"]).all() and result.manifest.entries[0].num_episodes == len(good)
    assert one.keys() == two.keys() == good.keys()
    for key, columns in two.items():
        for name in columns.keys() - {"segment"}:
            assert np.array_equal(one[key][name], columns[name], equal_nan=name != "gui"), (key, name)


@pytest.fixture
def good(tmp_path):
    for seed, name in enumerate(("good0", "good1")):
        make_tiny_tar(tmp_path / "in", name, seed)
    return tmp_path / "in"


@pytest.fixture
def spoilt(good):
    """Beside two good tars bad ones of each kind, with the words that name them; equal bytes are losses of their own."""
    contents = {
        "lfs.tar": (LFS, "Git LFS pointer, not the data; fetch it with `git lfs pull`"),
        "page.tar": (PAGE, "HTML page"),
        "page2.tar": (PAGE, "HTML page"),
        "zip.tar": (gzip.compress((good / "good0.tar").read_bytes(), mtime=0), "compressed with gzip"),
        "empty.tar": (b"", "it is empty"),
        "noise.tar": (b"junk" * 1000, "no uncompressed tar"),
        "zeros.tar": (bytes(10240), "holds no recording"),
        "zeros2.tar": (bytes(10240), "holds no recording"),
    }
    for name, (content, _) in contents.items():
        (good / name).write_bytes(content)
    (good / "gone.tar").symlink_to(good / "nowhere")
    (good / "loop.tar").symlink_to("loop.tar")
    os.mkfifo(good / "pipe.tar")
    links = dict.fromkeys(("gone.tar", "loop.tar"), "a link to a file that is not there")
    return {name: words for name, (_, words) in contents.items()} | links | {"pipe.tar": "no plain file"}


def test_bad_units_are_named_for_what_they_are_and_the_good_ones_land_whatever_share_is_allowed(
    good, spoilt, tmp_path, capsys
):
    with pytest.raises(ValueError, match=r"11 of 13 recordings were skipped \(85%\).*max_skipped_share=0\.8"):
        encode(good, tmp_path / "cache", tiniest_config(max_skipped_share=0.8))
    shown = capsys.readouterr().out
    assert all(key in shown for key in spoilt)
    result = encode(good, tmp_path / "cache", ALL)
    named = reasons(result.manifest)
    assert result.num_encoded == 0 and named.keys() == spoilt.keys()
    for key, words in spoilt.items():
        assert words in named[key] and str(tmp_path) not in named[key]
    assert sum(entry.num_episodes for entry in result.manifest.entries) == 2
    for path in good.glob("good*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match="no usable recording: all 11 were skipped"):
        encode(good, tmp_path / "cache", ALL)


def test_inspect_and_estimate_list_the_same_bad_units(good, spoilt, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (group,), _ = scan_units(tiniest_config(), [str(good)], good)
    unusable = []
    assert estimate_group(group, group.units, unusable)["unusable"] == len(unusable)
    listed = {recording.key: recording.reason for recording in (*unusable, *group.unreadable)}
    inspect([str(good), "dataset=vpt"])
    shown = capsys.readouterr().out
    for key, words in spoilt.items():
        if "2" not in key:  # both look at one of equal units
            assert any(key in line and words in line for line in shown.splitlines())
            # The estimate reads headers of videos alone, and this one has none.
            assert key == "zeros.tar" or words in listed[key]


@pytest.mark.parametrize("place", ["hashing", "listing", "opening", "decoding"])
def test_a_unit_that_cannot_be_read_has_no_store_and_is_tried_again_and_the_others_land(
    good, tmp_path, monkeypatch, place
):
    pairs = {key: make_vpt_pair(60, seed, **SMALL) for seed, key in enumerate("uvw", 7)}
    write_vpt_tar(good / "x.tar", pairs)
    owner, name, is_bad = {
        "hashing": (digests, "file_digest", lambda path: path.name == "x.tar"),
        "listing": (VptSource, "iter_episodes", lambda _, unit: unit.name == "x.tar"),
        "opening": (decoding, "open_video", lambda video, *_: video == pairs["v"][0]),
        "decoding": (
            decoding.Decoders,
            "_read_batch",
            lambda _, stream, video, inputs: inputs.max() > 16,
        ),  # of x.tar alone
    }[place]
    real = getattr(owner, name)

    def failing(*given, **options):
        if is_bad(*given):
            raise OSError(errno.EIO, "the disk is gone", "/data/v.mp4")
        return real(*given, **options)

    def failing_after_one(*given):
        recordings = real(*given)
        yield next(recordings)
        if is_bad(*given):
            failing(*given)
        yield from recordings

    monkeypatch.setattr(owner, name, failing_after_one if place == "listing" else failing)
    config = tiniest_config(max_skipped_share=0.5, batch_size=2)
    result = encode(good, tmp_path / "cache", config)
    assert "cannot be read: the disk is gone" in reasons(result.manifest)["x.tar"]
    assert result.num_encoded == len(result.manifest.entries) == 2
    assert len(list((tmp_path / "cache").glob("tokens/*/*"))) == 2
    assert not list((tmp_path / "cache").rglob(".jepa-cache-*"))
    monkeypatch.undo()
    again = encode(good, tmp_path / "cache", config)
    assert again.num_encoded == 1 and not again.manifest.skipped


def test_an_action_space_that_no_recording_allows_stops_before_anything_is_encoded(good, tmp_path):
    root = tmp_path / "cache"
    rows = np.arange(60 * 7).reshape(60, 7).tolist()
    (good / "a.mp4").write_bytes(make_video(60, **SMALL))
    (good / "a.json").write_text(json.dumps({"fps": 20, "actions": rows, "states": rows}))
    for dataset, space, words in (
        ("vpt", "pose7", "fits none of the first 2 .* needs the controls x_m.* set encode.action_space to .*vpt13"),
        ("mp4_json", "vector_last6x7", "has no column for action_6 .* encode.action_space to vector_last7x7 "),
    ):
        with pytest.raises(ValueError, match=words):
            encode(good, root, tiniest_config(dataset, action_space=space))
        assert not list(root.glob("tokens/*/*.zarr"))
    (good / "b.mp4").write_bytes(make_video(60, **SMALL))
    (good / "b.json").write_text(json.dumps({"fps": 20, "actions": [row[:2] for row in rows], "states": rows}))
    for dataset, words in (
        (
            "mp4_json",
            r"recordings differ in their columns: vector_sum[27]x7 in \S+/[ab], vector_sum[27]x7 in \S+/[ab]\. Name",
        ),
        ("vpt", r"'vector_sum', but \S+ has no numbered actions and states; it holds .*choose a space"),
    ):
        with pytest.raises(ValueError, match=words):
            encode(good, root, tiniest_config(dataset, action_space="vector_sum"))
    (good / "a.json").write_text("{}")
    (good / "b.mp4").write_bytes(b"")
    reasons = r"are not known; in/(a: .*states is missing|b: the video cannot be opened)"
    with pytest.raises(ValueError, match=reasons):
        encode(good, root, tiniest_config("mp4_json", action_space="vector_sum"))
    assert not list(root.glob("tokens/*/*.zarr"))
    with pytest.raises(ValueError, match=r"no usable recording: all 2 were skipped .*pose7"):  # as requested
        encode(good, root, tiniest_config(action_space="pose7", max_skipped_share=1.0))
    assert list(root.glob("tokens/*/*.zarr"))


def test_a_vector_space_without_numbers_is_that_of_the_recordings_and_finds_the_same_stores(tmp_path):
    folder, rows = tmp_path / "data", np.arange(12.0)[:, None]
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.mp4").write_bytes(make_video(12, **SMALL))
        fields = {"fps": 20, "actions": (rows * [1, 2, 3]).tolist(), "states": (rows * [1, 2]).tolist()}
        (folder / f"{name}.json").write_text(json.dumps(fields))
    config = tiniest_config("mp4_json", action_space="vector_last")
    first = encode(folder, tmp_path / "cache", config)
    assert first.manifest.action_space == "vector_last3x2" and not find_differences(config, first.manifest)
    named = tiniest_config("mp4_json", action_space="vector_last3x2")
    again = encode(folder, tmp_path / "cache", named)
    assert again.num_encoded == 0 and again.manifest.to_bytes() == first.manifest.to_bytes()
    for other in ("vector_sum", "vector_last2x2", "vector_last3"):
        differing = find_differences(tiniest_config("mp4_json", action_space=other), first.manifest)
        assert differing == [f"encode.action_space is {other!r}, the manifest has 'vector_last3x2'"]
    with pytest.raises(ValueError, match=r"takes its columns from recordings, and here are none; .*vector_last7x14"):
        get_action_space("vector_last")


def test_the_stage_calls_a_skipped_recording_by_its_present_name_and_the_manifest_stays(tmp_path, capsys):
    folder, fields = tmp_path / "data", {"fps": 20, "actions": [[0.5, 1.0]] * 12, "states": [[0.0, 1.0]] * 12}
    (folder / "old").mkdir(parents=True)
    for name, text in (("good", json.dumps(fields)), ("bad", "{}")):
        (folder / f"old/{name}.mp4").write_bytes(make_video(12, **SMALL))
        (folder / f"old/{name}.json").write_text(text)
    config = tiniest_config("mp4_json", action_space="vector_sum2x2", max_skipped_share=0.5)
    first = encode(folder, tmp_path / "cache", config)
    assert "skipped: old/bad: " in capsys.readouterr().out
    (folder / "old").rename(folder / "new")
    again = encode(folder, tmp_path / "cache", config)
    assert "skipped: new/bad: " in capsys.readouterr().out
    assert again.manifest.to_bytes() == first.manifest.to_bytes() and again.num_encoded == 0


def test_names_that_are_no_utf8_lose_nothing(good, tmp_path):
    with tarfile.open(good / os.fsdecode(b"st\xfcck.tar"), "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for suffix, content in zip(("mp4", "jsonl"), make_vpt_pair(9, 5, **SMALL), strict=True):
            header = tarfile.TarInfo(f"caf\xe9.{suffix}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    result = encode(good, tmp_path / "cache", tiniest_config())
    assert read_episodes(result, tmp_path / "cache").keys() == {"episode-0", "episode-1", r"caf\xe9"}


def test_different_recordings_under_one_key_are_refused_and_both_stay_encoded(good, tmp_path):
    pairs = make_vpt_pair(9, 7, **SMALL), make_vpt_pair(9, 8, **SMALL)
    write_vpt_tar(good / "z.tar", dict(zip(("episode-0", "a"), pairs, strict=True)))
    words = r"keys that name different .*: 1 \(episode-0 in (good0|z)\.tar and episode-0 in"
    with pytest.raises(ValueError, match=words) as error:
        encode(good, tmp_path / "cache", tiniest_config())
    assert "good1" not in str(error.value)
    write_vpt_tar(good / "z.tar", dict(zip(("session2/episode-0", "a"), pairs, strict=True)))
    assert encode(good, tmp_path / "cache", tiniest_config()).num_encoded == 1


def test_recordings_with_the_same_content_are_named_whatever_their_keys_and_units(good, tmp_path):
    pairs = [make_vpt_pair(9, seed, **SMALL) for seed in (5, 6)]
    other_rows = pairs[0][0], pairs[1][1]
    write_vpt_tar(good / "y.tar", {"a": pairs[0], "b": pairs[1], "copy": pairs[0], "other rows": other_rows})
    write_vpt_tar(good / "z.tar", {"a": pairs[0], "again": pairs[1]})
    result = encode(good, tmp_path / "cache", tiniest_config())
    told = result.copies
    assert told.startswith("recordings that repeat another one: 3 (")
    groups = [set(group.split(" = ")) for group in told[:-1].partition("(")[2].split("; ")]
    assert {"a in y.tar", "copy in y.tar", "a in z.tar"} in groups and {"b in y.tar", "again in z.tar"} in groups
    assert told in describe_result(result, CacheRoot(tmp_path / "cache"))
