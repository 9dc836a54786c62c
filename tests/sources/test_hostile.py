"""Claims: nothing in a data set makes a reader leave its folder, follow links, run code, or take memory without bound.

Each attack is tried; it must end as a skipped recording or an error with a reason, and other recordings must go on.
"""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_cache.episode import Episode, Skipped
from jepa_cache.media import tar as tar_module
from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.tar import iter_samples
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from jepa_cache.sources.parsers.untrusted import iter_objects, read_object
from jepa_cache.sources.parsers.vpt_controls import read_simple
from tests.makers import make_vpt_pair, to_jsonl, write_vpt_tar
from tests.sources.lerobot_makers import CAMERA, make_rows, read_list, write_info, write_list, write_v2, write_v3

OPTIONS = {"camera": CAMERA, "actions": ["action"], "states": ["observation.state"]}
MIB = 1 << 20


def read_all(name, folder, options):
    source = build_source(name, options)
    return [item for unit in source.list_units(["."], folder) for item in source.iter_episodes(unit)]


def read_lerobot(folder):
    return read_all("lerobot", folder, OPTIONS)


def peak_of(function):
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Videos

PLAYLISTS = {
    "ffconcat": b"ffconcat version 1.0\nfile secret.mp4\n",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1.0,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="dash:profile"><Period/></MPD>',
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "transport": b"\x47ffconcat version 1.0\nfile secret.mp4\n",
    "disguised": b"\x00\x00\x00\x08ftyp#EXTM3U\n#EXTINF:1.0,\nsecret.mp4\n<MPD dash:profile",
    "images": b"secret%d.mp4",
}


@pytest.mark.parametrize("decoder", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_that_is_called_mp4_leads_nowhere(tmp_path, kind, decoder):
    video, _ = make_vpt_pair(6)
    (tmp_path / "secret.mp4").write_bytes(video)
    (tmp_path / "a.mp4").write_bytes(PLAYLISTS[kind])
    for given in (tmp_path / "a.mp4", PLAYLISTS[kind]):
        with pytest.raises(DecodeError, match="the video cannot be opened"):
            open_video(given, decoder)


def test_neither_decoder_is_shown_what_begins_as_no_container(tmp_path, monkeypatch):
    """Other builds of FFmpeg open more forms than the one at hand."""
    monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("PyAV was asked"))
    for content in PLAYLISTS.values():
        if content[4:8] != b"ftyp":
            with pytest.raises(DecodeError, match=r"which is no mp4, mov, mkv, webm, avi or ts file"):
                probe_video(content)


def test_ffmpeg_may_open_only_plain_files_of_four_forms(tmp_path, monkeypatch):
    import av

    (tmp_path / "a.mp4").write_bytes(make_vpt_pair(6)[0])
    (tmp_path / "concat:b.mp4").write_bytes(make_vpt_pair(6)[0])
    monkeypatch.chdir(tmp_path)
    asked, real = [], av.open
    monkeypatch.setattr("av.open", lambda file, **options: asked.append((file, options)) or real(file, **options))
    for name in ("a.mp4", "concat:b.mp4"):
        with open_video(Path(name), "pyav") as video:
            assert video.info.num_frames == 6
    assert {file for file, _ in asked} == {str(tmp_path / "a.mp4"), str(tmp_path / "concat:b.mp4")}
    options = {"format_whitelist": "mov,matroska,avi,mpegts", "protocol_whitelist": "file"}
    assert all(given == {"options": options} for _, given in asked)


# Tar shards


@pytest.mark.parametrize("name", ["../out.mp4", "/etc/out.mp4", "a/../../out.mp4"])
def test_a_tar_member_that_leaves_its_folder_is_not_used(tmp_path, name):
    write_vpt_tar(tmp_path / "in" / "x.tar", {name[:-4]: (b"video", b"lines"), "good": make_vpt_pair(6)})
    items = read_all("vpt", tmp_path / "in", {})
    assert [item.key for item in items if isinstance(item, Episode)] == ["good"]
    assert all("leaves its folder" in item.reason for item in items if isinstance(item, Skipped))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_never_followed(tmp_path, kind):
    secret = tmp_path / "secret.jsonl"
    secret.write_text("secret")
    video, lines = make_vpt_pair(6)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("a.mp4", video), ("b.mp4", video), ("b.jsonl", lines)):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        link = tarfile.TarInfo("a.jsonl")
        link.type, link.linkname = kind, str(secret)
        tar.addfile(link)
    items = {item.key: item for item in read_all("vpt", tmp_path, {})}
    assert "only plain files" in items["a"].reason
    assert isinstance(items["b"], Episode)


