"""Claims of media/video.py, probe.py and images.py.

Frames are the ones requested, in order, as a player shows them, the same bit for bit from every decoder that takes the video, at every
stride and division into calls, also of a recording inside a longer video. What decord gets wrong is refused under its name.
Whatever is cut off, damaged or missing is a DecodeError that says so, at opening where the container shows it, counted the
same at every stride; damage outside of the recording does not matter. Pictures and stereo videos are opened as any video.
"""

import importlib.util
import io
import re
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from jepa_cache.media import probe
from jepa_cache.media.images import FrameSequence, SideBySide
from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.video import open_video
from tests.makers import make_video
from tests.sources.test_contract import MAX_GROWTH_BYTES, held
from tests.videos import (
    add_cover,
    damage_packet,
    flag_packet,
    hide_start,
    join_streams,
    make_pixels,
    record_decoded,
    turn_video,
)

NUM_FRAMES = 90
HAS_DECORD = importlib.util.find_spec("decord") is not None
DECODERS = ["pyav", *(["decord"] if HAS_DECORD else [])]
needs_decord = pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")


def read(video, decoder="auto", indices=None, *, first_frame=0, num_frames=None):
    with open_video(video, decoder, first_frame=first_frame, num_frames=num_frames) as opened:
        stop = opened.info.num_frames - first_frame if num_frames is None else num_frames
        return opened.read(np.arange(stop) if indices is None else np.asarray(indices))


@pytest.fixture(scope="module")
def video():
    return make_video(NUM_FRAMES, options={"g": "30", "bf": "2"})


CODECS = {
    "h264": ("libx264", {"g": "30", "bf": "3"}),
    "hevc": ("libx265", {"x265-params": "open-gop=0:log-level=error"}),
    "hevc-open": ("libx265", {"g": "25", "x265-params": "open-gop=1:log-level=error"}),
    "mpeg4": ("mpeg4", {"g": "12", "bf": "0"}),
    "mpeg4-open": ("mpeg4", {"g": "12", "bf": "2"}),
    "av1": ("libsvtav1", {"g": "20"}),
}


@pytest.fixture(scope="module", params=CODECS)
def coded(request):
    """(name, container, all frames decoded one after the other by PyAV)."""
    codec, options = CODECS[request.param]
    content = make_video(NUM_FRAMES, 3, codec=codec, options=options)
    return request.param, content, read(content, "pyav")


@pytest.mark.parametrize(
    ("first_frame", "stride"), [(0, 4), (0, 9), (0, 40), (1, 3), (63, 3), (64, 3), (70, 5), (89, 1)]
)
def test_every_stride_from_every_first_frame_gives_the_frames_requested(coded, first_frame, stride):
    _, content, everything = coded
    wanted = everything[first_frame::stride]
    indices = stride * np.arange(len(wanted))
    with open_video(content, first_frame=first_frame) as opened:
        frames = np.concatenate([opened.read(indices[:2]), opened.read(indices[2:])])
    np.testing.assert_array_equal(frames, wanted)


@needs_decord
def test_decord_gives_the_same_frames_or_refuses_open_groups_of_pictures(coded):
    name, content, everything = coded
    assert probe_video(content).open_gop == name.endswith("-open")
    if name.endswith("-open"):
        with pytest.raises(DecodeError, match=r"open groups .* use the decoder 'auto' or 'pyav'"):
            open_video(content, "decord")
    elif name != "av1":
        indices = np.array([0, 3, 4, 11, 40, 89])
        np.testing.assert_array_equal(read(content, "decord", indices), everything[indices])


def test_a_path_reads_like_its_bytes_and_probe_tells_count_rate_size_and_codec(video, tmp_path):
    (tmp_path / "a.mp4").write_bytes(video)
    np.testing.assert_array_equal(read(tmp_path / "a.mp4"), read(video))
    assert probe_video(video)[:5] == (NUM_FRAMES, 20.0, 48, 64, "h264")
    for container in ("matroska", "mpegts"):  # whose headers hold no count
        assert probe_video(make_video(23, codec="mpeg4", container=container)).num_frames == 23


