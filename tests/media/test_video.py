"""Claims of media/video.py.

Frames come in order, the same from both decoders and from any division into calls. Whatever is cut off, damaged or missing is a
DecodeError that says so, at opening where the container shows it, and never a shorter or repeated result.
"""

import importlib.util
import io
from pathlib import Path

import av
import numpy as np
import pytest

from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.video import open_video
from tests.makers import REAL_VPT, make_video
from tests.videos import record_decoded

NUM_FRAMES = 50
HAS_DECORD = importlib.util.find_spec("decord") is not None
DECODERS = [pytest.param("decord", marks=pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")), "pyav"]
needs_real = pytest.mark.skipif(not REAL_VPT.exists(), reason="no real recordings in ../shared/data/vpt")


@pytest.fixture(scope="module")
def video():
    return make_video(NUM_FRAMES)


def _read_all(video, decoder, indices=None):
    with open_video(video, decoder) as opened:
        return opened.read(np.arange(opened.info.num_frames) if indices is None else indices)


def test_probe_tells_count_rate_size_and_codec(video):
    assert probe_video(video)[:5] == (NUM_FRAMES, 20.0, 48, 64, "h264")


@pytest.mark.parametrize("container", ["matroska", "mpegts"])
def test_frames_are_counted_where_the_header_holds_no_count(container):
    assert probe_video(make_video(23, codec="mpeg4", container=container)).num_frames == 23


def test_a_path_reads_like_its_bytes(video, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(video)
    np.testing.assert_array_equal(_read_all(path, "auto"), _read_all(video, "auto"))


@pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")
@pytest.mark.parametrize(
    ("codec", "options"),
    [("libx264", {"g": "10", "bf": "3"}), ("mpeg4", {"g": "7"}), ("libx265", {"x265-params": "log-level=0"})],
)
def test_both_decoders_give_the_same_frames(codec, options):
    video = make_video(30, codec=codec, options=options, size=(64, 96))
    indices = np.array([0, 3, 4, 11, 17, 29])
    np.testing.assert_array_equal(_read_all(video, "decord", indices), _read_all(video, "pyav", indices))


@pytest.mark.parametrize("decoder", DECODERS)
def test_frames_are_those_of_their_index(video, decoder):
    frames = _read_all(video, decoder)
    bar_widths = (frames[:, 4] > 200).all(axis=-1).sum(axis=-1)
    assert np.abs(bar_widths - np.arange(1, NUM_FRAMES + 1)).max() <= 6, "the counting bar shows other frames"
    np.testing.assert_array_equal(_read_all(video, decoder, np.arange(3, NUM_FRAMES, 4)), frames[3::4])


@pytest.mark.parametrize("decoder", DECODERS)
def test_several_calls_equal_one(video, decoder):
    indices = np.arange(1, NUM_FRAMES, 3)
    with open_video(video, decoder) as opened:
        parts = [opened.read(indices[start : start + 5]) for start in range(0, len(indices), 5)]
    np.testing.assert_array_equal(np.concatenate(parts), _read_all(video, decoder, indices))


def test_pyav_decodes_every_frame_once_however_many_calls(video, monkeypatch):
    decoded = record_decoded(monkeypatch)
    with open_video(video, "pyav") as opened:
        for index in range(0, NUM_FRAMES, 10):
            opened.read(np.array([index]))
    assert decoded == list(range(41))


@pytest.mark.parametrize("indices", [[4, 3], [4, 4], [-1], [NUM_FRAMES]])
@pytest.mark.parametrize("decoder", DECODERS)
def test_indices_out_of_order_or_range_are_refused(video, decoder, indices):
    with open_video(video, decoder) as opened, pytest.raises(ValueError, match="frame"):
        opened.read(np.array(indices))


@pytest.mark.parametrize("decoder", DECODERS)
def test_going_back_is_refused(video, decoder):
    with open_video(video, decoder) as opened:
        opened.read(np.array([10]))
        with pytest.raises(ValueError, match="ascending"):
            opened.read(np.array([9]))


def test_reading_no_frame_gives_no_frame(video):
    with open_video(video) as opened:
        assert opened.read(np.array([], np.int64)).shape == (0, 48, 64, 3)


def test_a_closed_video_says_so(video):
    opened = open_video(video)
    opened.close()
    with pytest.raises(ValueError, match="closed"):
        opened.read(np.array([0]))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_file_cut_off_behind_its_header_is_named_at_opening(share, tmp_path):
    whole = _move_header_to_front(make_video(NUM_FRAMES), tmp_path / "a.mp4")
    assert whole.find(b"moov") < whole.find(b"mdat")
    assert probe_video(whole).num_frames == NUM_FRAMES
    with pytest.raises(DecodeError, match="cut off"):
        open_video(whole[: whole.find(b"mdat") + int((len(whole) - whole.find(b"mdat")) * share)])


def _move_header_to_front(video: bytes, path: Path) -> bytes:
    with (
        av.open(io.BytesIO(video)) as source,
        av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize("decoder", [*DECODERS, "auto"])
@pytest.mark.parametrize("broken", [b"", b"this is text", b"\0" * 5000])
def test_what_is_no_video_is_a_decode_error(decoder, broken):
    with pytest.raises(DecodeError, match="cannot be opened"):
        open_video(broken, decoder)


def test_a_video_cut_off_before_its_header_is_a_decode_error(video):
    assert video.find(b"moov") > video.find(b"mdat")
    with pytest.raises(DecodeError, match="cannot be opened"):
        open_video(video[: video.find(b"moov")])


@pytest.mark.parametrize("use", [probe_video, open_video])
def test_a_file_that_cannot_be_read_is_an_oserror_for_it_may_be_read_in_the_next_run(video, tmp_path, monkeypatch, use):
    with pytest.raises(FileNotFoundError):
        use(tmp_path / "absent.mp4")
    path = tmp_path / "a.mp4"
    path.write_bytes(video)

    def fail(*_, **__):
        raise av.error.OSError(5, "Input/output error")

    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(OSError, match="Input/output"):
        use(path)


def test_a_disk_that_fails_while_frames_are_read_is_an_oserror(video, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(video)
    with open_video(path) as opened:

        def fail(self, index):
            raise av.error.OSError(5, "Input/output error")

        monkeypatch.setattr(type(opened._handle), "read", fail)
        with pytest.raises(OSError, match="Input/output"):
            opened.read(np.arange(3))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hole_of_zeros_is_a_decode_error(decoder):
    video = bytearray(make_video(NUM_FRAMES, size=(96, 128)))
    start = video.find(b"mdat") + 1500
    video[start : start + 4000] = bytes(4000)
    assert start + 4000 < video.find(b"moov")
    with pytest.raises(DecodeError, match=r"undecodable packets: [0-9]+; the first at frame [0-9]+ of 50"):
        _read_all(bytes(video), decoder)


def test_auto_reads_what_decord_cannot():
    av1 = make_video(8, codec="libsvtav1", size=(64, 64), options={"preset": "12"})
    with open_video(av1, "auto") as opened:
        assert opened.info.codec in ("av1", "libdav1d")
        assert opened.decoder == "pyav"
        assert opened.read(np.arange(8)).shape == (8, 64, 64, 3)


def test_an_unknown_decoder_is_refused(video):
    with pytest.raises(ValueError, match="auto, decord, pyav"):
        open_video(video, "ffmpeg")


@needs_real
@pytest.mark.skipif(not HAS_DECORD, reason="decord is not installed")
def test_real_clip_has_the_same_frames_from_both_decoders():
    path = next(REAL_VPT.glob("*.mp4"))
    indices = np.arange(0, 120, 4)
    assert probe_video(path)[:5] == (445, 20.0, 360, 640, "mpeg4")
    np.testing.assert_array_equal(_read_all(path, "decord", indices), _read_all(path, "pyav", indices))