def test_a_huge_json_line_in_a_tar_is_refused_before_the_file_is_in_memory(tmp_path):
    video, lines = make_vpt_pair(6)
    huge = b'{"mouse": "' + b"x" * (64 * MIB) + b'"}\n'
    write_vpt_tar(tmp_path / "x.tar", {"bad": (video, lines + huge), "good": (video, lines)})
    del huge
    items, peak = peak_of(lambda: read_all("vpt", tmp_path, {}))
    assert [type(item) for item in items] == [Skipped, Episode]
    assert "line 7" in items[0].reason and "longer than 1048576 bytes" in items[0].reason
    assert peak < 16 * MIB, f"{peak / MIB:.0f} MiB"


def test_lines_at_the_bound_pass_and_the_number_of_a_longer_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_LINE_BYTES", {"jsonl": 10})
    monkeypatch.setattr(tar_module, "READ_BYTES", 7)
    for content, line in ((b"0123456789\n" * 3, None), (b"1\n0123456789a\n2", 2), (b"1\n" * 9 + b"0" * 11, 10)):
        write_vpt_tar(tmp_path / "x.tar", {"a": (b"v", content)})
        (sample,) = iter_samples(tmp_path / "x.tar", ("mp4", "jsonl"))
        assert sample.problem is None if line is None else f"line {line} " in sample.problem
        assert sample.members == ({"mp4": b"v", "jsonl": content} if line is None else {})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": [' + b"[]," * (MIB // 2) + b"[]]}", "line 2 of 2 is longer than 1048576 bytes"),
        (b"[" * 200_000, "line 2 of 2 is no JSON"),
    ],
)
def test_a_huge_or_endlessly_deep_line_is_a_reason_not_a_crash(line, words):
    with pytest.raises(ValueError, match=words):
        read_simple(
            to_jsonl([{"timestamp": 0, "mouse": {"dx": 0, "dy": 0}, "keyboard": []}]).rstrip() + b"\n" + line,
            "delta_deg",
        )


def test_a_member_too_large_for_memory_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_MEMBER_BYTES", 1000)
    write_vpt_tar(tmp_path / "x.tar", {"a": (b"v" * 1001, b"l"), "b": (b"v" * 1000, b"l")})
    first, second = iter_samples(tmp_path / "x.tar", ("mp4", "jsonl"))
    assert "at most 1000 are read" in first.problem and not first.members
    assert second.problem is None


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_header_is_not_read_into_memory(tmp_path, kind):
    write_vpt_tar(tmp_path / "x.tar", {"good": (b"v", b"l")})
    header = tarfile.TarInfo("header")
    header.type, header.size = kind, 64 * MIB
    with (tmp_path / "y.tar").open("wb") as file:
        file.write((tmp_path / "x.tar").read_bytes()[: 4 * 512])
        file.write(header.tobuf() + bytes(64 * MIB))
        file.write(bytes(1024))
    samples, peak = peak_of(lambda: list(iter_samples(tmp_path / "y.tar", ("mp4", "jsonl"))))
    assert samples[0].key == "good" and samples[0].problem is None
    assert "a header of" in samples[-1].problem
    assert peak < 8 * MIB, f"{peak / MIB:.0f} MiB"


# LeRobot


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("/etc/{episode_index}", "leads out of the data set"),
        ("../{episode_index}", "leads out of the data set"),
        ("data/{episode_index}/../../../x", "leads out of the data set"),
        ("..\\{episode_index}", "leads out of the data set"),
        ("", "leads out of the data set"),
        ("{episode_index.__class__}", "allowed are"),
        ("{episode_index!r}", "allowed are"),
        ("{episode_index:0999999999d}", "allowed are"),
        ("{episode_index:{episode_chunk}}", "allowed are"),
        ("{0}", "allowed are"),
        ("{}", "allowed are"),
        ("{home}", "allowed are"),
        ("{video_key:03d}", "format that does not fit"),
        ("{episode_index", "is no template"),
    ],
)
def test_a_path_template_names_files_inside_the_data_set_only(tmp_path, template, words):
    write_v2(tmp_path / "arm", {0: 6}, video_path=template)
    with pytest.raises(ValueError, match=words):
        read_lerobot(tmp_path)


def test_an_index_that_is_none_cannot_enter_a_path(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    for index in ("../../x", -1, 1.5, True, None, 2**80):
        (tmp_path / "arm/meta/episodes.jsonl").write_text(json.dumps({"episode_index": index, "length": 6}))
        with pytest.raises(ValueError, match="without a usable index"):
            read_lerobot(tmp_path)
    write_v3(tmp_path / "packed", [{0: 6}])
    listed = read_list(tmp_path / "packed")
    for index in (-1, 2**40):
        listed[0]["data/file_index"] = index
        write_list(tmp_path / "packed", listed)
        with pytest.raises(ValueError, match="an index that is none"):
            read_lerobot(tmp_path / "packed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 200_000, "no JSON"),
        (b"\xff\xfe{", "no JSON"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": "' + b"x" * (17 * MIB) + b'"}', "more than 16777216 bytes"),
    ],
)
def test_an_info_json_that_is_none_is_refused_within_bounds(tmp_path, content, words):
    write_v2(tmp_path / "arm", {0: 6})
    (tmp_path / "arm/meta/info.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_lerobot(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"fps": 0},
        {"fps": "10"},
        {"fps": 1e999},
        {"fps": 10**400},
        {"features": []},
        {"chunks_size": 0},
        {"data_path": 3},
    ],
)
def test_values_of_info_json_are_checked(tmp_path, change):
    write_v2(tmp_path / "arm", {0: 6})
    write_info(tmp_path / "arm", "v2.1", **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}"):
        read_lerobot(tmp_path)


