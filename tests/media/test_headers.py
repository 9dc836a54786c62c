"""Claims of media/headers.py: a part of a file reads as that part; videos in a tar are measured where they lie, bad ones told."""

import io
import random

from jepa_cache.media.probe import FilePart, iter_tar_videos, probe_video
from tests.makers import make_video, write_tar


def test_a_part_of_a_file_reads_as_that_part_wherever_one_seeks(tmp_path):
    content = bytes(range(256)) * 40
    path = tmp_path / "file"
    path.write_bytes(content)
    start, size = 1000, 5000
    rng, expected = random.Random(0), io.BytesIO(content[start : start + size])
    with io.BufferedReader(FilePart(path, start, size), 64) as part:
        for _ in range(200):
            whence = rng.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
            position = rng.randint(0, size) - {io.SEEK_SET: 0, io.SEEK_CUR: part.tell(), io.SEEK_END: size}[whence]
            assert part.seek(position, whence) == expected.seek(max(0, position) if whence == 0 else position, whence)
            count = rng.randint(0, 700)
            assert part.read(count) == expected.read(count)


def test_videos_of_a_tar_are_measured_as_they_are_when_read_whole(tmp_path):
    videos = {f"v{number}": make_video(20 + number, number, options={"g": "7"}) for number in range(3)}
    members = [
        (f"{key}.{suffix}", content)
        for key, video in videos.items()
        for suffix, content in (("mp4", video), ("jsonl", b"{}\n"))
    ]
    measured = {video.key: video.info for video in iter_tar_videos(write_tar(tmp_path / "x.tar", members))}
    # Whether later frames show before key frames is not looked at.
    assert measured == {key: probe_video(video)._replace(open_gop=False) for key, video in videos.items()}


def test_what_cannot_be_used_says_why(tmp_path):
    video = make_video(10)
    members = [
        ("cut.mp4", video[: len(video) // 2]),
        ("cut.jsonl", b"{}\n"),
        ("alone.mp4", video),
        ("text.jsonl", b"{}\n"),
    ]
    found = {it.key: it for it in iter_tar_videos(write_tar(tmp_path / "x.tar", members))}
    assert all(it.info is None and it.problem for it in found.values()) and set(found) == {"cut", "alone", "text"}
