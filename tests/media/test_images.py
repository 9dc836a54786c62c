"""Claims of media/images.py: pictures and stereo videos are opened as any video; sizes are checked before pixels are decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jepa_cache.media.images import FrameSequence, SideBySide
from jepa_cache.media.probe import DecodeError, probe_video
from jepa_cache.media.video import open_video
from tests.makers import make_video


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


def test_png_frames_come_back_bit_for_bit_in_any_ascending_choice():
    frames = make_frames(9)
    video = FrameSequence(tuple(to_picture(frame, "PNG") for frame in frames), 15.0)
    assert probe_video(video)[:5] == (9, 15.0, 16, 24, "png")
    with open_video(video) as opened:
        np.testing.assert_array_equal(opened.read(np.array([0, 3])), frames[[0, 3]])
        np.testing.assert_array_equal(opened.read(np.array([4, 8])), frames[[4, 8]])
        with pytest.raises(ValueError, match="ascending"):
            opened.read(np.array([4]))


def test_the_decoder_for_containers_changes_nothing_for_pictures():
    video = FrameSequence((to_picture(make_frames(1)[0], "JPEG"),), 15.0)
    results = []
    for decoder in ("auto", "pyav"):
        with open_video(video, decoder) as opened:
            assert opened.decoder == "pillow"
            results.append(opened.read(np.array([0])))
    np.testing.assert_array_equal(*results)


def test_grey_pictures_become_rgb():
    grey = make_frames(1)[0, :, :, 0]
    with open_video(FrameSequence((to_picture(grey, "PNG"),), 1.0)) as opened:
        np.testing.assert_array_equal(opened.read(np.array([0]))[0], np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(("side", "message"), [(9_000, "states 9000x9000 pixels"), (60_000, "decompression bomb")])
@pytest.mark.parametrize("place", [0, 1])
def test_a_decompression_bomb_is_refused_by_its_header(place, side, message):
    pictures = [to_picture(make_frames(1)[0], "PNG")] * 2
    pictures[place] = make_bomb(side, side)
    with (
        pytest.raises(DecodeError, match=message),
        open_video(FrameSequence(tuple(pictures), 1.0)) as opened,
    ):
        opened.read(np.array([0, 1]))


def test_a_picture_of_another_size_is_refused():
    pictures = (to_picture(make_frames(1)[0], "PNG"), to_picture(make_frames(1, (24, 16))[0], "PNG"))
    with pytest.raises(DecodeError, match="is 16x24"), open_video(FrameSequence(pictures, 1.0)) as opened:
        opened.read(np.array([0, 1]))


@pytest.mark.parametrize("cut", [slice(0, 60), slice(0, -30), slice(5, None)])
def test_a_damaged_picture_is_an_error(cut):
    picture = to_picture(make_frames(1, (64, 64))[0], "JPEG")
    with pytest.raises(DecodeError), open_video(FrameSequence((picture[cut],), 1.0)) as opened:
        opened.read(np.array([0]))


def test_other_formats_are_not_even_tried():
    gif = to_picture(make_frames(1)[0], "GIF")
    with pytest.raises(DecodeError, match="no JPEG or PNG"):
        probe_video(FrameSequence((gif,), 1.0))


@pytest.mark.parametrize(
    "video", [FrameSequence((), 15.0), FrameSequence((b"",), 0.0), FrameSequence((b"",), float("nan"))]
)
def test_no_pictures_or_no_rate_is_no_video(video):
    with pytest.raises(DecodeError, match="no usable frames"):
        probe_video(video)


@pytest.mark.parametrize("decoder", ["auto", "pyav"])
def test_a_stereo_video_is_its_left_half(decoder, tmp_path):
    data = make_video(6, size=(32, 96))
    (tmp_path / "a.mp4").write_bytes(data)
    with open_video(data, decoder) as whole:
        expected = whole.read(np.array([0, 2, 5]))[:, :, :48]
    for video in (SideBySide(data), SideBySide(tmp_path / "a.mp4")):
        assert probe_video(video)[:4] == (6, 20.0, 32, 48)
        with open_video(video, decoder) as left:
            np.testing.assert_array_equal(left.read(np.array([0, 2, 5])), expected)
        assert video.size_bytes == len(data)
