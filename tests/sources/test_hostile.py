"""Claims: nothing in a data set makes a reader leave its folder, follow links, run code, wait, or take memory without bound.

Each attack is tried; it must end as a skipped recording or an error with a reason, and other recordings must go on. Attacks on tar
shards stand in tests/media/test_tar.py, those on HDF5 and TFDS in test_droid_raw.py and test_droid_rlds.py.
"""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_cache.episode import Episode, Skipped
from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.video import open_video
from jepa_cache.sources import build_source
from tests.makers import make_video
from tests.sources.lerobot_makers import CAMERA, make_rows, read_list, write_info, write_list, write_v2, write_v3

OPTIONS = {"lerobot": {"camera": CAMERA, "actions": ["action"], "states": ["observation.state"]}, "mp4_json": {}}
MIB = 1 << 20


def read_all(name, folder):
    source = build_source(name, OPTIONS[name])
    return [item for unit in source.list_units(["."], folder) for item in source.iter_episodes(unit)]


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


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_that_is_called_mp4_leads_nowhere(tmp_path, kind, monkeypatch):
    (tmp_path / "secret.mp4").write_bytes(make_video(6))
    (tmp_path / "a.mp4").write_bytes(PLAYLISTS[kind])
    for given in (tmp_path / "a.mp4", PLAYLISTS[kind]):
        for decoder in ("auto", "decord"):
            with pytest.raises(DecodeError, match="the video cannot be opened"):
                open_video(given, decoder)
    if kind != "disguised":  # Other builds of FFmpeg open more forms than the one at hand.
        monkeypatch.setattr("av.open", lambda *_, **__: pytest.fail("PyAV was called"))
        with pytest.raises(DecodeError, match=r"which is no mp4, mov, mkv, webm, avi or ts file"):
            probe_video(PLAYLISTS[kind])


def test_ffmpeg_may_open_only_plain_files_of_four_forms(tmp_path, monkeypatch):
    import av

    for name in ("a.mp4", "concat:b.mp4"):
        (tmp_path / name).write_bytes(make_video(6))
    monkeypatch.chdir(tmp_path)
    opened, real = [], av.open
    monkeypatch.setattr("av.open", lambda file, **options: opened.append((file, options)) or real(file, **options))
    for name in ("a.mp4", "concat:b.mp4"):
        with open_video(Path(name), "pyav") as video:
            assert video.info.num_frames == 6
    options = {"format_whitelist": "mov,matroska,avi,mpegts", "protocol_whitelist": "file"}
    assert {file for file, _ in opened} == {str(tmp_path / "a.mp4"), str(tmp_path / "concat:b.mp4")}
    assert all(given == {"options": options} for _, given in opened)


# JSON and Parquet


def _info(**changes):
    return lambda folder: write_info(folder / "arm", "v2.1", **changes)


def _replace(path, content):
    return lambda folder: (folder / path).write_bytes(content)


def _list_index(index):
    return _replace("arm/meta/episodes.jsonl", json.dumps({"episode_index": index, "length": 6}).encode())


def _packed_index(index):
    def write(folder):
        write_v3(folder / "arm", [{0: 6}])
        listed = read_list(folder / "arm")
        listed[0]["data/file_index"] = index
        write_list(folder / "arm", listed)

    return write


def _actions(column):
    path = "arm/data/chunk-000/episode_000000.parquet"
    return lambda folder: pq.write_table(pa.table({**make_rows(0, len(column)), "action": column}), folder / path)


def _wide(num_rows, width):
    """Equal numbers, of which any count takes next to nothing on the disk."""
    return _actions(pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(num_rows * width)), width))