def test_every_frame_is_decoded_once_and_none_before_the_last_key_frame(video, monkeypatch):
    decoded = record_decoded(monkeypatch)
    with open_video(video) as opened:
        for index in range(0, 50, 10):
            opened.read(np.array([index]))
    assert decoded == list(range(41))
    decoded.clear()
    read(video, indices=[0], first_frame=80)
    assert decoded == list(range(60, 81))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
def test_a_video_is_read_by_the_thread_that_reads_it_and_by_no_other(video):
    threads = Path("/proc/self/task")
    with open_video(video) as opened:
        before = set(threads.iterdir())
        opened.read(np.arange(8))
        assert set(threads.iterdir()) <= before


def test_a_container_of_many_recordings_is_read_through_once_and_again_when_it_changes(video, tmp_path, monkeypatch):
    reads, real = [], probe._read_packets
    monkeypatch.setattr(probe, "_read_packets", lambda video: reads.append(video) or real(video))
    path = tmp_path / "many.mp4"
    path.write_bytes(video)
    for first_frame in (0, 70, 80):
        probe_video(path)
        assert read(path, indices=[0, 1], first_frame=first_frame).shape == (2, 48, 64, 3)
    assert len(reads) == 1
    path.write_bytes(make_video(20))
    assert probe_video(path).num_frames == 20 and len(reads) == 2


def test_a_first_frame_or_frame_that_does_not_exist_is_refused(video):
    for first_frame in (-1, NUM_FRAMES):
        with pytest.raises(ValueError, match="video of 90 frames"):
            open_video(video, first_frame=first_frame)
    with open_video(video, first_frame=80) as opened, pytest.raises(ValueError, match="has 90 frames"):
        opened.read(np.array([10]))


# A pixel at (x, y) is shown at (a x + c y, b x + d y); beside it what that makes of rows and columns [F, h, w, 3].
TURNS = {
    "upright": ((1, 0, 0, 1), lambda frames: frames),
    "clockwise": ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
    "upside down": ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, (1, 2))),
    "anticlockwise": ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
    "mirrored and anticlockwise": ((0, 1, 1, 0), lambda frames: frames.transpose(0, 2, 1, 3)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_as_they_are_shown_wherever_the_recording_begins(video, turn):
    matrix, shown = TURNS[turn]
    turned, wanted = turn_video(video, matrix), shown(read(video))
    info = probe_video(turned)
    assert (info.height, info.width) == wanted.shape[1:3]
    for first_frame in (0, 70):
        assert np.array_equal(read(turned, first_frame=first_frame), wanted[first_frame:])


def test_frames_that_an_edit_list_hides_are_not_counted():
    video = make_video(30, options={"g": "10", "bf": "0"})
    assert np.array_equal(read(hide_start(video, 5)), read(video)[5:])


def test_a_cover_picture_is_not_taken_for_the_video_nor_a_second_stream_however_large(video):
    other = make_video(NUM_FRAMES, 5, size=(96, 128))
    assert np.array_equal(read(add_cover(video)), read(video))
    for first, second in ((video, other), (other, video)):
        assert np.array_equal(read(join_streams(first, second)), read(first))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda video: turn_video(video, TURNS["clockwise"][0]), "turned or mirrored"),
        (lambda video: join_streams(video, video), "several video streams"),
        (lambda video: make_video(30, container="mpegts"), "transport stream"),
        *((lambda video, pixels=pixels: make_pixels(pixels), pixels) for pixels in ("yuv420p10le", "yuv422p10le")),
    ],
)
@needs_decord
def test_decord_refuses_by_name_what_it_gets_wrong(video, make, words):
    with pytest.raises(DecodeError, match=rf"{words}.*'auto' or 'pyav'"):
        open_video(make(video), "decord")