def test_a_huge_line_in_the_list_of_episodes_is_refused(tmp_path):
    write_v2(tmp_path / "arm", {0: 6})
    with (tmp_path / "arm/meta/episodes.jsonl").open("ab") as file:
        file.write(b'{"x": "' + b"x" * (48 * MIB) + b'"}')

    def read():
        with pytest.raises(ValueError, match="longer than 1048576 bytes"):
            read_lerobot(tmp_path)

    _, peak = peak_of(read)
    assert peak < 16 * MIB, f"{peak / MIB:.0f} MiB"


def test_equal_numbers_that_take_no_room_on_disk_do_not_fill_the_memory(tmp_path, monkeypatch):
    """Encoded runs unpack a thousandfold, so the announced count is bounded, not the file."""
    monkeypatch.setattr("jepa_cache.sources.parsers.untrusted.MAX_GROUP_VALUES", 100_000)
    write_v2(tmp_path / "arm", {0: 6, 1: 6})
    path = tmp_path / "arm/data/chunk-000/episode_000000.parquet"
    width = 3000
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(400 * width)), width)
    pq.write_table(pa.table({"action": column, "observation.state": column, "timestamp": np.arange(400) / 10}), path)
    assert path.stat().st_size < 20_000
    bad, good = read_lerobot(tmp_path)
    assert "numbers in one row group" in bad.reason
    assert isinstance(good, Episode)


def test_an_episode_of_endless_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jepa_cache.sources.lerobot.MAX_EPISODE_BYTES", 4000)
    write_v3(tmp_path / "arm", [{0: 90}, {1: 9}])
    bad, good = read_lerobot(tmp_path)
    assert "more than 4000 bytes of rows" in bad.reason
    assert isinstance(good, Episode)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([[1.0, 2.0]] * 5 + [[1.0]]), "lists of one length"),
        (pa.array([[1.0, 2.0]] * 5 + [None]), "empty cells"),
        (pa.array([[1.0, None]] * 6), "empty cells"),
        (pa.array([[]] * 6, pa.list_(pa.float64())), "lists of one length"),
        (pa.array([["a", "b"]] * 6), "must hold numbers"),
        (pa.array([[[1.0]]] * 6), "must hold numbers"),
        (pa.array([b"\x80\x04pickle"] * 6), "must hold numbers"),
    ],
)
def test_cells_that_are_no_numbers_are_the_reason_of_the_skip(tmp_path, column, words):
    write_v2(tmp_path / "arm", {0: 6, 1: 6})
    pq.write_table(
        pa.table({**make_rows(0, 6), "action": column}), tmp_path / "arm/data/chunk-000/episode_000000.parquet"
    )
    bad, good = read_lerobot(tmp_path)
    assert isinstance(bad, Skipped) and words in bad.reason
    assert isinstance(good, Episode)


def test_a_parquet_file_damaged_anywhere_is_skipped_or_reads_as_numbers(tmp_path):
    write_v2(tmp_path / "arm", {0: 6, 1: 6})
    path = tmp_path / "arm/data/chunk-000/episode_000000.parquet"
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        items = read_lerobot(tmp_path)
        assert len(items) == 2 and isinstance(items[1], Episode)


# Pairs of mp4 and json


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" + b"[]," * (16 * MIB), "more than 1048576 bytes"),
        (b'{"fps":' + b"[" * 200_000, "no JSON"),
        (json.dumps({"fps": 10**400, "states": [[0.0]], "actions": [[0.0]]}).encode(), "fps must be a positive number"),
    ],
)
def test_a_json_file_that_is_none_is_a_reason_within_bounds(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr("jepa_cache.sources.mp4_json.MAX_JSON_BYTES", MIB)
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (item,), peak = peak_of(lambda: read_all("mp4_json", tmp_path, {}))
    assert words in item.reason and peak < 8 * MIB, f"{peak / MIB:.0f} MiB"


@pytest.mark.parametrize("read", [lambda path: read_object(path, MIB), lambda path: list(iter_objects(path))])
def test_a_pipe_in_place_of_a_json_file_is_a_reason_and_never_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="is no plain file"):
        read(tmp_path / "a.json")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (item,) = read_all("mp4_json", tmp_path, {})
    assert isinstance(item, Skipped) and "is no plain file" in item.reason