OUTSIDE = ["/etc/{episode_index}", "../{episode_index}", "data/{episode_index}/../../../x", "..\\{episode_index}", ""]
FIELDS = ["{episode_index.__class__}", "{episode_index!r}", "{episode_index:0999999999d}", "{0}", "{home}"]
FIELDS += ["{episode_index:{episode_chunk}}", "{video_key:03d}", "{episode_index"]
NO_JSON = {"no JSON": b"[" * 200_000, "no JSON:": b"\xff\xfe{", "must hold a JSON object": b"[1]"}
NO_NUMBERS = {
    "lists of one length": [[1.0, 2.0]] * 5 + [[1.0]],
    "empty cells": [[1.0, 2.0]] * 5 + [None],
    "empty cells ": [[1.0, None]] * 6,
    "must hold numbers": [["a", "b"]] * 6,
    "must hold numbers;": [[[1.0]]] * 6,
    "must hold numbers; it": [b"\x80\x04pickle"] * 6,
}
ATTACKS = [
    *(("lerobot", _info(video_path=template), "must lead into the data set") for template in (*OUTSIDE, *FIELDS)),
    *(("lerobot", _info(fps=value), "fps") for value in (0, "10", 1e999, 10**400)),
    *(("lerobot", _info(**{key: 0}), key) for key in ("features", "data_path", "chunks_size")),
    *(("lerobot", _list_index(index), "without a usable index") for index in ("../../x", -1, 1.5, True, None, 2**80)),
    *(("lerobot", _packed_index(index), "an index that is none") for index in (-1, 2**40)),
    *(("lerobot", _replace("arm/meta/info.json", content), words) for words, content in NO_JSON.items()),
    ("lerobot", _replace("arm/meta/info.json", b'{"a": "' + b"x" * (17 * MIB) + b'"}'), "longer than 16777216 bytes"),
    ("lerobot", _replace("arm/meta/episodes.jsonl", b"[" * (48 * MIB)), "longer than 1048576 bytes"),
    *(("lerobot", _actions(pa.array(cells)), words.strip()) for words, cells in NO_NUMBERS.items()),
    ("lerobot", _wide(400, 3000), "1200000 numbers in one row group"),
    ("lerobot", _actions(pa.array([[1.0, 2.0]] * 900)), "more than 800 rows"),
    ("mp4_json", _replace("a.json", b"[" + b"[]," * (16 * MIB)), "longer than 1048576 bytes"),
    ("mp4_json", _replace("a.json", b'{"fps":' + b"[" * 200_000), "no JSON"),
    ("mp4_json", _replace("a.json", b'{"states":[[0]],"actions":[[0]],"fps":1' + b"0" * 400 + b"}"), "a valid number"),
    ("mp4_json", lambda folder: os.mkfifo(folder / "a.json"), "is no plain file"),
]


@pytest.mark.parametrize(("name", "attack", "words"), ATTACKS)
def test_an_attack_is_a_reason_within_bounds_and_others_go_on(tmp_path, monkeypatch, name, attack, words):
    monkeypatch.setattr("jepa_cache.sources.mp4_json.MAX_JSON_BYTES", MIB)
    monkeypatch.setattr("jepa_cache.sources.parsers.untrusted.MAX_VALUES", 1_000_000)
    monkeypatch.setattr("jepa_cache.sources.lerobot.MAX_EPISODE_ROWS", 800)
    if name == "lerobot":
        write_v2(tmp_path / "arm", {0: 6, 1: 6})
    else:
        (tmp_path / "a.mp4").write_bytes(b"no video")
    attack(tmp_path)
    files = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    try:
        items = read_all(name, tmp_path)
    except ValueError as error:  # of the whole data set
        reasons = [str(error)]
    else:
        reasons = [item.reason for item in items if isinstance(item, Skipped)]
        assert name == "mp4_json" or isinstance(items[-1], Episode)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(reasons) == 1 and words in reasons[0]
    assert peak < 36 * MIB and sorted(tmp_path.rglob("*")) == files, f"{peak / MIB:.0f} MiB"


def test_a_parquet_file_damaged_anywhere_is_skipped_or_reads_as_numbers(tmp_path):
    write_v2(tmp_path / "arm", {0: 6, 1: 6})
    path = tmp_path / "arm/data/chunk-000/episode_000000.parquet"
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        items = read_all("lerobot", tmp_path)
        assert len(items) == 2 and isinstance(items[1], Episode)