@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "gray"])
@needs_decord
def test_pixels_are_the_same_from_both_decoders(pixels):
    video = make_pixels(pixels)
    assert np.array_equal(read(video, "decord"), read(video, "pyav"))


def test_a_video_turned_by_other_than_quarter_turns_is_refused(video):
    with pytest.raises(DecodeError, match="quarter turns"):
        probe_video(turn_video(video, (0.7, 0.7, -0.7, 0.7)))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mpeg2video", "mjpeg"])
def test_damaged_frames_are_counted_the_same_at_every_stride(codec, decoder):
    options = {"strict": "unofficial"} if codec == "mjpeg" else {"g": "12", "bf": "0"}
    video = make_video(40, codec=codec, size=(96, 128), options=options)
    damaged = damage_packet(damage_packet(video, 17), 25)
    reasons = set()
    for stride in (1, 4):
        with pytest.raises(DecodeError) as caught:
            read(damaged, decoder, np.arange(0, 40, stride))
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert re.search(
        r"\((corrupt frames: 2|missing frames: 2; undecodable packets: 2); the first at frame 17 of 40\)", reasons.pop()
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_damage_outside_the_recording_does_not_matter(decoder):
    video = make_video(NUM_FRAMES, size=(96, 128), options={"g": "20", "bf": "0"})
    damaged = damage_packet(damage_packet(video, 5), 85)
    inside = {"first_frame": 45, "num_frames": 30}
    assert np.array_equal(read(damaged, decoder, **inside), read(video, decoder, **inside))
    for first_frame in (4, 15, 70):  # Frame 15 is predicted from frame 5.
        with pytest.raises(DecodeError, match=r"corrupt frames: 1; the first at frame [0-9]+ of 20"):
            read(damaged, decoder, first_frame=first_frame, num_frames=20)


def test_packets_that_the_container_calls_corrupt_and_frames_dropped_in_silence_are_counted():
    video = make_video(30, container="mpegts", options={"g": "10", "bf": "0"})
    assert len(read(video)) == 30
    with pytest.raises(DecodeError, match="corrupt packets: 1"):
        read(flag_packet(video, 12))
    late = make_video(30, container="mpegts", options={"g": "10", "bf": "2"})
    for number in (13, 14):  # packets of later frames that the decoder takes before it gives frame 10
        assert len(read(flag_packet(late, number), num_frames=11)) == 11
    options = {"x265-params": "log-level=none:bframes=0:keyint=10:open-gop=0"}
    damaged = damage_packet(make_video(40, codec="libx265", size=(96, 128), options=options), 15)
    with pytest.raises(DecodeError, match="missing frames: 5; the first at frame 15 of 40"):
        read(damaged, indices=np.arange(0, 40, 4))
    hole = bytearray(make_video(50, size=(96, 128)))
    start = hole.find(b"mdat") + 1500
    hole[start : start + 4000] = bytes(4000)
    with pytest.raises(DecodeError, match=r"undecodable packets: [0-9]+; the first at frame [0-9]+ of 50"):
        read(bytes(hole))


def _move_header_to_front(video, path):
    with av.open(io.BytesIO(video)) as source, av.open(path, "w", options={"movflags": "faststart"}) as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return path.read_bytes()


def test_a_file_that_is_cut_off_or_no_video_is_a_decode_error_at_opening(video, tmp_path):
    whole = _move_header_to_front(video, tmp_path / "a.mp4")
    start = whole.find(b"mdat")
    assert whole.find(b"moov") < start and probe_video(whole).num_frames == NUM_FRAMES
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(DecodeError, match="cut off"):
            open_video(whole[: start + int((len(whole) - start) * share)])
    for broken in (video[: video.find(b"moov")], b"", b"this is text", b"\0" * 5000):
        for decoder in (*DECODERS, "auto"):
            with pytest.raises(DecodeError, match="cannot be opened"):
                open_video(broken, decoder)


def test_a_file_that_cannot_be_read_is_an_oserror_for_it_may_be_read_in_the_next_run(video, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(video)

    def fail(*_, **__):
        raise av.error.OSError(5, "Input/output error")

    with open_video(path) as opened:
        monkeypatch.setattr(opened, "_decode", fail)
        with pytest.raises(OSError, match="Input/output"):
            opened.read(np.arange(3))
    monkeypatch.setattr(av, "open", fail)
    for use in (open_video, lambda path: probe._read_packets(path)):
        with pytest.raises(FileNotFoundError):
            use(tmp_path / "absent.mp4")
    path.write_bytes(video[:-1])
    with pytest.raises(OSError, match="Input/output"):
        probe_video(path)


# Pictures


def to_picture(frame, fmt):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, fmt)
    return buffer.getvalue()


def make_frames(num_frames, size=(16, 24)):
    return np.random.default_rng(0).integers(0, 256, (num_frames, *size, 3), np.uint8)


def make_bomb(width, height):
    """A PNG of a few bytes that states this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (chunk, body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_pictures_come_back_bit_for_bit_whatever_the_decoder_for_containers_is():
    frames = make_frames(9)
    video = FrameSequence(tuple(to_picture(frame, "PNG") for frame in frames), 15.0)
    assert probe_video(video)[:5] == (9, 15.0, 16, 24, "png")
    for decoder in ("auto", "pyav"):
        with open_video(video, decoder) as opened:
            assert opened.decoder == "pillow"
            for indices in ([0, 3], [4, 8]):
                np.testing.assert_array_equal(opened.read(np.array(indices)), frames[indices])
    grey = frames[0, :, :, 0]
    assert np.array_equal(
        read(FrameSequence((to_picture(grey, "PNG"),), 1.0))[0], np.repeat(grey[..., None], 3, axis=2)
    )


GOOD = to_picture(make_frames(1, (64, 64))[0], "JPEG")


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([GOOD, make_bomb(9_000, 9_000)], "states 9000x9000 pixels"),
        ([make_bomb(60_000, 60_000)], "decompression bomb"),
        ([GOOD, to_picture(make_frames(1, (24, 16))[0], "PNG")], "is 16x24; the video began with 64x64"),
        ([GOOD[:-30]], "cannot be decoded"),
        ([to_picture(make_frames(1)[0], "GIF")], "no JPEG or PNG"),
        ([], "no usable frames"),
    ],
)
def test_what_is_no_picture_of_the_videos_size_is_refused_by_its_header(pictures, words):
    with pytest.raises(DecodeError, match=words):
        read(FrameSequence(tuple(pictures), 1.0))


@pytest.mark.parametrize("decoder", ["auto", *DECODERS])
def test_a_stereo_video_is_its_left_half(decoder, tmp_path):
    data = make_video(6, size=(32, 96))
    (tmp_path / "a.mp4").write_bytes(data)
    expected = read(data, decoder, [0, 2, 5])[:, :, :48]
    for video in (SideBySide(data), SideBySide(tmp_path / "a.mp4")):
        assert probe_video(video)[:4] == (6, 20.0, 32, 48) and video.size_bytes == len(data)
        np.testing.assert_array_equal(read(video, decoder, [0, 2, 5]), expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hundred_opened_videos_leave_nothing_behind(decoder, tmp_path, video):
    (tmp_path / "shared.mp4").write_bytes(video)
    marks = []
    for number in range(1, 151):
        given, first_frame = (video, 0) if number % 2 else (tmp_path / "shared.mp4", 70)
        with open_video(given, decoder, first_frame=first_frame, num_frames=2) as opened:
            opened.read(np.arange(2))
        if number in (50, 150):
            marks.append(held(tmp_path))
    assert marks[1][0] - marks[0][0] < MAX_GROWTH_BYTES and len(marks[1][1]) <= len(marks[0][1])
